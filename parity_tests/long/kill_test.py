"""Training that is killed: `python -m parity_tests.long.kill_test --moments 20`.

Real processes of `qtx train` get SIGKILL or SIGTERM at a random moment between their start and the time that the whole
run takes: while they import, read data, train or save. The same command with `--resume` must then leave what the run
leaves that nothing interrupts: the tensors of its checkpoint and of those that it keeps, bit for bit, the lines of its
log, each step once and in order, and nothing else in its folder, nor where temporary files go. Half of the moments are
of a run shorter than the interval between its checkpoints (30 s), half of one that saves after each step, keeps two
checkpoints and evaluates held-out data, also in integers.

With `--processes 2` a run is two processes, which share its state in the long runs (FSDP2): SIGKILL comes to one,
SIGTERM to all, as torchrun passes it on. Where one is killed the others must end by themselves, in a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from qtx.files.shares import find_folders, find_state, load_shares
from qtx.jobs.log import UNEQUAL
from qtx.jobs.run import LOG

ROOT = Path(__file__).parents[2]
SECONDS = 60  # in which a process must notice that another was killed
SMALLEST = ("--model", "vit-tiny", "--batch", "8")
LONG = {
    "saving.seconds": 0,
    "saving.every": 4,
    "saving.keep": 2,
    "evaluation.every": 5,
    "evaluation.batches": 1,
    "evaluation.integers": "w8a8",
}
KINDS = {"short": (), "long": tuple(word for key, value in LONG.items() for word in ("--set", f"{key}={value}"))}
LOST = "lost another one"  # what a process says that ends because another was killed
ENDS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15)}  # -15: before Python itself had begun
Tensors = dict[str, dict[str, np.ndarray]]  # by checkpoint and name
Lines = list[dict[str, object]]  # of a log, without what depends on time


@dataclass(frozen=True)
class Left:
    """What a run leaves."""

    tensors: Tensors
    log: Lines


@dataclass(frozen=True)
class Moment:
    """When which signal came, where it found the run, and what was wrong afterwards; None: nothing."""

    kind: str
    number: signal.Signals
    seconds: float
    place: str
    fault: str | None


class Processes:
    """The processes of one run; what they say goes to one file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], count: int, log: Path) -> None:
        self.group: list[subprocess.Popen] = []
        self.killed: subprocess.Popen | None = None
        apart = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port()), "WORLD_SIZE": str(count)}
        with open(log, "ab") as file:
            for rank in range(count):
                own = {**environment, **apart, "RANK": str(rank)} if count > 1 else environment
                self.group.append(subprocess.Popen(command, env=own, stdout=file, stderr=file))

    def send(self, number: signal.Signals, draw: random.Random) -> None:
        """SIGKILL comes to one of them, another signal to all."""
        if number == signal.SIGKILL:
            self.killed = draw.choice(self.group)
        for process in self.group if self.killed is None else [self.killed]:
            process.send_signal(number)

    def wait(self, *, joined: bool = True) -> list[int]:
        """Their statuses. Of a killed process's others, each has a minute to end; where they may not have found each
        other (`joined`), they are told to, as by torchrun. Raises TimeoutExpired for one that does not."""
        for process in self.group:
            if self.killed is not None and not joined:
                process.terminate()
        seconds = None if self.killed is None else SECONDS
        try:
            return [process.wait(seconds) for process in self.group]
        finally:
            for process in self.group:
                process.kill()


def find_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Runs:
    """`qtx train` in folders of its own."""

    def __init__(self, folder: Path, backend: str, steps: int, processes: int, seed: int) -> None:
        self.folder, self.temporary, self.processes = folder, folder / "tmp", processes
        self.draw = random.Random(seed)
        self.sharding = ("--set", "step.sharding=full") if processes > 1 else ()
        self.temporary.mkdir()
        self.usual: set[str] = set()  # what the run that nothing interrupts leaves there: torch's own cache
        self.command = ("train", *SMALLEST, "--backend", backend, "--steps", str(steps))
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.temporary),
        }

    def start(self, kind: str, out: Path, *more: str) -> Processes:
        """The command; what it says goes to `out`.log."""
        sharding = self.sharding if kind == "long" else ()
        command = [sys.executable, "-m", "qtx", *self.command, *KINDS[kind], *sharding, "--out", str(out), *more]
        return Processes(command, self.environment, self.processes, Path(f"{out}.log"))

    def measure(self, kind: str) -> tuple[float, Left]:
        """Seconds and what is left of the run that nothing interrupts. Raises RuntimeError where it fails."""
        out = self.folder / f"whole-{kind}"
        began = time.monotonic()
        if any(status := self.start(kind, out).wait()):
            raise RuntimeError(f"status {status}: {Path(f'{out}.log').read_text()}")
        seconds = time.monotonic() - began
        self.usual = {path.name for path in self.temporary.iterdir()}
        return seconds, read_left(out)

    def stop(self, kind: str, number: signal.Signals, seconds: float, whole: Left, name: str) -> Moment:
        """One run that gets a signal after so many seconds, and is resumed."""
        out = self.folder / name
        group = self.start(kind, out)
        time.sleep(seconds)
        joined = out.exists()
        group.send(number, self.draw)
        try:
            status = group.wait(joined=joined)
        except subprocess.TimeoutExpired:
            return Moment(kind, number, seconds, self.locate(out), f"a process went on for {SECONDS} s")
        place = self.locate(out)
        log = Path(f"{out}.log").read_text()
        allowed = {0, *ENDS[number], *(() if joined else ENDS[signal.SIGTERM]), *((1,) if LOST in log else ())}
        if not allowed.issuperset(status) or "Traceback" in log:
            return Moment(kind, number, seconds, place, f"status {status}: {log}")
        resumed = self.start(kind, out, "--resume").wait()
        return Moment(kind, number, seconds, place, self.find_fault(out, whole, max(resumed, key=abs)))

    def locate(self, out: Path) -> str:
        """Where a run was stopped, from what it left."""
        if not out.exists():
            return "before its folder"
        if list(out.glob(".*.qtx-part")):
            return "in a save"
        return "after a save" if find_state(out / "model.safetensors") else "before a save"

    def find_fault(self, out: Path, whole: Left, status: int) -> str | None:
        """What is wrong with a run that was resumed."""
        if status:
            return f"resumed with status {status}: {Path(f'{out}.log').read_text()}"
        if fault := compare(read_left(out), whole):
            return fault
        left = {path.name for path in out.iterdir()} - whole.tensors.keys() - {LOG, "run.toml"}
        left |= {path.name for path in self.temporary.iterdir()} - self.usual
        return f"left behind: {sorted(left)}" if left else None


def read_left(out: Path) -> Left:
    """What a run left in its folder."""
    tensors = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    for folder in find_folders(out / "model.safetensors").values():
        checkpoint = load_shares(folder)
        tensors[folder.name] = {**checkpoint.params, **checkpoint.extra}
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    return Left(tensors, [{key: value for key, value in line.items() if key not in UNEQUAL} for line in lines])


def compare(got: Left, whole: Left) -> str | None:
    """The first difference between what two runs left, in words."""
    if got.tensors.keys() != whole.tensors.keys():
        return f"checkpoints differ: {sorted(got.tensors.keys() ^ whole.tensors.keys())}"
    for file, values in whole.tensors.items():
        tensors = got.tensors[file]
        if tensors.keys() != values.keys():
            return f"tensors of {file} differ: {sorted(tensors.keys() ^ values.keys())}"
        if other := [name for name, value in values.items() if value.tobytes() != tensors[name].tobytes()]:
            return f"bits of {file} differ: {other[0]} and {len(other) - 1} more"
    steps, known = ([line["step"] for line in one.log] for one in (got, whole))
    if steps != known:
        return f"steps of the log are {steps}"
    other = [str(line["step"]) for line, right in zip(got.log, whole.log, strict=True) if line != right]
    return f"lines of the log differ: of step {', '.join(other)}" if other else None


def stop_runs(
    folder: Path, moments: int, *, seed: int = 0, backend: str = "ref", steps: int = 30, processes: int = 1
) -> Iterator[Moment]:
    """`moments` for each of the two signals, in turn of the short run and of the long one."""
    runs, draw = Runs(folder, backend, steps, processes, seed), random.Random(seed)
    whole = {kind: runs.measure(kind) for kind in KINDS}
    kinds = cycle(KINDS)
    for number in ENDS:
        for index in range(moments):
            kind = next(kinds)
            seconds, left = whole[kind]
            yield runs.stop(kind, number, draw.uniform(0, seconds), left, f"{number.name}-{index}")


def main() -> None:
    """Prints a line per moment and the count of those without a fault; exit status 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=20, help="of each of the two signals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", help="default ref, of several processes torch")
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    backend = given.backend or ("ref" if given.processes == 1 else "torch")
    stopped = []
    with tempfile.TemporaryDirectory() as name:
        for moment in stop_runs(
            Path(name),
            given.moments,
            seed=given.seed,
            backend=backend,
            steps=given.steps,
            processes=given.processes,
        ):
            stopped.append(moment)
            print(
                f"{moment.number.name:8} {moment.kind:6} {moment.seconds:6.2f} s  {moment.place:18} "
                f"{moment.fault or 'equal'}",
                flush=True,
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
