"""Quantizers with gradients: forward the values of the codes, backward the straight-through estimator (Bengio et al.
2013), and a gradient for scales and zero points that are learned.

Differs from the reference: dynamic_quantize: quantizers are modules, in `numerics`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtx_ref.spec import QTX, FakeQuantizeRule, FloatQuantSpec, Profile, Quant, QuantSpec

from ..ops import own
from . import affine, blocks, quantizer, rounding


class StraightThrough(torch.autograd.Function):
    """One node where `x + (q - x).detach()` takes many. x is kept, and where it was clamped is found again: what would
    be written for it is as large. Scale and zero point are not looked at, which would wait for the device: `scale_zero`
    made them, or `bind` has checked them."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.spec = spec
        return own(blocks.simulate(x, scale, zero_point, spec))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None, None]:
        return blocks.pass_gradient(g, *ctx.saved_tensors, ctx.spec), None, None, None


class Unclamped(torch.autograd.Function):
    """The same where no code is clamped (`quantizer.holds_all`): nothing is kept, and all of the gradient passes."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return own(rounding.round_level(x, scale, zero_point).sub_(zero_point).mul_(scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        return g, None, None


class OwnRanges(torch.autograd.Function):
    """The same of rows by their own ranges (`blocks.has_rows`), found in the same pass: something is kept only where a
    code was clamped, which rounding seldom makes so."""

    @staticmethod
    def forward(ctx, x: Tensor, spec: QuantSpec) -> Tensor:
        y, scale, zero_point, ctx.clamped = blocks.simulate_rows(x, spec)
        if ctx.clamped:
            ctx.save_for_backward(x, scale, zero_point)
        ctx.spec = spec
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return blocks.pass_gradient(g, *ctx.saved_tensors, ctx.spec) if ctx.clamped else g, None


class Selected(torch.autograd.Function):
    """The same for a small float, beside outliers, of wide channels, under another profile: keeps where the gradient
    passes."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, spec: Quant, profile: Profile) -> Tensor:
        y, inside = quantizer.simulate(x, scale, zero_point, spec, None, profile)
        ctx.save_for_backward(inside)
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return g * inside, None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: Quant, profile: Profile = QTX) -> Tensor:
    """The straight-through estimator (Bengio et al. 2013): dx = g where the code was not clamped, else 0."""
    if profile is not QTX or isinstance(spec, FloatQuantSpec) or spec.outliers is not None or spec.wide is not None:
        return Selected.apply(x, scale, zero_point, spec, profile)
    return StraightThrough.apply(x, scale, zero_point, spec)


def learned_scale_zero(scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The scale and zero point that learned ones, float32, stand for: |scale|, no smaller than the smallest normal
    float32, and the nearest code, int32."""
    return scale.abs().clamp(min=affine.TINY), zero_point.round().clamp(spec.code_min, spec.code_max).int()


class LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, rule: FakeQuantizeRule) -> Tensor:
        s, z = learned_scale_zero(scale, zero_point, spec)
        y, inside = affine.simulate(x, s, z, spec, rule)
        ctx.save_for_backward(x, scale, s, z, inside)
        ctx.spec, ctx.rule = spec, rule.quantize
        return own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, scale, s, z, inside = ctx.saved_tensors
        spec = ctx.spec
        level = rounding.round_level(x, s, z, ctx.rule)
        slope = torch.where(inside, level - z - x / s, level.clamp(spec.code_min, spec.code_max) - z)
        axes = [i for i in range(x.ndim) if scale.shape[i] == 1]
        factor = 1 / math.sqrt(x.numel() / scale.numel() * spec.code_max)

        def gather(terms: Tensor) -> Tensor:
            return (terms.sum(dim=axes, keepdim=True, dtype=torch.float64) * factor).float()

        ds = torch.where(scale < 0, -1, 1) * gather(g * slope)
        dz = None if spec.symmetric else gather(torch.where(inside, 0, -g * s))
        return g * inside, ds, dz, None, None


def learned_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, profile: Profile = QTX) -> Tensor:
    """Learned step size (Esser et al. 2020, eq. 3 and 5) with a learned zero point (Bhalgat et al. 2020).

    With v = x / s and z the rounded zero point: dx = g inside; ds = g (round(v) - v) inside and g (limit - z) outside;
    dz = -g s outside and 0 inside. ds and dz are multiplied by 1 / sqrt(elements per range * code_max).
    """
    return LearnedStep.apply(x, scale, zero_point, spec, profile.fake_quantize)
