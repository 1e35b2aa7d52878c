"""From numbers to levels, which are codes not yet clamped, and from codes to numbers, as the rules have it.

Arrays: x of any shape and float dtype; scales (float32, float64) and zero points (int32) broadcast against it; levels
are whole numbers in floats.

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
    ZeroPoint,
)
from .rounding import SATURATED, fused_multiply_add, round_dtype, round_integer, working_dtype

__all__ = ["convert", "decode", "nan_code", "round_level", "to_integer"]


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
    held = (level >= float(least)) & (level < -float(least))
    with np.errstate(over="ignore"):
        total = np.where(held, level, 0).astype(np.int64) + np.where(held, 0, np.int64(least))
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
