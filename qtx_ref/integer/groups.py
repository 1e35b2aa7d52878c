"""Activations with several scales along the axis that is summed over: per-embedding-group (Bondarenko et al. 2021,
section 4), channels coded wide, a scale per channel; all fixed at calibration.

Channel c has real_c = s_c (q_c - z_c). With t the largest s_c and 2^24 t^-1 s_c rounded,

    m_c = round(2^24 s_c / t)
    acc_o = R(sum_c m_c (q_c - z_c) (w_co - zw_o) / 2^shift) + bias_o          of a linear
    acc_ij = R(sum_c m_c (q_ic - z_c) (k_jc - zk_c) / 2^shift)                 of scores, s_c the product of both scales
    x_c = R(m_c (q_c - z_c) / 2^shift)                                         into a norm, which then takes one unit

in units of t 2^(shift - 24), times w's scale in a linear; R is the one rounding, the profile's of sums. Channels of one
scale have one m, so a sum is that of the groups' own accumulators, each times its m: hardware multiplies bytes, has an
int32 for each group, and adds G of them. Here codes are multiplied by m first, and float64 carries the products, exact
in blocks; the integers are the same.

The shift is the least that keeps the sum below 2^30 for codes at their ends and the weights as they are, so that
nothing overflows, whatever the codes' bits, and t 2^(shift - 24) is about as fine as an int32 can have it.

Arrays: codes less their zero points (..., K), int32; multipliers int32, one per channel, broadcast against them; what
comes out is int64.

    >>> x, w = np.int32([[3, -2, 5]]), np.int32([[1], [4], [-2]])  # channels of scales 1, 1/2 and 1/4
    >>> m = channel_multiplier(np.float64([1, 0.5, 0.25]))
    >>> product(x, w, m, 20, QTX.add, 8, 8).tolist()  # 3 - 4 - 2.5 = -3.5 in units of 2^-4
    [[-56]]
"""

from __future__ import annotations

import numpy as np

from ..quant.affine import code_limits
from ..spec import QTX, WIDE_BITS, AddRule, QuantSpec
from .fixed_point import shift_right
from .products import block_product

__all__ = ["MULTIPLIER_BITS", "bits_below", "channel_multiplier", "join", "joint_unit", "product", "reach", "varies"]

MULTIPLIER_BITS = 24  # of the largest scale's multiplier
FLOAT_BITS = 53


def varies(unit: np.ndarray | float) -> bool:
    """Whether a unit differs from channel to channel, the last axis; a scale per token does not."""
    return np.ndim(unit) > 0 and np.shape(unit)[-1] > 1


def channel_multiplier(unit: np.ndarray) -> np.ndarray:
    """m of each channel's scale, float64, in its shape; int32. What is 2^25 times smaller than the largest is 0."""
    return np.rint(unit / unit.max() * 2.0**MULTIPLIER_BITS).astype(np.int32)


def joint_unit(unit: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The unit, float64, of what `product` and `join` make of channels of these units."""
    return np.asarray(np.float64(unit.max()) * np.exp2(np.float64(shift) - MULTIPLIER_BITS))


def reach(spec: QuantSpec, zero_point: np.ndarray) -> np.ndarray:
    """The largest magnitude of code less zero point, int64, in the shape of the zero points."""
    low, high = code_limits(zero_point, spec)
    return np.maximum(high - np.asarray(zero_point, np.int64), zero_point - np.asarray(low, np.int64))


def bits_below(spec: QuantSpec) -> int:
    """b such that no code less its zero point is beyond 2^b, wherever the zero point is."""
    return max(spec.bits - 1 if spec.symmetric else spec.bits, 0 if spec.wide is None else WIDE_BITS - 1)


def join(x: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, rule: AddRule = QTX.add) -> np.ndarray:
    """Each element in the joint unit, rounded: (..., K) -> (..., K). Raises ValueError where 62 bits do not hold it."""
    return shift_right(x * multiplier.astype(np.int64), shift, rule.rounding)


def product(
    a: np.ndarray,
    b: np.ndarray,
    multiplier: np.ndarray,
    shift: np.ndarray | int,
    rule: AddRule = QTX.add,
    a_bits: int = 16,
    b_bits: int = 16,
    integers: bool = False,
) -> np.ndarray:
    """round(sum_k m_k a_k b_k / 2^shift): a (..., M, K), b (..., K, N), multiplier (K,) or (..., 1, K) -> (..., M, N).

    a_bits, b_bits: the magnitudes are at most 2^bits. integers: multiply in integers, without float carriers. Raises
    ValueError where 62 bits do not hold the sum.
    """
    scaled = a * multiplier.astype(np.int64)
    free = FLOAT_BITS - MULTIPLIER_BITS - a_bits - b_bits
    exact = free >= 0 and not integers
    carrier, length = (np.float64, 2**free) if exact else (np.int64, max(a.shape[-1], 1))
    total = block_product(scaled.astype(carrier), b.astype(carrier), length, np.int64)
    return shift_right(total, shift, rule.rounding)
