"""Activations with several scales along the axis that is summed over: per-embedding-group (Bondarenko et al. 2021,
section 4), channels coded wide, a scale per channel; all fixed at calibration.

Differs from the reference: channel_multiplier, reach: constants are made once, there.

The reference's module has the formulas: codes less their zero points are multiplied by m_c, float64 carries the
products with the other factor, exact in blocks, and the sum is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtx_ref.spec import QTX, WIDE_BITS, AddRule, QuantSpec

from .fixed_point import shift_right
from .products import block_product

MULTIPLIER_BITS = 24  # of the largest scale's multiplier
FLOAT_BITS = 53


def varies(unit: Tensor | float) -> bool:
    """Whether a unit differs from channel to channel, the last axis; a scale per token does not."""
    return isinstance(unit, Tensor) and unit.ndim > 0 and unit.shape[-1] > 1


def joint_unit(unit: Tensor, shift: Tensor) -> Tensor:
    """The unit, float64, of what `product` and `join` make of channels of these units."""
    return unit.max() * torch.exp2((shift - MULTIPLIER_BITS).double())


def bits_below(spec: QuantSpec) -> int:
    """b such that no code less its zero point is beyond 2^b, wherever the zero point is."""
    return max(spec.bits - 1 if spec.symmetric else spec.bits, 0 if spec.wide is None else WIDE_BITS - 1)


def join(x: Tensor, multiplier: Tensor, shift: Tensor, rule: AddRule = QTX.add) -> Tensor:
    """Each element in the joint unit, rounded: (..., K) -> (..., K). Raises ValueError where 62 bits do not hold it."""
    return shift_right(x * multiplier.long(), shift, rule.rounding)


def product(
    a: Tensor,
    b: Tensor,
    multiplier: Tensor,
    shift: Tensor | int,
    rule: AddRule = QTX.add,
    a_bits: int = 16,
    b_bits: int = 16,
    integers: bool = False,
) -> Tensor:
    """round(sum_k m_k a_k b_k / 2^shift): a (..., M, K), b (..., K, N), multiplier (K,) or (..., 1, K) -> (..., M, N).

    a_bits, b_bits: the magnitudes are at most 2^bits. integers: multiply in integers, without float carriers. Raises
    ValueError where 62 bits do not hold the sum.
    """
    scaled = a * multiplier.long()
    free = FLOAT_BITS - MULTIPLIER_BITS - a_bits - b_bits
    exact = free >= 0 and not integers
    carrier, length = (torch.float64, 2**free) if exact else (torch.int64, max(a.shape[-1], 1))
    total = block_product(scaled.to(carrier), b.to(carrier), length, torch.int64)
    return shift_right(total, shift, rule.rounding)
