"""Inputs that two executions can be compared on where a user gives none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import SpecError

from ...graphs.export_check import random_batch
from .artifacts import ArtifactExecution
from .execution import Execution
from .onnx_files import OnnxExecution
from .tflite_files import TfliteExecution

__all__ = ["make_inputs"]

ROWS = 2


def make_inputs(executions: Sequence[Execution], seed: int) -> dict[str, np.ndarray]:
    """Of an artifact random tokens or images; else what the files say of their inputs. Raises SpecError where they do
    not say enough."""
    for execution in executions:
        if isinstance(execution, ArtifactExecution):
            return random_batch(execution.artifact.spec, seed)
    inputs: dict[str, np.ndarray] = {}
    for execution in executions:
        if isinstance(execution, OnnxExecution):
            for name, (dtype, shape) in execution.graph.inputs.items():
                inputs.setdefault(name, draw(name, dtype, shape or (), limit_of(execution, name), seed))
        elif isinstance(execution, TfliteExecution):
            for name in execution.graph.inputs:
                tensor = execution.graph.tensors[name]
                inputs.setdefault(name, draw(name, tensor.dtype, tensor.shape, 2, seed))
    return inputs


def draw(name: str, dtype: str, shape: Sequence[int | None], limit: int, seed: int) -> np.ndarray:
    """Floats of a normal distribution, codes of the whole range, whole numbers below `limit`; an axis that the file
    leaves open has a few. Raises SpecError for a dtype that is neither."""
    rng = stream(seed, "bisect", name)
    size = [ROWS if n is None or n < 1 and i == 0 else 16 if n is None or n < 1 else n for i, n in enumerate(shape)]
    kind = np.dtype(dtype) if dtype else np.dtype(np.float32)
    if kind.kind == "f":
        return rng.normal(size=size).astype(kind)
    if kind in (np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.uint16)):
        half = 2 ** (8 * kind.itemsize - 1)
        return (rng.integers(0, 2 * half, size) - (half if kind.kind == "i" else 0)).astype(kind)
    if kind.kind in "iub":
        return np.ones(size, bool) if kind.kind == "b" else rng.integers(0, limit, size).astype(kind)
    raise SpecError(f"input {name} is {dtype}: give --data")


def limit_of(execution: OnnxExecution, name: str) -> int:
    """The rows of the smallest table that whole numbers look up; 2 where they look up none."""
    rows = [
        len(execution.graph.constants[node.inputs[0]])
        for node in execution.graph.consumers.get(name, ())
        if node.op == "Gather" and node.inputs[0] in execution.graph.constants
    ]
    return min(rows, default=2)
