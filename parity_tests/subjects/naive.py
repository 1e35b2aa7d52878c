"""The models once more, in float64 loops over sequences, heads and queries: slow, obvious, sharing no arithmetic.

Arrays: x (T, D) is one sequence.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from qtx_ref.spec import (
    Activation,
    AttentionSpec,
    Family,
    Gate,
    Head,
    ModelSpec,
    Softmax,
)

Params = dict[str, np.ndarray]


def probability_row(scores: np.ndarray, allowed: np.ndarray, spec: AttentionSpec, sink: float | None) -> np.ndarray:
    """Probabilities (T,) of one query from its scaled scores (T,)."""
    row, keys = np.zeros(len(scores)), np.flatnonzero(allowed)
    if keys.size == 0:
        return row
    extra = {Softmax.PLUS_ONE: [0.0], Softmax.SINK: [sink]}.get(spec.softmax, [])
    row[keys] = special.softmax(np.concatenate([scores[keys], extra]))[: keys.size]
    gamma = -spec.alpha / keys.size if spec.softmax is Softmax.CLIPPED_ROW else spec.gamma
    if spec.softmax in (Softmax.CLIPPED, Softmax.CLIPPED_ROW):
        row = np.minimum(1.0, np.maximum(0.0, (spec.zeta - gamma) * row + gamma))
    return row


def head_context(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray, spec: AttentionSpec, sink: float | None
) -> np.ndarray:
    """q, k, v (T, K) of one head, allowed (T, T) -> (T, K)."""
    scores = q @ k.T / math.sqrt(q.shape[1])
    return np.stack([probability_row(s, a, spec, sink) for s, a in zip(scores, allowed, strict=True)]) @ v


def gate_openings(spec: ModelSpec, p: Params, name: str, x: np.ndarray, real: np.ndarray) -> np.ndarray:
    """How far the gate lets each feature through, (T, D)."""
    kind, width = spec.attention.gate, spec.head_width
    w, b = p.get(f"{name}.gate_logit.weight"), p.get(f"{name}.gate_logit.bias")
    if kind is Gate.ELEMENTWISE:
        return special.expit(x @ w.T)
    openings = np.empty(x.shape)
    for h in range(spec.heads):
        part = x[:, h * width : (h + 1) * width]
        if kind is Gate.HEAD:
            logit = np.full(len(x), b[h])
        elif kind is Gate.ALL_FEATURES:
            logit = x @ w[h] + b[h]
        elif kind is Gate.MLP:
            inner, offset = p[f"{name}.gate_hidden.weight"][h], p[f"{name}.gate_hidden.bias"][h]
            logit = np.maximum(part @ inner.T + offset, 0) @ w[h, 0] + b[h, 0]
        else:
            logit = part @ w[h, 0] + b[h, 0]
        if kind is Gate.HEAD_CONDITIONAL:
            logit = np.full(len(x), logit[real].mean() if real.any() else 0.0)
        openings[:, h * width : (h + 1) * width] = special.expit(logit)[:, None]
    return openings


def norm(p: Params, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p[f"{name}.weight"] + p[
        f"{name}.bias"
    ]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + special.erf(x / math.sqrt(2)))


def linear(p: Params, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def block(spec: ModelSpec, p: Params, i: int, x: np.ndarray, real: np.ndarray) -> np.ndarray:
    attn, ffn, eps, width = f"layer.{i}.attn", f"layer.{i}.ffn", spec.norm_eps, spec.head_width
    allowed = np.tile(real, (len(x), 1))
    if spec.causal:
        allowed &= np.arange(len(x))[None] <= np.arange(len(x))[:, None]
    h = norm(p, f"{attn}.norm", x, eps) if spec.pre_norm else x
    q, k, v = (linear(p, f"{attn}.{part}", h) for part in ("query", "key", "value"))
    sinks = p.get(f"{attn}.probs.sink", [None] * spec.heads)
    parts = [slice(j * width, (j + 1) * width) for j in range(spec.heads)]
    context = np.concatenate(
        [head_context(q[:, s], k[:, s], v[:, s], allowed, spec.attention, sinks[j]) for j, s in enumerate(parts)],
        axis=1,
    )
    if spec.attention.gate is not Gate.NONE:
        context = context * gate_openings(spec, p, attn, h, real)
    x = x + linear(p, f"{attn}.output", context)
    x = x if spec.pre_norm else norm(p, f"{attn}.norm", x, eps)
    h = linear(p, f"{ffn}.hidden", norm(p, f"{ffn}.norm", x, eps) if spec.pre_norm else x)
    h = gelu(h) if spec.activation is Activation.GELU else np.maximum(h, 0)
    x = x + linear(p, f"{ffn}.output", h)
    return x if spec.pre_norm else norm(p, f"{ffn}.norm", x, eps)


def embed(spec: ModelSpec, p: Params, one: Params) -> tuple[np.ndarray, np.ndarray]:
    """The first block's input (T, D), and which tokens are real (T,)."""
    places = p["embed.position.weight"]
    if spec.family is Family.VIT:
        n, size = spec.image_size // spec.patch_size, spec.patch_size
        cut = [
            one["images"][:, r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(n) for c in range(n)
        ]
        x = linear(p, "embed.patch", np.stack([patch.ravel() for patch in cut]))
        x = norm(p, "embed.norm", x, spec.norm_eps) if spec.patch_norm else x
        return np.concatenate([p["embed.cls.weight"][None], x]) + places, np.ones(spec.length, bool)
    x, real = p["embed.token.weight"][one["tokens"]], one["mask"]
    if spec.family is Family.BERT:
        x = x + p["embed.type.weight"][one["types"]] + places[: len(x)]
        return norm(p, "embed.norm", x, spec.norm_eps), real
    x = linear(p, "embed.project", x) if spec.embed_width else x
    count = [real[: t + 1].sum() - 1 if real[t] else -1 for t in range(len(x))]
    return x + places[np.array(count) + spec.position_offset], real


def forward(spec: ModelSpec, params: Params, batch: Params) -> np.ndarray:
    """Logits or hidden states of a batch, float64."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    size = len(next(iter(batch.values())))
    return np.stack([one(spec, p, {key: value[i] for key, value in batch.items()}) for i in range(size)])


def one(spec: ModelSpec, p: Params, inputs: Params) -> np.ndarray:
    x, real = embed(spec, p, inputs)
    for i in range(spec.layers):
        x = block(spec, p, i, x, real)
    x = norm(p, "final.norm", x, spec.norm_eps) if spec.final_norm else x
    x = linear(p, "final.project", x) if spec.embed_width else x
    if spec.head is Head.CAUSAL:
        return x @ p["embed.token.weight"].T
    if spec.head is Head.MLM:
        h = norm(p, "head.norm", gelu(linear(p, "head.transform", x)), spec.norm_eps)
        return h @ p["embed.token.weight"].T + p["head.decoder.bias"]
    if spec.head is Head.CLASSIFY:
        h = np.tanh(linear(p, "head.pool", x[0])) if spec.family is Family.BERT else x[0]
        return linear(p, "head.classifier", h)
    return x


def loss(logits: np.ndarray, batch: Params) -> float:
    """Mean over the counted targets of -log softmax(logits)[target]."""
    targets = batch["targets"] if "targets" in batch else batch["labels"]
    picked = [special.log_softmax(logits[i])[targets[i]] for i in np.ndindex(targets.shape) if targets[i] >= 0]
    return -math.fsum(picked) / len(picked)
