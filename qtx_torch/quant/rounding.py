"""The two roundings that everything rests on: to an integer (`Rounding`) and to a floating-point width (`Dtype`).

And what the rules make of them: from numbers to levels, which are codes not yet clamped, and from codes to numbers.

Differs from the reference: multiply: a product that no compiler fuses with the sum after it.

>>> x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
>>> for rule in list(Rounding)[:5]:
...     print(f"{rule:12}", (round_integer(x.clone(), rule) + 0).tolist())
half_even    [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
half_away    [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]
half_up      [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
toward_zero  [-2.0, -1.0, 0.0, 0.0, 1.0, 2.0]
floor        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]

>>> from dataclasses import replace
>>> rule = replace(QTX.quantize, beyond=Beyond.WRAP32)
>>> round_level(torch.tensor([2.5, 3e9]), torch.tensor(1.0), torch.tensor(7), rule).tolist()
[9.0, -1048576.0]
"""

from __future__ import annotations

import math

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
    Rounding,
    ZeroPoint,
)

SMALLEST = {Dtype.FLOAT32: 2.0**-126, Dtype.FLOAT64: 2.0**-1022, Dtype.BFLOAT16: 2.0**-126, Dtype.FLOAT16: 2.0**-14}
SATURATED = 2.0**20  # beyond every code plus zero point of 16 bits


def working_dtype(dtype: Dtype, x: Tensor) -> Dtype:
    """`dtype`; for INPUT that of x: FLOAT16, BFLOAT16, and FLOAT32 for any other."""
    if dtype is not Dtype.INPUT:
        return dtype
    return {torch.float16: Dtype.FLOAT16, torch.bfloat16: Dtype.BFLOAT16}.get(x.dtype, Dtype.FLOAT32)


def fused_multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x y + z of float32, rounded to nearest even once.

    In float64 the product of two float32 is exact. Its sum with z is not: rounded there and then to float32, what lies
    just beside a tie would fall on it. So the sum is rounded to odd (Boldo and Melquiond 2008): where it is inexact,
    the neighbour whose last bit is 1, which is no tie of float32 and lies on the true sum's side of every one.
    """
    product, z = x.double() * y.double(), z.double()
    total = product + z
    back = total - product
    rest = (product - (total - back)) + (z - back)  # of the sum, exactly (Knuth's two-sum); infinity has none
    bits = total.view(torch.int64)
    step = torch.where((rest > 0) == (total > 0), 1, -1)  # of the magnitude, towards the true sum
    inexact = torch.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
    return torch.where(inexact, bits + step, bits).view(torch.float64).float()


def round_dtype(x: Tensor, dtype: Dtype) -> Tensor:
    """x rounded to nearest even in `dtype`, carried in float32 (float64 for FLOAT64).

    By bits and not by two casts, which the compiler drops as a pair. bfloat16: as in the reference. float16 keeps 10
    bits of mantissa above 2^-14 (8191 of 8192 parts, and the odd one, carry), multiples of 2^-24 below; 65520 and more
    is infinity.
    """
    if dtype is Dtype.FLOAT64:
        return x.double()
    x = x.float()
    if dtype is Dtype.FLOAT32:
        return x
    if dtype is not Dtype.BFLOAT16 and dtype is not Dtype.FLOAT16:  # a string passes for no member
        raise ValueError(f"dtype is {dtype!r}: give a Dtype")
    bits, kept = x.view(torch.int32), 16 if dtype is Dtype.BFLOAT16 else 13
    upper = bits + ((1 << (kept - 1)) - 1 + ((bits >> kept) & 1))
    y = (upper & -(1 << kept)).view(torch.float32)
    if dtype is Dtype.FLOAT16:
        y = torch.where(x.abs() < 2.0**-14, torch.round(x * 2.0**24) * 2.0**-24, y)
        y = torch.where(x.abs() >= 65520, torch.copysign(torch.full_like(x, math.inf), x), y)
    return torch.where(torch.isnan(x), x, y)


def round_integer(x: Tensor, rounding: Rounding, words: Tensor | None = None) -> Tensor:
    """x rounded to an integer, in its dtype; HALF_EVEN works in place. Every remainder below is exact, so no addition
    can push x over a tie.

    `words`: STOCHASTIC's random 32-bit words, the shape of x: up where word < 2^32 (x - floor(x)).
    """
    if rounding is Rounding.HALF_EVEN:
        return x.round_()
    if rounding is Rounding.TOWARD_ZERO:
        return torch.trunc(x)
    if rounding is Rounding.HALF_AWAY:
        whole = torch.trunc(x)
        return whole + torch.copysign(((x - whole).abs() >= 0.5).to(x.dtype), x)
    whole = torch.floor(x)
    if rounding is Rounding.FLOOR:
        return whole
    if rounding is Rounding.HALF_UP:
        return whole + (x - whole >= 0.5).to(x.dtype)
    if rounding is not Rounding.STOCHASTIC:  # a string passes for no member
        raise ValueError(f"rounding is {rounding!r}: give a Rounding")
    if words is None:
        raise ValueError("stochastic rounding needs words: one random 32-bit word per element (random.bits)")
    x = x.clamp(-SATURATED, SATURATED)  # infinity has no remainder
    whole = torch.floor(x)
    threshold = torch.where(torch.isnan(x), 0, (x - whole) * 2.0**32).long()
    return whole + (words.long() < threshold).to(x.dtype)


# --- levels ---------------------------------------------------------------------------------------------------------


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
    total = torch.where(level.abs() < -float(least), level, float(least)).long()
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
