"""Requantization: an accumulator a times a positive real M, as an integer.

Fixed point writes M = 2^shift * multiplier / 2^31 with multiplier in [2^30, 2^31): a 32-bit mantissa, a Q31 number in
[1/2, 1). The product of two 32-bit integers is then exact in 64 bits, and engines differ in how they bring it back:

    product EXACT      R(2^shift a multiplier / 2^31)                         one rounding
    product HALF_UP    R(floor(2^left a multiplier / 2^31 + 1/2) / 2^right)   two: the high half, and what is left
    product TRUNCATED  R(floor(2^left a multiplier / 2^31) / 2^right)

R is the rule's rounding, left = max(shift, 0), right = max(-shift, 0); TRUNCATED shifts one more to the left and to the
right where right would be 0, so that it always rounds. Of 64-bit accumulators, whose product is EXACT, a rule of 15
bits rounds the multiplier to that many. `float_product` has the rules that multiply floats.
Sources: gemmlowp's fixedpoint.h, TFLite's MultiplyByQuantizedMultiplier, XNNPACK's rndnu kernels.

    >>> from dataclasses import replace
    >>> a, M = torch.tensor([-6, -2, 2, 6, 10], dtype=torch.int32), torch.tensor(0.25, dtype=torch.float64)
    >>> for rounding in Rounding.HALF_UP, Rounding.HALF_AWAY, Rounding.HALF_EVEN, Rounding.FLOOR:
    ...     print(f"{rounding:9}", round_by(a, M, replace(QTX.requantize, rounding=rounding)).tolist())
    half_up   [-1, 0, 1, 2, 3]
    half_away [-2, -1, 1, 2, 3]
    half_even [-2, 0, 0, 2, 2]
    floor     [-2, -1, 0, 1, 2]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtx_ref.spec import QTX, Bias, Fixed, FloatProduct, HighProduct, LeftShift, QuantSpec, Rounding

from ..quant.checks import check_range, check_shape
from ..quant.rounding import round_dtype
from ..tracing import is_traced
from . import float_product

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


# --- M as multiplier and shift ----------------------------------------------------------------------------------------


def check_real(real: Tensor) -> None:
    """Raises ValueError where M (float64 or float32) is not a number in [0, 2^30)."""
    if is_traced():
        return
    if not ((real >= 0) & (real < 2**30)).all():
        raise ValueError(
            f"multiplier {real.min().item()} to {real.max().item()} is outside 0 to 2^30: look at the scales"
        )


def quantize_multiplier(real: Tensor) -> tuple[Tensor, Tensor]:
    """M (float64, in [0, 2^30)) -> multiplier and shift, int32. M below 2^-32, which moves no int32, becomes 0, 0.

    The mantissa is rounded half away from zero; where it reaches 2^31 it is halved and the shift raised. Raises
    ValueError as `check_real`.
    """
    check_real(real)
    bits = real.double().view(torch.int64)  # torch.frexp of float64 does not compile on AVX-512 (torch 2.13)
    shift = (bits >> 52) - 1022
    multiplier = ((bits & (2**52 - 1) | 2**52) + 2**21) >> 22  # from 53 bits of mantissa to 31
    carried = multiplier == 2**31
    multiplier, shift = torch.where(carried, 2**30, multiplier), shift + carried
    tiny = shift < -31  # 0 too: its exponent bits are 0
    return multiplier.masked_fill(tiny, 0).int(), shift.masked_fill(tiny, 0).int()


def real_multiplier(
    x_scale: Tensor | float,
    w_scale: Tensor | float,
    y_scale: Tensor | float,
    rule: Fixed | FloatProduct = QTX.requantize,
) -> Tensor:
    """M = x_scale * w_scale / y_scale: in the dtypes and the order of the rule, rounded at each step.

    x_scale: one, or one per row of the accumulator, (..., N, 1). y_scale: one, or (O,). w_scale: one, (O,), or (O, 1)
    as `affine.ranges` gives them for a weight (O, I): they belong to the accumulator's columns, so M has their shape
    (O,). An order in steps gives its three factors on an axis before, (3, O). Raises ValueError for scales of another
    shape.
    """
    x, w, y = (
        scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        for scale in (x_scale, w_scale, y_scale)
    )
    if y.ndim > 1 and y.numel() > 1 and y.shape[-1] == 1:
        raise ValueError(f"result scales of shape {tuple(y.shape)}: give one, or (O,)")
    x, w, y = one_or_all(x), per_column(w), one_or_all(y)
    if isinstance(rule, FloatProduct):
        return float_product.make_factors(x, w, y, rule.order, rule.dtype)
    unit = round_dtype(round_dtype(x, rule.scales) * round_dtype(w, rule.scales), rule.dtype)
    return round_dtype(unit / round_dtype(y, rule.dtype), rule.dtype)


def one_or_all(scale: Tensor) -> Tensor:
    """A single scale without axes; several as they are."""
    return scale.reshape(()) if scale.numel() == 1 else scale


def per_column(scale: Tensor) -> Tensor:
    """Scales of a weight, one, (O,) or (O, 1), as they belong to the accumulator's columns: one without axes, or
    (O,). Raises ValueError for another shape."""
    if scale.ndim > 1 and scale.numel() > 1 and (scale.ndim > 2 or scale.shape[1] != 1):
        raise ValueError(
            f"weight scales of shape {tuple(scale.shape)}: give one, (O,), or (O, 1) as of a weight (O, I)"
        )
    return one_or_all(scale.reshape(-1))


# --- instructions -----------------------------------------------------------------------------------------------------


def rounding_doubling_high_multiply(a: Tensor, b: Tensor) -> Tensor:
    """round(2 a b / 2^32) of int32, half up; the one overflow, -2^31 squared, saturates: ARM's SQRDMULH.

    gemmlowp's nudge of 1 - 2^30 for a negative product, before a division that truncates, comes to the same. Raises
    ValueError beyond int32.
    """
    check_range("factor", a, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("factor", b, INT32_MIN, INT32_MAX, "give int32 values")
    product = a.long() * b.long()
    return ((product + 2**30) >> 31).clamp(max=INT32_MAX).int()


def doubling_high_multiply(a: Tensor, b: Tensor) -> Tensor:
    """floor(2 a b / 2^32) of int32, saturating: ARM's SQDMULH. Raises ValueError beyond int32."""
    check_range("factor", a, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("factor", b, INT32_MIN, INT32_MAX, "give int32 values")
    product = a.long() * b.long()
    return (product >> 31).clamp(max=INT32_MAX).int()


def rounding_shift_right(x: Tensor, exponent: Tensor | int) -> Tensor:
    """floor(x / 2^exponent + 1/2): half up. int64, |x| < 2^62; exponent in [0, 62]. Raises ValueError beyond these."""
    check_range("value", x, -(2**62), 2**62, "the rounding would leave int64")
    check_range("exponent", exponent, 0, 62, "an int64 has no more bits to shift out")
    x, exponent = x.long(), torch.as_tensor(exponent, device=x.device).long()
    return (x + ((torch.ones_like(exponent) << exponent) >> 1)) >> exponent


def shift_right(x: Tensor, exponent: Tensor | int, rounding: Rounding) -> Tensor:
    """x / 2^exponent rounded, exactly. int64, |x| <= 2^62; exponent in [0, 62]. Raises ValueError beyond these.

    HALF_AWAY is gemmlowp's RoundingDivideByPOT, HALF_UP a rounding shift as ARM has it (SRSHL).
    """
    if rounding is Rounding.HALF_UP:
        return rounding_shift_right(x, exponent)
    check_range("value", x, -(2**62), 2**62, "the rounding would leave int64")
    check_range("exponent", exponent, 0, 62, "an int64 has no more bits to shift out")
    x, exponent = x.long(), torch.as_tensor(exponent, device=x.device).long()
    whole = x >> exponent
    return whole + rounds_up(whole, x - (whole << exponent), exponent, rounding)


def rounds_up(whole: Tensor, rest: Tensor, exponent: Tensor, rounding: Rounding) -> Tensor:
    """Whether whole + rest / 2^exponent becomes whole + 1; boolean. int64, 0 <= rest < 2^exponent <= 2^62. Raises
    ValueError where the rounding is stochastic."""
    twice, unit = rest << 1, torch.ones_like(exponent) << exponent
    if rounding is Rounding.FLOOR:
        return torch.zeros_like(twice, dtype=torch.bool)
    if rounding is Rounding.TOWARD_ZERO:
        return (whole < 0) & (rest > 0)
    if rounding is Rounding.HALF_UP:
        return twice >= unit
    tie = (twice == unit) & ((whole >= 0) if rounding is Rounding.HALF_AWAY else (whole & 1 == 1))
    if rounding not in (Rounding.HALF_AWAY, Rounding.HALF_EVEN):
        raise ValueError(f"rounding is {rounding}: a requantization rounds the same each time")
    return (twice > unit) | tie


def hold(what: str, value: Tensor, left: LeftShift) -> Tensor:
    """int64 values as int32 holds them, int64, in their shape. Raises ValueError where it does not and the rule
    reports."""
    if left is LeftShift.SATURATE:
        return value.clamp(INT32_MIN, INT32_MAX)
    if left is LeftShift.WRAP:
        return value.int().long()
    check_range(what, value, INT32_MIN, INT32_MAX, "the rule keeps it in int32: look at the scales")
    return value


# --- a times multiplier and shift -------------------------------------------------------------------------------------


def check_wide(a: Tensor, shift: Tensor) -> None:
    """Raises ValueError where an int64 accumulator has more than 48 bits, or its shift is not in [-31, 7]."""
    check_range("accumulator", a, -(2**47), 2**47 - 1, "a 64-bit accumulator is requantized from 48 bits")
    check_range("shift", shift, -31, 7, "a 64-bit accumulator is scaled by less than 128")


def multiply_exact(a: Tensor, multiplier: Tensor, shift: Tensor, rule: Fixed) -> Tensor:
    """2^shift a multiplier / 2^31, rounded once -> int64. An int64 accumulator (16-bit codes) must stay within 48 bits,
    its shift in [-31, 7].

    Its product of 79 bits is taken in two halves; a rule of 15 bits first rounds the multiplier to them, as TFLite's
    16x8 kernels did. Raises ValueError beyond these, and for a multiplier outside [0, 2^31).
    """
    check_range("multiplier", multiplier, 0, INT32_MAX, "use quantize_multiplier")
    multiplier, shift = multiplier.long(), shift.long()
    if a.dtype != torch.int64:
        check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
        check_range("shift", shift, -31, 30, "use quantize_multiplier")
        return shift_right(a.long() * multiplier, 31 - shift, rule.rounding)
    check_wide(a, shift)
    if rule.bits == 15:
        reduced = torch.where(multiplier < 0x7FFF0000, (multiplier + 2**15) >> 16, 0x7FFF)
        return shift_right(a * reduced, 15 - shift, rule.rounding)
    low = (a & 0xFFFF) * multiplier
    high = (a >> 16) * multiplier + (low >> 16)  # the product is 2^16 high + the lower 16 bits of low
    whole = high >> (15 - shift)
    rest = ((high - (whole << (15 - shift))) << 16) + (low & 0xFFFF)
    return whole + rounds_up(whole, rest, 31 - shift, rule.rounding)


def multiply_high(a: Tensor, multiplier: Tensor, shift: Tensor, rule: Fixed) -> Tensor:
    """By the high half of the doubled product, then a rounding shift -> int64 holding int32 values. Raises ValueError
    where a is beyond int32, the shift is not in [-31, 30], or a 2^left is beyond int32 and the rule reports."""
    shift = shift.long()
    check_range("shift", shift, -31, 30, "use quantize_multiplier")
    check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
    truncated = rule.product is HighProduct.TRUNCATED
    right = (-shift).clamp(min=1 if truncated else 0)
    raised = hold("shifted accumulator", a.long() << (shift + right), rule.left)
    high = (doubling_high_multiply if truncated else rounding_doubling_high_multiply)(raised, multiplier)
    return shift_right(high, right, rule.rounding)


def multiply(a: Tensor, multiplier: Tensor, shift: Tensor, rule: Fixed) -> Tensor:
    """2^shift multiplier / 2^31 * a as the rule rounds it, in integers; int64 holding int32 values.

    a: int32, or int64 where the product is exact; multiplier and shift broadcast against it. Raises ValueError where
    they do not, or values are beyond their width.
    """
    check_shape("multiplier", multiplier, a.shape, "give one, or one per column or row")
    check_shape("shift", shift, a.shape, "give one, or one per column or row")
    if rule.product is HighProduct.EXACT:
        return hold("level", multiply_exact(a, multiplier, shift, rule), rule.left)
    if a.dtype == torch.int64:
        raise ValueError(f"a high product, {rule.product}, is not defined for 64-bit accumulators: keep the exact one")
    return multiply_high(a, multiplier, shift, rule)


# --- from accumulators to codes ---------------------------------------------------------------------------------------


def round_by(a: Tensor, real: Tensor, rule: Fixed | FloatProduct) -> Tensor:
    """round(real * a) in the engine's way; int64 holding int32 values. a: int32, or int64 where the product is exact or
    a float.

    Raises ValueError as `check_real` and `multiply`, and for an accumulator that is no integer.
    """
    if isinstance(rule, Fixed):
        return multiply(a, *quantize_multiplier(real), rule)
    float_product.check_factors(real, rule)
    return float_product.multiply(a, real, rule)


def requantize(
    a: Tensor,
    real: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    rule: Fixed | FloatProduct = QTX.requantize,
    bias: Tensor | None = None,
    place: Bias = QTX.bias,
) -> Tensor:
    """Accumulators a (..., N, O) -> codes (int32), shaped alike: round(real * a) + zero_point, clamped.

    real: from `real_multiplier`; it and `zero_point` (a code of `spec`) are one, or broadcast against a. bias: floats,
    as `float_product.scale_bias` gives them, which the rule adds at `place`.

    Raises:
        ValueError: a multiplier or zero point that does not fit the shape of a or is outside its range, accumulators
            beyond the width that the rule requantizes, or a bias that the rule cannot add.
    """
    check_range("zero point", zero_point, spec.code_min, spec.code_max, "it is one of the codes")
    check_shape("zero point", zero_point, a.shape, "give one, or one per column or row")
    if isinstance(rule, Fixed):
        if bias is not None:
            raise ValueError("a bias of floats, and a requantization in integers: add it to the accumulator")
        level = round_by(a, real, rule) + zero_point
    else:
        float_product.check_factors(real, rule)
        level = float_product.multiply(a, real, rule, zero_point, bias, place)
    return level.clamp(spec.code_min, spec.code_max).int()
