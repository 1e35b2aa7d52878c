"""The models as the obvious composition of torch.nn.functional, from a dict of tensors: what the backend's errors and
gradients are measured beside. Nothing here is shared with `qtx_torch`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qtx_ref.spec import (
    Activation,
    AttentionSpec,
    Family,
    Gate,
    Head,
    ModelSpec,
    Softmax,
)

Tensors = dict[str, Tensor]


def probabilities(scores: Tensor, mask: Tensor, spec: AttentionSpec, sink: Tensor | None) -> Tensor:
    x = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if spec.softmax in (Softmax.PLUS_ONE, Softmax.SINK):
        extra = torch.zeros_like(x[..., :1]) if sink is None else sink.view(-1, 1, 1).expand(*x.shape[:-1], 1)
        return F.softmax(torch.cat([x, extra], -1), -1)[..., :-1] * mask
    p = F.softmax(x, -1) * mask
    if spec.softmax is Softmax.PLAIN:
        return p
    gamma: Tensor | float = spec.gamma
    if spec.softmax is Softmax.CLIPPED_ROW:
        gamma = -spec.alpha / mask.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    return torch.clamp((spec.zeta - gamma) * p + gamma, 0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec, sink: Tensor | None) -> Tensor:
    """q, k, v (B, H, T, K) -> (B, T, H K)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (probabilities(scores, mask, spec, sink) @ v).transpose(1, 2).flatten(2)


def apply_gate(spec: ModelSpec, p: Tensors, name: str, x: Tensor, context: Tensor, rows: Tensor) -> Tensor:
    """sigmoid(logit) * context; x and context (B, T, D), rows (B, T)."""
    kind, w, b = spec.attention.gate, p.get(f"{name}.gate_logit.weight"), p.get(f"{name}.gate_logit.bias")
    if kind is Gate.ELEMENTWISE:
        return torch.sigmoid(F.linear(x, w)) * context
    parts = x.chunk(spec.heads, -1)
    if kind is Gate.HEAD:
        logit = b
    elif kind is Gate.ALL_FEATURES:
        logit = F.linear(x, w, b)
    elif kind is Gate.MLP:
        inner = zip(parts, p[f"{name}.gate_hidden.weight"], p[f"{name}.gate_hidden.bias"], w, b, strict=True)
        logit = torch.cat([F.linear(F.relu(F.linear(part, w1, b1)), w2, b2) for part, w1, b1, w2, b2 in inner], -1)
    else:
        logit = torch.cat([F.linear(part, *wb) for part, *wb in zip(parts, w, b, strict=True)], -1)
    if kind is Gate.HEAD_CONDITIONAL:
        keep = rows[:, :, None]
        logit = (logit * keep).sum(1, keepdim=True) / keep.sum(1, keepdim=True).clamp(min=1)
    return torch.sigmoid(logit).repeat_interleave(spec.head_width, -1) * context


def norm(p: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def block(spec: ModelSpec, p: Tensors, i: int, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    attn, ffn, eps = f"layer.{i}.attn", f"layer.{i}.ffn", spec.norm_eps
    h = norm(p, f"{attn}.norm", x, eps) if spec.pre_norm else x
    q, k, v = (
        linear(p, f"{attn}.{n}", h).unflatten(-1, (spec.heads, -1)).transpose(1, 2) for n in ("query", "key", "value")
    )
    context = attention(q, k, v, mask, spec.attention, p.get(f"{attn}.probs.sink"))
    if spec.attention.gate is not Gate.NONE:
        context = apply_gate(spec, p, attn, h, context, rows)
    x = x + linear(p, f"{attn}.output", context)
    x = x if spec.pre_norm else norm(p, f"{attn}.norm", x, eps)
    h = linear(p, f"{ffn}.hidden", norm(p, f"{ffn}.norm", x, eps) if spec.pre_norm else x)
    x = x + linear(p, f"{ffn}.output", F.gelu(h) if spec.activation is Activation.GELU else F.relu(h))
    return x if spec.pre_norm else norm(p, f"{ffn}.norm", x, eps)


def embed(spec: ModelSpec, p: Tensors, batch: Tensors) -> tuple[Tensor, Tensor]:
    """The first block's input (B, T, D), and which tokens are real (B, T)."""
    places = p["embed.position.weight"]
    if spec.family is Family.VIT:
        kernel = p["embed.patch.weight"].unflatten(1, (spec.channels, spec.patch_size, spec.patch_size))
        x = F.conv2d(batch["images"], kernel, p["embed.patch.bias"], stride=spec.patch_size).flatten(2).mT
        x = norm(p, "embed.norm", x, spec.norm_eps) if spec.patch_norm else x
        x = torch.cat([p["embed.cls.weight"].expand(len(x), 1, -1), x], 1) + places
        return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    rows, x = batch["mask"], F.embedding(batch["tokens"], p["embed.token.weight"])
    if spec.family is Family.BERT:
        x = x + F.embedding(batch["types"], p["embed.type.weight"]) + places[: x.shape[1]]
        return norm(p, "embed.norm", x, spec.norm_eps), rows
    x = linear(p, "embed.project", x) if spec.embed_width else x
    return x + F.embedding(rows.cumsum(1) * rows - 1 + spec.position_offset, places), rows


def forward(spec: ModelSpec, p: Tensors, batch: Tensors) -> Tensor:
    """Logits or hidden states; batch holds tensors, images in the parameters' dtype."""
    x, rows = embed(spec, p, batch)
    mask = rows[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    mask = mask.tril() if spec.causal else mask
    for i in range(spec.layers):
        x = block(spec, p, i, x, mask, rows)
    x = norm(p, "final.norm", x, spec.norm_eps) if spec.final_norm else x
    x = linear(p, "final.project", x) if spec.embed_width else x
    if spec.head is Head.CAUSAL:
        return F.linear(x, p["embed.token.weight"])
    if spec.head is Head.MLM:
        h = norm(p, "head.norm", F.gelu(linear(p, "head.transform", x)), spec.norm_eps)
        return F.linear(h, p["embed.token.weight"], p["head.decoder.bias"])
    if spec.head is Head.CLASSIFY:
        h = torch.tanh(linear(p, "head.pool", x[:, 0])) if spec.family is Family.BERT else x[:, 0]
        return linear(p, "head.classifier", h)
    return x


def run(
    spec: ModelSpec, params: dict[str, np.ndarray], batch: dict[str, np.ndarray], device: str, dtype: torch.dtype
) -> tuple:
    """Output, loss and gradients by name in NumPy; loss and gradients None without a head."""
    p = {name: torch.tensor(value, device=device, dtype=dtype).requires_grad_() for name, value in params.items()}
    inputs = {name: torch.tensor(value, device=device) for name, value in batch.items()}
    if "images" in inputs:
        inputs["images"] = inputs["images"].to(dtype)
    output = forward(spec, p, inputs)
    if spec.head is Head.NONE:
        return output.detach().cpu().numpy(), None, None
    targets = inputs["targets"] if "targets" in inputs else inputs["labels"]
    loss = F.cross_entropy(output.flatten(0, -2), targets.flatten(), ignore_index=-1)
    grads = torch.autograd.grad(loss, list(p.values()), allow_unused=True, materialize_grads=True)
    named = {name: g.cpu().numpy() for name, g in zip(p, grads, strict=True)}
    return output.detach().cpu().numpy(), loss.item(), named
