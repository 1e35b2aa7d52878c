"""ViT (Dosovitskiy et al. 2021): pre-norm encoder over image patches and a CLS token.

`patch_norm` puts a LayerNorm after the patch embedding, as Bondarenko et al. 2023 do.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import ops
from ..attention import attention_mask
from ..numerics import Numerics
from ..spec import Head, ModelSpec
from ..tape import V
from .block import block

__all__ = ["forward"]


def forward(nx: Numerics[V], spec: ModelSpec, batch: Mapping[str, np.ndarray]) -> V:
    """images (B, C, S, S), in the parameters' dtype -> hidden states (B, T, D) or class logits (B, classes)."""
    nx.begin(None, batch.get("spared"))
    x = nx.input("embed.image", ops.patches(batch["images"], spec.patch_size))  # (B, C, S, S) -> (B, N, C P P)
    x = nx.linear("embed.patch", x)  # (B, N, C P P) -> (B, N, D)
    if spec.patch_norm:
        x = nx.norm("embed.norm", x, spec.norm_eps)
    x = nx.prepend("embed.cls", x)  # (B, N, D) -> (B, T, D)
    x = nx.add("embed.sum", x, nx.embedding("embed.position", np.arange(spec.length)))
    x = nx.dropout("embed.sum", x, spec.dropout)
    mask = attention_mask(None, spec.length, spec.length, causal=False)
    for i in range(spec.layers):
        x, _ = block(nx, x, mask, spec, i)
    if spec.final_norm:
        x = nx.norm("final.norm", x, spec.norm_eps)
    return nx.linear("head.classifier", ops.token(x, 0)) if spec.head is Head.CLASSIFY else x
