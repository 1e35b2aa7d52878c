"""Affine quantization: `real = scale * (code - zero_point)`.

What two engines may do differently is a field of a rule, one per operation of a `Profile`. Under `QTX`, the default,
arithmetic is float32 whatever the dtype of the tensor: x / scale by IEEE division, rounded half to even, plus the
zero point, clamped to the codes of the `QuantSpec`.

Arrays: x of any shape, float32 or another float dtype; scales (float32, float64 where the profile stores that) and zero
points (int32) broadcast against it. The ends of ranges are float32 and broadcast against each other and the tensor.

    >>> spec = QuantSpec(bits=8, symmetric=True)
    >>> quantize(np.float32([-1.5, -0.5, 0.5, 1.5, 2.5]), np.float32(1), np.int32(0), spec).tolist()
    [-2, 0, 0, 2, 2]
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..spec import (
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
from .checks import check_range, check_shape
from .rounding import decode, nan_code, round_dtype, round_integer, round_level, working_dtype

__all__ = [
    "check_codes",
    "check_order",
    "check_quantizer",
    "check_scale",
    "code_limits",
    "dequantize",
    "fake_quantize",
    "group_channels",
    "min_max",
    "narrow_spec",
    "quantize",
    "quantize_reporting",
    "ranges",
    "scale_zero",
    "simulate",
    "unite_groups",
]

WIDE = QuantSpec(WIDE_BITS, symmetric=True)  # of a channel that is coded wide: the scale; its codes are moved up
TINY = np.float32(2.0**-126)  # the smallest normal float32; no float32 scale is below it


def check_scale(scale: np.ndarray, arithmetic: Dtype = Dtype.FLOAT32, reciprocal: bool = False) -> None:
    """Raises ValueError naming the first scale that, in this arithmetic (INPUT: float32), is no finite number above 0,
    or has no finite reciprocal where that is what is multiplied by."""
    scale = np.asanyarray(scale)
    arithmetic = Dtype.FLOAT32 if arithmetic is Dtype.INPUT else arithmetic
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        step = round_dtype(scale, arithmetic)
        good = np.isfinite(step) & (step > 0)
        if reciprocal:
            good &= np.isfinite(round_dtype(np.ones_like(step) / step, arithmetic))
    if not good.all():
        remedy = "a finite number above 0" + ", and so its reciprocal" * reciprocal
        raise ValueError(f"scale {scale[~good][0]}: in {arithmetic} it must be {remedy}")


def check_quantizer(
    shape: tuple[int, ...],
    scale: np.ndarray,
    zero_point: np.ndarray,
    spec: Quant,
    rule: QuantizeRule = QTX.quantize,
    x: np.ndarray | None = None,
) -> None:
    """Raises ValueError unless scale and zero point make a quantizer of tensors of `shape`: `check_scale`, a zero point
    that is one of the codes, both broadcast against the tensor. What `scale_zero` made passes. x: a tensor whose dtype
    is the arithmetic of a rule that takes the input's (without one: float32)."""
    reciprocal = rule.reciprocal and rule.nan is NanPolicy.RAISE  # engines multiply by infinity: of 0 it makes NaN
    check_scale(scale, rule.arithmetic if x is None else working_dtype(rule.arithmetic, x), reciprocal)
    narrow = zero_point if spec.wide is None else zero_point[zero_point != WIDE_ZERO]
    check_range("zero point", narrow, spec.code_min, spec.code_max, "it is one of the codes")
    for what, value in (("scale", scale), ("zero point", zero_point)):
        check_shape(what, value, shape, "give one, or one for each that has its own")


def code_limits(zero_point: np.ndarray, spec: Quant) -> tuple[np.ndarray | int, np.ndarray | int]:
    """The lowest and the highest code: the spec's, or one for each zero point, in its shape, where some channels are
    coded wide."""
    if spec.wide is None:
        return spec.code_min, spec.code_max
    wide = zero_point == WIDE_ZERO
    return np.where(wide, 0, spec.code_min), np.where(wide, 2**WIDE_BITS - 1, spec.code_max)


def min_max(x: np.ndarray, axes: tuple[int, ...], where: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum over `axes`, kept as length 1, of the elements where `where` (broadcast) is true.

    Float32; beyond it infinite. A range over no element at all is (0, 0); over no axis, each element is one. Raises
    ValueError for a mask that is not boolean or does not broadcast to x.
    """
    if where is not None:
        check_where(where.dtype == bool, where.shape, x.shape)
    x = x if x.dtype.kind == "f" else x.astype(np.float64)
    keep = True if where is None else np.broadcast_to(where, x.shape)
    low = np.min(x, axis=axes, keepdims=True, where=keep, initial=np.inf)
    high = np.max(x, axis=axes, keepdims=True, where=keep, initial=-np.inf)
    empty = low > high
    with np.errstate(over="ignore"):
        return np.where(empty, 0, low).astype(np.float32), np.where(empty, 0, high).astype(np.float32)


def ranges(
    x: np.ndarray, spec: Quant, weight: bool = False, where: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`min_max` of whatever shares a range, ready for `scale_zero`; it broadcasts against x (BLOCK: has its shape).

    Raises ValueError as `min_max` and `range_axes`, and where blocks do not divide their axis.
    """
    if spec.granularity is not Granularity.BLOCK:
        return min_max(x, range_axes(spec, x.ndim, weight), where)
    check_axes(spec, x.ndim)
    assert spec.block is not None  # BLOCK has one
    axis = -1 if spec.axis is None else spec.axis
    if x.shape[axis] % spec.block:
        named = "the last axis" if spec.axis is None else f"axis {axis}"
        raise ValueError(f"block {spec.block} does not divide {named}, {x.shape[axis]}; choose one that does")
    keep = None if where is None else np.moveaxis(np.broadcast_to(where, x.shape), axis, -1)
    x = np.moveaxis(x, axis, -1)
    blocks = (*x.shape[:-1], x.shape[-1] // spec.block, spec.block)
    keep = None if keep is None else keep.reshape(blocks)
    low, high = min_max(x.reshape(blocks), (x.ndim,), keep)  # (..., blocks, 1)
    low, high = np.repeat(low[..., 0], spec.block, -1), np.repeat(high[..., 0], spec.block, -1)
    return np.moveaxis(low, -1, axis), np.moveaxis(high, -1, axis)


def group_channels(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """The group of each channel, counted from 0, of channel ranges (one axis longer than 1), in their shape.

    Groups are equal in size and made of neighbours; with `permute`, of neighbours in the order of high - low, so that
    outlier channels share a group (Bondarenko et al. 2021, section 4). With `wide` so many of the largest
    magnitude are group 1 and the others group 0. Raises ValueError where groups do not divide the channels, or all
    would be wide.
    """
    count, channels = spec.groups, low.size
    if spec.wide is not None and spec.wide >= channels:
        raise ValueError(f"wide {spec.wide} of {channels} channels leaves none to the others; choose fewer")
    if count is not None and channels % count:
        raise ValueError(f"groups {count} does not divide the {channels} channels; choose a number that does")
    with np.errstate(over="ignore"):  # the widest are infinite alike
        size = high - low if count is not None else np.maximum(-low, high)
    ordered = spec.permute or count is None
    order = np.argsort(size.ravel(), kind="stable") if ordered else np.arange(channels)
    place = np.argsort(order)  # of each channel in that order
    group = place >= channels - (spec.wide or 0) if count is None else place // (channels // count)
    return group.astype(np.int32).reshape(low.shape)


def unite_groups(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    """Channel ranges (one axis longer than 1) -> its group's range for each, in the same shape. Raises ValueError
    as `group_channels`."""
    group = group_channels(low, high, spec)
    count = int(group.max()) + 1
    ends = np.array([[low[group == i].min(), high[group == i].max()] for i in range(count)], low.dtype)
    return ends[group, 0], ends[group, 1]


def narrow_spec(spec: QuantSpec) -> QuantSpec:
    """That of the channels that are not coded wide."""
    return replace(spec, granularity=Granularity.CHANNEL, wide=None)


def check_order(low: np.ndarray, high: np.ndarray) -> None:
    """Raises ValueError naming the first range whose low end is above its high end."""
    low, high = np.broadcast_arrays(low, high)
    if (reversed_ends := low > high).any():
        raise ValueError(
            f"range {low[reversed_ends][0]} to {high[reversed_ends][0]}: its low end is above its high end"
        )


def scale_zero(
    low: np.ndarray, high: np.ndarray, spec: QuantSpec, rule: ScaleRule = QTX.scale
) -> tuple[np.ndarray, np.ndarray]:
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
    check_order(low, high)
    if spec.granularity is Granularity.GROUP and np.size(low) > 1:
        wide = group_channels(low, high, spec) > 0
        low, high = unite_groups(low, high, spec)
        if spec.wide is not None:
            (scale, zero), (large, _) = (scale_zero(low, high, one, rule) for one in (narrow_spec(spec), WIDE))
            return np.where(wide, large, scale), np.where(wide, np.int32(WIDE_ZERO), zero)

    def number(value: np.ndarray | float) -> np.ndarray:
        return round_dtype(value, rule.arithmetic)

    low = np.minimum(number(low), number(0))
    high = np.maximum(number(high), number(0))
    with np.errstate(over="ignore", invalid="ignore"):
        span = np.maximum(-low, high) if spec.symmetric or spec.mirrored else number(high - low)
    if not np.isfinite(span).all():
        raise ValueError(f"range {low.min()} to {high.max()} is not finite; look for NaN or infinity upstream")
    middle = 2 ** (spec.bits - 1)
    if spec.mirrored:
        step = number(span / np.where(low < 0, number(middle - 1), number(spec.code_max)))
    elif not spec.symmetric:
        step = number(span / number(spec.code_max - spec.code_min))
    elif rule.symmetric is SymmetricScale.ABSMAX:
        step = number(span / number(spec.code_max))
    elif rule.symmetric is SymmetricScale.ABSMAX_HALF:
        step = number(span / number((2**spec.bits - 1) / 2))
    else:
        step = np.maximum(number(-low / number(-spec.code_min)), number(high / number(spec.code_max)))
    step = np.maximum(step, number(rule.floor))
    scale = round_dtype(np.where(span == 0, number(rule.empty), step), rule.dtype)
    divisor = number(scale)
    if not (np.isfinite(divisor) & (divisor > 0)).all():
        raise ValueError(
            f"scale {step.max()} does not fit {rule.dtype} in {rule.arithmetic}; "
            "choose a wider dtype, or a higher floor"
        )
    if spec.symmetric:
        return scale, np.zeros(scale.shape, np.int32)
    if spec.mirrored:
        return scale, np.where(low < 0, middle, 0).astype(np.int32)
    first, last = number(spec.code_min), number(spec.code_max)
    start = number(low / divisor)
    if rule.nudging is Nudging.LOW_ROUNDED:
        start = round_integer(start, rule.zero_point_rounding)
    zero = number(first - start)
    if rule.nudging is Nudging.CLOSER_END:
        up = number(high / divisor)
        # the two ends' rounding errors, as gemmlowp bounds them
        nearer_low = first + number(-low / divisor) < last + up
        zero = np.where(nearer_low, zero, number(last - up))
    zero = round_integer(zero, rule.zero_point_rounding)
    return scale, np.clip(zero, spec.code_min, spec.code_max).astype(np.int32)


def quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    spec: QuantSpec,
    rule: QuantizeRule = QTX.quantize,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """Codes (int32) of x, in its shape; each lies between the spec's limits.

    Raises ValueError on NaN and on infinity where the rule says so, and for a scale or zero point that no quantizer
    has (`check_quantizer`) or that does not fit the shape of x.
    """
    if rule.nan is NanPolicy.RAISE and np.isnan(x).any():
        raise ValueError("cannot quantize NaN; look upstream for the first tensor that holds one")
    if rule.infinity is InfinityPolicy.RAISE and np.isinf(x).any():
        raise ValueError("cannot quantize infinity under this rule; look upstream, or choose one that saturates")
    return quantize_reporting(x, scale, zero_point, spec, rule, words)[0]


def quantize_reporting(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    spec: QuantSpec,
    rule: QuantizeRule = QTX.quantize,
    words: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`quantize` of all of x, and where x is NaN or infinite (boolean, in its shape), which it does not refuse: there a
    rule that would has the zero point for NaN, and saturates for infinity. Raises ValueError as `quantize` for scale
    and zero point."""
    check_codes(x, spec, rule)
    check_quantizer(x.shape, scale, zero_point, spec, rule, x)
    level = round_level(x, scale, zero_point, rule, words)
    level = np.where(np.isnan(level), nan_code(zero_point, spec, rule), level)
    return np.clip(level, *code_limits(zero_point, spec)).astype(np.int32), ~np.isfinite(x)


def check_codes(x: np.ndarray, spec: QuantSpec, rule: QuantizeRule) -> None:
    """Raises ValueError where zero points are added in a float16 that does not hold the codes."""
    if rule.zero_point is not ZeroPoint.AFTER:
        check_width(spec, working_dtype(rule.arithmetic, x))


def dequantize(
    code: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, rule: DequantizeRule = QTX.dequantize
) -> np.ndarray:
    """scale * (code - zero_point), or as the rule's form has it, each step rounded to its arithmetic: float32
    (float64; the scale's float16 or bfloat16 under INPUT). The difference is taken in integers (int64).

    Raises ValueError for codes that are no integers or beyond 62 bits, a zero point that int32 does not hold, a scale
    as `check_scale`, and where either does not fit the shape of the codes.
    """
    scale = np.asanyarray(scale)
    check_scale(scale, rule.arithmetic)
    check_range("code", code, -(2**62), 2**62, "an accumulator has 48 bits at most")
    check_range("zero point", zero_point, -(2**31), 2**31 - 1, "it is one of the codes")
    for what, value in (("scale", scale), ("zero point", zero_point)):
        check_shape(what, value, np.shape(code), "give one, or one for each that has its own")
    y = decode(np.asanyarray(code).astype(np.int64), scale, zero_point, rule)
    sixteen = rule.arithmetic is Dtype.INPUT and working_dtype(Dtype.INPUT, scale) is not Dtype.FLOAT32
    return y.astype(scale.dtype) if sixteen else y


def fake_quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    spec: QuantSpec,
    rule: FakeQuantizeRule = QTX.fake_quantize,
    words: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """dequantize(quantize(x)) in x's dtype, and where the straight-through gradient passes: codes inside their limits.

    NaN stays NaN where the rule would raise, so that a training run shows it. Raises ValueError as `quantize` for
    infinity, scale and zero point.
    """
    check_quantizer(x.shape, scale, zero_point, spec, rule.quantize, x)
    return simulate(x, scale, zero_point, spec, rule, words)


def simulate(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    spec: QuantSpec,
    rule: FakeQuantizeRule = QTX.fake_quantize,
    words: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`fake_quantize` without looking at scale and zero point: for those that `scale_zero` made, that were checked when
    the model was bound, or that are being learned. A NaN among them gives NaN. Raises ValueError for infinity where the
    rule says so."""
    quantizing = rule.quantize
    check_codes(x, spec, quantizing)
    if quantizing.infinity is InfinityPolicy.RAISE and np.isinf(x).any():
        raise ValueError("cannot quantize infinity under this rule; look upstream, or choose one that saturates")
    level = round_level(x, scale, zero_point, quantizing, words)
    lowest, highest = code_limits(zero_point, spec)
    inside = (level >= lowest) & (level <= highest)  # NaN is not
    if quantizing.nan is not NanPolicy.RAISE:
        level = np.where(np.isnan(level), nan_code(zero_point, spec, quantizing), level)
    code = np.clip(level, lowest, highest)
    with np.errstate(over="ignore"):
        return decode(code, scale, zero_point, rule.dequantize).astype(x.dtype), inside
