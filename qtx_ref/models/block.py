"""One transformer block, shared by BERT (post-norm), OPT (pre- or post-norm) and ViT (pre-norm)."""

from __future__ import annotations

import numpy as np

from .. import ops
from ..numerics import Numerics
from ..spec import Gate, ModelSpec
from ..tape import V
from .gate import gate

__all__ = ["Cache", "block", "feed_forward", "self_attention"]

Cache = tuple[V, V]  # keys and values, (B, H, T, K)


def self_attention(
    nx: Numerics[V], x: V, mask: np.ndarray, spec: ModelSpec, name: str, past: Cache[V] | None
) -> tuple[V, Cache[V]]:
    """x (B, T, D), float or integer codes -> (B, T, D), and the keys and values so far. mask, boolean, broadcasts to
    (B, H, T, Tk)."""
    q = ops.split_heads(nx.linear(f"{name}.query", x), spec.heads)  # (B, T, D) -> (B, H, T, K)
    k = ops.split_heads(nx.linear(f"{name}.key", x), spec.heads)
    v = ops.split_heads(nx.linear(f"{name}.value", x), spec.heads)
    if past is not None:
        k, v = ops.concat([past[0], k], axis=2), ops.concat([past[1], v], axis=2)
    context = nx.attention(name, q, k, v, mask, spec.attention, spec.attention_dropout)  # (B, T, D)
    if spec.attention.gate is not Gate.NONE:
        context = gate(nx, x, context, spec, name)
    return nx.linear(f"{name}.output", context), (k, v)


def feed_forward(nx: Numerics[V], x: V, spec: ModelSpec, name: str) -> V:
    """x (B, T, D), float or integer codes -> (B, T, D), through F hidden units."""
    h = nx.linear(f"{name}.hidden", x)  # (B, T, D) -> (B, T, F)
    h = nx.activation(f"{name}.activation", h, str(spec.activation))
    return nx.linear(f"{name}.output", h)  # (B, T, F) -> (B, T, D)


def block(
    nx: Numerics[V], x: V, mask: np.ndarray, spec: ModelSpec, index: int, past: Cache[V] | None = None
) -> tuple[V, Cache[V]]:
    """Pre-norm: x + f(norm(x)), twice. Post-norm: norm(x + f(x)), twice. x (B, T, D), float or integer codes -> (B, T,
    D) and the layer's keys and values; mask as in `self_attention`."""
    attn, ffn = f"layer.{index}.attn", f"layer.{index}.ffn"
    h = nx.norm(f"{attn}.norm", x, spec.norm_eps) if spec.pre_norm else x
    h, present = self_attention(nx, h, mask, spec, attn, past)
    x = nx.add(f"{attn}.residual", x, nx.dropout(f"{attn}.output", h, spec.dropout))
    if not spec.pre_norm:
        x = nx.norm(f"{attn}.norm", x, spec.norm_eps)
    h = nx.norm(f"{ffn}.norm", x, spec.norm_eps) if spec.pre_norm else x
    h = feed_forward(nx, h, spec, ffn)
    x = nx.add(f"{ffn}.residual", x, nx.dropout(f"{ffn}.output", h, spec.dropout))
    if not spec.pre_norm:
        x = nx.norm(f"{ffn}.norm", x, spec.norm_eps)
    return x, present
