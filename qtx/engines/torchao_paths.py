"""torchao: affine quantization by blocks, which its int8 per row is made of, and casts to MX formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need
from .paths import Path

PACKAGES = {"torchao": "engines", "torch": "torch"}
NAME = "torchao"
CODES = ("int8", "uint8", "int4", "uint4")
MODES = {"floor": "FLOOR", "ceil": "CEIL", "even": "EVEN", "rceil": "RCEIL"}
FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn_x2"}
BLOCK = 32
PATHS = (
    *(Path(NAME, NAME, op, NAME, CODES) for op in ("scale", "quantize", "dequantize")),
    *(Path(f"{NAME}-mx-{mode}", NAME, "mx", NAME, tuple(FORMATS)) for mode in MODES),
)
WIDER = {"int4": "int8", "uint4": "uint8"}


def run(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What torchao gives, on one thread."""
    torch = need("torch", "torch", "engine torchao")
    torch.set_num_threads(1)
    return cast_mx(path, values) if path.op == "mx" else run_affine(path, values)


def run_affine(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scales of ranges, codes, real numbers. `axis`: of which each index has its own scale, as rows have at 0."""
    torch = need("torch", "torch", "engine torchao")
    ops = need("torchao.quantization.quant_primitives", "engines", "engine torchao")
    dtype = values["dtype"]
    bits = int(dtype.lstrip("uint"))
    low, high = (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    low, high = values.get("code_min", low), values.get("code_max", high)
    kind = getattr(torch, WIDER.get(dtype, dtype))
    if path.op == "scale":
        ends = [torch.from_numpy(np.asarray(values[end], np.float32).reshape(-1)) for end in ("low", "high")]
        mapping = getattr(ops.MappingType, "SYMMETRIC" if values.get("symmetric") else "ASYMMETRIC")
        scale, zero = ops.choose_qparams_affine_with_min_max(
            *ends, mapping, (), kind, low, high, scale_dtype=torch.float32, zero_point_dtype=torch.int32
        )
        shape = np.shape(values["low"])
        return {"scale": scale.numpy().reshape(shape), "zero_point": zero.numpy().reshape(shape)}
    name = "x" if path.op == "quantize" else "code"
    given = torch.from_numpy(np.array(values[name]))
    if "x_dtype" in values and name == "x":
        given = given.to(getattr(torch, values["x_dtype"]))
    block = list(given.shape)
    if "axis" in values:
        block[values["axis"]] = 1
    scale = torch.from_numpy(np.asarray(values["scale"]).reshape(-1).copy())
    if values.get("x_dtype") == "bfloat16":
        scale = scale.to(torch.bfloat16)
    zero = torch.from_numpy(np.asarray(values["zero_point"]).reshape(-1).astype(np.int32))
    if path.op == "quantize":
        return {"code": ops.quantize_affine(given, block, scale, zero, kind, low, high).numpy()}
    return {"y": ops.dequantize_affine(given, block, scale, zero, kind, low, high).numpy()}


def cast_mx(path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scales (..., D / 32), as E8M0 codes, and codes (..., D) of x (..., D)."""
    torch = need("torch", "torch", "engine torchao")
    mx = need("torchao.prototype.mx_formats.mx_tensor", "engines", "engine torchao")
    x = torch.from_numpy(np.array(values["x"])).to(getattr(torch, values.get("x_dtype", "float32")))
    mode = mx.ScaleCalculationMode[MODES[path.name.rpartition("-")[2]]]
    scale, code = mx.to_mx(x, getattr(torch, FORMATS[values["format"]]), BLOCK, mode)
    code = code.view(torch.uint8).numpy()
    if values["format"] == "e2m1":  # two in a byte, the first in its low half
        code = np.stack([code & 15, code >> 4], -1).reshape(x.shape)
    return {"scale": scale.view(torch.uint8).numpy(), "code": code.reshape(x.shape)}
