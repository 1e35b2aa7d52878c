"""Bit lengths, roots and divisions by way of float64, in the loops that `torch.compile` makes.

Not in the reference: it has no compiler, and divides integers.

A compiler for CPUs has no vector division of int64, and unrolls Newton's loop for every element. Float64 has both, and
what it leaves open is settled here exactly: each function gives what `ops` gives by integers, over the whole domain it
names. `ops` calls them under `torch.compile` alone: eager, and `strict`, has no float.

Floors, per value: a store of 8 bytes, and about 10 vector operations of 8 lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

HIGH_BITS = 22  # of the first part of a reciprocal: times an int32 exact, for 22 + 31 bits are a float64's 53


def bit_length(x: Tensor) -> Tensor:
    """The number of bits of x, int64 in [1, 2^62).

    A float64's exponent, of x without those ones that follow a one: its second bit is then 0, so that rounding to 53
    bits cannot carry it to the next power of two.
    """
    return ((x & ~(x >> 1)).double().view(torch.int64) >> 52) - 1022


def square_root(x: Tensor) -> Tensor:
    """floor(sqrt(x)), int64, for x in [2^60, 2^62).

    Let r be the floor. x as float64 is off by 2^8 at most (2^7 below 2^61), hence its root by 2^-23.4 at most; a
    float64 near it is a multiple of 2^-22, of which the integer r is one. So the rounded root is not below r: x >= r^2,
    and what is less than half a step below r rounds to r. It is not above r + 1 either: x < (r + 1)^2. The one question
    left, r or r + 1, is asked of integers.
    """
    root = x.double().sqrt().long()
    return root - (root * root > x).long()


def store(x: Tensor) -> Tensor:
    """x, one number per row, in memory: inductor would compute it anew for every vector of the row, with two divisions.
    What is viewed by strides has to be there."""
    return x.as_strided(x.shape, x.stride())


def half_up_shifted(numerator: Tensor, shift: Tensor | int, denominator: Tensor) -> Tensor:
    """floor(n 2^shift / d + 1/2), int64, of integers: |n| < 2^31, shift in [0, 62], d > 0; one d per row.

    Let q = n 2^shift / d. Holds where |q| <= 2^28 (1 + 2^-10) and d < 2^31, or |n| 2^shift < 2^53 (1 + 2^-10) and
    d < 2^49.

    2^shift / d is written as high + low with 22 bits in high, so that n high is exact (53 bits), and so are its floor
    and what is left of it: q = floor(n high) + rest + n low. A tie of q + 1/2 with an integer is one of rest + n low +
    1/2, from which any q below it is 1 / (2 d) away at least: so 1 / (4 d) is added, and the error of rest + n low must
    be less. |low| <= 2^-21 2^shift / d, and it is off by 2^-51 of itself: the product with n then by |q| 2^-71, and two
    sums by 2^-53 (2 + |q| 2^-20) each. For |q| up to 2^28 that is below 2^-42, and 1 / (4 d) above 2^-33. In the other
    case d |q| is below 2^54, and 4 d times the first is below 2^-14, the second's part in |q| below 2^-14 too, and the
    rest 2^-50 d, at most 1/2.
    """
    d = denominator.double()
    unit = torch.as_tensor(shift, device=d.device).long()
    unit = ((unit + 1023) << 52).view(torch.float64)  # 2^shift
    high = ((1 / d).view(torch.int64) & -(1 << (53 - HIGH_BITS))).view(torch.float64)
    upper = (d.view(torch.int64) & -(1 << 26)).view(torch.float64)  # 27 bits of d: high times it, or the rest, is exact
    low = ((1 - high * upper) - high * (d - upper)) / d
    high, low, tie = (store(part) for part in (high * unit, low * unit, 0.5 + 0.25 / d))
    n = numerator.double()
    whole = n * high
    floor = whole.floor()
    rest = (whole - floor) + n * low
    return (floor + (rest + tie).floor()).long()
