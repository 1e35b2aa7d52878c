"""The machine: where a model runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np

from qtx_ref.spec import ModelSpec, StepSpec, to_dict

from .backend import backend
from .protocols import Model


@dataclass(frozen=True)
class Machine:
    """Where a model runs. The device `auto` is replaced by the one that it stands for here, which is what a checkpoint
    keeps."""

    backend: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.device == "auto":
            object.__setattr__(self, "device", backend(self.backend).choose_device(self.device))

    def check(self) -> None:
        """Raises SpecError or MissingExtra where it is not to be had: a backend, a device, a dtype of it."""
        backend(self.backend).check_machine(self.device, self.dtype)

    def check_step(self, step: StepSpec) -> None:
        """Raises SpecError where it has no such training step."""
        backend(self.backend).check_step(step, self.device)

    @property
    def processes(self) -> tuple[int, int]:
        """This process's number, from 0, and how many train one model."""
        return backend(self.backend).processes()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.processes[0] == 0

    def join(self) -> AbstractContextManager[None]:
        """Within it the processes that train one model know each other. Raises ConnectionError where one is lost."""
        return backend(self.backend).join(self.device)

    def agree(self, *values: float) -> list[float]:
        """The largest of all processes' values, place by place, in all of them: each has to ask."""
        return backend(self.backend).agree(values)

    @property
    def model(self) -> Callable[[ModelSpec, Mapping[str, np.ndarray]], Model]:
        """The backend's model of a spec and parameters, on this device in this dtype. Called, it raises SpecError where
        the machine is not to be had."""
        return partial(backend(self.backend).Model, device=self.device, dtype=self.dtype)


def identify_machine(machine: Machine) -> dict[str, object]:
    """What must be equal of the machine for two runs to give the same bits, as JSON values."""
    threads, (_, count) = backend(machine.backend).threads(), machine.processes
    return {"machine": to_dict(machine), "threads": threads, "processes": count}
