"""BERT (Devlin et al. 2019): post-norm encoder with token types, a masked-language-model head or a classifier."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import ops
from ..attention import attention_mask
from ..numerics import Numerics
from ..spec import Head, ModelSpec
from ..tape import V
from .block import block

__all__ = ["forward", "head"]


def forward(nx: Numerics[V], spec: ModelSpec, batch: Mapping[str, np.ndarray]) -> V:
    """tokens, mask and types (B, T) -> hidden states (B, T, D), MLM logits (B, T, V) or class logits (B, C).

    mask is boolean, as `attention.boolean_mask` makes it.
    """
    tokens, rows = batch["tokens"], batch["mask"]
    length = tokens.shape[1]
    nx.begin(rows, batch.get("spared"))
    x = nx.embedding("embed.token", tokens)  # (B, T) -> (B, T, D)
    x = nx.add("embed.pair", x, nx.embedding("embed.type", batch["types"]))
    x = nx.add("embed.sum", x, nx.embedding("embed.position", np.arange(length)))
    x = nx.dropout("embed.norm", nx.norm("embed.norm", x, spec.norm_eps), spec.dropout)
    mask = attention_mask(rows, length, length, causal=False)
    for i in range(spec.layers):
        x, _ = block(nx, x, mask, spec, i)
    return head(nx, spec, x)


def head(nx: Numerics[V], spec: ModelSpec, x: V) -> V:
    """x (B, T, D), float or integer codes -> MLM logits (B, T, V), class logits (B, C), or x where there is no head."""
    if spec.head is Head.MLM:
        h = nx.activation("head.activation", nx.linear("head.transform", x), "gelu")
        h = nx.norm("head.norm", h, spec.norm_eps)
        return nx.linear("head.decoder", h, weight="embed.token.weight")  # (B, T, D) -> (B, T, V)
    if spec.head is Head.CLASSIFY:
        h = nx.activation("head.activation", nx.linear("head.pool", ops.token(x, 0)), "tanh")  # (B, T, D) -> (B, D)
        return nx.linear("head.classifier", nx.dropout("head.activation", h, spec.dropout))  # (B, D) -> (B, C)
    return x
