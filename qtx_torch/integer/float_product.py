"""Requantization in floats: an accumulator, as a float, times the factors of M in turn.

    order RATIO        a M,  M = (x w) / y
    order RATIO32      the same, M in float32
    order RECIPROCAL   a M,  M = (x w) (1 / y)
    order STEPS        ((a x') w') (1 / y),  s' = 1 / (1 / s);  _DIVIDED ((a x') w') / y';  _JOINED (a (x' w')) (1 / y)
    order SCALES       ((a x) w) (1 / y);  _DIVIDED ((a x) w) / y;  _JOINED (a (x w)) (1 / y)

x, w, y are the scales of the operands and of the result; every operation is rounded to the rule's dtype. A bias b in
float32 is added to the accumulator in its unit x w (FLOAT_BEFORE, a + b / (x w); FUSED, b (1 / (x w)) + a rounded
once), or after it is scaled to real numbers (FLOAT_AFTER: before the last of three factors, and otherwise, where no
real number occurs, in units of y). The zero point is added to the rounded level, or before rounding.

    >>> from dataclasses import replace
    >>> from qtx_ref.spec import Rounding
    >>> rint = FloatProduct(Dtype.FLOAT32, Order.RATIO, ZeroPoint.AFTER, Rounding.HALF_EVEN, Beyond.SATURATE)
    >>> before = replace(rint, zero_point=ZeroPoint.BEFORE)
    >>> a, half, zero = torch.tensor([-1, 1, 3]), torch.tensor(0.5), torch.tensor(3)  # levels -0.5, 0.5, 1.5
    >>> multiply(a, half, rint, zero).tolist(), multiply(a, half, before, zero).tolist()
    ([3, 3, 5], [2, 4, 4])
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qtx_ref.spec import QTX, Beyond, Bias, Dtype, FloatProduct, Order, ZeroPoint

from ..quant.checks import check_integers, check_range, check_shape
from ..quant.rounding import fused_multiply_add, round_dtype, round_integer, to_integer
from ..tracing import is_traced

FACTORS = 3  # of an order in steps; before the last, the accumulator is scaled to real numbers
REACH = 2.0**64  # of one factor: its product with an accumulator stays finite in float32
LARGEST_HALF = 65504  # of float16
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def make_factors(x: Tensor, w: Tensor, y: Tensor, order: Order, dtype: Dtype) -> Tensor:
    """M, or of an order in steps its three factors on an axis before, of scales in shapes that broadcast against the
    accumulator; float32, or float64 where the dtype is that."""
    to = partial(round_dtype, dtype=Dtype.FLOAT32 if order is Order.RATIO32 else dtype)
    x, w, y = to(x), to(w), to(y)
    if order in (Order.RATIO, Order.RATIO32):
        return to(to(x * w) / y)
    one = torch.ones_like(y)  # a host's number divided is not always rounded the same way on a device
    if order is Order.RECIPROCAL:
        return to(to(x * w) * to(one / y))
    if order in (Order.STEPS, Order.STEPS_DIVIDED, Order.STEPS_JOINED):
        x, w = (to(torch.ones_like(scale) / to(torch.ones_like(scale) / scale)) for scale in (x, w))
    if order.joins:
        x, w = to(x * w), torch.ones_like(w)
    last = y if order is Order.SCALES_DIVIDED else to(one / y)
    return torch.stack(torch.broadcast_tensors(x, w, to(one / last) if order is Order.STEPS_DIVIDED else last))


def list_factors(real: Tensor, rule: FloatProduct) -> list[Tensor]:
    """The factors that an accumulator is multiplied by, in turn: float32 or float64, each in the shape of M. Raises
    ValueError where an order in steps has not three."""
    if not rule.order.in_steps:
        return [real]
    if real.ndim == 0 or len(real) != FACTORS:
        raise ValueError(f"factors of shape {tuple(real.shape)}: order {rule.order} has {FACTORS}, on the first axis")
    return list(real)


def check_factors(real: Tensor, rule: FloatProduct) -> None:
    """Raises ValueError where M (float64 or float32), or the product of its factors, is not a number in [0, 2^30), or a
    factor of several is not in (0, 2^64)."""
    if is_traced():
        return
    steps = list_factors(real, rule)
    total = torch.ones((), dtype=torch.float64, device=real.device)
    for factor in steps:
        if len(steps) > 1 and not ((factor > 0) & (factor < REACH)).all():
            ends = factor.min().item(), factor.max().item()
            raise ValueError(f"factor {ends[0]} to {ends[1]} is outside 0 to 2^64: look at the scales")
        total = total / factor if rule.order.divides and factor is steps[-1] else total * factor
    if not ((total >= 0) & (total < 2**30)).all():
        ends = total.min().item(), total.max().item()
        raise ValueError(f"multiplier {ends[0]} to {ends[1]} is outside 0 to 2^30: look at the scales")


def scale_bias(bias: Tensor, unit: Tensor, y_scale: Tensor, rule: FloatProduct, place: Bias) -> Tensor:
    """A float32 bias in real numbers as `multiply` adds it: in the accumulator's `unit`, x w, or the result's, y_scale;
    it, unit and y_scale broadcast against each other. FLOAT_BEFORE_FUSED: it and 1 / unit, on an axis before. Raises
    ValueError for a bias of integers, which `products.matmul` adds."""
    if place is Bias.INT32:
        raise ValueError(f"bias is {place}: it is added to the accumulator, in integers")
    to = partial(round_dtype, dtype=rule.dtype)
    if place is Bias.FLOAT_BEFORE:
        return to(to(bias) / to(unit))
    if place is Bias.FLOAT_BEFORE_FUSED:
        unit = to(unit)
        return torch.stack(torch.broadcast_tensors(to(bias), to(torch.ones_like(unit) / unit)))
    if rule.order.in_steps:
        return to(bias)
    y_scale = to(y_scale)
    if rule.order is Order.RECIPROCAL:
        return to(to(bias) * to(torch.ones_like(y_scale) / y_scale))
    return to(to(bias) / y_scale)


def multiply(
    a: Tensor,
    real: Tensor,
    rule: FloatProduct,
    zero_point: Tensor | int = 0,
    bias: Tensor | None = None,
    place: Bias = QTX.bias,
) -> Tensor:
    """Accumulators of any shape, int32 or int64 -> level plus zero point, int64, shaped alike.

    The level is saturated to int32. real: of `make_factors`. bias: of `scale_bias`, (O,) or as it broadcasts. Raises
    ValueError for what is no integer or does not fit the shape of a, for what float16 has not, and for a bias that is
    placed among the integers.
    """
    check_integers("accumulator", a.dtype)
    if bias is not None and place is Bias.INT32:
        raise ValueError(f"bias is {place}: it is added to the accumulator, in integers")
    fused = bias is not None and place is Bias.FLOAT_BEFORE_FUSED
    biases = [] if bias is None else list(bias) if fused else [bias]
    for what, value in (("zero point", zero_point), *(("bias", part) for part in biases)):
        if isinstance(value, Tensor):
            check_shape(what, value, a.shape, "give one, or one per column or row")
    if rule.dtype is Dtype.FLOAT16:
        check_range("accumulator", a, -LARGEST_HALF, LARGEST_HALF, "float16 ends there")
    to = partial(round_dtype, dtype=rule.dtype)
    carried = partial(round_dtype, dtype=Dtype.FLOAT64 if rule.dtype is Dtype.FLOAT64 else Dtype.FLOAT32)
    x, factors = to(a), list_factors(real, rule)
    for factor in factors:
        check_shape("multiplier", factor, a.shape, "give one, or one per column or row")
    if fused:
        x = fused_multiply_add(biases[0], biases[1], x)
    elif bias is not None and place is Bias.FLOAT_BEFORE:
        x = to(x + bias)
    for factor in factors[:2]:
        x = to(x * carried(factor))
    if bias is not None and place is Bias.FLOAT_AFTER:
        x = to(x + bias)
    for factor in factors[2:]:
        x = to(x / carried(factor) if rule.order.divides else x * carried(factor))
    looking = not is_traced()
    if looking and rule.dtype is Dtype.FLOAT16 and x.isnan().any():  # others have the range
        raise ValueError("infinity times 0, in float16: look at the scales, or take float32")
    return round_level(x, rule, zero_point)


def round_level(x: Tensor, rule: FloatProduct, zero_point: Tensor | int) -> Tensor:
    """Real levels, float32 or float64, as integers with the zero point, int64, in the shape of x; what int32 does not
    hold is saturated before a zero point that is added after, or converted as the rule says. It may round x in
    place."""
    before = rule.zero_point is ZeroPoint.BEFORE
    if before:
        x = round_dtype(x + round_dtype(torch.as_tensor(zero_point, device=x.device), rule.dtype), rule.dtype)
    level = round_integer(x, rule.rounding).double()  # float32 has no 2^31 - 1
    if rule.beyond is not Beyond.SATURATE:
        return to_integer(level, 0 if before else zero_point, rule.beyond)
    level = level.clamp(INT32_MIN, INT32_MAX).long()
    return level if before else level + zero_point


def add(parts: list[Tensor], multipliers: list[Tensor], rule: FloatProduct, zero_point: Tensor | int) -> Tensor:
    """The sum of two operands, codes less their zero points or accumulators, int32 or int64, each times its multiplier,
    as levels with the zero point; int64, in the shape they broadcast to.

    The multiplier, float32 or float64, is M in the `single` of the order, of one scale x.
    """
    to = partial(round_dtype, dtype=rule.dtype)
    first, second = (to(to(part) * to(multiplier)) for part, multiplier in zip(parts, multipliers, strict=True))
    return round_level(to(first + second), rule, zero_point)
