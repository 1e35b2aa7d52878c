"""torch's quantized linear layers, by the kernels of each of its engines, and its integer product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need
from .paths import Path

ENGINES = ("fbgemm", "onednn", "qnnpack", "x86")
POINTWISE = "torch-onednn-pointwise"
LINEAR_PATHS = (
    Path("torch-fbgemm", "torch", "linear", "torch-fbgemm", ("uint8",)),
    Path("torch-onednn", "torch", "linear", "torch-onednn", ("int8", "uint8")),
    Path("torch-qnnpack", "torch", "linear", "torch-qnnpack", ("uint8",)),
    Path("torch-x86", "torch", "linear", "torch-onednn", ("uint8",)),
    Path(POINTWISE, "torch", "linear", "torch-onednn", ("int8", "uint8")),
    Path("torch-int_mm", "torch", "matmul", "torch-onednn", ("int8",)),
)


def scalar(value: Any) -> float:
    return float(np.asarray(value).reshape(()))


def run_linear(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """Codes of x (M, K) times w (K, N), plus a float bias (N,); scales of w are one or (N,)."""
    torch = need("torch", "torch", "engine torch")
    x, w = torch.from_numpy(values["x"].copy()), torch.from_numpy(values["w"].T.copy())
    x_scale, y_scale = scalar(values["x_scale"]), scalar(values["y_scale"])
    x_zero, y_zero = int(scalar(values["x_zero"])), int(scalar(values["y_zero"]))
    scales = torch.from_numpy(np.asarray(values["w_scale"], np.float32).reshape(-1))
    zeros = torch.from_numpy(np.broadcast_to(np.asarray(values["w_zero"], np.int64).reshape(-1), scales.shape).copy())
    bias = values.get("bias")
    bias = None if bias is None else torch.from_numpy(np.asarray(bias, np.float32).copy())
    if path.name == POINTWISE:
        ops = torch.ops.onednn
        packed = ops.qlinear_prepack(w, list(x.shape))
        kind = getattr(torch, str(np.asarray(values["y_zero"]).dtype))
        y = ops.qlinear_pointwise(
            x, x_scale, x_zero, packed, scales, zeros, bias, y_scale, y_zero, kind, "none", [], ""
        )
        return y.numpy()
    torch.backends.quantized.engine = path.name.removeprefix("torch-")
    if len(scales) == 1:
        weight = torch._make_per_tensor_quantized_tensor(w, float(scales[0]), int(zeros[0]))
    else:
        weight = torch._make_per_channel_quantized_tensor(w, scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, bias)
    given = torch._make_per_tensor_quantized_tensor(x, x_scale, x_zero)
    return torch.ops.quantized.linear(given, packed, y_scale, y_zero).int_repr().numpy()


def multiply(path: Path, values: Mapping[str, Any]) -> np.ndarray:
    """`_int_mm`, which knows no zero points. Raises ValueError for one."""
    if any(np.any(values.get(name, 0)) for name in ("x_zero", "w_zero")):
        raise ValueError("_int_mm knows no zero points")
    torch = need("torch", "torch", "engine torch")
    return torch._int_mm(torch.from_numpy(values["x"].copy()), torch.from_numpy(values["w"].copy())).numpy()
