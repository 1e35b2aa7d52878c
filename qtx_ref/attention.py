"""Attention variants: how probabilities are made from scores, masks, and gates on the output.

Bondarenko et al. 2023 (arXiv 2306.12929) section 4: clipped softmax (eq. 4) and gated attention (eq. 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import ops
from .spec import AttentionSpec, Gate, ModelSpec, Softmax
from .tape import Var, const

if TYPE_CHECKING:
    from .numerics import Float

Params = dict[str, Var]


def probabilities(scores: Var, mask: np.ndarray, spec: AttentionSpec, sink: Var | None = None) -> Var:
    """Attention probabilities of scaled scores (B, H, Tq, Tk) under a boolean mask that broadcasts against them.

    Softmax, softmax1 (a sink of logit 0), a learned sink per head (H,), or the clipped softmax with the spec's gamma or
    with each row's own, -alpha / number of keys. Rows without keys give zeros in every variant.
    """
    if spec.softmax is Softmax.PLUS_ONE:
        return ops.softmax(scores, mask, const(np.zeros((1, 1), scores.value.dtype)))
    if spec.softmax is Softmax.SINK:
        return ops.softmax(scores, mask, ops.reshape(sink, (-1, 1, 1)))
    p = ops.softmax(scores, mask)
    if spec.softmax is Softmax.PLAIN:
        return p
    gamma = spec.gamma
    if spec.softmax is Softmax.CLIPPED_ROW:
        keys = np.broadcast_to(mask, scores.shape).sum(axis=-1, keepdims=True)
        gamma = -spec.alpha / np.maximum(keys, 1)
    return ops.clip_stretch(p, gamma, spec.zeta)


def boolean_mask(mask: np.ndarray) -> np.ndarray:
    """A boolean mask as it is; an additive one with 0 as true and -10000 and below as false.

    Raises ValueError naming the first other value.
    """
    if mask.dtype == bool:
        return mask
    other = mask[~((mask == 0) | (mask <= -10000))]
    if other.size:
        raise ValueError(
            f"attention mask holds {other.flat[0]}: give booleans, or an additive mask of 0 (attend) and -10000 or below"
        )
    return mask == 0


def attention_mask(rows: np.ndarray | None, queries: int, keys: int, causal: bool) -> np.ndarray:
    """Which key each query may attend to, boolean, broadcasting to (B, H, queries, keys).

    rows (B, keys) is true at real tokens, None where all are. The queries are the last of the keys' positions.
    """
    mask = np.ones((1, 1, queries, keys), bool)
    if causal:
        mask = np.tril(mask, keys - queries)
    return mask if rows is None else mask & rows[:, None, None, :]


def gate(nx: Float, p: Params, x: Var, context: Var, spec: ModelSpec, name: str) -> Var:
    """sigmoid(logit) * context (times 1 / pi where rescaled), as the spec's gate says.

    The logit is made from the attention's input x (B, T, D). context (B, T, D) has its heads side by side. Every form
    but ELEMENTWISE has one logit per head.
    """
    kind, hidden, logit = spec.attention.gate, f"{name}.gate_hidden", f"{name}.gate_logit"
    if kind is Gate.NONE:
        return context
    if kind is Gate.HEAD:
        z = nx.parameter(logit, p)  # (H,)
    elif kind is Gate.MLP:
        h = nx.activation(hidden, nx.linear(hidden, x, p, named=False), "relu")  # (B, T, D) -> (B, T, H m)
        z = nx.linear(logit, h, p)  # (B, T, H m) -> (B, T, H)
    elif kind is Gate.HEAD_CONDITIONAL:
        z = nx.mean(logit, nx.linear(logit, x, p, named=False))  # (B, T, H) -> (B, 1, H)
    else:
        z = nx.linear(logit, x, p)  # (B, T, D) -> (B, T, H), or (B, T, D) elementwise
    g = nx.activation(f"{name}.gate", z, "sigmoid")
    if spec.attention.rescaled:
        g = nx.scale(g, 1 / spec.attention.pi)
    if kind is not Gate.ELEMENTWISE:
        g = ops.spread_heads(g, spec.head_width)  # (..., H) -> (..., D)
    return nx.mul(f"{name}.gated", context, g)
