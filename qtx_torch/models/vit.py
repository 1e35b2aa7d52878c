"""ViT (Dosovitskiy et al. 2021): pre-norm encoder over image patches and a CLS token.

Differs from the reference: forward, Vit: models are modules, not functions.

`patch_norm` puts a LayerNorm after the patch embedding, as Bondarenko et al. 2023 do.
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


class Vit(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Module()
        self.embed.image = SiteModule()
        self.embed.patch = Linear(spec.width, spec.channels * spec.patch_size**2)
        if spec.patch_norm:
            self.embed.norm = Norm(spec.width)
        self.embed.cls = SiteModule(weight=(spec.width,))
        self.embed.position = Embedding(spec.length, spec.width)
        self.embed.sum = SiteModule()
        self.layer = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.final = nn.Module()
        if spec.final_norm:
            self.final.norm = Norm(spec.width)
        self.head = nn.Module()
        if spec.head is Head.CLASSIFY:
            self.head.classifier = Linear(spec.classes, spec.width)

    def forward(self, nx: Float, batch: Mapping[str, Tensor]) -> Tensor:
        """images (B, C, S, S) -> hidden states (B, T, D) or class logits (B, classes)."""
        x, mask = self.bottom(nx, batch)
        for block in self.layer:
            x, _ = block(nx, x, mask)
        return self.top(nx, x)

    def bottom(self, nx: Float, batch: Mapping[str, Tensor]) -> tuple[Tensor, Mask]:
        """What enters the layers, (B, T, D)."""
        embed, spec = self.embed, self.spec
        nx.begin(None, batch.get("spared"))
        images = batch["images"].to(embed.patch.weight.dtype)
        x = nx.input(embed.image, ops.patches(images, spec.patch_size))  # (B, C, S, S) -> (B, N, C P P)
        x = nx.linear(embed.patch, x)  # (B, N, C P P) -> (B, N, D)
        if spec.patch_norm:
            x = nx.norm(embed.norm, x, spec.norm_eps)
        x = nx.prepend(embed.cls, x)  # (B, N, D) -> (B, T, D)
        x = nx.add(embed.sum, x, nx.embedding(embed.position, torch.arange(spec.length, device=x.device)))
        x = nx.dropout(embed.sum, x, spec.dropout)
        return x, make_mask(None, spec.length, spec.length, causal=False, like=x)

    def top(self, nx: Float, x: Tensor) -> Tensor:
        """The model's output of what leaves the layers."""
        spec = self.spec
        if spec.final_norm:
            x = nx.norm(self.final.norm, x, spec.norm_eps)
        return nx.linear(self.head.classifier, ops.token(x, 0)) if spec.head is Head.CLASSIFY else x
