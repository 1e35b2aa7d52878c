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

Arrays: element by element; what multiplies or shifts an accumulator broadcasts against it, so that the result has its
shape. Integers of any integer dtype are taken where their values are within the range said, and int32 or int64 given,
as said.

    >>> from dataclasses import replace
    >>> a, M = np.int32([-6, -2, 2, 6, 10]), np.float64(0.25)
    >>> for rounding in Rounding.HALF_UP, Rounding.HALF_AWAY, Rounding.HALF_EVEN, Rounding.FLOOR:
    ...     print(f"{rounding:9}", round_by(a, M, replace(QTX.requantize, rounding=rounding)))
    half_up   [-1  0  1  2  3]
    half_away [-2 -1  1  2  3]
    half_even [-2  0  0  2  2]
    floor     [-2 -1  0  1  2]
"""

from __future__ import annotations

import numpy as np

from ..quant.checks import check_range, check_shape
from ..quant.rounding import round_dtype, round_integer
from ..spec import QTX, Bias, Fixed, FloatProduct, HighProduct, LeftShift, QuantSpec, Rounding
from . import float_product

__all__ = [
    "INT32_MAX",
    "INT32_MIN",
    "check_real",
    "check_wide",
    "doubling_high_multiply",
    "hold",
    "multiply",
    "multiply_exact",
    "multiply_high",
    "one_or_all",
    "per_column",
    "quantize_multiplier",
    "real_multiplier",
    "requantize",
    "round_by",
    "rounding_doubling_high_multiply",
    "rounding_shift_right",
    "rounds_up",
    "shift_right",
]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


# --- M as multiplier and shift ----------------------------------------------------------------------------------------


def check_real(real: np.ndarray) -> None:
    """Raises ValueError where M (float64 or float32) is not a number in [0, 2^30)."""
    real = np.asanyarray(real)
    if not ((real >= 0) & (real < 2**30)).all():
        raise ValueError(f"multiplier {real.min()} to {real.max()} is outside 0 to 2^30: look at the scales")


def quantize_multiplier(real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M (float64, in [0, 2^30)) -> multiplier and shift, int32. M below 2^-32, which moves no int32, becomes 0, 0.

    The mantissa is rounded half away from zero; where it reaches 2^31 it is halved and the shift raised. Raises
    ValueError as `check_real`.
    """
    check_real(real)
    mantissa, shift = np.frexp(np.asanyarray(real, np.float64))
    multiplier = round_integer(mantissa * 2.0**31, Rounding.HALF_AWAY).astype(np.int64)
    carried = multiplier == 2**31
    multiplier, shift = np.where(carried, 2**30, multiplier), shift + carried
    tiny = (shift < -31) | (multiplier == 0)
    return np.where(tiny, 0, multiplier).astype(np.int32), np.where(tiny, 0, shift).astype(np.int32)


def real_multiplier(
    x_scale: np.ndarray | float,
    w_scale: np.ndarray | float,
    y_scale: np.ndarray | float,
    rule: Fixed | FloatProduct = QTX.requantize,
) -> np.ndarray:
    """M = x_scale * w_scale / y_scale: in the dtypes and the order of the rule, rounded at each step.

    x_scale: one, or one per row of the accumulator, (..., N, 1). y_scale: one, or (O,). w_scale: one, (O,), or (O, 1)
    as `affine.ranges` gives them for a weight (O, I): they belong to the accumulator's columns, so M has their shape
    (O,). An order in steps gives its three factors on an axis before, (3, O). Raises ValueError for scales of another
    shape.
    """
    x, w, y = (np.asanyarray(scale) for scale in (x_scale, w_scale, y_scale))
    if y.ndim > 1 and y.size > 1 and y.shape[-1] == 1:
        raise ValueError(f"result scales of shape {y.shape}: give one, or (O,)")
    x, w, y = one_or_all(x), per_column(w), one_or_all(y)
    if isinstance(rule, FloatProduct):
        return float_product.make_factors(x, w, y, rule.order, rule.dtype)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # `check_real` refuses what is no number
        unit = round_dtype(round_dtype(x, rule.scales) * round_dtype(w, rule.scales), rule.dtype)
        return round_dtype(unit / round_dtype(y, rule.dtype), rule.dtype)


def one_or_all(scale: np.ndarray) -> np.ndarray:
    """A single scale without axes; several as they are."""
    return scale.reshape(()) if scale.size == 1 else scale


def per_column(scale: np.ndarray) -> np.ndarray:
    """Scales of a weight, one, (O,) or (O, 1), as they belong to the accumulator's columns: one without axes, or
    (O,). Raises ValueError for another shape."""
    if scale.ndim > 1 and scale.size > 1 and (scale.ndim > 2 or scale.shape[1] != 1):
        raise ValueError(f"weight scales of shape {scale.shape}: give one, (O,), or (O, 1) as of a weight (O, I)")
    return one_or_all(scale.reshape(-1))


# --- instructions -----------------------------------------------------------------------------------------------------


def rounding_doubling_high_multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """round(2 a b / 2^32) of int32, half up; the one overflow, -2^31 squared, saturates: ARM's SQRDMULH.

    gemmlowp's nudge of 1 - 2^30 for a negative product, before a division that truncates, comes to the same. Raises
    ValueError beyond int32.
    """
    check_range("factor", a, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("factor", b, INT32_MIN, INT32_MAX, "give int32 values")
    product = np.asanyarray(a, np.int64) * np.asanyarray(b, np.int64)
    return np.minimum((product + 2**30) >> 31, INT32_MAX).astype(np.int32)


def doubling_high_multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """floor(2 a b / 2^32) of int32, saturating: ARM's SQDMULH. Raises ValueError beyond int32."""
    check_range("factor", a, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("factor", b, INT32_MIN, INT32_MAX, "give int32 values")
    product = np.asanyarray(a, np.int64) * np.asanyarray(b, np.int64)
    return np.minimum(product >> 31, INT32_MAX).astype(np.int32)


def rounding_shift_right(x: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
    """floor(x / 2^exponent + 1/2): half up. int64, |x| < 2^62; exponent in [0, 62]. Raises ValueError beyond these."""
    check_range("value", x, -(2**62), 2**62, "the rounding would leave int64")
    check_range("exponent", exponent, 0, 62, "an int64 has no more bits to shift out")
    x, exponent = np.asanyarray(x, np.int64), np.asanyarray(exponent, np.int64)
    return (x + ((np.int64(1) << exponent) >> 1)) >> exponent


def shift_right(x: np.ndarray, exponent: np.ndarray | int, rounding: Rounding) -> np.ndarray:
    """x / 2^exponent rounded, exactly. int64, |x| <= 2^62; exponent in [0, 62]. Raises ValueError beyond these.

    HALF_AWAY is gemmlowp's RoundingDivideByPOT, HALF_UP a rounding shift as ARM has it (SRSHL).
    """
    if rounding is Rounding.HALF_UP:
        return rounding_shift_right(x, exponent)
    check_range("value", x, -(2**62), 2**62, "the rounding would leave int64")
    check_range("exponent", exponent, 0, 62, "an int64 has no more bits to shift out")
    x, exponent = np.asanyarray(x, np.int64), np.asanyarray(exponent, np.int64)
    whole = x >> exponent
    return whole + rounds_up(whole, x - (whole << exponent), exponent, rounding)


def rounds_up(whole: np.ndarray, rest: np.ndarray, exponent: np.ndarray, rounding: Rounding) -> np.ndarray:
    """Whether whole + rest / 2^exponent becomes whole + 1; boolean. int64, 0 <= rest < 2^exponent <= 2^62. Raises
    ValueError where the rounding is stochastic."""
    twice, unit = rest << 1, np.int64(1) << exponent
    if rounding is Rounding.FLOOR:
        return np.zeros_like(twice, bool)
    if rounding is Rounding.TOWARD_ZERO:
        return (whole < 0) & (rest > 0)
    if rounding is Rounding.HALF_UP:
        return twice >= unit
    tie = (twice == unit) & ((whole >= 0) if rounding is Rounding.HALF_AWAY else (whole & 1 == 1))
    if rounding not in (Rounding.HALF_AWAY, Rounding.HALF_EVEN):
        raise ValueError(f"rounding is {rounding}: a requantization rounds the same each time")
    return (twice > unit) | tie


def hold(what: str, value: np.ndarray, left: LeftShift) -> np.ndarray:
    """int64 values as int32 holds them, int64, in their shape. Raises ValueError where it does not and the rule
    reports."""
    if left is LeftShift.SATURATE:
        return np.clip(value, INT32_MIN, INT32_MAX)
    if left is LeftShift.WRAP:
        return value.astype(np.int32).astype(np.int64)
    check_range(what, value, INT32_MIN, INT32_MAX, "the rule keeps it in int32: look at the scales")
    return value


# --- a times multiplier and shift -------------------------------------------------------------------------------------


def check_wide(a: np.ndarray, shift: np.ndarray) -> None:
    """Raises ValueError where an int64 accumulator has more than 48 bits, or its shift is not in [-31, 7]."""
    check_range("accumulator", a, -(2**47), 2**47 - 1, "a 64-bit accumulator is requantized from 48 bits")
    check_range("shift", shift, -31, 7, "a 64-bit accumulator is scaled by less than 128")


def multiply_exact(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, rule: Fixed) -> np.ndarray:
    """2^shift a multiplier / 2^31, rounded once -> int64. An int64 accumulator (16-bit codes) must stay within 48 bits,
    its shift in [-31, 7].

    Its product of 79 bits is taken in two halves; a rule of 15 bits first rounds the multiplier to them, as TFLite's
    16x8 kernels did. Raises ValueError beyond these, and for a multiplier outside [0, 2^31).
    """
    check_range("multiplier", multiplier, 0, INT32_MAX, "use quantize_multiplier")
    a, multiplier, shift = np.asanyarray(a), np.asanyarray(multiplier, np.int64), np.asanyarray(shift, np.int64)
    if a.dtype != np.int64:
        check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
        check_range("shift", shift, -31, 30, "use quantize_multiplier")
        return shift_right(a.astype(np.int64) * multiplier, 31 - shift, rule.rounding)
    check_wide(a, shift)
    if rule.bits == 15:
        reduced = np.where(multiplier < 0x7FFF0000, (multiplier + 2**15) >> 16, 0x7FFF)
        return shift_right(a * reduced, 15 - shift, rule.rounding)
    low = (a & 0xFFFF) * multiplier
    high = (a >> 16) * multiplier + (low >> 16)  # the product is 2^16 high + the lower 16 bits of low
    whole = high >> (15 - shift)
    rest = ((high - (whole << (15 - shift))) << 16) + (low & 0xFFFF)
    return whole + rounds_up(whole, rest, 31 - shift, rule.rounding)


def multiply_high(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, rule: Fixed) -> np.ndarray:
    """By the high half of the doubled product, then a rounding shift -> int64 holding int32 values. Raises ValueError
    where a is beyond int32, the shift is not in [-31, 30], or a 2^left is beyond int32 and the rule reports."""
    shift = np.asanyarray(shift, np.int64)
    check_range("shift", shift, -31, 30, "use quantize_multiplier")
    check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
    truncated = rule.product is HighProduct.TRUNCATED
    right = np.maximum(-shift, 1 if truncated else 0)
    raised = hold("shifted accumulator", np.asanyarray(a, np.int64) << (shift + right), rule.left)
    high = (doubling_high_multiply if truncated else rounding_doubling_high_multiply)(raised, multiplier)
    return shift_right(high, right, rule.rounding)


def multiply(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, rule: Fixed) -> np.ndarray:
    """2^shift multiplier / 2^31 * a as the rule rounds it, in integers; int64 holding int32 values.

    a: int32, or int64 where the product is exact; multiplier and shift broadcast against it. Raises ValueError where
    they do not, or values are beyond their width.
    """
    check_shape("multiplier", multiplier, np.shape(a), "give one, or one per column or row")
    check_shape("shift", shift, np.shape(a), "give one, or one per column or row")
    if rule.product is HighProduct.EXACT:
        return hold("level", multiply_exact(a, multiplier, shift, rule), rule.left)
    if np.asanyarray(a).dtype == np.int64:
        raise ValueError(f"a high product, {rule.product}, is not defined for 64-bit accumulators: keep the exact one")
    return multiply_high(a, multiplier, shift, rule)


# --- from accumulators to codes ---------------------------------------------------------------------------------------


def round_by(a: np.ndarray, real: np.ndarray, rule: Fixed | FloatProduct) -> np.ndarray:
    """round(real * a) in the engine's way; int64 holding int32 values. a: int32, or int64 where the product is exact or
    a float.

    Raises ValueError as `check_real` and `multiply`, and for an accumulator that is no integer.
    """
    if isinstance(rule, Fixed):
        return multiply(a, *quantize_multiplier(real), rule)
    float_product.check_factors(real, rule)
    return float_product.multiply(a, real, rule)


def requantize(
    a: np.ndarray,
    real: np.ndarray,
    zero_point: np.ndarray,
    spec: QuantSpec,
    rule: Fixed | FloatProduct = QTX.requantize,
    bias: np.ndarray | None = None,
    place: Bias = QTX.bias,
) -> np.ndarray:
    """Accumulators a (..., N, O) -> codes (int32), shaped alike: round(real * a) + zero_point, clamped.

    real: from `real_multiplier`; it and `zero_point` (a code of `spec`) are one, or broadcast against a. bias: floats,
    as `float_product.scale_bias` gives them, which the rule adds at `place`.

    Raises:
        ValueError: a multiplier or zero point that does not fit the shape of a or is outside its range, accumulators
            beyond the width that the rule requantizes, or a bias that the rule cannot add.
    """
    check_range("zero point", zero_point, spec.code_min, spec.code_max, "it is one of the codes")
    check_shape("zero point", zero_point, np.shape(a), "give one, or one per column or row")
    if isinstance(rule, Fixed):
        if bias is not None:
            raise ValueError("a bias of floats, and a requantization in integers: add it to the accumulator")
        level = round_by(a, real, rule) + zero_point
    else:
        float_product.check_factors(real, rule)
        level = float_product.multiply(a, real, rule, zero_point, bias, place)
    return np.clip(level, spec.code_min, spec.code_max).astype(np.int32)
