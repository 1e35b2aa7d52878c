"""The two roundings that everything rests on: to an integer (`Rounding`) and to a floating-point width (`Dtype`).

>>> x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
>>> for rule in list(Rounding)[:5]:
...     print(f"{rule:12}", (round_integer(x.clone(), rule) + 0).tolist())
half_even    [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
half_away    [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]
half_up      [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
toward_zero  [-2.0, -1.0, 0.0, 0.0, 1.0, 2.0]
floor        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qtx_ref.spec import Dtype, Rounding

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
