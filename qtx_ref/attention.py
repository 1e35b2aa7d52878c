"""Attention variants: masks, and how probabilities are made from scores.

Bondarenko et al. 2023 (arXiv 2306.12929) section 4: clipped softmax (eq. 4). The gates of eq. 5 are in `models.gate`.

Letters: B batch, H heads, Tq queries, Tk keys.
"""

from __future__ import annotations

import numpy as np

from . import ops
from .spec import MASKS, AttentionSpec, Softmax
from .tape import Var, const

__all__ = ["attention_mask", "boolean_mask", "probabilities"]


def probabilities(scores: Var, mask: np.ndarray, spec: AttentionSpec, sink: Var | None = None) -> Var:
    """Attention probabilities of scaled scores (B, H, Tq, Tk), float32 or float64, under a boolean mask that broadcasts
    against them: in [0, 1], in the scores' shape and dtype.

    Softmax, softmax1 (a sink of logit 0; Miller 2023), a learned sink per head (H,), or the clipped softmax (eq. 4)
    with the spec's gamma or with each row's own, -alpha / number of keys. Rows without keys give zeros in every
    variant, and masked scores never enter, whatever they are.
    """
    if spec.softmax is Softmax.PLUS_ONE:
        return ops.softmax(scores, mask, const(np.zeros((1, 1), scores.value.dtype)))
    if spec.softmax is Softmax.SINK:
        assert sink is not None  # a parameter of such a model
        return ops.softmax(scores, mask, ops.reshape(sink, (-1, 1, 1)))
    p = ops.softmax(scores, mask)
    if spec.softmax is Softmax.PLAIN:
        return p
    gamma: float | np.ndarray = spec.gamma
    if spec.softmax is Softmax.CLIPPED_ROW:
        keys = np.broadcast_to(mask, scores.shape).sum(axis=-1, keepdims=True)
        assert spec.alpha is not None  # the spec has checked it
        gamma = -spec.alpha / np.maximum(keys, 1)
    return ops.clip_stretch(p, gamma, spec.zeta)


def boolean_mask(mask: np.ndarray) -> np.ndarray:
    """A boolean mask, of any shape, as it is; an additive one with 0 as true and -10000 and below as false.

    Raises ValueError naming the first other value, or an unsigned dtype, which has no negative number: a mask of 0 and
    1 is not read as either kind.
    """
    if mask.dtype == bool:
        return mask
    if mask.dtype.kind not in "if":
        raise ValueError(f"attention mask is {mask.dtype}: {MASKS}")
    other = mask[~((mask == 0) | (mask <= -10000))]
    if other.size:
        raise ValueError(f"attention mask holds {other.flat[0].item()}: {MASKS}")
    return mask == 0


def attention_mask(rows: np.ndarray | None, queries: int, keys: int, causal: bool) -> np.ndarray:
    """Which key each query may attend to, boolean, broadcasting to (B, H, queries, keys).

    rows (B, keys) is true at real tokens, None where all are. The queries are the last of the keys' positions.
    """
    mask = np.ones((1, 1, queries, keys), bool)
    if causal:
        mask = np.tril(mask, keys - queries)
    return mask if rows is None else mask & rows[:, None, None, :]
