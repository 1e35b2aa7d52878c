"""torch's quantized linear layers, by the kernels of each of its engines, and its integer product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need
from .paths import Path, check_granularity

POINTWISE = "torch-onednn-pointwise"
BYTE, SIGNED = ("uint8",), ("int8",)
LINEAR_PATHS = (  # path and profile, by the codes of x
    Path("torch-fbgemm", "torch", "linear", "torch-fbgemm", BYTE),
    Path("torch-fbgemm-channel", "torch", "linear", "torch-fbgemm-channel", BYTE),
    Path("torch-x86", "torch", "linear", "torch-fbgemm", BYTE),
    Path("torch-x86-channel", "torch", "linear", "torch-fbgemm-channel", BYTE),
    Path("torch-onednn", "torch", "linear", "torch-onednn", BYTE),
    Path("torch-onednn-channel", "torch", "linear", "torch-onednn", BYTE),
    Path("torch-onednn-s8", "torch", "linear", "torch-onednn-s8", SIGNED),
    Path("torch-onednn-s8-channel", "torch", "linear", "torch-onednn-s8", SIGNED),
    Path("torch-qnnpack", "torch", "linear", "torch-qnnpack", BYTE),
    Path("torch-qnnpack-channel", "torch", "linear", "torch-qnnpack", BYTE),
    Path(POINTWISE, "torch", "linear", POINTWISE, BYTE),
    Path(f"{POINTWISE}-channel", "torch", "linear", POINTWISE, BYTE),
    Path(f"{POINTWISE}-s8", "torch", "linear", f"{POINTWISE}-s8", SIGNED),
    Path(f"{POINTWISE}-s8-channel", "torch", "linear", f"{POINTWISE}-s8", SIGNED),
    Path("torch-int_mm", "torch", "matmul", "torch-onednn-s8", SIGNED),
)


def scalar(value: Any) -> float:
    return float(np.asarray(value).reshape(()))


def run_linear(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """Codes of x (M, K) times w (K, N), plus a float bias (N,); scales of w are one or (N,)."""
    check_granularity(path, values)
    if str(values["x"].dtype) not in path.codes:
        raise ValueError(f"{path.name} takes x of {path.codes[0]}, not of {values['x'].dtype}")
    torch = need("torch", "torch", "engine torch")
    x, w = torch.from_numpy(values["x"].copy()), torch.from_numpy(values["w"].T.copy())
    x_scale, y_scale = scalar(values["x_scale"]), scalar(values["y_scale"])
    x_zero, y_zero = int(scalar(values["x_zero"])), int(scalar(values["y_zero"]))
    scales = torch.from_numpy(np.asarray(values["w_scale"], np.float32).reshape(-1))
    zeros = torch.from_numpy(np.broadcast_to(np.asarray(values["w_zero"], np.int64).reshape(-1), scales.shape).copy())
    bias = make_bias(values)
    if path.name.startswith(POINTWISE):
        ops = torch.ops.onednn
        packed = ops.qlinear_prepack(w, list(x.shape))
        kind = getattr(torch, str(np.asarray(values["y_zero"]).dtype))
        y = ops.qlinear_pointwise(
            x, x_scale, x_zero, packed, scales, zeros, bias, y_scale, y_zero, kind, "none", [], ""
        )
        return y.numpy()
    torch.backends.quantized.engine = path.name.split("-")[1]
    if len(scales) == 1:
        weight = torch._make_per_tensor_quantized_tensor(w, float(scales[0]), int(zeros[0]))
    else:
        weight = torch._make_per_channel_quantized_tensor(w, scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, bias)
    given = torch._make_per_tensor_quantized_tensor(x, x_scale, x_zero)
    return torch.ops.quantized.linear(given, packed, y_scale, y_zero).int_repr().numpy()


def make_bias(values: Mapping[str, Any]) -> Any:
    """A bias as a float tensor; one of integers is in units of the accumulator."""
    bias = values.get("bias")
    if bias is None:
        return None
    real = np.asarray(bias, np.float32)
    if np.asarray(bias).dtype.kind == "i":
        real = real * (np.float32(values["x_scale"]) * np.asarray(values["w_scale"], np.float32))
    return need("torch", "torch", "engine torch").from_numpy(real.reshape(-1).copy())


def multiply(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """`_int_mm`, which knows no zero points. Raises ValueError for one."""
    if any(np.any(values.get(name, 0)) for name in ("x_zero", "w_zero")):
        raise ValueError("_int_mm knows no zero points")
    torch = need("torch", "torch", "engine torch")
    return torch._int_mm(torch.from_numpy(values["x"].copy()), torch.from_numpy(values["w"].copy())).numpy()
