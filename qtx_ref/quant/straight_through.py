"""Quantizers on the tape: forward the values of the codes, backward the straight-through estimator (Bengio et al.
2013), and a gradient for scales and zero points that are learned."""

from __future__ import annotations

import numpy as np

from ..spec import QTX, Profile, Quant, QuantSpec
from ..tape import Var, node
from . import affine, quantizer, rounding

__all__ = ["dynamic_quantize", "fake_quantize", "learned_quantize", "learned_scale_zero"]

BEYOND = 1e38  # of a range whose ends lie as far apart float32 has no length


def fake_quantize(x: Var, scale: np.ndarray, zero_point: np.ndarray, spec: Quant, profile: Profile = QTX) -> Var:
    """x of any shape, float32 or float64, as the values of its codes, in its dtype; scale and zero point broadcast.

    The straight-through estimator (Bengio et al. 2013): dx = g where the code was not clamped, else 0.
    """
    y, inside = quantizer.simulate(x.value, scale, zero_point, spec, None, profile)
    return node(y, (x, lambda g: g * inside))


def dynamic_quantize(x: Var, spec: Quant, where: np.ndarray | None, weight: bool, profile: Profile = QTX) -> Var:
    """`fake_quantize` of x, of any shape, by its own range, that of the elements where `where`, boolean, is true (None:
    all). One that is not finite becomes NaN throughout: a run that diverges shows it in its loss. Raises ValueError as
    `quantizer.dynamic_scale` for all else."""
    try:
        scale = quantizer.dynamic_scale(x.value, spec, where, weight, profile)
    except ValueError:
        if np.abs(x.value).max() < BEYOND:  # something else is wrong
            raise
        nan = x.value.dtype.type(np.nan)
        return node(x.value * nan, (x, lambda g: g * nan))
    return fake_quantize(x, *scale, spec, profile)


def learned_scale_zero(scale: np.ndarray, zero_point: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """The scale and zero point that learned ones, float32, stand for, in their shape: |scale|, no smaller than the
    smallest normal float32, and the nearest code, int32."""
    zero = np.clip(np.rint(zero_point), spec.code_min, spec.code_max).astype(np.int32)
    return np.maximum(np.abs(scale), affine.TINY), zero


def learned_quantize(x: Var, scale: Var, zero_point: Var, spec: QuantSpec, profile: Profile = QTX) -> Var:
    """Learned step size (Esser et al. 2020, eq. 3 and 5) with a learned zero point (Bhalgat et al. 2020): x as
    `fake_quantize` has it; scale and zero point, float32, in a shape of as many axes, each of x's length or of 1.

    With v = x / s and z the rounded zero point: dx = g inside; ds = g (round(v) - v) inside and g (limit - z) outside;
    dz = -g s outside and 0 inside. ds and dz are multiplied by 1 / sqrt(elements per range * code_max).
    """
    s, z = learned_scale_zero(scale.value, zero_point.value, spec)
    rule = profile.fake_quantize
    y, inside = affine.simulate(x.value, s, z, spec, rule)
    v = x.value / s
    level = rounding.round_level(x.value, s, z, rule.quantize)
    outside = np.clip(level, spec.code_min, spec.code_max) - z
    slope = np.where(inside, level - z - v, outside)
    factor = 1 / np.sqrt(x.value.size / scale.value.size * spec.code_max)

    def gather(g: np.ndarray) -> np.ndarray:
        axes = tuple(i for i in range(g.ndim) if scale.shape[i] == 1)
        return g.sum(axis=axes, dtype=np.float64, keepdims=True) * factor

    edges = [(x, lambda g: g * inside), (scale, lambda g: gather(g * slope) * np.where(scale.value < 0, -1, 1))]
    if not spec.symmetric:
        edges.append((zero_point, lambda g: gather(np.where(inside, 0, -g * s))))
    return node(y, *edges)
