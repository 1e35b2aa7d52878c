"""OPT (Zhang et al. 2022): causal decoder with ReLU, learned positions behind an offset and a tied head.

Differs from the reference: forward, Opt: models are modules, not functions.

The 350m shape as released is post-norm, embeds tokens in 512 dimensions, projects them to 1024 and back without bias,
and has no final norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qtx_ref.spec import Head, ModelSpec

from ..attention import Mask, make_mask
from ..numerics import Float
from ..sites import Embedding, Linear, Norm, SiteModule
from .block import Block, Cache


class Opt(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        narrow = spec.embed_width or spec.width
        self.embed = nn.Module()
        self.embed.token = Embedding(spec.vocab, narrow)
        if spec.embed_width:
            self.embed.project = Linear(spec.width, narrow, bias=False)
        self.embed.position = Embedding(spec.length + spec.position_offset, spec.width)
        self.embed.sum = SiteModule()
        self.layer = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.final = nn.Module()
        if spec.final_norm:
            self.final.norm = Norm(spec.width)
        if spec.embed_width:
            self.final.project = Linear(narrow, spec.width, bias=False)
        self.head = nn.Module()
        if spec.head is Head.CAUSAL:
            self.head.decoder = Linear(spec.vocab, narrow, bias=False, tied="embed.token.weight")

    def forward(self, nx: Float, batch: Mapping[str, Tensor], cache: list[Cache] | None = None) -> Tensor:
        """tokens and mask (B, T) -> hidden states (B, T, D) or next-token logits (B, T, V).

        mask, boolean, is None where every token is real. cache, a list that starts empty, holds each layer's keys and
        values of the tokens before these; it is filled and brought up to date in place, and then every token counts.
        """
        x, mask = self.bottom(nx, batch, cache)
        for i, block in enumerate(self.layer):
            x, present = block(nx, x, mask, cache[i] if cache and i < len(cache) else None)
            if cache is not None:
                cache[i : i + 1] = [present]
        return self.top(nx, x)

    def bottom(self, nx: Float, batch: Mapping[str, Tensor], cache: list[Cache] | None = None) -> tuple[Tensor, Mask]:
        """What enters the layers, (B, T, D)."""
        embed, spec, tokens = self.embed, self.spec, batch["tokens"]
        count, past = tokens.shape[1], cache[0][0].shape[2] if cache else 0
        rows = batch["mask"] if cache is None else None
        nx.begin(rows, batch.get("spared"))
        if rows is None:
            positions = torch.arange(past, past + count, device=tokens.device).expand(tokens.shape)
        else:
            positions = rows.cumsum(dim=1) * rows - 1  # real tokens count from 0, padding is at -1
        x = nx.embedding(embed.token, tokens)  # (B, T) -> (B, T, D or E)
        if spec.embed_width:
            x = nx.linear(embed.project, x)  # (B, T, E) -> (B, T, D)
        x = nx.add(embed.sum, x, nx.embedding(embed.position, positions + spec.position_offset))
        return x, make_mask(rows, count, past + count, causal=True, like=x)

    def top(self, nx: Float, x: Tensor) -> Tensor:
        """The model's output of what leaves the layers."""
        spec = self.spec
        if spec.final_norm:
            x = nx.norm(self.final.norm, x, spec.norm_eps)
        if spec.embed_width:
            x = nx.linear(self.final.project, x)  # (B, T, D) -> (B, T, E)
        return nx.linear(self.head.decoder, x, weight=self.embed.token.weight) if spec.head is Head.CAUSAL else x
