"""The backends by name, and the errors of qtx that a user can mend.

A backend is a module with `Model`, `IntegerModel`, `Trainer`, `choose_device`, `check_machine` and `threads`; the two
have the same signatures, which a test compares. Everything in `qtx` works through it and holds NumPy arrays only.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import cast

from qtx_ref.spec import SpecError, read_processes

from .protocols import Backend

BACKENDS = {"ref": "qtx_ref.backend", "torch": "qtx_torch.backend"}


class MissingExtra(ImportError):
    """An optional package is not installed. The message says which extra brings it."""


class MissingDevice(SpecError):
    """A device that a backend could compute on, and that this machine does not have."""


def need(package: str, extra: str, what: str, without: str = "") -> ModuleType:
    """The imported package. Raises MissingExtra with the command that installs it, and `without`: what works as it
    is."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise MissingExtra(
            f'{what} needs {package}, which is not installed: pip install "qtx[{extra}]", or ".[{extra}]" in a checkout'
            f"{without and '; '}{without}"
        ) from None


def backend(name: str) -> Backend:
    """The backend module `ref` or `torch`. Raises SpecError for another name, MissingExtra without torch."""
    if name not in BACKENDS:
        raise SpecError(f"backend is {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "torch":
        # Threads that spin while they wait are a tenth faster on an idle machine and many times slower on a busy one.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if read_processes()[1] > 1:
            # DDP warns, in each process, that it looks for unused parameters, which it is asked to.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        need("torch", "torch", "--backend torch", "--backend ref runs without it")
    return cast(Backend, importlib.import_module(BACKENDS[name]))
