"""BERT (Devlin et al. 2019): post-norm encoder with token types, a masked-language-model head or a classifier.

Differs from the reference: forward, head, Embed, Bert: models are modules, not functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qtx_ref.spec import Head, ModelSpec

from .. import ops
from ..attention import Mask, make_mask
from ..numerics import Float
from ..sites import Embedding, Linear, Norm, SiteModule
from .block import Block


class Embed(nn.Module):
    type = property(lambda self: self._modules["type"])  # nn.Module has a method of this name

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.token = Embedding(spec.vocab, spec.width)
        self._modules["type"] = Embedding(spec.types, spec.width)
        self.position = Embedding(spec.length, spec.width)
        self.pair = SiteModule()
        self.sum = SiteModule()
        self.norm = Norm(spec.width)


class Bert(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = Embed(spec)
        self.layer = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.head = nn.Module()
        if spec.head is Head.MLM:
            self.head.transform = Linear(spec.width, spec.width)
            self.head.activation = SiteModule()
            self.head.norm = Norm(spec.width)
            self.head.decoder = Linear(spec.vocab, spec.width, tied="embed.token.weight")
        if spec.head is Head.CLASSIFY:
            self.head.pool = Linear(spec.width, spec.width)
            self.head.activation = SiteModule()
            self.head.classifier = Linear(spec.classes, spec.width)

    def forward(self, nx: Float, batch: Mapping[str, Tensor]) -> Tensor:
        """tokens, mask and types (B, T) -> hidden states (B, T, D), MLM logits (B, T, V) or class logits (B, C).

        mask, boolean, is None where every token is real.
        """
        x, mask = self.bottom(nx, batch)
        for block in self.layer:
            x, _ = block(nx, x, mask)
        return self.top(nx, x)

    def bottom(self, nx: Float, batch: Mapping[str, Tensor]) -> tuple[Tensor, Mask]:
        """What enters the layers, (B, T, D)."""
        embed, spec, tokens, rows = self.embed, self.spec, batch["tokens"], batch["mask"]
        length = tokens.shape[1]
        nx.begin(rows, batch.get("spared"))
        x = nx.embedding(embed.token, tokens)  # (B, T) -> (B, T, D)
        x = nx.add(embed.pair, x, nx.embedding(embed.type, batch["types"]))
        x = nx.add(embed.sum, x, nx.embedding(embed.position, torch.arange(length, device=tokens.device)))
        x = nx.dropout(embed.norm, nx.norm(embed.norm, x, spec.norm_eps), spec.dropout)
        return x, make_mask(rows, length, length, causal=False, like=x)

    def top(self, nx: Float, x: Tensor) -> Tensor:
        """The model's output of what leaves the layers."""
        head, spec = self.head, self.spec
        if spec.head is Head.MLM:
            h = nx.activation(head.activation, nx.linear(head.transform, x), "gelu")
            h = nx.norm(head.norm, h, spec.norm_eps)
            return nx.linear(head.decoder, h, weight=self.embed.token.weight)  # (B, T, D) -> (B, T, V)
        if spec.head is Head.CLASSIFY:
            h = nx.activation(head.activation, nx.linear(head.pool, ops.token(x, 0)), "tanh")  # (B, T, D) -> (B, D)
            return nx.linear(head.classifier, nx.dropout(head.activation, h, spec.dropout))  # (B, D) -> (B, C)
        return x
