"""A model of our shapes as one writes it without qtx, in plain `torch.nn`: what our modules may cost at most."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtx_ref.spec import ModelSpec


class PlainBlock(nn.Module):
    """A transformer block as one writes it without qtx."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        d, self.heads, self.pre, self.causal = spec.width, spec.heads, spec.pre_norm, spec.causal
        self.query, self.key, self.value, self.output = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, spec.hidden), nn.Linear(spec.hidden, d)
        self.norm1, self.norm2 = nn.LayerNorm(d, spec.norm_eps), nn.LayerNorm(d, spec.norm_eps)
        self.activation = {"gelu": F.gelu, "relu": F.relu}[str(spec.activation)]

    def attend(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.output(
            F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, t, d)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.attend(self.norm1(x))
            return x + self.down(self.activation(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.down(self.activation(self.up(x))))


class Plain(nn.Module):
    """BERT with its MLM head, or OPT, with plain attention and without padding."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        d = spec.width
        self.bert, self.offset = not spec.causal, spec.position_offset
        self.token, self.position = nn.Embedding(spec.vocab, d), nn.Embedding(spec.length + self.offset, d)
        self.blocks = nn.ModuleList(PlainBlock(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(d, spec.norm_eps)
        if self.bert:
            self.kinds, self.transform = nn.Embedding(spec.types, d), nn.Linear(d, d)
            self.head_norm, self.bias = nn.LayerNorm(d, spec.norm_eps), nn.Parameter(torch.zeros(spec.vocab))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]) + self.offset)
        if self.bert:
            x = self.norm(x + self.kinds(torch.zeros_like(tokens)))
        for block in self.blocks:
            x = block(x)
        if self.bert:
            x = self.head_norm(F.gelu(self.transform(x)))
            return F.linear(x, self.token.weight, self.bias)
        return F.linear(self.norm(x), self.token.weight)

    def load(self, p: dict[str, np.ndarray]) -> None:
        names = {"token.weight": "embed.token.weight", "position.weight": "embed.position.weight"}
        norm = "embed.norm" if self.bert else "final.norm"
        names |= {f"norm.{kind}": f"{norm}.{kind}" for kind in ("weight", "bias")}
        if self.bert:
            names |= {"kinds.weight": "embed.type.weight", "bias": "head.decoder.bias"}
            for mine, theirs in (("transform", "head.transform"), ("head_norm", "head.norm")):
                names |= {f"{mine}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
        parts = {"up": "ffn.hidden", "down": "ffn.output", "norm1": "attn.norm", "norm2": "ffn.norm"}
        parts |= {part: f"attn.{part}" for part in ("query", "key", "value", "output")}
        for i in range(len(self.blocks)):
            for mine, theirs in parts.items():
                for kind in ("weight", "bias"):
                    names[f"blocks.{i}.{mine}.{kind}"] = f"layer.{i}.{theirs}.{kind}"
        self.load_state_dict({mine: torch.from_numpy(p[theirs]) for mine, theirs in names.items()})
