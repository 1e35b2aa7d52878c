"""Philox 4x32-10 in one pass: the words of `random.bits`, or which of them a dropout keeps, written once.

Not in the reference: its words are the same.

In torch operations a word takes about sixty of them; here each is computed in registers. Triton has the rounds.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from .host import on_device, sign_seed

BLOCK = 256  # counters, of four words each, that a program takes


# without a specialization a step that is 1 would be a constant, and each would be compiled
@triton.jit(do_not_specialize=("count", "begin", "shift", "step", "place", "seed", "least"))
def _write(out, count, begin, shift, step, place, seed, least, BLOCK: tl.constexpr, MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place_in = begin + counter
    low, high = (place_in & 0xFFFFFFFF).to(tl.uint32), (place_in >> 32).to(tl.uint32)
    zero = tl.zeros((BLOCK,), tl.uint32)
    words = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + place.to(tl.uint32))
    # word j of counter i stands at 4 i + j
    both = tl.interleave(tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3])).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - shift
    inside = (at >= 0) & (at < count)
    if MASK:
        tl.store(out + at, both >= least, mask=inside)
    else:
        tl.store(out + at, both, mask=inside)


def write_words(
    seed: int, step: int, place: int, count: int, first: int, device: torch.device, least: int | None
) -> Tensor:
    """Words `first` to `first + count` of a site's number, (count,) int64; with `least`, whether each is at least that,
    bool."""
    out = torch.empty(count, dtype=torch.int64 if least is None else torch.bool, device=device)
    shift = first & 3
    programs = -(-(count + shift) // (4 * BLOCK))
    if programs:
        given = (count, first >> 2, shift, step, place, sign_seed(seed), least or 0)
        with on_device(device):
            _write[(programs,)](out, *given, BLOCK=BLOCK, MASK=least is not None)
    return out
