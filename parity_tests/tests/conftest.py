"""A fixture that runs a function of the pure modules in each backend; Ctrl-C, which tests send to themselves; and how
properties are drawn."""

from __future__ import annotations

import importlib
import signal

import numpy as np
import pytest
import torch
from hypothesis import settings

# a shell's & turns it off
signal.signal(signal.SIGINT, signal.default_int_handler)
# the same examples each time, however long they take
settings.register_profile("qtx", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("qtx")


def tensors(value):
    """An array as a tensor, lists and tuples of them alike; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(tensors, value))
    return torch.from_numpy(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


@pytest.fixture(params=["qtx_ref", "qtx_torch"])
def call(request):
    """call("module.function", ...) in one backend: NumPy in, NumPy out."""

    def run(name, *values):
        module, function = name.rsplit(".", 1)
        given = tensors(values) if request.param == "qtx_torch" else values
        result = getattr(importlib.import_module(f"{request.param}.{module}"), function)(*given)
        return tuple(map(np.asarray, result)) if isinstance(result, tuple) else np.asarray(result)

    return run
