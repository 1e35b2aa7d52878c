"""The reference behind the interface that both backends share: a `Model`, a `Trainer` and an `IntegerModel`, and the
machine.

Batches and results are NumPy arrays; see `qtx.data` for a batch's keys.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from .model import DTYPES, Arrays, Batch, IntegerModel, Model, check_bound, check_device, check_machine, to_arrays
from .models.initial import init_params, shapes
from .trainer import Trainer, check_step

__all__ = [
    "Arrays",
    "Batch",
    "DTYPES",
    "IntegerModel",
    "Model",
    "Trainer",
    "agree",
    "check_bound",
    "check_device",
    "check_machine",
    "check_step",
    "choose_device",
    "init_params",
    "join",
    "peak_memory",
    "processes",
    "shapes",
    "threads",
    "to_arrays",
]


def choose_device(name: str) -> str:
    """What `auto` stands for, the cpu; any other name as it is."""
    return "cpu" if name == "auto" else name


def threads() -> int:
    """How many threads BLAS may use: its sums, and so the last bits, depend on it."""
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return os.cpu_count() or 1


def processes() -> tuple[int, int]:
    """This process's number and how many train one model: (0, 1)."""
    return 0, 1


def join(device: str) -> AbstractContextManager[None]:
    """Within it processes that train one model know each other: here there is one."""
    return nullcontext()


def agree(values: Sequence[float]) -> list[float]:
    """The largest of all processes' values, place by place: the one's own."""
    return list(values)


def peak_memory(device: str) -> int | None:
    """Bytes that arrays have taken at most on a device with memory of its own: None, for the reference has none.

    Raises SpecError for a device other than cpu.
    """
    check_device(device)
    return None
