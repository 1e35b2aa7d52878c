"""Attention on a GPU without a tensor of queries times keys: any softmax, dropout, a gate, quantized probabilities.

Not in the reference: it has rows whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtx_ref.spec import AttentionSpec, Softmax

from ..tracing import is_traced
from .attention_launch import LOG2E, Shape, backward_op, forward_op, run_backward, run_forward
from .host import sign_seed

WIDEST = 256  # columns of a head
FARTHEST = 2**31  # elements that a head's lines span, which are addressed in 32 bits


@dataclass(frozen=True)
class Words:
    """Which elements of (B, H, Tq, Tk) dropout drops: those whose word, of `random.bits` and counted from `first`, is
    below rate * 2^32, rounded. step and first may be tensors, int64 without axes; such a first begins a row of the
    batch: it is a multiple of H Tq Tk."""

    seed: int
    step: int | Tensor
    place: int  # the site's number
    rate: float
    first: int | Tensor


# scale and zero point, of one element each, and the least and the largest code
Codes = tuple[Tensor, Tensor, int, int]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    causal: bool,
    spec: AttentionSpec,
    sink: Tensor | None = None,
    drop: Words | None = None,
    gate: Tensor | None = None,
    scores: Codes | None = None,
    probs: Codes | None = None,
) -> Tensor:
    """gate * dropout(probabilities(q k^T / sqrt(K))) v: q (B, H, Tq, K), k and v (B, H, Tk, K), float32, bfloat16 or
    float16 -> (B, H, Tq, K) in their dtype, in the memory of (B, Tq, H, K).

    rows (B, Tk) is true at real keys, None where all are; causal: the queries are the last of the keys' positions.
    sink (H,) belongs to `Softmax.SINK`; gate (B, Tq, H) multiplies rows of heads; scores and probabilities are
    quantized as `FakeQuant` does it, before mask and dropout. Queries without keys give zeros, whatever the softmax.

    Sums, scores and probabilities are float32; the product with 16 bits rounds probabilities to them. A query whose
    scores are all -infinity counts as one without keys. Raises ValueError for another dtype, heads above 256, and a
    sink that the softmax has not, or lacks.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ValueError(f"attention of {dtypes}: give q, k and v one of float32, bfloat16 and float16")
    if q.shape[-1] > WIDEST:
        raise ValueError(f"attention heads of {q.shape[-1]} columns: a tile holds {WIDEST}, give no more")
    if (sink is None) is (spec.softmax is Softmax.SINK):
        raise ValueError(
            f"attention {spec.softmax} {'without' if sink is None else 'with'} a sink: {Softmax.SINK} has one"
        )
    share, words, address, drops, fours = 1.0, [0] * 5, None, False, False
    if drop is not None:
        dropped = round(drop.rate * 2**32)
        drops, share = dropped > 0, 1 / (1 - drop.rate)
        fours, step, first = k.shape[2] % 4 == 0, drop.step, drop.first
        if isinstance(step, Tensor) or isinstance(first, Tensor):
            address = torch.stack([torch.as_tensor(x, device=q.device) for x in (step, first)])  # (2,)
            step = first = 0
        else:
            fours = fours and first % 4 == 0
        words = [sign_seed(drop.seed), step, drop.place, dropped - 1, first]
    by_row = spec.softmax is Softmax.CLIPPED_ROW
    flags = [  # a `Shape`, of which a compiler of torch 2.11 traces only numbers
        int(flag)
        for flag in (
            causal and q.shape[2] > 1,
            rows is not None,
            by_row or spec.softmax is Softmax.CLIPPED,
            spec.zeta > 1,
            by_row,
            1 if spec.softmax is Softmax.SINK else 2 if spec.softmax is Softmax.PLUS_ONE else 0,
            drops,
            fours,
            address is not None,
            gate is not None,
            scores is not None,
            probs is not None,
        )
    ]
    limits = [float(x) for codes in (scores, probs) for x in (codes[2:] if codes else (0, 0))]
    factor = q.shape[-1] ** -0.5
    unit = LOG2E if scores is not None else factor * LOG2E
    gamma = -spec.alpha if by_row and spec.alpha is not None else spec.gamma
    numbers = [factor, unit, float(gamma), float(spec.zeta), share, *limits]
    return Attend.apply(q, k, v, sink, gate, rows, join_codes(scores, probs), address, flags, numbers, words)


def join_codes(*quantizers: Codes | None) -> Tensor | None:
    """Scale and zero point of each, 1 and 0 where there is none, float32 (4,); None where there are none at all."""
    device = next((codes[0].device for codes in quantizers if codes is not None), None)
    if device is None:
        return None
    ends = [(1, 0) if codes is None else codes[:2] for codes in quantizers]
    return torch.stack([torch.as_tensor(x, device=device).reshape(()).float() for pair in ends for x in pair])


class Attend(torch.autograd.Function):
    """`attend` as one node, which keeps q, k, v, what is as large as they are once or twice, and numbers by row."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        gate: Tensor | None,
        rows: Tensor | None,
        coder: Tensor | None,
        address: Tensor | None,
        *how: list[int] | list[float],
    ) -> Tensor:
        q, k, v, sink, gate, rows = (align(x) for x in (q, k, v, sink, gate, rows))
        ctx.how, ctx.split = how, Shape(*how[0]).split
        given = (q, k, v, sink, gate, rows, coder, address)
        run = forward_op if is_traced() else run_forward
        out, context, passed, logs, gammas = run(*given, *how, any(ctx.needs_input_grad))
        if not ctx.split:
            passed = out if gate is None else context
        ctx.save_for_backward(*given, context, passed, logs, gammas)
        return out  # new, under the compiler too: `own` has nothing to copy

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:
        sink, gate = ctx.saved_tensors[3:5]
        run = backward_op if is_traced() else run_backward
        dq, dk, dv, d_sink, d_gate = run(align(slope), *ctx.saved_tensors, *ctx.how)
        given = None if sink is None else d_sink, None if gate is None else d_gate
        return dq, dk, dv, *given, None, None, None, None, None, None


def align(x: Tensor | None) -> Tensor | None:
    """x, or a copy of it whose last axis is contiguous and whose heads are addressed in 32 bits."""
    near = x is None or (x.stride(-1) == 1 and (x.ndim < 4 or x.shape[2] * x.stride(2) < FARTHEST))
    return x if near else x.contiguous()
