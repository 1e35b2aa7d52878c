"""Affine quantization: `real = scale * (code - zero_point)`.

What two engines may do differently is a field of a rule, one per operation of a `Profile`. Under `QTX`, the default,
arithmetic is float32 whatever the dtype of the tensor: x / scale by IEEE division, rounded half to even, plus the
zero point, clamped to the codes of the `QuantSpec`. Scales are tensors on the tensor's device: CUDA divides by a host
number by multiplying with its reciprocal.

    >>> spec = QuantSpec(bits=8, symmetric=True)
    >>> quantize(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), torch.tensor(1.0), torch.tensor(0), spec).tolist()
    [-2, 0, 0, 2, 2]
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qtx_ref.spec import (
    QTX,
    WIDE_BITS,
    WIDE_ZERO,
    DequantizeRule,
    Dtype,
    FakeQuantizeRule,
    Granularity,
    InfinityPolicy,
    NanPolicy,
    Nudging,
    Quant,
    QuantizeRule,
    QuantSpec,
    ScaleRule,
    SymmetricScale,
    ZeroPoint,
    check_axes,
    check_where,
    check_width,
    range_axes,
)

from ..tracing import is_traced
from .checks import check_range, check_shape
from .compiled import find_ends, hide
from .rounding import decode, nan_code, round_dtype, round_integer, round_level, working_dtype

WIDE = QuantSpec(WIDE_BITS, symmetric=True)  # of a channel that is coded wide: the scale; its codes are moved up
TINY = 2.0**-126  # the smallest normal float32; no float32 scale is below it


def check_scale(scale: Tensor, arithmetic: Dtype = Dtype.FLOAT32, reciprocal: bool = False) -> None:
    """Raises ValueError naming the first scale that, in this arithmetic (INPUT: float32), is no finite number above 0,
    or has no finite reciprocal where that is what is multiplied by."""
    arithmetic = Dtype.FLOAT32 if arithmetic is Dtype.INPUT else arithmetic
    step = round_dtype(scale, arithmetic)
    good = torch.isfinite(step) & (step > 0)
    if reciprocal:
        good &= torch.isfinite(round_dtype(torch.ones_like(step) / step, arithmetic))
    if not good.all():
        remedy = "a finite number above 0" + ", and so its reciprocal" * reciprocal
        raise ValueError(f"scale {scale[~good][0].item()}: in {arithmetic} it must be {remedy}")


def check_quantizer(
    shape: tuple[int, ...],
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    rule: QuantizeRule = QTX.quantize,
    x: Tensor | None = None,
) -> None:
    """Raises ValueError unless scale and zero point make a quantizer of tensors of `shape`: `check_scale`, a zero point
    that is one of the codes, both broadcast against the tensor. What `scale_zero` made passes. x: a tensor whose dtype
    is the arithmetic of a rule that takes the input's (without one: float32). It waits for the device."""
    reciprocal = rule.reciprocal and rule.nan is NanPolicy.RAISE  # engines multiply by infinity: of 0 it makes NaN
    check_scale(scale, rule.arithmetic if x is None else working_dtype(rule.arithmetic, x), reciprocal)
    narrow = zero_point if spec.wide is None else zero_point[zero_point != WIDE_ZERO]
    check_range("zero point", narrow, spec.code_min, spec.code_max, "it is one of the codes")
    for what, value in (("scale", scale), ("zero point", zero_point)):
        check_shape(what, value, shape, "give one, or one for each that has its own")


def code_limits(zero_point: Tensor, spec: Quant) -> tuple[Tensor | int, Tensor | int]:
    """The lowest and the highest code: the spec's, or one for each zero point, in its shape, where some channels are
    coded wide."""
    if spec.wide is None:
        return spec.code_min, spec.code_max
    wide = zero_point == WIDE_ZERO
    return torch.where(wide, 0, spec.code_min), torch.where(wide, 2**WIDE_BITS - 1, spec.code_max)


def min_max(x: Tensor, axes: tuple[int, ...], where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over `axes`, kept as length 1, of the elements where `where` (broadcast) is true.

    Float32; beyond it infinite. A range over no element at all is (0, 0); over no axis, each element is one. Raises
    ValueError for a mask that is not boolean or does not broadcast to x.
    """
    if where is not None:
        check_where(where.dtype == torch.bool, tuple(where.shape), tuple(x.shape))
    if not axes:
        low = x.float() if where is None else torch.where(where, x, 0).float()
        return low, low.clone()
    if not x.numel():
        low = x.new_zeros([1 if i in axes else n for i, n in enumerate(x.shape)], dtype=torch.float32)
        return low, low.clone()
    if where is None:
        low, high = find_ends(x, axes)
        return low.float(), high.float()
    # what shares a place of `where` is reduced before it is masked: the mask is small, and so is what is left
    shared = tuple(i for i in axes if i + where.ndim >= x.ndim and where.shape[i - x.ndim] == 1)
    low, high = find_ends(x, shared) if shared else (x, x)
    low = torch.where(where, low, math.inf).amin(axes, keepdim=True)
    high = torch.where(where, high, -math.inf).amax(axes, keepdim=True)
    empty = low > high
    return low.masked_fill(empty, 0).float(), high.masked_fill(empty, 0).float()


def ranges(x: Tensor, spec: QuantSpec, weight: bool = False, where: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`min_max` of whatever shares a range, ready for `scale_zero`; it broadcasts against x (BLOCK: has its shape).

    Raises ValueError as `min_max` and `range_axes`, and where blocks do not divide their axis.
    """
    if spec.granularity is not Granularity.BLOCK:
        return min_max(x, range_axes(spec, x.ndim, weight), where)
    check_axes(spec, x.ndim)
    axis = -1 if spec.axis is None else spec.axis
    if x.shape[axis] % spec.block:
        named = "the last axis" if spec.axis is None else f"axis {axis}"
        raise ValueError(f"block {spec.block} does not divide {named}, {x.shape[axis]}; choose one that does")
    keep = None if where is None else torch.movedim(where.broadcast_to(x.shape), axis, -1)
    x = torch.movedim(x, axis, -1)
    blocks = (*x.shape[:-1], x.shape[-1] // spec.block, spec.block)
    keep = None if keep is None else keep.reshape(blocks)
    low, high = min_max(x.reshape(blocks), (x.ndim,), keep)  # (..., blocks, 1)
    low, high = low[..., 0].repeat_interleave(spec.block, -1), high[..., 0].repeat_interleave(spec.block, -1)
    return torch.movedim(low, -1, axis), torch.movedim(high, -1, axis)


def group_channels(low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """The group of each channel, counted from 0, of channel ranges (one axis longer than 1), in their shape.

    Groups are equal in size and made of neighbours; with `permute`, of neighbours in the order of high - low, so that
    outlier channels share a group (Bondarenko et al. 2021, section 4). With `wide` so many of the largest
    magnitude are group 1 and the others group 0. Raises ValueError where groups do not divide the channels, or all
    would be wide.
    """
    count, channels = spec.groups, low.numel()
    if spec.wide is not None and spec.wide >= channels:
        raise ValueError(f"wide {spec.wide} of {channels} channels leaves none to the others; choose fewer")
    if count is not None and channels % count:
        raise ValueError(f"groups {count} does not divide the {channels} channels; choose a number that does")
    size = (high - low if count is not None else torch.maximum(-low, high)).flatten()
    ordered = spec.permute or count is None
    order = torch.argsort(size, stable=True) if ordered else torch.arange(channels, device=size.device)
    place = torch.argsort(order)  # of each channel in that order
    group = place >= channels - (spec.wide or 0) if count is None else place // (channels // count)
    return group.int().reshape(low.shape)


def unite_groups(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Channel ranges (one axis longer than 1) -> its group's range for each, in the same shape. Raises ValueError
    as `group_channels`."""
    group = group_channels(low, high, spec).flatten().long()
    count = 2 if spec.groups is None else spec.groups

    def share(values: Tensor, reduce: str) -> Tensor:
        ends = values.new_zeros(count).scatter_reduce(0, group, values.flatten(), reduce, include_self=False)
        return ends[group].reshape(values.shape)

    return share(low, "amin"), share(high, "amax")


def narrow_spec(spec: QuantSpec) -> QuantSpec:
    """That of the channels that are not coded wide."""
    return replace(spec, granularity=Granularity.CHANNEL, wide=None)


def check_order(low: Tensor, high: Tensor) -> None:
    """Raises ValueError naming the first range whose low end is above its high end."""
    low, high = torch.broadcast_tensors(low, high)
    if (reversed_ends := low > high).any():
        first, last = low[reversed_ends][0].item(), high[reversed_ends][0].item()
        raise ValueError(f"range {first} to {last}: its low end is above its high end")


def scale_zero(low: Tensor, high: Tensor, spec: QuantSpec, rule: ScaleRule = QTX.scale) -> tuple[Tensor, Tensor]:
    """Scale and zero point (int32) of a range, widened to hold 0. The scale is carried in float32 (float64 for
    FLOAT64).

    Symmetric: by the rule's `SymmetricScale`, and 0. Asymmetric: (high - low) / (code_max - code_min) and the rounded
    real zero point. Mirrored: of a range with a negative end what symmetric has, under codes moved up by 2^(bits - 1);
    else high / code_max and 0. An empty range (0, 0) has the scale `empty`; no scale is below the `floor`. So what
    comes out passes `check_quantizer`: scales are above 0, they and their reciprocals finite, zero points among the
    codes. With `wide` some channels have the scale of symmetric codes of 16 bits, and the zero point WIDE_ZERO. Raises
    ValueError where low is above high, or the range, or the scale in its dtype, is not finite.
    """
    check_width(spec, rule.arithmetic)
    reversed_ends, ends = low > high, (low, high)
    if spec.granularity is Granularity.GROUP and low.numel() > 1:
        wide = group_channels(low, high, spec) > 0
        low, high = unite_groups(low, high, spec)
        if spec.wide is not None:
            (scale, zero), (large, _) = (scale_zero(low, high, one, rule) for one in (narrow_spec(spec), WIDE))
            return torch.where(wide, large, scale), zero.masked_fill(wide, WIDE_ZERO)

    def number(value: Tensor) -> Tensor:
        return round_dtype(value, rule.arithmetic)

    low, high = number(low).clamp(max=0), number(high).clamp(min=0)

    def constant(value: float) -> Tensor:
        return number(torch.full_like(low, value))

    def divide(x: Tensor, value: float) -> Tensor:
        return number(x / hide(constant(value), x))

    span = torch.maximum(-low, high) if spec.symmetric or spec.mirrored else number(high - low)
    # both at once: asking waits for the device; a compiled graph asks nothing, and NaN comes out as NaN
    if not is_traced() and not (torch.isfinite(span) & ~reversed_ends).all():
        check_order(*ends)
        raise ValueError(
            f"range {low.min().item()} to {high.max().item()} is not finite; look for NaN or infinity upstream"
        )
    middle = 2 ** (spec.bits - 1)
    if spec.mirrored:
        step = number(span / torch.where(low < 0, constant(middle - 1), constant(spec.code_max)))
    elif not spec.symmetric:
        step = divide(span, spec.code_max - spec.code_min)
    elif rule.symmetric is SymmetricScale.ABSMAX:
        step = divide(span, spec.code_max)
    elif rule.symmetric is SymmetricScale.ABSMAX_HALF:
        step = divide(span, (2**spec.bits - 1) / 2)
    else:
        step = torch.maximum(divide(-low, -spec.code_min), divide(high, spec.code_max))
    step = torch.where(span == 0, constant(rule.empty), torch.maximum(step, constant(rule.floor)))
    scale = round_dtype(step, rule.dtype)
    divisor = number(scale)
    if not is_traced() and not (torch.isfinite(divisor) & (divisor > 0)).all():
        raise ValueError(
            f"scale {step.max().item()} does not fit {rule.dtype} in {rule.arithmetic}; "
            "choose a wider dtype, or a higher floor"
        )
    if spec.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    if spec.mirrored:
        return scale, (low < 0).int() * middle
    first, last = constant(spec.code_min), constant(spec.code_max)
    start = number(low / divisor)
    if rule.nudging is Nudging.LOW_ROUNDED:
        start = round_integer(start, rule.zero_point_rounding)
    zero = number(first - start)
    if rule.nudging is Nudging.CLOSER_END:
        up = number(high / divisor)
        # the two ends' rounding errors, as gemmlowp bounds them
        nearer_low = first + number(-low / divisor) < last + up
        zero = torch.where(nearer_low, zero, number(last - up))
    zero = round_integer(zero, rule.zero_point_rounding)
    return scale, zero.clamp(spec.code_min, spec.code_max).to(torch.int32)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    rule: QuantizeRule = QTX.quantize,
    words: Tensor | None = None,
) -> Tensor:
    """Codes (int32) of x, in its shape; each lies between the spec's limits.

    Raises ValueError on NaN and on infinity where the rule says so, and for a scale or zero point that no quantizer
    has (`check_quantizer`) or that does not fit the shape of x.
    """
    looking = not is_traced()  # a compiled graph has no branch on data
    if looking and rule.nan is NanPolicy.RAISE and torch.isnan(x).any():
        raise ValueError("cannot quantize NaN; look upstream for the first tensor that holds one")
    if looking and rule.infinity is InfinityPolicy.RAISE and torch.isinf(x).any():
        raise ValueError("cannot quantize infinity under this rule; look upstream, or choose one that saturates")
    if rule.nan is NanPolicy.RAISE:
        check_codes(x, spec, rule)
        if looking:
            check_quantizer(x.shape, scale, zero_point, spec, rule, x)
        return round_level(x, scale, zero_point, rule, words).clamp_(*code_limits(zero_point, spec)).to(torch.int32)
    return quantize_reporting(x, scale, zero_point, spec, rule, words)[0]


def quantize_reporting(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    rule: QuantizeRule = QTX.quantize,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize` of all of x, and where x is NaN or infinite (boolean, in its shape), which it does not refuse: there a
    rule that would has the zero point for NaN, and saturates for infinity. Raises ValueError as `quantize` for scale
    and zero point."""
    check_codes(x, spec, rule)
    check_quantizer(x.shape, scale, zero_point, spec, rule, x)
    level = round_level(x, scale, zero_point, rule, words)
    level = torch.where(torch.isnan(level), nan_code(zero_point, spec, rule), level)
    return level.clamp(*code_limits(zero_point, spec)).to(torch.int32), ~torch.isfinite(x)


def check_codes(x: Tensor, spec: QuantSpec, rule: QuantizeRule) -> None:
    """Raises ValueError where zero points are added in a float16 that does not hold the codes."""
    if rule.zero_point is not ZeroPoint.AFTER:
        check_width(spec, working_dtype(rule.arithmetic, x))


def dequantize(code: Tensor, scale: Tensor, zero_point: Tensor, rule: DequantizeRule = QTX.dequantize) -> Tensor:
    """scale * (code - zero_point), or as the rule's form has it, each step rounded to its arithmetic: float32
    (float64; the scale's float16 or bfloat16 under INPUT). The difference is taken in integers (int64).

    Raises ValueError for codes that are no integers or beyond 62 bits, a zero point that int32 does not hold, a scale
    as `check_scale`, and where either does not fit the shape of the codes.
    """
    check_scale(scale, rule.arithmetic)
    check_range("code", code, -(2**62), 2**62, "an accumulator has 48 bits at most")
    check_range("zero point", zero_point, -(2**31), 2**31 - 1, "it is one of the codes")
    for what, value in (("scale", scale), ("zero point", zero_point)):
        check_shape(what, value, code.shape, "give one, or one for each that has its own")
    y = decode(code.long(), scale, zero_point, rule)
    sixteen = rule.arithmetic is Dtype.INPUT and working_dtype(Dtype.INPUT, scale) is not Dtype.FLOAT32
    return y.to(scale.dtype) if sixteen else y


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    rule: FakeQuantizeRule = QTX.fake_quantize,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dequantize(quantize(x)) in x's dtype, and where the straight-through gradient passes: codes inside their limits.

    NaN stays NaN where the rule would raise, so that a training run shows it. Raises ValueError as `quantize` for
    infinity, scale and zero point.
    """
    check_quantizer(x.shape, scale, zero_point, spec, rule.quantize, x)
    return simulate(x, scale, zero_point, spec, rule, words)


def simulate(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    rule: FakeQuantizeRule = QTX.fake_quantize,
    words: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fake_quantize` without looking at scale and zero point, which would wait for the device: for those that
    `scale_zero` made, that were checked when the model was bound, or that are being learned. A NaN among them gives
    NaN."""
    quantizing = rule.quantize
    check_codes(x, spec, quantizing)
    if quantizing.infinity is InfinityPolicy.RAISE and torch.isinf(x).any():
        raise ValueError("cannot quantize infinity under this rule; look upstream, or choose one that saturates")
    level = round_level(x, scale, zero_point, quantizing, words)
    code = level.clamp(*code_limits(zero_point, spec))
    inside = level == code  # NaN is not
    if quantizing.nan is not NanPolicy.RAISE:
        code = torch.where(torch.isnan(level), nan_code(zero_point, spec, quantizing), code)
    if rule.dequantize == QTX.dequantize and code.dtype is torch.float32:
        return code.sub_(zero_point).mul_(scale.float()).to(x.dtype), inside
    return decode(code, scale, zero_point, rule.dequantize).to(x.dtype), inside
