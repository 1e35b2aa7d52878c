"""A fixture that runs a function of the pure modules in each backend; and Ctrl-C, which tests send to themselves."""

from __future__ import annotations

import importlib
import signal

import numpy as np
import pytest
import torch

# a shell's & turns it off
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["qtx_ref", "qtx_torch"])
def call(request):
    """call("module.function", ...) in one backend: NumPy in, NumPy out."""

    def run(name, *values):
        module, function = name.rsplit(".", 1)
        tensor = request.param == "qtx_torch"
        given = [
            torch.from_numpy(np.asarray(v)) if tensor and isinstance(v, (np.ndarray, np.generic)) else v for v in values
        ]
        result = getattr(importlib.import_module(f"{request.param}.{module}"), function)(*given)
        return tuple(map(np.asarray, result)) if isinstance(result, tuple) else np.asarray(result)

    return run
