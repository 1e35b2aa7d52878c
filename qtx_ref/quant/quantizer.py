"""A quantizer by its spec: uniform codes (`affine`) or a small float (`formats`).

Arrays: x of any shape and float dtype; scales (float32) and zero points (int32) broadcast against it, as do the ends of
its range (float32).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..spec import (
    QTX,
    FloatQuantSpec,
    Granularity,
    Profile,
    Quant,
    QuantSpec,
    Range,
    Rounding,
    check_axes,
    check_where,
    is_local,
)
from . import affine, formats

__all__ = [
    "SILENT_SCALE",
    "STOCHASTIC",
    "beside_outliers",
    "check_quantizer",
    "dynamic_scale",
    "fake_quantize",
    "quantize",
    "rescale",
    "scale_zero",
    "silence_groups",
    "simulate",
    "static_scale",
    "was_silent",
]

SILENT_SCALE = np.float32(2.0**-8)  # of a tensor that was 0 in all of calibration
STOCHASTIC = replace(QTX.fake_quantize, quantize=replace(QTX.quantize, rounding=Rounding.STOCHASTIC))


def scale_zero(low: np.ndarray, high: np.ndarray, spec: Quant, profile: Profile = QTX) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a range. Raises ValueError as both modules."""
    if isinstance(spec, FloatQuantSpec):
        return formats.scale_zero(low, high, spec)
    return affine.scale_zero(low, high, spec, profile.scale)


def static_scale(low: np.ndarray, high: np.ndarray, silent: np.ndarray, spec: Quant) -> tuple[np.ndarray, np.ndarray]:
    """`scale_zero` of a calibrated range, in one for all numerics. Where `silent`, in the shape of low, says that the
    tensor was 0 in all of calibration, the scale of a uniform quantizer is 2^-8: in integers 1 would be a coarse unit
    for what is added to it. A range of zero length of a tensor that was not (a percentile's) keeps scale 1; of a group
    it has 2^-8 too."""
    scale, zero = scale_zero(low, high, spec)
    if isinstance(spec, FloatQuantSpec):
        return scale, zero
    return np.where(silence_groups(low, high, silent, spec), SILENT_SCALE, scale), zero


def silence_groups(low: np.ndarray, high: np.ndarray, silent: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Where a tensor counts as silent, boolean, in the shape of low: as `silent` says, but a group's channels only
    together, by the range that they share."""
    if spec.granularity is not Granularity.GROUP or low.size == 1:
        return silent
    low, high = affine.unite_groups(low, high, spec)
    return (low == 0) & (high == 0)


def rescale(calibrated: Range, spec: Quant, profile: Profile) -> Range:
    """A static range with the scale and zero point of a profile: as calibrated, which was by QTX, or learned; anew
    where the profile makes scales in another way, but those of tensors that were 0."""
    if isinstance(spec, FloatQuantSpec) or spec.learned or profile.scale == QTX.scale:
        return calibrated
    scale, zero = affine.scale_zero(calibrated.low, calibrated.high, spec, profile.scale)
    silent = silence_groups(calibrated.low, calibrated.high, was_silent(calibrated), spec)
    silent = np.reshape(silent, np.shape(scale))
    return calibrated._replace(scale=np.where(silent, SILENT_SCALE, scale), zero_point=zero)


def was_silent(range: Range) -> np.ndarray:
    """Where a calibrated range says that its tensor was 0 in all of calibration."""
    return (range.low == 0) & (range.high == 0) & (range.scale == SILENT_SCALE)


def dynamic_scale(
    x: np.ndarray, spec: Quant, where: np.ndarray | None, weight: bool, profile: Profile = QTX
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point from the tensor's own minimum and maximum (MX blocks: from their largest magnitude), of
    elements where `where` (boolean, broadcast) is true. Raises ValueError as `affine.ranges` and `scale_zero`."""
    if spec.outliers is not None:
        return beside_outliers(x, spec, where, profile)
    if is_local(spec):
        where = None  # a row of padding has ranges of its own and touches no other
    if isinstance(spec, FloatQuantSpec) and spec.granularity is Granularity.BLOCK:
        assert spec.shared is not None and spec.block is not None  # the spec has filled them in
        check_axes(spec, x.ndim)
        axis = -1 if spec.axis is None else spec.axis
        x = np.moveaxis(x if where is None else np.where(where, x, 0), axis, -1)
        scale = np.moveaxis(formats.mx_scale(x, spec.format, spec.shared, spec.block), -1, axis)
        return scale, np.zeros(scale.shape, np.int32)
    return scale_zero(*affine.ranges(x, spec, weight, where), spec, profile)


def beside_outliers(
    x: np.ndarray, spec: QuantSpec, where: np.ndarray | None, profile: Profile = QTX
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point per row in the shape of x, from its channels without outliers (LLM.int8, Dettmers et al.
    2022, section 3.2). A channel in which an element that counts reaches `spec.outliers` has scale 0, by which
    `check_quantizer`, `quantize` and `simulate` know that it stays in float; no other scale is 0. Raises ValueError for
    a tensor without axes, and a mask as in `affine.min_max`.
    """
    check_axes(spec, x.ndim)
    large = np.abs(x) >= spec.outliers
    if where is not None:
        check_where(where.dtype == bool, where.shape, x.shape)
        large &= where
    kept = large.any(axis=tuple(range(x.ndim - 1)))  # (C,)
    scale, zero = affine.scale_zero(*affine.min_max(x, (x.ndim - 1,), ~kept), spec, profile.scale)
    return np.where(kept, np.float32(0), scale), np.broadcast_to(zero, x.shape)


def check_quantizer(
    shape: tuple[int, ...], scale: np.ndarray, zero_point: np.ndarray, spec: Quant, profile: Profile = QTX
) -> None:
    """Raises ValueError unless scale and zero point make a quantizer of tensors of `shape`: each scale a finite number
    above 0, each zero point a code. An MX block's scale is a power of two, or NaN where the block holds NaN or
    infinity; beside outliers the scale 0 says that a channel stays in float."""
    if isinstance(spec, FloatQuantSpec) and spec.granularity is Granularity.BLOCK:
        formats.check_shared(scale)
        scale = np.ones_like(scale)
    elif spec.outliers is not None:
        scale = np.where(scale == 0, 1, scale)
    affine.check_quantizer(shape, scale, zero_point, spec, profile.fake_quantize.quantize)


def quantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: Quant, profile: Profile = QTX
) -> np.ndarray:
    """Codes of x: int32, or the uint8 of a small float. Raises ValueError as `check_quantizer` and both modules."""
    if isinstance(spec, FloatQuantSpec):
        check_quantizer(x.shape, scale, zero_point, spec, profile)
        return formats.encode(x.astype(np.float32) / scale, spec.format, spec.saturate, None, profile.cast)
    if spec.outliers is not None:  # what stays in float has the code of 0
        kept, step = np.where(scale == 0, 0, x), np.where(scale == 0, 1, scale)
        codes = affine.quantize(kept, step, zero_point, spec, profile.quantize)
        return np.where(scale == 0, zero_point, codes)
    return affine.quantize(x, scale, zero_point, spec, profile.quantize)


def fake_quantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: Quant, profile: Profile = QTX
) -> tuple[np.ndarray, np.ndarray]:
    """The values that x's codes stand for, in x's dtype, and where the straight-through gradient passes. Raises
    ValueError as `check_quantizer`."""
    check_quantizer(x.shape, scale, zero_point, spec, profile)
    return simulate(x, scale, zero_point, spec, None, profile)


def simulate(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    spec: Quant,
    words: np.ndarray | None = None,
    profile: Profile = QTX,
) -> tuple[np.ndarray, np.ndarray]:
    """`fake_quantize` without looking at scale and zero point: for those made by `dynamic_scale` or `scale_zero`, or
    checked when a model was bound. `words`, 32-bit ones in the shape of x: rounded stochastically, by them, and else as
    QTX has it."""
    if isinstance(spec, FloatQuantSpec):
        return formats.simulate(x, spec.format, spec.saturate, scale, words, profile.cast)
    if spec.outliers is not None:
        y, inside = affine.simulate(x, np.where(scale == 0, 1, scale), zero_point, spec, profile.fake_quantize)
        return np.where(scale == 0, x, y), inside | (scale == 0)
    rule = profile.fake_quantize if words is None else STOCHASTIC
    return affine.simulate(x, scale, zero_point, spec, rule, words)
