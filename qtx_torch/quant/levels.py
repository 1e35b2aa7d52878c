"""From numbers to levels, which are codes not yet clamped, and from codes to numbers, as the rules have it.

Differs from the reference: multiply: a product that no compiler fuses with the sum after it.

    >>> from dataclasses import replace
    >>> rule = replace(QTX.quantize, beyond=Beyond.WRAP32)
    >>> round_level(torch.tensor([2.5, 3e9]), torch.tensor(1.0), torch.tensor(7), rule).tolist()
    [9.0, -1048576.0]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtx_ref.spec import (
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


def round_level(
    x: Tensor, scale: Tensor, zero_point: Tensor, rule: QuantizeRule = QTX.quantize, words: Tensor | None = None
) -> Tensor:
    """The code of x, not yet clamped: a whole number, in float32 (float64); NaN of NaN, and where an infinite
    reciprocal is multiplied by 0. `words` as in `round_integer`."""
    arithmetic = working_dtype(rule.arithmetic, x)

    def number(value: Tensor) -> Tensor:
        return round_dtype(value, arithmetic)

    x, scale = number(x), number(scale)
    added = rule.zero_point is not ZeroPoint.AFTER  # before what is converted is converted
    factor = number(torch.ones_like(scale) / scale) if rule.reciprocal else None
    if rule.zero_point is ZeroPoint.FUSED:
        level = round_integer(fused_multiply_add(x, factor, number(zero_point)), rule.rounding, words)
    else:
        before = rule.zero_point is ZeroPoint.BEFORE
        ratio = number(x / scale) if factor is None else number(multiply(x, factor) if before else x * factor)
        if before:
            ratio = number(ratio.add_(number(zero_point)))
        level = round_integer(ratio, rule.rounding, words)
        if rule.zero_point is ZeroPoint.AFTER_FLOAT:
            level = number(level.add_(number(zero_point)))
    if rule.beyond is not Beyond.SATURATE:
        return convert(level, torch.zeros_like(zero_point) if added else zero_point, rule.beyond)
    return level if added else level.add_(zero_point.to(level.dtype))


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x y of float32 (float64) before a sum: by way of float64, where it is exact, for else Triton makes one fused
    multiply-add of the two."""
    return (x.double() * y.double()).to(x.dtype)


def convert(level: Tensor, zero_point: Tensor, beyond: Beyond) -> Tensor:
    """`to_integer` in the dtype of level, clamped to what it holds. NaN stays NaN."""
    clamped = to_integer(level, zero_point, beyond).clamp(-int(SATURATED), int(SATURATED)).to(level.dtype)
    return torch.where(torch.isnan(level), level, clamped)


def to_integer(level: Tensor, zero_point: Tensor | int, beyond: Beyond) -> Tensor:
    """Whole numbers in floats to int32 or int64 as x86 converts them, what these do not hold, and NaN, to the least of
    them, plus a zero point, which wraps; int64, in the shape that level and zero point broadcast to."""
    bits = 32 if beyond is Beyond.WRAP32 else 64
    least = -(2 ** (bits - 1))
    held = (level >= float(least)) & (level < -float(least))
    total = torch.where(held, level, 0).long().masked_fill(~held, least)
    total = total + (zero_point.long() if isinstance(zero_point, Tensor) else zero_point)  # wraps at 64 bits by itself
    return total if bits == 64 else ((total + 2**31) & (2**32 - 1)) - 2**31


def nan_code(zero_point: Tensor, spec: QuantSpec, rule: QuantizeRule) -> Tensor:
    """The code of NaN (int32, in the shape of zero_point), or the zero point where the rule raises."""
    zero = zero_point.int()
    if rule.nan in (NanPolicy.RAISE, NanPolicy.ZERO):
        return zero
    if rule.nan is NanPolicy.RAW_ZERO:
        return torch.full_like(zero, min(max(0, spec.code_min), spec.code_max))
    if rule.nan is NanPolicy.CODE_MAX:
        return torch.full_like(zero, spec.code_max)
    if rule.nan is NanPolicy.CONVERTED and rule.zero_point is ZeroPoint.AFTER:
        return torch.where(zero < 0, spec.code_max, spec.code_min).int()
    return torch.full_like(zero, spec.code_min)


def decode(code: Tensor, scale: Tensor, zero_point: Tensor, rule: DequantizeRule) -> Tensor:
    """`dequantize` without looking: of codes (integers, or whole numbers in floats), float32 (float64)."""
    arithmetic = Dtype.FLOAT32 if rule.arithmetic is Dtype.INPUT else rule.arithmetic

    def number(value: Tensor) -> Tensor:
        return round_dtype(value, arithmetic)

    scale = number(scale)
    if rule.form is DequantizeForm.EXPANDED:
        return number(number(multiply(number(code), scale)) + number(multiply(-number(zero_point), scale)))
    return number(scale * number(code - zero_point))
