"""Attention on a CPU in tiles: some query rows of some heads with all of their keys, so that no tensor of Tq x Tk is
stored.

Not in the reference: it stores the probabilities.

A tile's scores stay in the cache from their product to the context's, and whole rows need no running maximum. Of a
forward pass nothing is kept but q, k and v, and dropout's mask where it is no larger than they are: backward computes
each tile again.

Floors, of H heads: forward 4 Tq Tk K H floating-point operations, forward and backward 14, over the rate of a float32
product; bytes, 4 (2 Tq + 2 Tk) K H and 4 (4 Tq + 5 Tk) K H over the memory's bandwidth, are far below it for Tk > K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import own

BLOCK = 2**19  # scores of a tile: measured flat from here to four times as many, and slower below a quarter
KEPT = 16  # bytes of a mask per column of a head: no more than q, k, v and their result take in float32

softmax_into = torch.ops.aten._softmax.out
softmax_backward_into = torch.ops.aten._softmax_backward_data.out
hardtanh_backward_into = torch.ops.aten.hardtanh_backward.grad_input


Hook = Callable[[Tensor], Tensor]  # a quantizer of (1, n, rows, Tk) whose every row is by itself
Back = Callable[[Tensor], Tensor]  # from the gradient of its result to that of what it took


class Quantizers(NamedTuple):
    """Of scores, of probabilities, and of what dropout leaves of them. They take float32 or float64."""

    scores: Hook | None = None
    probs: Hook | None = None
    operand: Hook | None = None


@dataclass(frozen=True)
class RowRule:
    """What is done to a row of scores, beside the softmax.

    hidden: true at keys hidden from a query, (B or 1, 1, Tq or 1, Tk), from one without keys none. causal: no query
    sees a key after its own, the queries being the last of the keys' positions: whole blocks of keys are passed over.
    gamma and span, of a clip: numbers or (B or 1, 1, Tq, 1); None without one. keep(first, shape): dropout's mask of
    elements from `first` on.
    """

    hidden: Tensor | None
    causal: bool
    gamma: Tensor | float | None
    span: Tensor | float | None
    keep: Callable[[int, tuple[int, ...]], Tensor] | None
    rate: float
    quantizers: Quantizers = Quantizers()

    @property
    def share(self) -> float:
        """What a tile's result is multiplied by for dropout; 1 where its probabilities are, before a quantizer."""
        return 1.0 if self.quantizers.operand else 1 / (1 - self.rate)

    def clip(self, p: Tensor, tile: Tile, out: Tensor) -> Tensor:
        """span p + gamma before it is clamped, rounded twice as in `ops.ClippedSoftmax`: codes are the same."""
        gamma, span = (tile.of(x) if isinstance(x, Tensor) else x for x in (self.gamma, self.span))
        return torch.mul(p, span, out=out).add_(gamma)


class Tile(NamedTuple):
    """Rows of some heads of one sequence, and how many keys they see at most."""

    sequence: int
    heads: slice
    rows: slice
    width: int

    def of(self, x: Tensor) -> Tensor:
        """The part of x (B or 1, 1, Tq or 1, n) for these rows, (Tq or 1, n)."""
        part = x[self.sequence if x.shape[0] > 1 else 0, 0]
        return part if part.shape[0] == 1 else part[self.rows]

    def size(self, width: int) -> tuple[int, int, int]:
        return self.heads.stop - self.heads.start, self.rows.stop - self.rows.start, width


def cut_heads(q: Tensor, k: Tensor, block: int) -> Iterator[tuple[int, slice]]:
    """Sequences and heads of theirs that are computed together: as many as fit into `block` scores, at least one."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    together = max(1, min(heads, block // max(1, queries * keys)))
    for sequence in range(batch):
        for head in range(0, heads, together):
            yield sequence, slice(head, min(head + together, heads))


def cut_rows(sequence: int, heads: slice, queries: int, keys: int, causal: bool, block: int) -> Iterator[Tile]:
    """The tiles of some heads: as many rows as fit into `block` scores, at least one; of no queries one without."""
    step = max(1, min(queries, block // max(1, keys)))
    for row in range(0, max(1, queries), step):
        stop = min(row + step, queries)
        yield Tile(sequence, heads, slice(row, stop), keys - queries + stop if causal else keys)


class Space:
    """Memory for tiles, used by one after another."""

    def __init__(self, count: int, like: Tensor) -> None:
        self.dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        self.device = like.device
        self.parts: list[Tensor | None] = [None] * count

    def take(self, place: int, size: tuple[int, ...]) -> Tensor:
        needed = torch.Size(size).numel()
        part = self.parts[place]
        if part is None or len(part) < needed:
            part = self.parts[place] = torch.empty(needed, dtype=self.dtype, device=self.device)
        return part[:needed].view(size)


def multiply(a: Tensor, b: Tensor, out: Tensor, half: torch.dtype | None, alpha: float = 1, beta: int = 0) -> Tensor:
    """out = beta out + alpha a b, (n, M, I) by (n, I, N); half: the operands are rounded to it, and so is a b."""
    if half is None:
        return out.baddbmm_(a, b, beta=beta, alpha=alpha)
    product = torch.bmm(a.to(half), b.to(half))
    if beta:
        return out.add_(product, alpha=alpha)
    return out.copy_(product) if alpha == 1 else out.copy_(product).mul_(alpha)


def find_probs(
    q: Tensor, k: Tensor, sink: Tensor | None, rule: RowRule, tile: Tile, p: Tensor, backs: list[Back] | None = None
) -> Tensor:
    """Writes the softmax of a tile into p (n, rows, width), or with a sink (n, rows, width + 1), and gives its keys'
    part. q and k (n, T, K) are of the tile's heads. backs: takes the way back through a quantizer of scores."""
    scores, width = p[..., : tile.width], tile.width
    half = None if q.dtype == p.dtype else q.dtype
    multiply(q[:, tile.rows], k[:, :width].mT, scores, half, alpha=q.shape[-1] ** -0.5)
    if rule.quantizers.scores:
        scores.copy_(quantize(rule.quantizers.scores, scores, backs))
    if sink is not None:
        p[..., width] = sink[tile.heads, None]
    if rule.hidden is not None:
        scores.masked_fill_(tile.of(rule.hidden)[:, :width], -torch.inf)
    elif rule.causal:
        count = p.shape[1]
        later = p.new_ones(count, count, dtype=torch.bool).triu_(1)
        scores[..., width - count :].masked_fill_(later, -torch.inf)
    softmax_into(p, -1, False, out=p)
    return scores


def quantize(hook: Hook, x: Tensor, backs: list[Back] | None) -> Tensor:
    """What a quantizer makes of x (n, rows, width); backs, where there is one: takes the way back."""
    if backs is None:
        return hook(x[None])[0]
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        y = hook(leaf[None])[0]
    backs.append(lambda g: torch.autograd.grad(y, leaf, g)[0])
    return y.detach()


def weigh(c: Tensor, keep: Tensor | None, rule: RowRule, backs: list[Back] | None) -> Tensor:
    """What multiplies the values, of clipped probabilities: quantized, dropped, quantized. backs as in `quantize`."""
    if rule.quantizers.probs:
        c = quantize(rule.quantizers.probs, c, backs)
    if keep is not None:
        share = 1 / (1 - rule.rate) / rule.share
        c = c * keep * share
        if backs is not None:
            backs.append(lambda g: g * keep * share)
    return quantize(rule.quantizers.operand, c, backs) if rule.quantizers.operand else c


class Attend(torch.autograd.Function):
    """The context of q (B, H, Tq, K), k and v (B, H, Tk, K), sink (H,) or None, in the memory of (B, Tq, H, K).

    With P the softmax, C = clip(span P + gamma), D dropout's mask over 1 - rate, f the scores' factor and G the
    context's gradient: O = (C * D) V, dV = (C * D)^T G, dC = (G V^T) * D, dP = span dC inside the clip and 0 beyond,
    dS = P * (dP - rowsum(P * dP)), dQ = f dS K, dK = f dS^T Q.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, rule: RowRule, block: int) -> Tensor:
        (batch, heads, queries, width), keys = q.shape, k.shape[2]
        half, beside = q.dtype if q.dtype.itemsize == 2 else None, sink is not None
        kept = None
        if rule.keep is not None and keys <= KEPT * width and any(ctx.needs_input_grad):
            kept = rule.keep(0, (batch, heads, queries, keys))
        ctx.save_for_backward(q, k, v, sink, kept)
        ctx.rule, ctx.block = rule, block
        out = empty_heads(q)
        space = Space(2, q)
        for group in cut_heads(q, k, block):
            q1, k1, v1 = (x[group].contiguous() for x in (q, k, v))
            for tile in cut_rows(*group, queries, keys, rule.causal, block):
                seen = tile.width
                c = find_probs(q1, k1, sink, rule, tile, space.take(0, tile.size(seen + beside)))
                if rule.gamma is not None:
                    rule.clip(c, tile, c).clamp_(0, 1)
                keep = None if rule.keep is None else find_kept(rule, kept, tile, q, k)
                if any(rule.quantizers):
                    c = weigh(c, keep, rule, None)
                elif keep is not None:
                    c.mul_(keep)
                context = multiply(c, v1[:, :seen], space.take(1, tile.size(width)), half)
                out[(*group, tile.rows)] = context.mul_(rule.share) if rule.rate else context
        return own(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, kept = ctx.saved_tensors
        (_, _, queries, width), keys, rule = q.shape, k.shape[2], ctx.rule
        half, beside = q.dtype if q.dtype.itemsize == 2 else None, sink is not None
        row_span = rule.span if isinstance(rule.span, Tensor) else None
        factor = width**-0.5 * (1 if rule.span is None or row_span is not None else rule.span)
        dq, dk, dv = (empty_heads(x) for x in (q, k, v))
        ds = q.new_zeros(len(sink), dtype=torch.float64) if ctx.needs_input_grad[3] else None
        space = Space(7, q)
        limits = torch.finfo(space.dtype)  # hardtanh's kernel excludes its limits: they lie one step beyond [0, 1]
        for group in cut_heads(q, k, ctx.block):
            q1, k1, v1 = (x[group].contiguous() for x in (q, k, v))
            sums = [space.take(place, (len(q1), width, keys)) for place in (5, 6)]  # dK and dV, turned
            for tile in cut_rows(*group, queries, keys, rule.causal, ctx.block):
                rows, seen = tile.rows, tile.width
                p, dp = (space.take(place, tile.size(seen + beside)) for place in (0, 1))
                before: list[Back] = []  # through a quantizer of scores
                c, dc = find_probs(q1, k1, sink, rule, tile, p, before), dp[..., :seen]
                dy = space.take(2, tile.size(width)).copy_(g[(*group, rows)]).mul_(rule.share)
                multiply(dy if row_span is None else dy * tile.of(row_span), v1[:, :seen].mT, dc, half)
                keep = None if rule.keep is None else find_kept(rule, kept, tile, q, k)
                stretched = None if rule.gamma is None else rule.clip(c, tile, space.take(3, tile.size(seen)))
                if any(rule.quantizers):
                    after: list[Back] = []
                    c = weigh(c if stretched is None else stretched.clamp(0, 1), keep, rule, after)
                    for back in reversed(after):
                        dc.copy_(back(dc))
                elif keep is not None:
                    dc.mul_(keep)
                if stretched is not None:
                    hardtanh_backward_into(dc, stretched, -limits.tiny, 1 + limits.eps, grad_input=dc)
                if not any(rule.quantizers):
                    c = c if stretched is None else stretched.clamp_(0, 1)
                    c = c if keep is None else torch.mul(c, keep, out=space.take(3, tile.size(seen)))
                if beside:
                    dp[..., seen] = 0
                softmax_backward_into(dp, p, -1, dp.dtype, grad_input=dp)
                if ds is not None:
                    ds[tile.heads] += dp[..., seen].sum(dim=1, dtype=torch.float64)
                for back in before:
                    dc.copy_(back(dc))
                whole = seen == keys  # else the first tile leaves part of the sums as it is
                if rows.start == 0 and not whole:
                    for part in sums:
                        part.zero_()
                dk1, dv1 = (part[..., :seen] for part in sums)
                beta = 0 if rows.start == 0 and whole else 1
                multiply(dy.mT, c, dv1, half, beta=beta)
                multiply(q1[:, rows].mT, dc, dk1, half, factor, beta)
                dq[(*group, rows)] = multiply(dc, k1[:, :seen], space.take(4, tile.size(width)), half, factor)
            dk[group], dv[group] = (part.mT for part in sums)
        return dq, dk, dv, None if ds is None else ds.to(sink.dtype), None, None


def empty_heads(x: Tensor) -> Tensor:
    """Memory in x's shape (B, H, T, K), in the order of (B, T, H, K), which merging heads leaves as it is."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def find_kept(rule: RowRule, kept: Tensor | None, tile: Tile, q: Tensor, k: Tensor) -> Tensor:
    """Dropout's mask of a tile: part of the whole, where that was kept, or drawn again."""
    sequence, heads, rows, seen = tile
    if kept is not None:
        return kept[sequence, heads, rows, :seen]
    first = ((sequence * q.shape[1] + heads.start) * q.shape[2] + rows.start) * k.shape[2]
    return rule.keep(first, tile.size(k.shape[2]))[..., :seen]
