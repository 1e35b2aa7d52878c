"""Every differentiable op, named as in the reference: the equation, and how torch computes it.

Differs from the reference: own: a Function's result, for the compiler.
Differs from the reference: scores, stretch, clipped_softmax: several of the reference's ops in one kernel.
Differs from the reference: arrange: a method of the reference's tape.

Ops take and return tensors and compute in the dtype of their input, float32 or float64 (under autocast in what torch
chooses); means and losses sum in float64. Letters: B batch, T tokens, D width, H heads, K = D / H, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tracing import is_traced

# --- arithmetic -------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b: x (..., I), W (O, I), b (O,) -> (..., O).

    Or one matrix per head: x (..., H I), W (H, O, I), b (H, O) -> (..., H O), head h reading and writing its own slice.
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    x = x.unflatten(-1, (weight.shape[0], -1))  # (..., H I) -> (..., H, I)
    if weight.shape[1] == 1:
        y = (x * weight.squeeze(1)).sum(dim=-1, keepdim=True)  # four times faster than a matrix product
    else:
        y = torch.einsum("...hi,hoi->...ho", x, weight)
    return (y if bias is None else y + bias).flatten(-2)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """y = a b over the last two axes; leading axes agree."""
    return a @ b


def scores(q: Tensor, k: Tensor, factor: float) -> Tensor:
    """y = factor q k^T, q (B, H, Tq, K) and k (B, H, Tk, K) -> (B, H, Tq, Tk); the factor is taken in by the
    product. Compiled, a power of two is not: it rounds nothing, and inductor writes what beta = 0 multiplies, as large
    as the scores."""
    if is_traced() and math.frexp(factor)[0] == 0.5:
        return (q @ k.transpose(-1, -2)) * factor
    unused = q.new_zeros(1, 1, 1)  # times beta = 0
    y = torch.baddbmm(unused, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=factor)
    return y.unflatten(0, q.shape[:2])


def add(a: Tensor, b: Tensor) -> Tensor:
    """y = a + b, broadcast."""
    return a + b


def mul(a: Tensor, b: Tensor) -> Tensor:
    """y = a b, broadcast."""
    return a * b


def scale(x: Tensor, factor: float) -> Tensor:
    """y = factor x, the factor rounded to x's dtype first."""
    return x * factor


def select(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y = a where `where` (boolean, broadcast) is true, else b; a and b of one shape."""
    return torch.where(where, a, b)


def divide(x: Tensor, divisor: Tensor) -> Tensor:
    """y = x / d, d of x's last axis, in x's dtype (16 bits: by the float32 d, then rounded)."""
    return (x / divisor).to(x.dtype)


def hadamard(x: Tensor, block: int) -> Tensor:
    """y = x R, R block-diagonal of H_n / sqrt(n) with n = `block`, a power of two that divides the last axis.

    H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]] (Sylvester). R is symmetric and its own inverse: dx = g R. Computed by
    log2 n rounds of sums and differences (Fino and Algazi 1976), in one order, then times 1 / sqrt(n): the same bits
    everywhere.
    """
    y, half = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, 1
    while half < block:
        y = y.reshape(-1, 2, half)  # (pairs, 2, half)
        y = torch.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], dim=1)
        half *= 2
    return (y.reshape(x.shape) * block**-0.5).to(x.dtype)


def mean(x: Tensor, axis: int, where: Tensor | None = None) -> Tensor:
    """Mean over one axis, kept, of the elements where `where` (broadcast) is true; 0 where there are none."""
    keep = torch.ones_like(x, dtype=torch.bool) if where is None else where.expand(x.shape)
    n = keep.sum(dim=axis, keepdim=True).clamp(min=1)
    return (x.double().masked_fill(~keep, 0).sum(dim=axis, keepdim=True) / n).to(x.dtype)


def total(x: Tensor) -> Tensor:
    """The sum of all elements, in float64."""
    return x.sum(dtype=torch.float64)


# --- nonlinear --------------------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * w + b over the last axis, var biased (Ba et al. 2016)."""
    if weight.dtype == torch.bfloat16 and x.dtype == torch.float32:  # as FSDP2 gathers it
        weight, bias = weight.float(), bias.float()
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def softmax(x: Tensor, mask: Tensor | None = None, sink: Tensor | None = None) -> Tensor:
    """p_i = exp(x_i) / (sum_j exp(x_j) + exp(s)) over the last axis.

    mask, boolean and broadcast, is true where a key may be attended to. Masked keys get 0 whatever their score, NaN and
    infinities too, and so does a row without keys. A row is NaN, masked keys too, where it may attend to NaN or
    infinity, or to -infinity alone. sink s, broadcast to (..., 1), takes probability that no key receives: 0 for
    softmax1, learned for a sink per head.
    """
    empty = None
    if mask is not None:
        empty = ~mask.any(dim=-1, keepdim=True)
        x = x.masked_fill(~(mask | empty), -math.inf)  # a row of -inf alone would be NaN, and so would its gradient
    if sink is None:
        p = torch.softmax(x, dim=-1)
    else:  # one more logit, whose probability is dropped
        p = torch.softmax(torch.cat([x, sink.expand(*x.shape[:-1], 1)], dim=-1), dim=-1)[..., :-1]
    return p if empty is None else p.masked_fill(empty, 0)


def clip_stretch(p: Tensor, gamma: Tensor | float, zeta: float) -> Tensor:
    """y = clip((zeta - gamma) p + gamma, 0, 1) (Bondarenko et al. 2023, eq. 4). dp = g (zeta - gamma) inside [0, 1].

    gamma is a number or broadcasts against p (one per row). At the ends themselves the gradient passes.
    """
    gamma, span = stretch(gamma, zeta, p.dtype)
    return (p * span + gamma).clamp(0, 1)


def stretch(gamma: Tensor | float, zeta: float, dtype: torch.dtype) -> tuple[Tensor | float, Tensor | float]:
    """gamma and zeta - gamma, the difference in float64; torch rounds numbers to the other operand's dtype itself."""
    if not isinstance(gamma, Tensor):
        return gamma, zeta - gamma
    return gamma.to(dtype), (zeta - gamma.double()).to(dtype)


def own(y: Tensor) -> Tensor:
    """y as a Function's result. Compiled, a tensor that is new: of one that was changed in place, or converted to the
    dtype that it has, torch 2.11 loses the gradient and says nothing."""
    return y.clone() if is_traced() else y


class ClippedSoftmax(torch.autograd.Function):
    """clip_stretch(softmax(x)) as one node that keeps the probabilities and nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor | float, zeta: float) -> Tensor:
        p = torch.softmax(x, dim=-1)
        ctx.save_for_backward(p)
        ctx.gamma, ctx.span = stretch(gamma, zeta, p.dtype)
        return own((p * ctx.span).add_(ctx.gamma).clamp_(0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        (p,) = ctx.saved_tensors
        stretched = (p * ctx.span).add_(ctx.gamma)
        kind = torch.finfo(p.dtype)  # this kernel's limits are excluded, so they lie one step beyond [0, 1]
        g = torch.ops.aten.hardtanh_backward(g, stretched, -kind.tiny, 1 + kind.eps).mul_(ctx.span)
        return torch.ops.aten._softmax_backward_data(g, p, -1, p.dtype), None, None


def clipped_softmax(x: Tensor, gamma: Tensor | float, zeta: float) -> Tensor:
    """clip_stretch(softmax(x), gamma, zeta) of scores that are -inf where masked."""
    return ClippedSoftmax.apply(x, gamma, zeta)


def gelu(x: Tensor) -> Tensor:
    """y = x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016)."""
    return F.gelu(x)


def relu(x: Tensor) -> Tensor:
    """y = max(x, 0). dx = g where x > 0."""
    return torch.relu(x)


def sigmoid(x: Tensor) -> Tensor:
    """y = 1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    """y = tanh(x)."""
    return torch.tanh(x)


def cross_entropy(logits: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """sum over targets >= 0 of -log softmax(logits)[target], divided by `count`, their number unless given. Targets < 0
    do not count.

    logits (..., V), targets (...) integers. Each target's term is float32 (float64 for float64 logits), their sum
    float64. Raises ValueError where the count is 0.
    """
    flat, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    rows = torch.nonzero(labels >= 0).squeeze(1)
    count = rows.numel() if count is None else count
    if count == 0:
        raise ValueError("cross entropy has no target: every target is negative")
    if rows.numel() < labels.numel():
        flat, labels = flat[rows], labels[rows]
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return F.cross_entropy(flat, labels, reduction="none").sum(dtype=torch.float64) / count


def soft_cross_entropy(logits: Tensor, weights: Tensor, count: int | None = None) -> Tensor:
    """sum over rows of -sum_v weights[v] log softmax(logits)[v], divided by `count`, the rows unless given.

    logits (B, V), weights (B, V) floats. Each row's term is float32 (float64 for float64 logits), their sum float64.
    Raises ValueError where the count is 0.
    """
    count = len(logits) if count is None else count
    if count == 0:
        raise ValueError("cross entropy has no target: the batch is empty")
    x = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(x, weights.to(x.dtype), reduction="none").sum(dtype=torch.float64) / count


# --- wiring: moves values, changes none -------------------------------------------------------------------------------


def embedding(table: Tensor, index: Tensor) -> Tensor:
    """y[...] = table[index[...]], (V, D) -> (..., D)."""
    return F.embedding(index, table)


def arrange(move: Callable[..., Tensor], *parts: Any) -> Any:
    """`parts` in another arrangement: `move` changes no value. Integer codes take their scale and zero point along
    (`integer.model.Code`)."""
    return move(*parts) if isinstance(parts[0], Tensor) else parts[0].arrange(move, parts)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, D) -> (B, H, T, K)."""
    # a scale per token has one channel, whatever the heads
    return arrange(lambda v: v.unflatten(-1, (min(heads, v.shape[-1]), -1)).transpose(1, 2), x)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, K) -> (B, T, H K)."""
    return arrange(lambda v: v.transpose(1, 2).flatten(-2), x)


def spread_heads(x: Tensor, width: int) -> Tensor:
    """(..., H) -> (..., H K): each head's value K times."""

    def move(v: Tensor) -> Tensor:
        one = v.shape[-1] != x.shape[-1]  # a scale per token stays one
        return v if one else v.unsqueeze(-1).expand(*v.shape, width).flatten(-2)

    return arrange(move, x)


def swap_last(x: Tensor) -> Tensor:
    """(..., M, N) -> (..., N, M)."""
    return x.transpose(-1, -2)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(shape)


def concat(parts: list[Tensor], axis: int) -> Tensor:
    """Joins along one axis."""
    return arrange(lambda *v: torch.cat(v, dim=axis), *parts)


def token(x: Tensor, position: int) -> Tensor:
    """(B, T, D) -> (B, D): one token of every sequence."""
    return arrange(lambda v: v[:, position], x)


def patches(image: Tensor, size: int) -> Tensor:
    """(B, C, S, S) -> (B, N, C size size), row by row; a patch's values in the order of a convolution's weight."""
    b, c, s, _ = image.shape
    n = s // size
    return image.reshape(b, c, n, size, n, size).permute(0, 2, 4, 1, 3, 5).reshape(b, n * n, c * size * size)
