"""Random bits that do not depend on who draws them, or when: counter-based Philox 4x32-10 (Salmon et al. 2011).

Differs from the reference: stream: weights, masking and batch order are drawn in NumPy whichever the backend.

Words are addressed by (seed, step, site, element), the same as in the reference, and drawn on torch's default device
(`with x.device:`). torch has no unsigned 64-bit arithmetic; int64 products wrap to the same 64 bits.
"""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox 4x32-10: counter (4, N) and key as unsigned 32-bit words -> (4, N) words, as int64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c1, c3 = _high(p1).bitwise_xor_(c1).bitwise_xor_(k0), _high(p0).bitwise_xor_(c3).bitwise_xor_(k1)
        c0, c1, c2, c3 = c1, p1.bitwise_and_(LOW), c3, p0.bitwise_and_(LOW)
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return torch.stack([c0, c1, c2, c3])


def _high(product: Tensor) -> Tensor:
    """The upper 32 of 64 bits, as a number below 2^32; the shift alone would drag the sign along."""
    return (product >> 32).bitwise_and_(LOW)


def bits(seed: int, step: int, site: str, count: int, first: int = 0) -> Tensor:
    """Words `first` to `first + count` of 32 random bits, (count,) int64 below 2^32.

    Word e is word e % 4 of Philox with key (seed low, seed high) and counter (e // 4 low, e // 4 high, step,
    crc32(site)). So part of a tensor has the words that it has in the whole.
    """
    block = torch.arange(first // 4, -(-(first + count) // 4))
    fixed = (torch.full_like(block, word) for word in (step, zlib.crc32(site.encode())))
    words = philox(torch.stack([block & LOW, block >> 32, *fixed]), (seed & LOW, (seed >> 32) & LOW))
    return words.T.reshape(-1)[first % 4 :][:count]


def keep_mask(seed: int, step: int, site: str, shape: tuple[int, ...], rate: float, first: int = 0) -> Tensor:
    """Dropout's boolean mask: an element is dropped where its word is below rate * 2^32, rounded. The tensor's first
    element has word `first`: of rows r, r + 1, ... of a batch, r * prod(shape[1:])."""
    return (bits(seed, step, site, math.prod(shape), first) >= round(rate * 2**32)).reshape(shape)
