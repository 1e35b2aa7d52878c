"""Affine quantization: `real = scale * (code - zero_point)`.

Arithmetic is float32 whatever the dtype of the tensor: x / scale by IEEE division, rounded half to even, plus the zero
point, clamped to the codes of the `QuantSpec`. Scales are tensors on the tensor's device: CUDA divides by a host number
by multiplying with its reciprocal.

    >>> spec = QuantSpec(bits=8, symmetric=True)
    >>> quantize(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), torch.tensor(1.0), torch.tensor(0), spec).tolist()
    [-2, 0, 0, 2, 2]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtx_ref.spec import Granularity, QuantSpec

TINY = 2.0**-126  # the smallest normal float32; no scale is below it


def range_axes(spec: QuantSpec, ndim: int, weight: bool) -> tuple[int, ...]:
    """The axes that one range spans: all (tensor), all but the last (channel of an activation), the last (channel of a
    weight (..., O, I), token)."""
    if spec.granularity is Granularity.TENSOR:
        return tuple(range(ndim))
    if spec.granularity is Granularity.CHANNEL and not weight:
        return tuple(range(ndim - 1))
    return (ndim - 1,)


def min_max(x: Tensor, axes: tuple[int, ...], where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over `axes`, kept as length 1, of the elements where `where` (broadcast) is true.

    Float32. A range over no element at all is (0, 0).
    """
    if where is None:
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        return low.float(), high.float()
    low = torch.where(where, x, math.inf).amin(axes, keepdim=True)
    high = torch.where(where, x, -math.inf).amax(axes, keepdim=True)
    empty = low > high
    return low.masked_fill(empty, 0).float(), high.masked_fill(empty, 0).float()


def scale_zero(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of a range, widened to hold 0.

    Symmetric: max(-low, high) / code_max and 0. Asymmetric: (high - low) / code_max and round(-low / scale). An empty
    range (0, 0) has scale 1. Raises ValueError where the range is not finite.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    span = torch.maximum(-low, high) if spec.symmetric else high - low
    if not torch.isfinite(span).all():
        raise ValueError(
            f"range {low.min().item()} to {high.max().item()} is not finite; look for NaN or infinity upstream"
        )
    scale = (span / torch.full_like(span, spec.code_max)).clamp(min=TINY).masked_fill(span == 0, 1)
    if spec.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return scale, torch.round(-low / scale).clamp(spec.code_min, spec.code_max).to(torch.int32)


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """round(x / scale) + zero_point in float32, not yet clamped."""
    return (x.float() / scale).round_().add_(zero_point)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Codes (int32) of x. Raises ValueError on NaN, which no code stands for; infinities saturate."""
    if torch.isnan(x).any():
        raise ValueError("cannot quantize NaN; look upstream for the first tensor that holds one")
    return rounded(x, scale, zero_point).clamp_(spec.code_min, spec.code_max).to(torch.int32)


def dequantize(code: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """scale * (code - zero_point), the difference in integers (or exact in float32), the product rounded to float32."""
    return (code - zero_point).float() * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """dequantize(quantize(x)) in x's dtype, and where the straight-through gradient passes: codes inside their limits."""
    level = rounded(x, scale, zero_point)
    inside = (level >= spec.code_min) & (level <= spec.code_max)
    return dequantize(level.clamp_(spec.code_min, spec.code_max), scale, zero_point).to(x.dtype), inside
