"""The two roundings that everything rests on: to an integer (`Rounding`) and to a floating-point width (`Dtype`).

>>> x = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
>>> for rule in list(Rounding)[:5]:
...     print(f"{rule:12}", (round_integer(x, rule) + 0).tolist())
half_even    [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
half_away    [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]
half_up      [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
toward_zero  [-2.0, -1.0, 0.0, 0.0, 1.0, 2.0]
floor        [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]
"""

from __future__ import annotations

import numpy as np

from ..spec import Dtype, Rounding

__all__ = ["SMALLEST", "fused_multiply_add", "round_dtype", "round_integer", "working_dtype"]

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
