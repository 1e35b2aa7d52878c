"""onnxruntime's CPU provider, at each of its optimisation levels."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need
from .onnx_models import (
    build_dequantize,
    build_gemm,
    build_linear,
    build_matmul,
    build_quantize,
    build_scales,
    join_scales,
)
from .paths import Path

PACKAGES = {"onnxruntime": "engines", "onnx": "engines"}
NAME = "onnxruntime"
LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
CODES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
BYTES = ("int8", "uint8")
TAKEN = {
    "scale": ("uint8",),
    "quantize": (*CODES, "e4m3", "e5m2"),
    "dequantize": (*CODES, "int32"),
    "matmul": BYTES,
    "linear": BYTES,
}
PATHS = tuple(Path(f"{NAME}-{level}", NAME, op, NAME, codes) for level in LEVELS for op, codes in TAKEN.items())


def open_session(model: str | bytes, level: str, optimized: str | None = None) -> Any:
    """A session of a file or a model, on one thread; `optimized`: where it writes what it made of it."""
    runtime = need(NAME, "engines", f"engine {NAME}")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # fatal: errors are raised as well
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, LEVELS[level])
    if optimized is not None:
        options.optimized_model_filepath = optimized
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


keep_session = functools.lru_cache(maxsize=64)(open_session)  # of the models of paths, which come again


def run(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a session gives. A linear with a bias is QGemm, one without QLinearMatMul."""
    level = path.name.removeprefix(f"{NAME}-")
    if path.op == "scale":
        return join_scales(values, [call(one, level) for one in build_scales(values)])
    if path.op == "quantize":
        return {"code": call(build_quantize(values), level)[0]}
    if path.op == "dequantize":
        return {"y": call(build_dequantize(values), level)[0]}
    if path.op == "matmul":
        return {"accumulator": call(build_matmul(values), level)[0]}
    build = build_linear if values.get("bias") is None else build_gemm
    return {"y": call(build(values), level)[0]}


def call(built: tuple[bytes, dict[str, np.ndarray]], level: str) -> list[np.ndarray]:
    """The outputs of a model for its feeds."""
    model, feeds = built
    session = keep_session(model, level)
    if "float8" not in session.get_outputs()[0].type:
        return session.run(None, feeds)
    (value,) = session.run_with_ort_values(None, {name: make_value(array) for name, array in feeds.items()})
    shape, size = value.shape(), int(np.prod(value.shape()))  # NumPy has no such type: its bytes are copied
    return [np.frombuffer(ctypes.string_at(value.data_ptr(), size), np.uint8).reshape(shape)]


def make_value(array: np.ndarray) -> Any:
    """An array as onnxruntime holds it."""
    return need(NAME, "engines", f"engine {NAME}").OrtValue.ortvalue_from_numpy(array)
