"""A quantizer by its spec: uniform codes (`affine`) or a small float (`formats`).

Differs from the reference: crosses_rows: processes may share a batch.
Differs from the reference: was_silent, rescale: ranges are lowered, and kept by `qtx ptq`, in NumPy.
Differs from the reference: holds_all: what can be saved where no code is clamped.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qtx_ref.spec import (
    QTX,
    FloatQuantSpec,
    Granularity,
    Profile,
    Quant,
    QuantSpec,
    Rounding,
    check_axes,
    check_where,
    is_local,
)

from .. import distributed
from . import affine, formats
from .compiled import store_rows

SILENT_SCALE = 2.0**-8  # of a tensor that was 0 in all of calibration
STOCHASTIC = replace(QTX.fake_quantize, quantize=replace(QTX.quantize, rounding=Rounding.STOCHASTIC))


def scale_zero(low: Tensor, high: Tensor, spec: Quant, profile: Profile = QTX) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range. Raises ValueError as both modules."""
    if isinstance(spec, FloatQuantSpec):
        return formats.scale_zero(low, high, spec)
    return affine.scale_zero(low, high, spec, profile.scale)


def static_scale(low: Tensor, high: Tensor, silent: Tensor, spec: Quant) -> tuple[Tensor, Tensor]:
    """`scale_zero` of a calibrated range, in one for all numerics. Where `silent`, in the shape of low, says that the
    tensor was 0 in all of calibration, the scale of a uniform quantizer is 2^-8: in integers 1 would be a coarse unit
    for what is added to it. A range of zero length of a tensor that was not (a percentile's) keeps scale 1; of a group
    it has 2^-8 too."""
    scale, zero = scale_zero(low, high, spec)
    if isinstance(spec, FloatQuantSpec):
        return scale, zero
    return scale.masked_fill(silence_groups(low, high, silent, spec), SILENT_SCALE), zero


def silence_groups(low: Tensor, high: Tensor, silent: Tensor, spec: QuantSpec) -> Tensor:
    """Where a tensor counts as silent, boolean, in the shape of low: as `silent` says, but a group's channels only
    together, by the range that they share."""
    if spec.granularity is not Granularity.GROUP or low.numel() == 1:
        return silent
    low, high = affine.unite_groups(low, high, spec)
    return (low == 0) & (high == 0)


def dynamic_scale(
    x: Tensor, spec: Quant, where: Tensor | None, weight: bool, profile: Profile = QTX
) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the tensor's own minimum and maximum (MX blocks: from their largest magnitude), of
    elements where `where` (boolean, broadcast) is true. Raises ValueError as `affine.ranges` and `scale_zero`."""
    if spec.outliers is not None:
        return beside_outliers(x, spec, where, profile)
    if is_local(spec):
        where = None  # a row of padding has ranges of its own and touches no other
    if isinstance(spec, FloatQuantSpec) and spec.granularity is Granularity.BLOCK:
        check_axes(spec, x.ndim)
        axis = -1 if spec.axis is None else spec.axis
        x = torch.movedim(x if where is None else torch.where(where, x, 0), axis, -1)
        scale = torch.movedim(formats.mx_scale(x, spec.format, spec.shared, spec.block), -1, axis)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    ends = affine.ranges(x, spec, weight, where)
    if torch.is_grad_enabled() and not weight and crosses_rows(spec):
        if spec.axis is not None and distributed.processes()[1] > 1:
            raise ValueError(f"ranges along axis {spec.axis} of a batch that several processes share: leave axis out")
        ends = distributed.share_range(*ends)  # of the whole batch, of which each process trains on some rows
    scale, zero = scale_zero(*ends, spec, profile)
    return store_rows(scale, x), store_rows(zero, x)


def crosses_rows(spec: Quant) -> bool:
    """Whether sequences of a batch share a range."""
    return not is_local(spec)


def holds_all(spec: Quant, where: Tensor | None) -> bool:
    """Whether every element's code under `dynamic_scale` is one of the codes without being clamped. So it is where all
    elements are in the range and the scale is its largest magnitude / code_max: no quotient rounds to more. An
    asymmetric range's ends and zero point are rounded apart from each other, and may lie one code too far."""
    if isinstance(spec, FloatQuantSpec) or spec.outliers is not None or not spec.symmetric:
        return False
    return where is None or is_local(spec)


def beside_outliers(x: Tensor, spec: QuantSpec, where: Tensor | None, profile: Profile = QTX) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row in the shape of x, from its channels without outliers (LLM.int8, Dettmers et al.
    2022, section 3.2). A channel in which an element that counts reaches `spec.outliers` has scale 0, by which
    `check_quantizer`, `quantize` and `simulate` know that it stays in float; no other scale is 0. Raises ValueError for
    a tensor without axes, and a mask as in `affine.min_max`.
    """
    check_axes(spec, x.ndim)
    large = x.abs() >= spec.outliers
    if where is not None:
        check_where(where.dtype == torch.bool, tuple(where.shape), tuple(x.shape))
        large &= where
    kept = large.reshape(math.prod(x.shape[:-1]), x.shape[-1]).any(dim=0)  # (C,)
    scale, zero = affine.scale_zero(*affine.min_max(x, (x.ndim - 1,), ~kept), spec, profile.scale)
    return torch.where(kept, 0, scale), zero.expand(x.shape)


def check_quantizer(
    shape: tuple[int, ...], scale: Tensor, zero_point: Tensor, spec: Quant, profile: Profile = QTX
) -> None:
    """Raises ValueError unless scale and zero point make a quantizer of tensors of `shape`: each scale a finite number
    above 0, each zero point a code. An MX block's scale is a power of two, or NaN where the block holds NaN or
    infinity; beside outliers the scale 0 says that a channel stays in float."""
    if isinstance(spec, FloatQuantSpec) and spec.granularity is Granularity.BLOCK:
        formats.check_shared(scale)
        scale = torch.ones_like(scale)
    elif spec.outliers is not None:
        scale = torch.where(scale == 0, 1, scale)
    affine.check_quantizer(shape, scale, zero_point, spec, profile.fake_quantize.quantize)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: Quant, profile: Profile = QTX) -> Tensor:
    """Codes of x: int32, or the uint8 of a small float. Raises ValueError as `check_quantizer` and both modules."""
    if isinstance(spec, FloatQuantSpec):
        check_quantizer(x.shape, scale, zero_point, spec, profile)
        return formats.encode(x.float() / scale, spec.format, spec.saturate, None, profile.cast)
    if spec.outliers is not None:  # what stays in float has the code of 0
        kept, step = torch.where(scale == 0, 0, x), torch.where(scale == 0, 1, scale)
        codes = affine.quantize(kept, step, zero_point, spec, profile.quantize)
        return torch.where(scale == 0, zero_point, codes)
    return affine.quantize(x, scale, zero_point, spec, profile.quantize)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: Quant, profile: Profile = QTX
) -> tuple[Tensor, Tensor]:
    """The values that x's codes stand for, in x's dtype, and where the straight-through gradient passes. Raises
    ValueError as `check_quantizer`."""
    check_quantizer(x.shape, scale, zero_point, spec, profile)
    return simulate(x, scale, zero_point, spec, None, profile)


def simulate(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: Quant,
    words: Tensor | None = None,
    profile: Profile = QTX,
) -> tuple[Tensor, Tensor]:
    """`fake_quantize` without looking at scale and zero point: for those made by `dynamic_scale` or `scale_zero`, or
    checked when a model was bound. `words`, 32-bit ones in the shape of x: rounded stochastically, by them, and else as
    QTX has it."""
    if isinstance(spec, FloatQuantSpec):
        return formats.simulate(x, spec.format, spec.saturate, scale, words, profile.cast)
    if spec.outliers is not None:
        y, inside = affine.simulate(x, torch.where(scale == 0, 1, scale), zero_point, spec, profile.fake_quantize)
        return torch.where(scale == 0, x, y), inside | (scale == 0)
    rule = profile.fake_quantize if words is None else STOCHASTIC
    return affine.simulate(x, scale, zero_point, spec, rule, words)
