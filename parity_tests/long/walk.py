"""The walk of one weight: through which files it goes from `qtx quantize` to its codes, and to their use in `qtx
evaluate`.

    python -m parity_tests.long.walk [--weight layer.0.ffn.hidden.weight] [CHECKPOINT] [--data TEXT]

Runs `qtx quantize CHECKPOINT --out MODEL.qtx` and `qtx evaluate MODEL.qtx` in this process, on the reference, and
watches every call and every return of a function of the project. Words, as they are counted:

- The weight's arrays are the one that `quantize` first has under the weight's name, what a function of the project
  makes of one of them in the same shape (its codes), and whatever is equal to one of these, after the file is read
  again too.
- A function holds the weight while one of its arguments or local variables, or what was just returned to it, is one of
  these arrays, a view of one, a variable of the tape around one, or a mapping that has one under the weight's name. An
  object that keeps such a mapping (a checkpoint, a model) does not count until somebody takes the mapping out.
- The walk is in the file of the function that runs, as long as that function holds the weight. It passes from file to
  file when a function is called or returns. A passage that was made before in the same command, from the same file to
  the same file, is not counted again: loops over batches, layers and ops are walked once.
- A room is a file that the walk enters. A return is a passage into a file that the walk had entered before and left, in
  this command or the one before it.

Functions of other packages are looked through: what NumPy or click calls is called by whoever called NumPy or click.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from qtx.cli import main as command

PACKAGES = ("qtx", "qtx_ref", "qtx_torch")
WEIGHT = "layer.0.ffn.hidden.weight"
# of a checkout; an installed qtx has no such files, and names a checkpoint and a text
KEPT = next((folder for above in Path(__file__).parents if (folder := above / "fixtures" / "v0.1").is_dir()), Path())
CHECKPOINT = KEPT / "study" / "vanilla-seed0" / "model.safetensors"
TEXT = KEPT / "words.txt"


@dataclass
class Walk:
    """The passages of each command, in order: the file that was entered, and whether that is a return."""

    weight: str
    commands: dict[str, list[tuple[str, bool]]] = field(default_factory=dict)

    @property
    def rooms(self) -> list[str]:
        """Files by first entrance."""
        return list(dict.fromkeys(file for passages in self.commands.values() for file, _ in passages))

    @property
    def returns(self) -> int:
        return sum(again for passages in self.commands.values() for _, again in passages)


class Follower:
    """A tracer, see `sys.settrace`, that follows one weight."""

    def __init__(self, weight: str) -> None:
        self.walk = Walk(weight)
        self.arrays: dict[int, np.ndarray] = {}  # kept alive, so that no other array gets their id
        self.given: dict[FrameType, bool] = {}  # running functions, and whether one of the arrays was an argument
        self.place = ""
        self.passages: set[tuple[str, str]] = set()
        self.roots = {Path(find_spec(name).origin).parent: name for name in PACKAGES}
        self.files: dict[str, str] = {}

    def run(self, *arguments: object) -> None:
        """Runs a command of qtx. Raises RuntimeError where it fails."""
        self.place, self.passages = "", set()
        self.walk.commands[str(arguments[0])] = []
        before = sys.gettrace()
        sys.settrace(self.enter)
        try:
            command([str(part) for part in arguments], standalone_mode=False)
        except BaseException as error:
            raise RuntimeError(f"qtx {arguments[0]}: {error}") from error
        finally:
            sys.settrace(before)

    def enter(self, frame: FrameType, event: str, value: Any) -> Any:
        """A function is called."""
        if not self.file(frame):
            return None
        frame.f_trace_lines = False
        self.given[frame] = any(self.own(argument) for argument in frame.f_locals.values())
        self.step(frame, None)
        return self.leave

    def leave(self, frame: FrameType, event: str, value: Any) -> Any:
        """A function returns."""
        if event != "return":
            return self.leave
        if self.given.pop(frame, False) and isinstance(value, np.ndarray) and value.shape in self.shapes():
            self.arrays[id(value)] = value
        caller = frame.f_back
        while caller is not None and not self.file(caller):
            caller = caller.f_back
        if caller is not None:
            self.step(caller, value)
        return self.leave

    def step(self, frame: FrameType, returned: Any) -> None:
        """Control is in `frame`: the walk goes there if that function holds the weight."""
        file = self.file(frame)
        if not self.holds(returned) and not any(self.holds(value) for value in frame.f_locals.values()):
            return
        passage, self.place = (self.place, file), file
        if passage[0] != file and passage not in self.passages:
            self.passages.add(passage)
            self.walk.commands[next(reversed(self.walk.commands))].append((file, file in self.walk.rooms))

    def shapes(self) -> set[tuple[int, ...]]:
        return {array.shape for array in self.arrays.values()}

    def holds(self, value: Any) -> bool:
        """Whether a value is one of the weight's arrays or variables, or a mapping that has one by its name."""
        return self.own(value) or self.lists(value)

    def own(self, value: Any) -> bool:
        """Whether a value is one of the arrays, a view of one or equal to one, or a variable of the tape around one."""
        value = getattr(value, "value", value)  # of a variable of the tape
        if not isinstance(value, np.ndarray):
            return False
        if id(value) in self.arrays or any(np.may_share_memory(value, array) for array in self.arrays.values()):
            return True
        if any(np.array_equal(value, array) for array in self.arrays.values()):
            self.arrays[id(value)] = value
            return True
        return False

    def lists(self, value: Any) -> bool:
        if not isinstance(value, Mapping) or self.walk.weight not in value:
            return False
        entry = value[self.walk.weight]
        if isinstance(entry, np.ndarray) and not self.arrays:
            self.arrays[id(entry)] = entry
        return self.own(entry)

    def file(self, frame: FrameType) -> str:
        """The function's file under its package, or "" where it is none of the project's."""
        name = frame.f_code.co_filename
        if name not in self.files:
            homes = [(root, package) for root, package in self.roots.items() if Path(name).is_relative_to(root)]
            self.files[name] = f"{homes[0][1]}/{Path(name).relative_to(homes[0][0]).as_posix()}" if homes else ""
        return self.files[name]


def follow(weight: str = WEIGHT, checkpoint: Path = CHECKPOINT, data: Path = TEXT) -> Walk:
    """The walk of a weight of a checkpoint. Raises RuntimeError where a command fails, or where nobody holds the
    weight."""
    follower = Follower(weight)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.qtx"
        options = ("--data", data, "--backend", "ref")
        follower.run("quantize", checkpoint, "--out", model, *options)
        follower.run("evaluate", model, "--batches", 1, *options)
    for name, passages in follower.walk.commands.items():
        if not passages:
            raise RuntimeError(f"no function of qtx {name} holds {weight}: name a weight of {checkpoint}")
    return follower.walk


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="through which files a weight goes, from quantize to evaluate")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--data", type=Path, default=TEXT)
    parser.add_argument("--weight", default=WEIGHT)
    given = parser.parse_args(arguments)
    walk = follow(given.weight, given.checkpoint, given.data)
    for name, passages in walk.commands.items():
        print(f"qtx {name}")
        for file, again in passages:
            print(f"  {'back to ' if again else ''}{file}")
    print(f"{walk.weight}: {len(walk.rooms)} rooms, {walk.returns} returns")


if __name__ == "__main__":
    main()
