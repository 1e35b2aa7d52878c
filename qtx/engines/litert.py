"""LiteRT, formerly TensorFlow Lite: its reference kernels, its optimised ones, and those of its XNNPACK delegate."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need
from .litert_models import Tensor, make_model, settle
from .paths import Path, check_granularity

PACKAGES = {"ai_edge_litert": "engines", "flatbuffers": "engines"}
NAME = "litert"
RESOLVERS = {"reference": "BUILTIN_REF", "optimized": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "xnnpack": "BUILTIN"}
BYTES = ("int8", "uint8")
LANES, TAIL = 8, "litert-2.3-optimized-tail"  # of the optimised kernels, which take what XNNPACK does not, int16


def list_kernels(kernels: str) -> tuple[Path, ...]:
    """The paths of one resolver."""
    name, profile, reference = f"{NAME}-{kernels}", f"{NAME}-2.3-{kernels}", f"{NAME}-2.3-reference"
    split = (LANES, TAIL)
    narrow = split if kernels == "optimized" else (1, "")
    wide = (1, "") if kernels == "reference" else split
    channel = f"{profile}-channel" if kernels == "optimized" else profile
    return (
        Path(name, NAME, "quantize", profile, BYTES, *narrow),
        Path(name, NAME, "dequantize", profile, BYTES, *narrow),
        Path(name, NAME, "linear", profile, ("int8",)),
        Path(f"{name}-channel", NAME, "quantize", reference, BYTES),
        Path(f"{name}-channel", NAME, "dequantize", reference, BYTES),
        Path(f"{name}-channel", NAME, "linear", channel, ("int8",)),
        Path(f"{name}-16x8", NAME, "quantize", f"{profile}-16x8", ("int16",), *wide),
        Path(f"{name}-16x8", NAME, "dequantize", f"{profile}-16x8", ("int16",)),
        Path(f"{name}-16x8", NAME, "linear", f"{profile}-16x8", ("int16",)),
    )


PATHS = tuple(path for kernels in RESOLVERS for path in list_kernels(kernels))


@functools.lru_cache(maxsize=16)
def make_interpreter(model: bytes, kernels: str) -> Any:
    """An interpreter of a model, on one thread."""
    module = need("ai_edge_litert.interpreter", "engines", f"engine {NAME}")
    resolver = module.OpResolverType[RESOLVERS[kernels]]
    interpreter = module.Interpreter(model_content=model, num_threads=1, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    return interpreter


def run(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the kernels give. Tensors are rows: an axis of channels is the last."""
    kernels = path.name.split("-")[1]
    check_granularity(path, values)
    if path.op == "linear":
        return {"y": run_linear(kernels, values)}
    name = "x" if path.op == "quantize" else "code"
    given = np.ascontiguousarray(values[name])
    dtype = values.get("dtype", str(given.dtype))
    if path.op == "quantize" and given.dtype != np.float32:
        raise ValueError(f"QUANTIZE takes x of float32 here, not of {given.dtype}")
    scales, zeros = settle(values["scale"], values["zero_point"])
    codes = Tensor("code", dtype, given.shape, scales, zeros, values.get("axis", 0))
    real = Tensor("real", "float32", given.shape)
    if path.op == "quantize":
        return {"code": call(make_model("QUANTIZE", (real,), codes), kernels, given)}
    return {"y": call(make_model("DEQUANTIZE", (codes,), real), kernels, given)}


def run_linear(kernels: str, values: Mapping[str, Any]) -> np.ndarray:
    """Codes of x (M, K) times w (K, N), plus a bias (N,) in integers; scales of w are one or (N,)."""
    x, w, bias = values["x"], np.ascontiguousarray(values["w"].T), values.get("bias")
    dtype = str(x.dtype)
    wide = np.int64 if dtype == "int16" else np.int32
    bias = np.zeros(len(w), wide) if bias is None else np.asarray(bias).astype(wide)
    x_scale, w_scale = np.asarray(values["x_scale"], np.float32), np.asarray(values["w_scale"], np.float32).reshape(-1)
    inputs = (
        Tensor("x", dtype, x.shape, *settle(x_scale, values["x_zero"])),
        Tensor("w", str(w.dtype), w.shape, *settle(w_scale, values["w_zero"]), 0, w.tobytes()),
        Tensor("bias", str(bias.dtype), bias.shape, *settle(x_scale.reshape(()) * w_scale, 0), 0, bias.tobytes()),
    )
    output = Tensor("y", dtype, (len(x), len(w)), *settle(values["y_scale"], values["y_zero"]))
    return call(make_model("FULLY_CONNECTED", inputs, output), kernels, np.ascontiguousarray(x))


def call(model: bytes, kernels: str, given: np.ndarray) -> np.ndarray:
    """The output of a model with one input."""
    interpreter = make_interpreter(model, kernels)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], given)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
