"""ViT (Dosovitskiy et al. 2021): pre-norm encoder over image patches and a CLS token.

`patch_norm` puts a LayerNorm after the patch embedding, as Bondarenko et al. 2023 do.
"""

from __future__ import annotations

import numpy as np

from .. import ops
from ..attention import Params, attention_mask
from ..numerics import Float
from ..spec import Head, ModelSpec
from ..tape import Var, const
from .block import block


def forward(nx: Float, p: Params, spec: ModelSpec, batch: dict[str, np.ndarray]) -> Var:
    """images (B, C, S, S) -> hidden states (B, T, D) or class logits (B, classes)."""
    nx.begin(None)
    images = batch["images"].astype(p["embed.patch.weight"].value.dtype)
    x = nx.parameter("embed.image", ops.patches(images, spec.patch_size))  # (B, C, S, S) -> (B, N, C P P)
    x = nx.linear("embed.patch", x, p)  # (B, N, C P P) -> (B, N, D)
    if spec.patch_norm:
        x = nx.norm("embed.norm", x, p, spec.norm_eps)
    cls = ops.add(p["embed.cls.weight"], const(np.zeros((x.shape[0], 1, 1), x.value.dtype)))  # (D,) -> (B, 1, D)
    x = nx.concat("embed.cls", [cls, x], axis=1)  # (B, T, D)
    x = nx.add("embed.sum", x, nx.embedding("embed.position", np.arange(spec.length), p))
    x = nx.dropout("embed.sum", x, spec.dropout)
    mask = attention_mask(None, spec.length, spec.length, causal=False)
    for i in range(spec.layers):
        x, _ = block(nx, p, x, mask, spec, i)
    if spec.final_norm:
        x = nx.norm("final.norm", x, p, spec.norm_eps)
    return nx.linear("head.classifier", ops.token(x, 0), p) if spec.head is Head.CLASSIFY else x
