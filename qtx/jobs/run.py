"""What a run of training is: its specs, what it begins with, and the place that it writes to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import shapes
from qtx_ref.spec import ModelSpec, OptimSpec, Spec, SpecError, StepSpec
from qtx_ref.spec.base import refuse
from qtx_ref.spec.optim import trains
from qtx_ref.spec.step import divide_rows

from ..data import DataError
from ..engines.backend import MissingExtra
from ..engines.machine import Machine
from ..files.container import FileError, check_writable
from ..files.locks import hold
from ..files.shares import find_folders
from ..runs.spec import EvaluationSpec, LogSpec, SavingSpec

STEPS, PER_STEP = 350, 16  # of a run, unless said otherwise: steps, and sequences or images in each
LOG = "log.jsonl"  # beside a run's checkpoint
MENDABLE = (SpecError, DataError, FileError, MissingExtra, OSError)  # what a user can mend: a line tells what
HEADER = 2**20  # bytes of a checkpoint beside its numbers: at most about what a tokenizer and the names take


@dataclass(frozen=True)
class TrainSpec(Spec):
    """One run: equal specs and data give equal runs. `stop`, `evaluation`, `saving` and `log` do not count:
    they change no bit."""

    model: ModelSpec
    optim: OptimSpec
    batch: int  # sequences or images per step
    seed: int
    train_quant: str | None = None  # recipe of the forward pass while training; w8a8 stands for train-w8a8
    init: str | None = None  # sha256 of the checkpoint whose parameters it begins with; None: they are drawn
    step: StepSpec = StepSpec()
    stop: int | None = None  # the last step, where it is not that of the schedule
    evaluation: EvaluationSpec = EvaluationSpec()
    saving: SavingSpec = SavingSpec()
    log: LogSpec = LogSpec()

    def check(self) -> None:
        if self.stop is not None and not 1 <= self.stop <= self.optim.steps:
            refuse("stop", self.stop, f"give 1 to {self.optim.steps}, the steps of the schedule")
        divide_rows(self.batch, self.step.accumulate)

    @property
    def last(self) -> int:
        """The step after which the run is done."""
        return self.stop or self.optim.steps


@dataclass(frozen=True)
class Start:
    """What a run begins with where its parameters are not drawn; the run's `TrainSpec.init` says which file it is
    of."""

    params: dict[str, np.ndarray]
    kept: dict[str, Any] = field(default_factory=dict)  # JSON values that every checkpoint of the run keeps


def describe_difference(key: str, was: Any, now: Any) -> str:
    """The first place where two JSON values differ, in words; `key` is their own name."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*now, *was]):
            if was.get(name) != now.get(name):
                return describe_difference(f"{key}.{name}", was.get(name), now.get(name))
    was, now = (text if len(text) <= 200 else f"{text[:200]}..." for text in (repr(was), repr(now)))
    remedy = " (set OMP_NUM_THREADS)" if key == "threads" else ""
    return f"{key} was {was} and is {now}{remedy}; choose another --out or the same settings"


def refuse_existing(path: Path, resume: bool) -> None:
    """Raises FileError for a file that is there and is not to be gone on with."""
    if (path.exists() or find_folders(path)) and not resume:
        raise FileError(f"{path} exists: go on with --resume, or choose another --out")


@contextmanager
def claim(path: Path, resume: bool, machine: Machine) -> Iterator[None]:
    """A run's folder is this process's to write in, of several the first one's. Raises FileError where a run is there
    and not to be gone on with, it cannot be written, or another process holds it."""
    refuse_existing(path, resume)
    refuse_existing(path.with_name(LOG), resume)
    with hold(path.parent) if machine.is_first else nullcontext():
        if machine.is_first:
            check_writable(path)
        machine.agree()  # what a kill left is removed, before another process looks
        yield


def checkpoint_bytes(spec: ModelSpec, optim: OptimSpec, dtype: str) -> int:
    """About how much a run's checkpoint takes: each parameter, and AdamW's two averages of those that are trained.

    Not counted: learned ranges, which are few numbers.
    """
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes(spec).items()}
    count = sum(size * (3 if trains(name, optim) else 1) for name, size in sizes.items())
    return count * (8 if dtype == "float64" else 4) + 8 * optim.steps + HEADER
