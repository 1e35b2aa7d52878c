"""One transformer block, shared by BERT (post-norm), OPT (pre- or post-norm) and ViT (pre-norm).

Differs from the reference: self_attention, feed_forward, block, Attention, FeedForward, Block: models are modules, not
functions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtx_ref.spec import Gate, ModelSpec, Softmax

from .. import ops
from ..attention import Mask
from ..numerics import Float
from ..sites import Linear, Norm, Product, SiteModule
from .gate import gate, gate_sites, open_gate

Cache = tuple[Tensor, Tensor]  # keys and values, (B, H, T, K)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm = Norm(spec.width)
        for part in ("query", "key", "value", "output"):
            self.add_module(part, Linear(spec.width, spec.width))
        self.scores = Product()
        self.probs = SiteModule(sink=(spec.heads,)) if spec.attention.softmax is Softmax.SINK else SiteModule()
        self.context = Product()
        for name, site in gate_sites(spec).items():
            self.add_module(name, site)
        self.residual = SiteModule()

    def forward(self, nx: Float, x: Tensor, mask: Mask, past: Cache | None) -> tuple[Tensor, Cache]:
        """x (B, T, D) -> (B, T, D), and the keys and values so far."""
        spec = self.spec
        q = ops.split_heads(nx.linear(self.query, x), spec.heads)  # (B, T, D) -> (B, H, T, K)
        k = ops.split_heads(nx.linear(self.key, x), spec.heads)
        v = ops.split_heads(nx.linear(self.value, x), spec.heads)
        if past is not None:
            k, v = ops.concat([past[0], k], axis=2), ops.concat([past[1], v], axis=2)
        given = (self, q, k, v, mask, spec.attention, spec.attention_dropout)
        if nx.takes_gate(*given):
            context = nx.gated_attention(*given, open_gate(nx, self, x, spec))  # (B, T, D)
        else:
            context = nx.attention(*given)  # (B, T, D)
            if spec.attention.gate is not Gate.NONE:
                context = gate(nx, self, x, context, spec)
        return nx.linear(self.output, context), (k, v)


class FeedForward(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.kind = str(spec.activation)
        self.norm = Norm(spec.width)
        self.hidden = Linear(spec.hidden, spec.width)
        self.activation = SiteModule()
        self.output = Linear(spec.width, spec.hidden)
        self.residual = SiteModule()

    def forward(self, nx: Float, x: Tensor) -> Tensor:
        h = nx.linear(self.hidden, x)  # (B, T, D) -> (B, T, F)
        h = nx.activation(self.activation, h, self.kind)
        return nx.linear(self.output, h)  # (B, T, F) -> (B, T, D)


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.attn = Attention(spec)
        self.ffn = FeedForward(spec)
        self.recompute = False  # what lies within a block is not kept for the gradient, but computed again

    def forward(self, nx: Float, x: Tensor, mask: Mask, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """x (B, T, D) -> (B, T, D), and the keys and values so far."""
        if self.recompute and torch.is_grad_enabled():  # no state of a generator is kept: draws have addresses
            return checkpoint(self.compute, nx, x, mask, past, use_reentrant=False, preserve_rng_state=False)
        return self.compute(nx, x, mask, past)

    def compute(self, nx: Float, x: Tensor, mask: Mask, past: Cache | None) -> tuple[Tensor, Cache]:
        """Pre-norm: x + f(norm(x)), twice. Post-norm: norm(x + f(x)), twice."""
        spec, attn, ffn = self.spec, self.attn, self.ffn
        h = nx.norm(attn.norm, x, spec.norm_eps) if spec.pre_norm else x
        h, present = attn(nx, h, mask, past)
        x = nx.add(attn.residual, x, nx.dropout(attn.output, h, spec.dropout))
        if not spec.pre_norm:
            x = nx.norm(attn.norm, x, spec.norm_eps)
        h = nx.norm(ffn.norm, x, spec.norm_eps) if spec.pre_norm else x
        h = ffn(nx, h)
        x = nx.add(ffn.residual, x, nx.dropout(ffn.output, h, spec.dropout))
        if not spec.pre_norm:
            x = nx.norm(ffn.norm, x, spec.norm_eps)
        return x, present
