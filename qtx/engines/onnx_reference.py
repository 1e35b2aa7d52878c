"""The ONNX reference evaluator: what the standard says, in NumPy."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need
from .onnx_models import build_dequantize, build_linear, build_matmul, build_quantize, build_scales, join_scales
from .paths import Path

PACKAGES = {"onnx": "engines"}
NAME = "onnx-reference"
CODES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
BYTES = ("int8", "uint8")
PATHS = (
    Path(NAME, NAME, "scale", NAME, ("uint8",)),
    Path(NAME, NAME, "quantize", NAME, (*CODES, "e4m3", "e5m2", "e2m1")),
    Path(NAME, NAME, "dequantize", NAME, (*CODES, "int32")),
    Path(NAME, NAME, "matmul", NAME, BYTES),
    Path(NAME, NAME, "linear", NAME, BYTES),
)
OPERATIONS = {
    "quantize": (build_quantize, "code"),
    "dequantize": (build_dequantize, "y"),
    "matmul": (build_matmul, "accumulator"),
    "linear": (build_linear, "y"),
}


@functools.lru_cache(maxsize=64)
def make_evaluator(model: bytes) -> Any:
    """An evaluator of a model."""
    return need("onnx.reference", "engines", f"engine {NAME}").ReferenceEvaluator(
        need("onnx", "engines", "").load_from_string(model)
    )


def run(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the evaluator gives."""
    if path.op == "scale":
        return join_scales(values, [evaluate(one) for one in build_scales(values)])
    build, name = OPERATIONS[path.op]
    return {name: as_bits(evaluate(build(values))[0])}


def evaluate(built: tuple[bytes, dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The outputs of a model for its feeds."""
    model, feeds = built
    with np.errstate(all="ignore"):
        return [np.asarray(array) for array in make_evaluator(model).run(None, feeds)]


def as_bits(array: np.ndarray) -> np.ndarray:
    """Float formats of a byte and less, which NumPy lacks, as uint8."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 and array.dtype.kind not in "iu" else array
