"""When a run's checkpoints are written, how often that is tried, and which are kept."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..disk import WriteError, link_whole
from ..engines.machine import Machine
from ..engines.protocols import Trainer
from ..files.checkpoint import Checkpoint, save_checkpoint
from ..files.shares import (
    begin_folder,
    find_folders,
    finish_folder,
    load_shares,
    name_folder,
    name_unfinished,
    remove_folders,
    seal_shard,
)
from ..runs.spec import SavingSpec

LAST_SECONDS = 60  # for so long the last checkpoint is tried where the disk is full
RETRY_SECONDS = 2


class Saving:
    """The checkpoint of a run at `path`, and beside it the numbered ones of `SavingSpec`."""

    def __init__(self, path: Path, spec: SavingSpec) -> None:
        self.path, self.spec = path, spec
        self.saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step although nothing ends."""
        return self.is_numbered(step) or time.monotonic() - self.saved > self.spec.seconds

    def is_numbered(self, step: int) -> bool:
        """Whether it is the turn of this step by `every`."""
        return self.spec.every is not None and step % self.spec.every == 0

    def save(self, checkpoint: Checkpoint, step: int, *, last: bool) -> None:
        """Saves the run as it stands after a step. Where that cannot be written, training goes on without; the `last`
        one is tried for a minute, and then raises WriteError."""
        until = time.monotonic() + LAST_SECONDS
        warned = False
        while True:
            try:
                self.write(checkpoint, step)
            except WriteError as error:
                if last and self.is_over(until):
                    raise
                if not warned:
                    then = f"trying for {LAST_SECONDS} s" if last else f"training goes on, step {step} is not saved"
                    sys.stderr.write(f"\n{error}; {then}\n")
                    warned = True
            else:
                break
            if not last:
                break
            time.sleep(RETRY_SECONDS)
        self.saved = time.monotonic()

    def is_over(self, until: float) -> bool:
        """Whether it is that late."""
        return time.monotonic() >= until

    def write(self, checkpoint: Checkpoint, step: int) -> None:
        """Writes the state, and a numbered checkpoint where one is due, which is the same file by two names.

        The numbered one comes first: after a kill between the two, it is written again when its step is reached.
        Raises WriteError.
        """
        if not self.spec.keep or not self.is_numbered(step) or checkpoint.meta["done"]:
            save_checkpoint(self.path, checkpoint)
            remove_folders(self.path, keep=self.list_kept(step))  # of a run whose processes shared its state
            return
        numbered = self.name(step)
        save_checkpoint(numbered, checkpoint)
        if not link_whole(self.path, numbered):
            save_checkpoint(self.path, checkpoint)
        self.remove_oldest(step)

    def name(self, step: int) -> Path:
        """The numbered checkpoint of a step."""
        return self.path.with_name(f"{self.path.stem}-{step:06}{self.path.suffix}")

    def list_numbered(self) -> dict[int, Path]:
        """The numbered checkpoints that are there, by step."""
        pattern = re.compile(rf"{re.escape(self.path.stem)}-([0-9]{{6,}}){re.escape(self.path.suffix)}")
        return {int(match[1]): path for path in self.path.parent.iterdir() if (match := pattern.fullmatch(path.name))}

    def list_kept(self, step: int) -> list[int]:
        """The last steps up to this one, as many as are kept, whose state is there, as a file or as shares."""
        shares = filter(self.is_numbered, find_folders(self.path))
        known = sorted(number for number in {*self.list_numbered(), *shares} if number <= step)
        return known[-self.spec.keep :] if self.spec.keep else []

    def remove_oldest(self, step: int) -> None:
        """Removes the numbered checkpoints up to this step but those that are kept."""
        kept = self.list_kept(step)
        for number, path in self.list_numbered().items():
            if number <= step and number not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()
        remove_folders(self.path, keep=kept)  # of a run whose processes shared its state


class SharedSaving(Saving):
    """The same for a run whose processes share its state: each writes its part of a folder, the first one the rest, and
    at the end of the run the one file that everything opens. All of them call this."""

    def __init__(self, path: Path, spec: SavingSpec, machine: Machine, trainer: Trainer) -> None:
        super().__init__(path, spec)
        self.machine, self.trainer = machine, trainer

    def is_over(self, until: float) -> bool:
        return bool(self.machine.agree(super().is_over(until))[0])

    def write(self, checkpoint: Checkpoint, step: int) -> None:
        """Writes the state; checkpoint: without parameters. Raises WriteError, in all processes where one cannot."""
        if "diverged_at" in checkpoint.meta:
            self.do(lambda: self.finish(checkpoint, step), first=True)
            return
        folder = name_folder(self.path, step)
        if step not in find_folders(self.path):
            try:
                self.write_folder(folder, checkpoint)
            except WriteError:
                if self.machine.is_first:  # nobody writes into it any more, and the next one needs the room
                    shutil.rmtree(name_unfinished(folder), ignore_errors=True)
                raise
        if checkpoint.meta["done"]:
            self.do(lambda: self.finish(replace(load_shares(folder), meta=checkpoint.meta), step), first=True)
        else:
            self.do(lambda: self.clear(step), first=True)

    def write_folder(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Each process writes its part, and the first one the rest."""
        unfinished = name_unfinished(folder)
        self.do(lambda: begin_folder(folder), first=True)
        rest: dict = {}
        self.do(lambda: rest.update(self.trainer.save_shares(str(unfinished))))
        self.do(lambda: seal_shard(folder, self.machine.processes[0]))
        whole = replace(checkpoint, extra=checkpoint.extra | rest)
        self.do(lambda: finish_folder(folder, whole), first=True)

    def do(self, act: Callable[[], None], *, first: bool = False) -> None:
        """Does something in all processes, or in the first one, which the others wait for."""
        fault: OSError | None = None
        try:
            if self.machine.is_first or not first:
                act()
        except OSError as error:
            fault = error
        if self.machine.agree(fault is not None)[0]:
            why = "another process could not" if fault is None else fault.strerror or fault
            raise WriteError(f"{self.path} cannot be written ({why}): make room, or choose another place") from None

    def finish(self, checkpoint: Checkpoint, step: int) -> None:
        """Writes the one file in place of all folders but those that are kept."""
        save_checkpoint(self.path, checkpoint)
        remove_folders(self.path, keep=self.list_kept(step))

    def clear(self, step: int) -> None:
        """Removes what the state of a step takes the place of."""
        remove_folders(self.path, keep={step, *self.list_kept(step)})
        self.path.unlink(missing_ok=True)
