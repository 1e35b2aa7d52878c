"""Random bits that do not depend on who draws them, or when: counter-based Philox 4x32-10 (Salmon et al. 2011).

Differs from the reference: stream: weights, masking and batch order are drawn in NumPy whichever the backend.
Differs from the reference: number_site: so that the compiler can be told of it.
Differs from the reference: device: where words are drawn; None: torch's default device.
Differs from the reference: has_kernels: one pass of Triton.

Words are addressed by (seed, step, site, element), the same as in the reference. A step or a first word that is a
tensor, int64 without axes, is no constant of a compiled graph, which then holds for all of them. torch has no unsigned
64-bit arithmetic; int64 products wrap to the same 64 bits.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor

from .tracing import is_traced

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
CHUNK = 2**15  # counters that a CPU takes at a time: more would leave its cache, fewer be mostly calls


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox 4x32-10: counter (4, N) and key as unsigned 32-bit words -> (4, N) words, as int64 below 2^32."""
    return torch.stack(_mix([word.clone() for word in counter], key))


def _mix(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """`philox` in the memory of its counter. A word's upper 32 bits are cleared before it is multiplied, and at the
    end."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(10):
        torch.mul(c0, MULTIPLIERS[0], out=p0)
        torch.mul(c2, MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW)
        c1, c3, p0, p1 = p1, p0, c1, c3
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return [c0, c1.bitwise_and_(LOW), c2, c3.bitwise_and_(LOW)]


def number_site(site: str) -> int:
    """The counter's word for a site; `step.compile_forward` tells the compiler that it is a constant."""
    return zlib.crc32(site.encode())


def _draw(
    seed: int,
    step: int | Tensor,
    site: str,
    count: int,
    first: int | Tensor,
    device: torch.device,
    dtype: torch.dtype,
    read: Callable[..., Tensor],
) -> Tensor:
    """`read(word)` of words `first` to `first + count`, (count,)."""
    key, place = (seed & LOW, (seed >> 32) & LOW), number_site(site)
    known = not isinstance(first, Tensor)
    begin, shift = first >> 2, first & 3  # its counter, and its place among the four words there
    counters = -(-(count + (shift if known else 3)) // 4)

    def words(start: int, stop: int) -> list[Tensor]:
        block = torch.arange(start, stop, device=device) + begin
        return _mix([block & LOW, block >> 32, torch.zeros_like(block) + step, torch.full_like(block, place)], key)

    if is_traced() or device.type != "cpu":
        results = torch.stack([read(word) for word in words(0, counters)], dim=1)
    else:
        results = torch.empty(counters, 4, dtype=dtype, device=device)
        for start in range(0, counters, CHUNK):
            chunk = results[start : start + CHUNK]
            for word, column in zip(words(start, start + len(chunk)), chunk.unbind(1), strict=True):
                read(word, out=column)
    if known:
        return results.flatten()[shift : shift + count]
    return results.flatten()[torch.arange(count, device=device) + shift]


def _find_kernel(step: int | Tensor, first: int | Tensor, device: torch.device) -> Callable[..., Tensor] | None:
    """What writes a site's words in one pass: on a GPU, where Triton is installed. A compiled graph fuses its own."""
    tensors = isinstance(step, Tensor) or isinstance(first, Tensor)
    if tensors or is_traced() or device.type != "cuda":
        return None
    return _load_kernel(device)


def has_kernels(device: torch.device) -> bool:
    """Whether Triton compiles and runs here: on a GPU where it is installed and a C compiler is. `step.compile_forward`
    tells the compiler that it is a constant."""
    return device.type == "cuda" and _load_kernel(device) is not None


@cache
def _load_kernel(device: torch.device) -> Callable[..., Tensor] | None:
    try:
        write = import_module("qtx_torch.kernels.philox").write_words
        write(0, 0, 0, 1, 0, device, None)
    except (ImportError, RuntimeError):  # no Triton, as on Windows, or no C compiler, which Triton needs
        return None
    return write


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
    device = device or torch.get_default_device()
    if write := _find_kernel(step, first, device):
        return write(seed, step, number_site(site), count, first, device, None)
    return _draw(seed, step, site, count, first, device, torch.int64, partial(torch.bitwise_or, other=0))


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
    device, least = device or torch.get_default_device(), round(rate * 2**32)
    if write := _find_kernel(step, first, device):
        return write(seed, step, number_site(site), math.prod(shape), first, device, least).reshape(shape)
    keep = partial(torch.ge, other=least)
    return _draw(seed, step, site, math.prod(shape), first, device, torch.bool, keep).reshape(shape)
