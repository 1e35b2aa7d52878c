"""Random bits that do not depend on who draws them, or when: counter-based Philox 4x32-10 (Salmon et al. 2011).

Differs from the reference: stream: weights, masking and batch order are drawn in NumPy whichever the backend.
Differs from the reference: hash_site: so that it can be named to the compiler.
Differs from the reference: device: where words are drawn; None: torch's default device.

Words are addressed by (seed, step, site, element), the same as in the reference. A step or a first element that is a
tensor, int64 without axes, is no constant of a compiled graph, which holds for all of them. torch has no unsigned
64-bit arithmetic; int64 products wrap to the same 64 bits.
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


def bits(
    seed: int,
    step: int | Tensor,
    site: str,
    count: int,
    first: int | Tensor = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Words `first` to `first + count` of 32 random bits, (count,) int64 below 2^32.

    Word e is word e % 4 of Philox with key (seed low, seed high) and counter (e // 4 low, e // 4 high, step,
    crc32(site)). So part of a tensor has the words that it has in the whole.
    """
    key = (seed & LOW, (seed >> 32) & LOW)
    if isinstance(first, Tensor):  # its place among four words is not known: a block for every word
        element = torch.arange(count, device=device) + first
        words = philox(_counter(element >> 2, step, site), key)
        return words.gather(0, (element & 3)[None])[0]
    words = philox(_counter(torch.arange(first // 4, -(-(first + count) // 4), device=device), step, site), key)
    return words.T.reshape(-1)[first % 4 :][:count]


def _counter(block: Tensor, step: int | Tensor, site: str) -> Tensor:
    """The counters (4, N) of blocks of four words."""
    fixed = (torch.zeros_like(block) + word for word in (step, hash_site(site)))
    return torch.stack([block & LOW, block >> 32, *fixed])


def hash_site(site: str) -> int:
    """A site's word of the counter; a function of its own, as a compiled graph takes in what it gives."""
    return zlib.crc32(site.encode())


def keep_mask(
    seed: int,
    step: int | Tensor,
    site: str,
    shape: tuple[int, ...],
    rate: float,
    first: int | Tensor = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Dropout's boolean mask: an element is dropped where its word is below rate * 2^32, rounded. The tensor's first
    element has word `first`: of rows r, r + 1, ... of a batch, r * prod(shape[1:])."""
    words = bits(seed, step, site, math.prod(shape), first, device)
    return (words >= round(rate * 2**32)).reshape(shape)
