"""Affine quantization: `real = scale * (code - zero_point)`.

Arithmetic is float32 whatever the dtype of the tensor: x / scale by IEEE division, rounded half to even, plus the zero
point, clamped to the codes of the `QuantSpec`.

    >>> spec = QuantSpec(bits=8, symmetric=True)
    >>> quantize(np.float32([-1.5, -0.5, 0.5, 1.5, 2.5]), np.float32(1), np.int32(0), spec).tolist()
    [-2, 0, 0, 2, 2]
"""

from __future__ import annotations

import numpy as np

from .spec import Granularity, QuantSpec

TINY = np.float32(2.0**-126)  # the smallest normal float32; no scale is below it


def range_axes(spec: QuantSpec, ndim: int, weight: bool) -> tuple[int, ...]:
    """The axes that one range spans: all (tensor), all but the last (channel of an activation), the last (channel of a
    weight (..., O, I), token)."""
    if spec.granularity is Granularity.TENSOR:
        return tuple(range(ndim))
    if spec.granularity is Granularity.CHANNEL and not weight:
        return tuple(range(ndim - 1))
    return (ndim - 1,)


def min_max(x: np.ndarray, axes: tuple[int, ...], where: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum over `axes`, kept as length 1, of the elements where `where` (broadcast) is true.

    Float32. A range over no element at all is (0, 0).
    """
    keep = True if where is None else np.broadcast_to(where, x.shape)
    low = np.min(x, axis=axes, keepdims=True, where=keep, initial=np.inf)
    high = np.max(x, axis=axes, keepdims=True, where=keep, initial=-np.inf)
    empty = low > high
    return np.where(empty, 0, low).astype(np.float32), np.where(empty, 0, high).astype(np.float32)


def scale_zero(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (int32) of a range, widened to hold 0.

    Symmetric: max(-low, high) / code_max and 0. Asymmetric: (high - low) / code_max and round(-low / scale). An empty
    range (0, 0) has scale 1. Raises ValueError where the range is not finite.
    """
    low = np.minimum(np.asarray(low, np.float32), np.float32(0))
    high = np.maximum(np.asarray(high, np.float32), np.float32(0))
    with np.errstate(over="ignore", invalid="ignore"):
        span = np.maximum(-low, high) if spec.symmetric else high - low
    if not np.isfinite(span).all():
        raise ValueError(f"range {low.min()} to {high.max()} is not finite; look for NaN or infinity upstream")
    scale = np.where(span == 0, np.float32(1), np.maximum(span / np.float32(spec.code_max), TINY))
    if spec.symmetric:
        return scale, np.zeros(scale.shape, np.int32)
    return scale, np.clip(np.rint(-low / scale), spec.code_min, spec.code_max).astype(np.int32)


def rounded(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """round(x / scale) + zero_point in float32, not yet clamped."""
    with np.errstate(over="ignore"):
        return np.rint(np.asarray(x, np.float32) / scale) + np.asarray(zero_point, np.float32)


def quantize(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Codes (int32) of x. Raises ValueError on NaN, which no code stands for; infinities saturate."""
    if np.isnan(x).any():
        raise ValueError("cannot quantize NaN; look upstream for the first tensor that holds one")
    return np.clip(rounded(x, scale, zero_point), spec.code_min, spec.code_max).astype(np.int32)


def dequantize(code: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """scale * (code - zero_point), the difference in integers, the product rounded to float32."""
    return scale * (code - zero_point).astype(np.float32)


def fake_quantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: QuantSpec
) -> tuple[np.ndarray, np.ndarray]:
    """dequantize(quantize(x)) in x's dtype, and where the straight-through gradient passes: codes inside their limits."""
    level = rounded(x, scale, zero_point)
    inside = (level >= spec.code_min) & (level <= spec.code_max)
    code = np.clip(level, spec.code_min, spec.code_max)
    return (scale * (code - np.asarray(zero_point, np.float32))).astype(x.dtype), inside
