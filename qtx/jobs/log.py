"""What a run writes down of its course: `log.jsonl` beside its checkpoint, and TensorBoard's events."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ..disk import WriteError
from ..engines.backend import need
from ..engines.protocols import Batch
from ..files.container import FileError
from ..files.lines import Lines, cut_lines, read_lines
from ..runs.spec import LogSpec
from .run import LOG

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BOARD = "tensorboard"  # the folder beside the checkpoint
# what depends on time and place; all else is equal in two equal runs
UNEQUAL = ("tokens_per_second", "images_per_second", "memory", "device_memory", "seconds_left")
Record = Mapping[str, Any]  # JSON values by name


class Log:
    """`with Log(...) as log: log.add({"step": 1, "loss": 4.3})`. After a kill, and going on with `step` steps done, the
    file has each step once, in order."""

    def __init__(self, folder: Path, spec: LogSpec, step: int, *, writes: bool = True) -> None:
        """writes: not where another process does. Raises FileError for a log that is another's, MissingExtra without
        the package of `spec.tensorboard`."""
        self.board = Board(folder / BOARD, step) if spec.tensorboard and writes else None
        self.lines = None
        self.told = False
        if writes:
            check_log(folder / LOG)
            cut_lines(folder / LOG, step or -1)  # before the first step nothing stands there yet
            self.lines = Lines(folder / LOG)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.board:
            self.board.close()

    def add(self, record: Record) -> None:
        """A line, whose numbers that are not finite become null. Where it cannot be written, that is said once."""
        if self.lines is None:
            return
        record = null_strange(record)
        try:
            self.lines.add(record)
            if self.board:
                self.board.add(record)
        except OSError as error:
            if not self.told:
                said = error if isinstance(error, WriteError) else f"{BOARD}: {error.strerror or error}"
                sys.stderr.write(f"\n{said}; training goes on\n")
            self.told = True

    def sync(self) -> None:
        """Puts on the disk all that was added."""
        if self.lines:
            self.lines.sync()
        if self.board:
            self.board.writer.flush()


def check_log(path: Path) -> None:
    """Raises FileError for a file of lines with steps whose first is none that a run writes: going on would cut it."""
    first = next(read_lines(path), None)
    if first is not None and not first.keys() & {"loss", "evaluation"}:
        raise FileError(f"{path} is no log that qtx wrote: move it away, or choose another --out")


class Board:
    """TensorBoard's events, by its own package, which needs no torch. What was written before of steps after `step` is
    taken back, as its readers understand it."""

    def __init__(self, folder: Path, step: int) -> None:
        need("tensorboard", "tensorboard", "log.tensorboard", "leave it out: log.jsonl has the same numbers")
        self.event = import_module("tensorboard.compat.proto.event_pb2")
        self.summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        try:
            self.writer = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter(str(folder))
        except OSError as error:
            raise FileError(f"{folder} cannot be written ({error.strerror or error}): choose another --out") from None
        start = self.event.SessionLog(status=self.event.SessionLog.START)
        self.writer.add_event(self.event.Event(wall_time=time.time(), step=step and step + 1, session_log=start))

    def add(self, record: Record) -> None:
        """The record's numbers as scalars, named after their places in it."""
        values = [self.summary.Value(tag=tag, simple_value=value) for tag, value in list_numbers(record, "")]
        event = self.event.Event(wall_time=time.time(), step=record["step"], summary=self.summary(value=values))
        self.writer.add_event(event)

    def close(self) -> None:
        """Writes what is not written yet."""
        self.writer.close()


class Clock:
    """How fast a run is, and when it will end."""

    def __init__(self, done: int, last: int, processes: int = 1) -> None:
        """done: steps, of `last`. processes: each has about as many of a batch's rows as another."""
        self.began, self.first, self.last, self.processes = time.monotonic(), done, last, processes
        self.spent = 0.0  # seconds of the steps since it was last read
        self.items: Counter[str] = Counter()  # of their batches

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """What is done within belongs to a step on this batch."""
        began = time.monotonic()
        yield
        self.spent += time.monotonic() - began
        if "images" in batch:
            self.items["images_per_second"] += len(batch["images"])
        else:
            self.items["tokens_per_second"] += int(batch["mask"].sum()) if "mask" in batch else batch["tokens"].size

    def read(self, step: int) -> dict[str, float]:
        """Tokens (padding not counted) or images a second of the steps since this was last asked, evaluations and saves
        apart; and the seconds that the rest of the run takes, all told."""
        speed = {name: round(count * self.processes / max(self.spent, 1e-9), 1) for name, count in self.items.items()}
        self.spent, self.items = 0.0, Counter()
        left = (time.monotonic() - self.began) / (step - self.first) * (self.last - step)
        return {**speed, "seconds_left": round(left, 1)}


def null_strange(value: Any) -> Any:
    """A record with None in place of numbers that are not finite, for which JSON has no words."""
    if isinstance(value, Mapping):
        return {name: null_strange(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_numbers(record: Record, before: str) -> list[tuple[str, float]]:
    """The numbers of a record but its step, each with its name: `sites/layer.4.input/inf_norm`."""
    numbers = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            numbers += list_numbers(value, f"{before}{name}/")
        elif name != "step" and isinstance(value, (int, float)):
            numbers.append((f"{before}{name}", float(value)))
    return numbers


def peak_memory() -> int | None:
    """The most bytes that this process has held in memory so far; None where the system does not say."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
