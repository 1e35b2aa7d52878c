"""A quantizer by its spec: uniform codes (`affine`) or a small float (`formats`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtx_ref.spec import (
    FloatQuantSpec,
    Granularity,
    Quant,
    QuantSpec,
    check_axes,
    check_where,
)

from . import affine, formats


def scale_zero(low: Tensor, high: Tensor, spec: Quant) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range."""
    return (formats if isinstance(spec, FloatQuantSpec) else affine).scale_zero(low, high, spec)


def dynamic_scale(x: Tensor, spec: Quant, where: Tensor | None, weight: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the tensor's own minimum and maximum (MX blocks: from their largest magnitude)."""
    if spec.outliers is not None:
        return beside_outliers(x, spec, where)
    if spec.granularity in (Granularity.TOKEN, Granularity.BLOCK):
        where = None  # a row of padding has ranges of its own and touches no other
    if isinstance(spec, FloatQuantSpec) and spec.granularity is Granularity.BLOCK:
        scale = formats.mx_scale(x, spec.format, spec.shared, spec.block)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return scale_zero(*affine.ranges(x, spec, weight, where), spec)


def beside_outliers(x: Tensor, spec: QuantSpec, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point per row in the shape of x, from its channels without outliers (LLM.int8, Dettmers et al. 2022,
    section 3.2). A channel in which an element that counts reaches `spec.outliers` has scale 0, which leaves it in float.
    """
    check_axes(spec, x.ndim)
    large = x.abs() >= spec.outliers
    if where is not None:
        check_where(where.dtype == torch.bool, tuple(where.shape), tuple(x.shape))
        large &= where
    kept = large.reshape(math.prod(x.shape[:-1]), x.shape[-1]).any(dim=0)  # (C,)
    scale, zero = affine.scale_zero(*affine.min_max(x, (x.ndim - 1,), ~kept), spec)
    return torch.where(kept, 0, scale), zero.expand(x.shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: Quant) -> Tensor:
    """Codes of x: int32, or the uint8 of a small float."""
    if isinstance(spec, FloatQuantSpec):
        return formats.encode(x.float() / scale, spec.format, spec.saturate)
    if spec.outliers is not None:  # what stays in float has the code of 0
        codes = affine.quantize(torch.where(scale == 0, 0, x), torch.where(scale == 0, 1, scale), zero_point, spec)
        return torch.where(scale == 0, zero_point, codes)
    return affine.quantize(x, scale, zero_point, spec)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: Quant) -> tuple[Tensor, Tensor]:
    """The values that x's codes stand for, in x's dtype, and where the straight-through gradient passes."""
    if isinstance(spec, FloatQuantSpec):
        return formats.fake_quantize(x, spec.format, spec.saturate, scale)
    if spec.outliers is not None:
        y, inside = affine.fake_quantize(x, torch.where(scale == 0, 1, scale), zero_point, spec)
        return torch.where(scale == 0, x, y), inside | (scale == 0)
    return affine.fake_quantize(x, scale, zero_point, spec)
