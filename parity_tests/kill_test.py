"""Training that is killed: `python -m parity_tests.kill_test --moments 20`.

Real processes of `qtx train` get SIGKILL or SIGTERM at a random moment between their start and the time that the whole
run takes: while they import, read data, train or save. The same command with `--resume` must then leave the tensors of
the run that nothing interrupted, bit for bit, and nothing else in its folder, nor where temporary files go. Half of the
moments are of a run shorter than the interval between its checkpoints (30 s), half of one that saves after each step.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
SMALLEST = ("--model", "vit-tiny", "--batch", "8")
# as qtx does, with a checkpoint after each step
LONG = """
from qtx.signals import handle, leave
with handle(leave):
    from qtx.jobs import training
    training.SAVE_SECONDS = 0
    from qtx.__main__ import main
    main()
"""
KINDS = {"short": ("-m", "qtx"), "long": ("-c", LONG)}
ENDS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}  # -15: before Python itself had begun
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Moment:
    """When which signal came, where it found the run, and what was wrong afterwards; None: nothing."""

    kind: str
    number: signal.Signals
    seconds: float
    place: str
    fault: str | None


class Runs:
    """`qtx train` in folders of its own."""

    def __init__(self, folder: Path, backend: str, steps: int) -> None:
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir()
        self.usual: set[str] = set()  # what the run that nothing interrupts leaves there: torch's own cache
        self.command = ("train", *SMALLEST, "--backend", backend, "--steps", str(steps))
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
        }

    def start(self, kind: str, out: Path, *more: str) -> subprocess.Popen:
        """The command as a process; what it says goes to `out`.log."""
        with open(f"{out}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, *KINDS[kind], *self.command, "--out", str(out), *more],
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def read(self, out: Path) -> Tensors:
        """What the run left."""
        return load_file(out / "model.safetensors")

    def measure(self) -> tuple[float, Tensors]:
        """Seconds and tensors of the run that nothing interrupts. Raises RuntimeError where it fails."""
        out = self.folder / "whole"
        began = time.monotonic()
        if status := self.start("short", out).wait():
            raise RuntimeError(f"status {status}: {Path(f'{out}.log').read_text()}")
        seconds = time.monotonic() - began
        self.usual = {path.name for path in self.temporary.iterdir()}
        return seconds, self.read(out)

    def stop(self, kind: str, number: signal.Signals, seconds: float, whole: Tensors, name: str) -> Moment:
        """One run that gets a signal after so many seconds, and is resumed."""
        out = self.folder / name
        process = self.start(kind, out)
        time.sleep(seconds)
        process.send_signal(number)
        status = process.wait()
        place = self.locate(out)
        log = Path(f"{out}.log").read_text()
        if status not in (0, *ENDS[number]) or "Traceback" in log:
            return Moment(kind, number, seconds, place, f"status {status}: {log}")
        resumed = self.start(kind, out, "--resume").wait()
        return Moment(kind, number, seconds, place, self.find_fault(out, whole, resumed))

    def locate(self, out: Path) -> str:
        """Where a run was stopped, from what it left."""
        if not out.exists():
            return "before its folder"
        if list(out.glob("*.qtx-part")):
            return "in a save"
        return "after a save" if (out / "model.safetensors").exists() else "before a save"

    def find_fault(self, out: Path, whole: Tensors, status: int) -> str | None:
        """What is wrong with a run that was resumed."""
        if status:
            return f"resumed with status {status}: {Path(f'{out}.log').read_text()}"
        tensors = self.read(out)
        if tensors.keys() != whole.keys():
            return f"tensors differ: {sorted(tensors.keys() ^ whole.keys())}"
        if other := [name for name, value in whole.items() if value.tobytes() != tensors[name].tobytes()]:
            return f"bits differ: {other[0]} and {len(other) - 1} more"
        left = {path.name for path in out.iterdir()} - {"model.safetensors"}
        left |= {path.name for path in self.temporary.iterdir()} - self.usual
        return f"left behind: {sorted(left)}" if left else None


def stop_runs(folder: Path, moments: int, *, seed: int = 0, backend: str = "ref", steps: int = 30) -> list[Moment]:
    """`moments` for each of the two signals, in turn of the short run and of the long one."""
    runs, draw = Runs(folder, backend, steps), random.Random(seed)
    seconds, whole = runs.measure()
    kinds, stopped = cycle(KINDS), []
    for number in ENDS:
        for index in range(moments):
            name = f"{number.name}-{index}"
            stopped.append(runs.stop(next(kinds), number, draw.uniform(0, seconds), whole, name))
    return stopped


def main() -> None:
    """Prints a line per moment and the count of those without a fault; exit status 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20, help="of each of the two signals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="ref")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        stopped = stop_runs(Path(name), given.moments, seed=given.seed, backend=given.backend, steps=given.steps)
    for moment in stopped:
        print(
            f"{moment.number.name:8} {moment.kind:6} {moment.seconds:6.2f} s  {moment.place:18} "
            f"{moment.fault or 'equal'}"
        )
    for place, count in Counter(moment.place for moment in stopped).items():
        print(f"{place}: {count}")
    faults = sum(moment.fault is not None for moment in stopped)
    print(
        f"{len(stopped) - faults} of {len(stopped)} end in the bits of the uninterrupted run, with nothing left behind"
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
