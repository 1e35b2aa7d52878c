"""Requantization: an accumulator a times a positive real M, as an integer.

Fixed point writes M = 2^shift * multiplier / 2^31 with multiplier in [2^30, 2^31): a 32-bit mantissa, a Q31 number in
[1/2, 1). The product of two 32-bit integers is then exact in 64 bits, and engines differ in how they bring it back:

    product EXACT      floor((a multiplier + 2^(30 - shift)) / 2^(31 - shift))            one rounding, half up
    product HALF_UP    round(round(2^left a multiplier / 2^31) / 2^right)                 two: half up, then half away
    product TRUNCATED  round(floor(2^left a multiplier / 2^31) / 2^right)                 truncated, then half up

where left = max(shift, 0), right = max(-shift, 0); TRUNCATED shifts right by at least 1 so that it always
rounds. Of 64-bit accumulators a rule with 15 bits rounds the multiplier to that many.
Sources: gemmlowp's fixedpoint.h, TFLite's MultiplyByQuantizedMultiplier, XNNPACK's rndnu kernels.

Arrays: element by element; what multiplies or shifts an accumulator broadcasts against it, so that the result has its
shape. Integers of any integer dtype are taken where their values are within the range said, and int32 or int64 given,
as said.

    >>> M = np.float64(0.25)
    >>> round_by(np.int32([-6, -2, 2, 6, 10]), M, QTX.requantize).tolist()
    [-1, 0, 1, 2, 3]
"""

from __future__ import annotations

import numpy as np

from ..quant.checks import check_integers, check_range, check_shape
from ..quant.rounding import round_integer
from ..spec import QTX, Dtype, Fixed, FloatProduct, HighProduct, QuantSpec, Rounding

__all__ = [
    "INT32_MAX",
    "INT32_MIN",
    "check_real",
    "check_wide",
    "doubling_high_multiply",
    "multiply",
    "multiply_high_half_up",
    "multiply_one_rounding",
    "multiply_one_rounding_narrow",
    "multiply_two_roundings",
    "one_or_all",
    "per_column",
    "quantize_multiplier",
    "real_multiplier",
    "requantize",
    "round_by",
    "round_float",
    "rounding_divide_by_power_of_two",
    "rounding_doubling_high_multiply",
    "rounding_shift_right",
]

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


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


def rounding_divide_by_power_of_two(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """round(x / 2^exponent) of int32, half away from zero. exponent in [0, 31]. Raises ValueError beyond these."""
    check_range("value", x, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("exponent", exponent, 0, 31, "an int32 has no more bits to shift out")
    x, exponent = np.asanyarray(x, np.int64), np.asanyarray(exponent, np.int64)
    half = (np.int64(1) << exponent) >> 1
    magnitude = (np.abs(x) + half) >> exponent
    return np.where(x < 0, -magnitude, magnitude).astype(np.int32)


def rounding_shift_right(x: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
    """floor(x / 2^exponent + 1/2): half up. int64, |x| < 2^62; exponent in [0, 62]. Raises ValueError beyond these."""
    check_range("value", x, -(2**62), 2**62, "the rounding would leave int64")
    check_range("exponent", exponent, 0, 62, "an int64 has no more bits to shift out")
    x, exponent = np.asanyarray(x, np.int64), np.asanyarray(exponent, np.int64)
    return (x + ((np.int64(1) << exponent) >> 1)) >> exponent


def multiply_one_rounding(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """FIXED_ONE -> int64. An int64 accumulator (16-bit codes) must stay within 48 bits, its shift in [-31, 7]; the
    product of 79 bits is then taken in two halves. Raises ValueError beyond these, and for a multiplier outside [0,
    2^31)."""
    check_range("multiplier", multiplier, 0, INT32_MAX, "use quantize_multiplier")
    multiplier, shift = np.asanyarray(multiplier, np.int64), np.asanyarray(shift, np.int64)
    if np.asanyarray(a).dtype != np.int64:
        check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
        check_range("shift", shift, -31, 30, "use quantize_multiplier")
        return rounding_shift_right(np.asanyarray(a, np.int64) * multiplier, 31 - shift)
    check_wide(a, shift)
    low = (a & 0xFFFF) * multiplier + (np.int64(1) << (30 - shift))  # with the half
    return ((a >> 16) * multiplier + (low >> 16)) >> (15 - shift)


def multiply_one_rounding_narrow(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """FIXED_ONE_NARROW -> int64: as FIXED_ONE, but with an int64 accumulator the multiplier is rounded to 15 bits, as
    in TFLite's 16x8 kernels. Raises ValueError as `multiply_one_rounding`."""
    if np.asanyarray(a).dtype != np.int64:
        return multiply_one_rounding(a, multiplier, shift)
    check_range("multiplier", multiplier, 0, INT32_MAX, "use quantize_multiplier")
    multiplier, shift = np.asanyarray(multiplier, np.int64), np.asanyarray(shift, np.int64)
    check_wide(a, shift)
    reduced = np.where(multiplier < 0x7FFF0000, (multiplier + 2**15) >> 16, 0x7FFF)
    return rounding_shift_right(a * reduced, 15 - shift)


def check_wide(a: np.ndarray, shift: np.ndarray) -> None:
    """Raises ValueError where an int64 accumulator has more than 48 bits, or its shift is not in [-31, 7]."""
    check_range("accumulator", a, -(2**47), 2**47 - 1, "a 64-bit accumulator is requantized from 48 bits")
    check_range("shift", shift, -31, 7, "a 64-bit accumulator is scaled by less than 128")


def multiply_two_roundings(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """FIXED_TWO -> int32. a * 2^left must fit int32, else ValueError; engines leave it undefined."""
    shift = np.asanyarray(shift, np.int64)
    check_range("shift", shift, -31, 30, "use quantize_multiplier")
    check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
    raised = np.asanyarray(a, np.int64) << np.maximum(shift, 0)
    check_range("shifted accumulator", raised, INT32_MIN, INT32_MAX, "two roundings need a * 2^shift in int32")
    return rounding_divide_by_power_of_two(rounding_doubling_high_multiply(raised, multiplier), np.maximum(-shift, 0))


def multiply_high_half_up(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """HIGH_HALF_UP -> int64 holding int32 values. The left shift saturates. Raises ValueError where a is beyond int32
    or the shift is not in [-31, 30]."""
    shift = np.asanyarray(shift, np.int64)
    check_range("shift", shift, -31, 30, "use quantize_multiplier")
    check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
    right = np.maximum(-shift, 1)
    raised = np.clip(np.asanyarray(a, np.int64) << (shift + right), INT32_MIN, INT32_MAX)
    return rounding_shift_right(doubling_high_multiply(raised, multiplier), right)


def real_multiplier(
    x_scale: np.ndarray | float,
    w_scale: np.ndarray | float,
    y_scale: np.ndarray | float,
    rule: Fixed | FloatProduct = QTX.requantize,
) -> np.ndarray:
    """M = x_scale * w_scale / y_scale: in the dtype of the rule, rounded at each step.

    x_scale: one, or one per row of the accumulator, (..., N, 1). y_scale: one, or (O,). w_scale: one, (O,), or (O, 1)
    as `affine.ranges` gives them for a weight (O, I): they belong to the accumulator's columns, so M has their shape
    (O,). Raises ValueError for scales of another shape.
    """
    kind = np.float64 if rule.dtype is Dtype.FLOAT64 else np.float32
    x, w, y = (np.asanyarray(scale, kind) for scale in (x_scale, w_scale, y_scale))
    if y.ndim > 1 and y.size > 1 and y.shape[-1] == 1:
        raise ValueError(f"result scales of shape {y.shape}: give one, or (O,)")
    return one_or_all(x) * per_column(w) / one_or_all(y)


def one_or_all(scale: np.ndarray) -> np.ndarray:
    """A single scale without axes; several as they are."""
    return scale.reshape(()) if scale.size == 1 else scale


def per_column(scale: np.ndarray) -> np.ndarray:
    """Scales of a weight, one, (O,) or (O, 1), as they belong to the accumulator's columns: one without axes, or
    (O,). Raises ValueError for another shape."""
    if scale.ndim > 1 and scale.size > 1 and (scale.ndim > 2 or scale.shape[1] != 1):
        raise ValueError(f"weight scales of shape {scale.shape}: give one, (O,), or (O, 1) as of a weight (O, I)")
    return one_or_all(scale.reshape(-1))


def multiply(a: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, rule: Fixed) -> np.ndarray:
    """round(2^shift multiplier / 2^31 * a) in the engine's way, in integers; int64, saturated to int32.

    a: int32, or int64 where one rounding; multiplier and shift broadcast against it. Raises ValueError where they do
    not, or values are beyond their width.
    """
    check_shape("multiplier", multiplier, np.shape(a), "give one, or one per column or row")
    check_shape("shift", shift, np.shape(a), "give one, or one per column or row")
    if np.asanyarray(a).dtype == np.int64 and rule.product is not HighProduct.EXACT:
        raise ValueError(f"a high product, {rule.product}, is not defined for 64-bit accumulators: keep the exact one")
    if rule.product is HighProduct.HALF_UP:
        level = multiply_two_roundings(a, multiplier, shift)
    elif rule.product is HighProduct.TRUNCATED:
        level = multiply_high_half_up(a, multiplier, shift)
    elif rule.bits == 15:
        level = multiply_one_rounding_narrow(a, multiplier, shift)
    else:
        level = multiply_one_rounding(a, multiplier, shift)
    return np.clip(level, INT32_MIN, INT32_MAX).astype(np.int64)


def round_float(x: np.ndarray, rule: FloatProduct) -> np.ndarray:
    """float32 -> int64, saturated to int32, ties as a float requantization has them."""
    level = round_integer(x, rule.rounding).astype(np.float64)  # float32 has no 2^31 - 1
    return np.clip(level, INT32_MIN, INT32_MAX).astype(np.int64)


def round_by(a: np.ndarray, real: np.ndarray, rule: Fixed | FloatProduct) -> np.ndarray:
    """round(real * a) in the engine's way; int64, saturated to int32. a: int32, or int64 where one rounding or a float.

    Raises ValueError as `check_real` and `multiply`, and for an accumulator that is no integer.
    """
    if isinstance(rule, Fixed):
        return multiply(a, *quantize_multiplier(real), rule)
    check_real(real)
    a = np.asanyarray(a)
    check_integers("accumulator", a.dtype)
    check_shape("multiplier", real, a.shape, "give one, or one per column or row")
    return round_float(a.astype(np.float32) * np.asanyarray(real, np.float32), rule)


def requantize(
    a: np.ndarray,
    real: np.ndarray,
    zero_point: np.ndarray,
    spec: QuantSpec,
    rule: Fixed | FloatProduct = QTX.requantize,
) -> np.ndarray:
    """Accumulators a (..., N, O) -> codes (int32), shaped alike: round(real * a) + zero_point, clamped.

    real: from `real_multiplier`; it and `zero_point` (a code of `spec`) are one, or broadcast against a.

    Raises:
        ValueError: a multiplier or zero point that does not fit the shape of a or is outside its range, or accumulators
            beyond the width that the rule requantizes.
    """
    check_range("zero point", zero_point, spec.code_min, spec.code_max, "it is one of the codes")
    check_shape("zero point", zero_point, np.shape(a), "give one, or one per column or row")
    level = round_by(a, real, rule) + zero_point
    return np.clip(level, spec.code_min, spec.code_max).astype(np.int32)
