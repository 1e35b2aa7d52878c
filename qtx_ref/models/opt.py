"""OPT (Zhang et al. 2022): causal decoder with ReLU, learned positions behind an offset and a tied head.

The 350m shape as released is post-norm, embeds tokens in 512 dimensions, projects them to 1024 and back without bias,
and has no final norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..attention import attention_mask
from ..numerics import Numerics
from ..spec import Head, ModelSpec
from ..tape import V
from .block import Cache, block

__all__ = ["forward"]


def forward(
    nx: Numerics[V], spec: ModelSpec, batch: Mapping[str, np.ndarray], cache: list[Cache[V]] | None = None
) -> V:
    """tokens and mask (B, T) -> hidden states (B, T, D) or next-token logits (B, T, V).

    mask is boolean, as `attention.boolean_mask` makes it. cache, a list that starts empty, holds each layer's keys and
    values of the tokens before these; it is filled and brought up to date in place, and then every token counts as
    real.
    """
    tokens = batch["tokens"]
    count, past = tokens.shape[1], cache[0][0].shape[2] if cache else 0
    rows = batch["mask"] if cache is None else None
    nx.begin(rows, batch.get("spared"))
    if rows is None:
        positions = np.broadcast_to(np.arange(past, past + count), tokens.shape)
    else:
        positions = np.cumsum(rows, axis=1) * rows - 1  # real tokens count from 0, padding is at -1
    x = nx.embedding("embed.token", tokens)  # (B, T) -> (B, T, D or E)
    if spec.embed_width:
        x = nx.linear("embed.project", x)  # (B, T, E) -> (B, T, D)
    x = nx.add("embed.sum", x, nx.embedding("embed.position", positions + spec.position_offset))
    mask = attention_mask(rows, count, past + count, causal=True)
    for i in range(spec.layers):
        x, present = block(nx, x, mask, spec, i, cache[i] if cache and past else None)
        if cache is not None:
            cache[i : i + 1] = [present]
    if spec.final_norm:
        x = nx.norm("final.norm", x, spec.norm_eps)
    if spec.embed_width:
        x = nx.linear("final.project", x)  # (B, T, D) -> (B, T, E)
    return nx.linear("head.decoder", x, weight="embed.token.weight") if spec.head is Head.CAUSAL else x
