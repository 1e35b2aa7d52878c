"""Random bits that do not depend on who draws them, or when.

`stream` gives a NumPy generator for a name: weights, masking, batch order. `bits` gives counter-based Philox 4x32-10
words (Salmon et al. 2011) addressed by (seed, step, site, element): dropout, the same in NumPy and torch, on a
recomputed layer and on a resumed run.
"""

from __future__ import annotations

import hashlib
import zlib

import numpy as np

__all__ = ["bits", "keep_mask", "philox", "stream"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)


def stream(seed: int, *names: object) -> np.random.Generator:
    """A generator of its own for (seed, names)."""
    text = "/".join(str(part) for part in (seed, *names))
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little"))
    )


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox 4x32-10: counter (4, N) and key as unsigned 32-bit words -> (4, N) words, as uint64 arrays below 2^32."""
    c0, c1, c2, c3 = (word.astype(np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * np.uint64(MULTIPLIERS[0])
        p1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & LOW,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def bits(seed: int, step: int, site: str, count: int, first: int = 0) -> np.ndarray:
    """Words `first` to `first + count` of 32 random bits, shape (count,), uint64 below 2^32.

    Word e is word e % 4 of Philox with key (seed low, seed high) and counter (e // 4 low, e // 4 high, step,
    crc32(site)). So part of a tensor has the words that it has in the whole.
    """
    block = np.arange(first // 4, -(-(first + count) // 4), dtype=np.uint64)
    fixed = np.empty_like(block)
    counter = np.stack(
        [block & LOW, block >> np.uint64(32), np.full_like(fixed, step), np.full_like(fixed, zlib.crc32(site.encode()))]
    )
    words = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words.T.reshape(-1)[first % 4 :][:count]


def keep_mask(seed: int, step: int, site: str, shape: tuple[int, ...], rate: float, first: int = 0) -> np.ndarray:
    """Dropout's mask of a tensor of `shape`, boolean: an element is dropped, False, where its word is below rate *
    2^32, rounded. rate is in [0, 1). The tensor's first element has word `first`: of rows r, r + 1, ... of a batch,
    r * prod(shape[1:])."""
    words = bits(seed, step, site, int(np.prod(shape)), first)
    return (words >= np.uint64(round(rate * 2**32))).reshape(shape)
