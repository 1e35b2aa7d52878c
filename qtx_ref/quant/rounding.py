"""The two roundings that everything rests on: to an integer (`Rounding`) and to a floating-point width (`Dtype`).

And what the rules make of them: from numbers to levels, which are codes not yet clamped, and from codes to numbers.

Arrays: x of any shape and float dtype; scales (float32, float64) and zero points (int32) broadcast against it; levels
are whole numbers in floats.

>>> x = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
>>> for rule in list(Rounding)[:5]:
...     print(f"{rule:12}", (round_integer(x, rule) + 0).tolist())
half_even    [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
half_away    [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]
half_up      [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
toward_zero  [-2.0, -1.0, 0.0, 0.0, 1.0, 2.0]
floor        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]

>>> from dataclasses import replace
>>> rule = replace(QTX.quantize, beyond=Beyond.WRAP32)
>>> round_level(np.float32([2.5, 3e9]), np.float32(1), np.int32(7), rule).tolist()
[9.0, -1048576.0]
"""

from __future__ import annotations

import numpy as np

from ..spec import (
    QTX,
    Beyond,
    DequantizeForm,
    DequantizeRule,
    Dtype,
    NanPolicy,
    QuantizeRule,
    QuantSpec,
    Rounding,
    ZeroPoint,
)

__all__ = [
    "SMALLEST",
    "convert",
    "decode",
    "fused_multiply_add",
    "nan_code",
    "round_dtype",
    "round_integer",
    "round_level",
    "to_integer",
    "working_dtype",
]

SMALLEST = {Dtype.FLOAT32: 2.0**-126, Dtype.FLOAT64: 2.0**-1022, Dtype.BFLOAT16: 2.0**-126, Dtype.FLOAT16: 2.0**-14}
SATURATED = 2.0**20  # beyond every code plus zero point of 16 bits


def working_dtype(dtype: Dtype, x: np.ndarray) -> Dtype:
    """`dtype`; for INPUT that of x, of any shape: FLOAT16, BFLOAT16, and FLOAT32 for any other."""
    if dtype is not Dtype.INPUT:
        return dtype
    return {"float16": Dtype.FLOAT16, "bfloat16": Dtype.BFLOAT16}.get(x.dtype.name, Dtype.FLOAT32)


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x y + z of float32, in any shapes that broadcast, rounded to nearest even once: float32.

    In float64 the product of two float32 is exact. Its sum with z is not: rounded there and then to float32, what lies
    just beside a tie would fall on it. So the sum is rounded to odd (Boldo and Melquiond 2008): where it is inexact,
    the neighbour whose last bit is 1, which is no tie of float32 and lies on the true sum's side of every one.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product, z = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + z
        back = total - product
        rest = (product - (total - back)) + (z - back)  # of the sum, exactly (Knuth's two-sum); infinity has none
        bits = np.atleast_1d(total).view(np.int64).reshape(np.shape(total))
        step = np.where((rest > 0) == (total > 0), 1, -1)  # of the magnitude, towards the true sum
        inexact = np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
        odd = np.atleast_1d(np.where(inexact, bits + step, bits)).view(np.float64)
        return odd.reshape(np.shape(total)).astype(np.float32)


def round_dtype(x: np.ndarray | float, dtype: Dtype) -> np.ndarray:
    """x, of any shape and real dtype, rounded to nearest even in `dtype`, carried in float32 (float64 for FLOAT64).

    bfloat16 is the upper half of a float32: adding 0x7FFF, and 1 more where the half to keep is odd, carries into it
    exactly where nearest even rounds up. A float64 passes through float32 on its way to 16 bits. Raises ValueError for
    what is no `Dtype`.
    """
    if dtype is Dtype.FLOAT64:
        return np.asarray(x, np.float64)
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.float32)
        if dtype is Dtype.FLOAT32:
            return x
        if dtype is Dtype.FLOAT16:
            return x.astype(np.float16).astype(np.float32)
    if dtype is not Dtype.BFLOAT16:  # a string passes for no member
        raise ValueError(f"dtype is {dtype!r}: give a Dtype")
    bits = x.view(np.uint32)
    upper = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, upper.view(np.float32))


def round_integer(x: np.ndarray, rounding: Rounding, words: np.ndarray | None = None) -> np.ndarray:
    """x, of any shape, rounded to an integer, in its dtype: float32 or float64.

    Every remainder below is exact, so no addition can push x over a tie.

    `words`: STOCHASTIC's random 32-bit words, uint32 in the shape of x: up where word < 2^32 (x - floor(x)). Raises
    ValueError where it has none, and for what is no `Rounding`.
    """
    if rounding is Rounding.HALF_EVEN:
        return np.rint(x)
    if rounding is Rounding.TOWARD_ZERO:
        return np.trunc(x)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: not a tie
        if rounding is Rounding.HALF_AWAY:
            whole = np.trunc(x)
            return whole + np.copysign((np.abs(x - whole) >= 0.5).astype(x.dtype), x)
        whole = np.floor(x)
        if rounding is Rounding.FLOOR:
            return whole
        if rounding is Rounding.HALF_UP:
            return whole + (x - whole >= 0.5).astype(x.dtype)
    if rounding is not Rounding.STOCHASTIC:  # a string passes for no member
        raise ValueError(f"rounding is {rounding!r}: give a Rounding")
    if words is None:
        raise ValueError("stochastic rounding needs words: one random 32-bit word per element (random.bits)")
    x = np.clip(x, -SATURATED, SATURATED)  # infinity has no remainder
    whole = np.floor(x)
    threshold = np.where(np.isnan(x), 0, (x - whole) * x.dtype.type(2.0**32)).astype(np.int64)
    return whole + (words.astype(np.int64) < threshold).astype(x.dtype)


# --- levels ---------------------------------------------------------------------------------------------------------


def round_level(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    rule: QuantizeRule = QTX.quantize,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """The code of x, not yet clamped: a whole number, in float32 (float64); NaN of NaN, and where an infinite
    reciprocal is multiplied by 0. `words` as in `round_integer`."""
    arithmetic = working_dtype(rule.arithmetic, x)

    def number(value: np.ndarray) -> np.ndarray:
        return round_dtype(value, arithmetic)

    x, scale = number(x), number(scale)
    added = rule.zero_point is not ZeroPoint.AFTER  # before what is converted is converted
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        factor = number(np.ones_like(scale) / scale) if rule.reciprocal else None
        if rule.zero_point is ZeroPoint.FUSED:
            assert factor is not None  # the rule has checked it
            level = round_integer(fused_multiply_add(x, factor, number(zero_point)), rule.rounding, words)
        else:
            ratio = number(x / scale) if factor is None else number(x * factor)
            if rule.zero_point is ZeroPoint.BEFORE:
                ratio = number(ratio + number(zero_point))
            level = round_integer(ratio, rule.rounding, words)
            if rule.zero_point is ZeroPoint.AFTER_FLOAT:
                level = number(level + number(zero_point))
        if rule.beyond is not Beyond.SATURATE:
            return convert(level, np.zeros_like(zero_point) if added else zero_point, rule.beyond)
        return level if added else level + np.asarray(zero_point, level.dtype)


def convert(level: np.ndarray, zero_point: np.ndarray, beyond: Beyond) -> np.ndarray:
    """`to_integer` in the dtype of level, clamped to what it holds. NaN stays NaN."""
    total = to_integer(level, zero_point, beyond)
    clamped = np.clip(total, -int(SATURATED), int(SATURATED)).astype(level.dtype)
    return np.where(np.isnan(level), level, clamped)


def to_integer(level: np.ndarray, zero_point: np.ndarray | int, beyond: Beyond) -> np.ndarray:
    """Whole numbers in floats to int32 or int64 as x86 converts them, what these do not hold, and NaN, to the least of
    them, plus a zero point, which wraps; int64, in the shape that level and zero point broadcast to."""
    bits = 32 if beyond is Beyond.WRAP32 else 64
    least = -(2 ** (bits - 1))
    with np.errstate(over="ignore"):
        total = np.where(np.abs(level) < -float(least), level, float(least)).astype(np.int64)
        total = total + np.asarray(zero_point, np.int64)  # wraps at 64 bits by itself
    return total if bits == 64 else ((total + 2**31) & (2**32 - 1)) - 2**31


def nan_code(zero_point: np.ndarray, spec: QuantSpec, rule: QuantizeRule) -> np.ndarray:
    """The code of NaN (int32, in the shape of zero_point), or the zero point where the rule raises."""
    zero = np.asarray(zero_point, np.int32)
    if rule.nan in (NanPolicy.RAISE, NanPolicy.ZERO):
        return zero
    if rule.nan is NanPolicy.RAW_ZERO:
        return np.full_like(zero, min(max(0, spec.code_min), spec.code_max))
    if rule.nan is NanPolicy.CODE_MAX:
        return np.full_like(zero, spec.code_max)
    wraps = rule.nan is NanPolicy.CONVERTED and rule.zero_point is ZeroPoint.AFTER
    return np.where(wraps & (zero < 0), spec.code_max, spec.code_min).astype(np.int32)


def decode(code: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, rule: DequantizeRule) -> np.ndarray:
    """`dequantize` without looking: of codes (integers, or whole numbers in floats), float32 (float64)."""
    arithmetic = Dtype.FLOAT32 if rule.arithmetic is Dtype.INPUT else rule.arithmetic

    def number(value: np.ndarray) -> np.ndarray:
        return round_dtype(value, arithmetic)

    scale = number(scale)
    with np.errstate(over="ignore", invalid="ignore"):  # where both parts of the expanded form are infinite, NaN
        if rule.form is DequantizeForm.EXPANDED:
            return number(number(scale * number(code)) + number(-number(zero_point) * scale))
        return number(scale * number(code - np.asarray(zero_point, np.float32 if code.dtype.kind == "f" else None)))
