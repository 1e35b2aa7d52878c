"""Attention variants: how probabilities are made from scores, masks, and gates on the output.

Bondarenko et al. 2023 (arXiv 2306.12929) section 4: clipped softmax (eq. 4) and gated attention (eq. 5).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtx_ref.spec import AttentionSpec, Gate, ModelSpec, Softmax

from . import ops
from .sites import Linear, Site

if TYPE_CHECKING:
    from .numerics import Float


def attention_mask(rows: Tensor | None, queries: int, keys: int, causal: bool) -> Tensor:
    """Which key each query may attend to, boolean, broadcasting to (B, H, queries, keys).

    rows (B, keys) is true at real tokens, None where all are. The queries are the last of the keys' positions.
    """
    mask = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=None if rows is None else rows.device)
    if causal:
        mask = mask.tril(keys - queries)
    return mask if rows is None else mask & rows[:, None, None, :]


def boolean_mask(mask: Tensor) -> Tensor:
    """A boolean mask as it is; an additive one with 0 as true and -10000 and below as false.

    Raises ValueError naming the first other value.
    """
    if mask.dtype == torch.bool:
        return mask
    other = mask[~((mask == 0) | (mask <= -10000))]
    if other.numel():
        raise ValueError(
            f"attention mask holds {other[0].item()}: give booleans, or an additive mask of 0 (attend) and -10000 or below"
        )
    return mask == 0


class Mask:
    """A forward pass's mask in the forms that kernels want, each made once and shared by the layers."""

    def __init__(self, allowed: Tensor, dtype: torch.dtype, *, full: bool = False, triangle: bool = False) -> None:
        """allowed as `attention_mask` gives it; full: all of it is true; triangle: it is the lower triangle."""
        self.allowed = allowed
        self.dtype = dtype
        self.full = full
        self.triangle = triangle

    @cached_property
    def empty(self) -> Tensor | None:
        """True at queries without keys, (B, 1, Tq, 1); None where there are none."""
        if self.full or self.triangle:
            return None
        empty = ~self.allowed.any(dim=-1, keepdim=True)
        return empty if empty.any() else None

    @cached_property
    def bias(self) -> Tensor | None:
        """0 where allowed and -inf where not, to be added to scores; None where there is nothing to add.

        Queries without keys have 0 throughout, as a row of -inf would become NaN: `close` puts zeros in their results.
        """
        if self.full:
            return None
        opened = self.allowed if self.empty is None else self.allowed | self.empty
        return torch.zeros(opened.shape, dtype=self.dtype, device=opened.device).masked_fill_(~opened, -math.inf)

    def close(self, x: Tensor) -> Tensor:
        """x (B, H, Tq, n) with zeros at queries without keys."""
        return x if self.empty is None else x.masked_fill(self.empty, 0)


def make_mask(rows: Tensor | None, queries: int, keys: int, causal: bool, like: Tensor) -> Mask:
    """The mask of a forward pass, in the dtype and on the device of `like`."""
    with like.device:
        allowed = attention_mask(rows, queries, keys, causal)
    triangle = causal and queries == keys and rows is None
    return Mask(allowed, like.dtype, full=rows is None and (not causal or queries == 1), triangle=triangle)


def probabilities(scores: Tensor, mask: Tensor, spec: AttentionSpec, sink: Tensor | None = None) -> Tensor:
    """Attention probabilities of scaled scores (B, H, Tq, Tk) under a boolean mask that broadcasts against them.

    Softmax, softmax1 (a sink of logit 0), a learned sink per head (H,), or the clipped softmax with the spec's gamma or
    with each row's own, -alpha / number of keys. Rows without keys give zeros in every variant.
    """
    m = Mask(mask, scores.dtype)
    return masked_probabilities(scores + m.bias, m, spec, sink)


def masked_probabilities(scores: Tensor, mask: Mask, spec: AttentionSpec, sink: Tensor | None) -> Tensor:
    """`probabilities` of scores to which the mask's bias has been added."""
    if spec.softmax is Softmax.PLUS_ONE:
        p = ops.softmax(scores, sink=scores.new_zeros(1))
    elif spec.softmax is Softmax.SINK:
        p = ops.softmax(scores, sink=sink.reshape(-1, 1, 1))
    elif spec.softmax is Softmax.PLAIN:
        p = ops.softmax(scores)
    else:
        gamma: Tensor | float = spec.gamma
        if spec.softmax is Softmax.CLIPPED_ROW:
            gamma = -spec.alpha / mask.allowed.sum(dim=-1, keepdim=True).clamp(min=1).double()
        p = ops.clipped_softmax(scores, gamma, spec.zeta)
    return mask.close(p)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in one kernel: q (B, H, Tq, K), k and v (B, H, Tk, K) -> (B, H, Tq, K)."""
    bias = None if mask.triangle else mask.bias
    return mask.close(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=mask.triangle))


def gate_sites(spec: ModelSpec) -> dict[str, Site]:
    """The sites that the spec's gate adds to an attention, by name within it."""
    kind, h, k, d, m = spec.attention.gate, spec.heads, spec.head_width, spec.width, spec.gate_hidden
    if kind is Gate.NONE:
        return {}
    found: dict[str, Site] = {}
    if kind is Gate.HEAD:
        found["gate_logit"] = Site(bias=(h,))
    elif kind is Gate.MLP:
        found["gate_hidden"] = Linear(m, k, heads=h)
        found["gate_logit"] = Linear(1, m, heads=h)
    elif kind is Gate.ALL_FEATURES:
        found["gate_logit"] = Linear(h, d)
    elif kind is Gate.ELEMENTWISE:
        found["gate_logit"] = Linear(d, d, bias=False)
    else:
        found["gate_logit"] = Linear(1, k, heads=h)
    return found | {"gate": Site(), "gated": Site()}


def gate(nx: Float, attn: nn.Module, x: Tensor, context: Tensor, spec: ModelSpec) -> Tensor:
    """sigmoid(logit) * context (times 1 / pi where rescaled), as the spec's gate says.

    The logit is made from the attention's input x (B, T, D). context (B, T, D) has its heads side by side. Every form
    but ELEMENTWISE has one logit per head.
    """
    kind = spec.attention.gate
    if kind is Gate.NONE:
        return context
    if kind is Gate.HEAD:
        z = nx.parameter(attn.gate_logit)  # (H,)
    elif kind is Gate.MLP:
        h = nx.activation(
            attn.gate_hidden, nx.linear(attn.gate_hidden, x, named=False), "relu"
        )  # (B, T, D) -> (B, T, H m)
        z = nx.linear(attn.gate_logit, h)  # (B, T, H m) -> (B, T, H)
    elif kind is Gate.HEAD_CONDITIONAL:
        z = nx.mean(attn.gate_logit, nx.linear(attn.gate_logit, x, named=False))  # (B, T, H) -> (B, 1, H)
    else:
        z = nx.linear(attn.gate_logit, x)  # (B, T, D) -> (B, T, H), or (B, T, D) elementwise
    g = nx.activation(attn.gate, z, "sigmoid")
    if spec.attention.rescaled:
        g = nx.scale(g, 1 / spec.attention.pi)
    if kind is not Gate.ELEMENTWISE:
        g = ops.spread_heads(g, spec.head_width)  # (..., H) -> (..., D)
    return nx.mul(attn.gated, context, g)
