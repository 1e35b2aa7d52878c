"""torch behind the interface that both backends share: a `Model`, a `Trainer` and an `IntegerModel`, and the machine.

Batches and results are NumPy arrays; see `qtx.data` for a batch's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from . import distributed
from .arrays import find_device
from .model import DTYPES, Batch, IntegerModel, Model, check_machine
from .trainer import Trainer, check_step


def choose_device(name: str) -> str:
    """What `auto` stands for: cuda where torch finds a device, else the cpu; any other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def threads() -> int:
    """How many threads an op may use: its sums, and so the last bits, depend on it."""
    return torch.get_num_threads()


def processes() -> tuple[int, int]:
    """This process's number, from 0, and how many train one model."""
    return distributed.processes()


def join(device: str) -> AbstractContextManager[None]:
    """Within it the processes that torchrun started know each other. Raises ConnectionError where one is lost."""
    return distributed.join(find_device(device))


def agree(values: Sequence[float]) -> list[float]:
    """The largest of all processes' values, place by place, in all of them: each has to ask."""
    return distributed.agree(values)


def peak_memory(device: str) -> int | None:
    """Bytes that tensors have taken at most on a CUDA device so far; None on a CPU."""
    place = find_device(device)
    return torch.cuda.max_memory_allocated(place) if place.type == "cuda" else None


__all__ = [
    "DTYPES",
    "Batch",
    "IntegerModel",
    "Model",
    "Trainer",
    "agree",
    "check_machine",
    "check_step",
    "choose_device",
    "join",
    "peak_memory",
    "processes",
    "threads",
]
