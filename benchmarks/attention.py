"""Clipped attention in tiles against the same written with a tensor of scores, and against torch's fused kernel, which
does not clip: float32 on a CPU, 12 heads of 64.

Floors, of H heads: products, 2 of 2 T^2 K operations each forward and 5 more backward (scores again, dP, dV, dQ, dK),
at the rate of a matrix product in the same process; bytes, q, k, v and the output once, and their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from qtx_ref.spec import AttentionSpec, Softmax
from qtx_torch.attention import Drop, attend_fused, attend_tiled, make_mask, masked_probabilities
from qtx_torch.ops import mul, scale, scores
from qtx_torch.random import keep_mask

from .harness import Call, Row, compare, near, peak, time_calls

HEADS, WIDTH = 12, 64
LENGTHS = (512, 1024, 2048, 4096)
BOUNDS = {False: 0.5, True: 0.7}
RATE = 0.1
MEMORY = 0.1


def build(way: str, length: int, causal: bool, backward: bool, rate: float) -> Call:
    """A call gives the context and, after `backward`, the gradients of q, k and v. Ways: tiles, matrix, fused."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, length, HEADS, WIDTH)
    q, k, v, slope = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    spec = AttentionSpec(softmax=Softmax.CLIPPED, alpha=4.0).with_length(length)
    mask = make_mask(None, length, length, causal, q)
    drop = Drop(0, 1, "layer.0.attn.probs", rate, 0) if rate else None

    def attend() -> Tensor:
        if way == "fused":
            return attend_fused(q, k, v, mask)
        if way == "tiles":
            return attend_tiled(q, k, v, mask, spec, None, drop)
        hidden = scores(q, k, WIDTH**-0.5)
        probs = masked_probabilities(mask.hide(hidden), mask, spec, None)
        if drop is not None:
            keep = keep_mask(drop.seed, drop.step, drop.site, tuple(probs.shape), rate, 0, q.device)
            probs = scale(mul(probs, keep), 1 / (1 - rate))
        return probs @ v

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            y = attend()
        return [y, *torch.autograd.grad(y, inputs, slope)] if backward else [y]

    return call


def check(ours: Call, other: Call) -> str:
    """Values and gradients, as shares of the largest."""
    pairs = list(zip(ours(), other(), strict=True))
    largest = [float(y.detach().abs().max()) for _, y in pairs]
    return [near(x / m, y / m, 2e-5, "values, gradients") for (x, y), m in zip(pairs, largest, strict=True)][-1]


def measure_rate(quick: bool) -> float:
    """Operations a millisecond of a matrix product."""
    n = 128 if quick else 2048
    x = torch.randn(n, n)
    y = torch.empty_like(x)
    return 2 * n**3 / (1000 * min(time_calls({"product": lambda: torch.mm(x, x, out=y)}, 5)["product"]))


def rows(device: str, quick: bool) -> Iterator[Row]:
    """Forward, and forward with backward, against the matrix; causal and with dropout at the longest; then the fused
    kernel. Memory is what lies beyond the inputs and a pass's mask."""
    rate, lengths = measure_rate(quick), (128,) if quick else LENGTHS
    cases = [(length, False, backward, 0.0) for length in lengths for backward in (False, True)]
    cases += [(lengths[-1], True, True, 0.0), (lengths[len(lengths) // 2 - 1], False, True, RATE)]
    for length, causal, backward, dropout in cases:
        given = (length, causal, backward, dropout)
        done = (7 if backward else 2) * 2 * HEADS * length**2 * WIDTH / (2 if causal else 1)
        title = "forward and backward" if backward else "forward"
        title += ", causal" * causal + f", dropout {dropout}" * bool(dropout)
        ours = build("tiles", *given)
        for way in ("matrix",) if causal or dropout else ("matrix", "fused"):
            other = build(way, *given)
            longest = way == "matrix" and length == LENGTHS[-1]
            mib, against = (peak(build, each, *given, held=False) for each in ("tiles", way))
            notes = f"floor of products {done / rate:.1f} ms"
            if longest and None not in (mib, against):
                notes += f"; memory {mib / against:.3f} of it, bound {MEMORY}"
            yield compare(
                f"tiles, {title}, T {length}", ours, f"{way}, {title}, T {length}", other,
                rounds=2 if quick else 3 if length > 1024 else 7,
                check=partial(check, ours, other if way == "matrix" else build("matrix", *given)),
                bound=BOUNDS[backward] if longest else None, mib=mib, against_mib=against, notes=notes,
            )  # fmt: skip
