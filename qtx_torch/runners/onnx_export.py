"""A float model as an ONNX file, for engines that are run beside us.

Not in the reference: the exporter is torch's, and follows torch's modules.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qtx_ref.spec import AttentionSpec, Family, ModelSpec

from .. import models
from ..attention import Mask
from ..numerics import Float

EXAMPLE = (2, 8)  # sequences and tokens that the exporter traces; both axes stay free


class TracedMask(Mask):
    """A mask that looks at no value: queries without keys are closed whether or not there are any."""

    @cached_property
    def empty(self) -> Tensor | None:
        return None if self.full or self.triangle else ~self.allowed.any(dim=-1, keepdim=True)


class Traced(Float):
    """`Float` without a branch on the data."""

    def attention(
        self, attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Mask, spec: AttentionSpec, rate: float
    ) -> Tensor:
        traced = TracedMask(mask.allowed, mask.dtype, full=mask.full, triangle=mask.triangle)
        return super().attention(attn, q, k, v, traced, spec, rate)


class Exportable(nn.Module):
    """A model as a function of its inputs in order. Its parameters are a list: `embed.type` is no attribute of a module
    that the exporter may make, `nn.Module` having a method of that name."""

    def __init__(self, net: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.parts = nn.ParameterList(net.parameters())
        self.keys = [name for name, _ in net.named_parameters()]
        self.net = (net,)  # in a tuple: no child

    def forward(self, *inputs: Tensor) -> Tensor:
        batch = {"mask": None} | dict(zip(self.names, inputs, strict=True))
        return torch.func.functional_call(self.net[0], dict(zip(self.keys, self.parts, strict=True)), (Traced(), batch))


def input_names(spec: ModelSpec, masked: bool) -> list[str]:
    """What an exported model takes, in order."""
    if spec.family is Family.VIT:
        return ["images"]
    return ["tokens"] + ["mask"] * masked + ["types"] * (spec.family is Family.BERT)


def export_onnx(spec: ModelSpec, params: Mapping[str, np.ndarray], path: Path, *, masked: bool) -> None:
    """The float model as an ONNX file, by torch's exporter; batch and length are free.

    masked: whether it takes a mask (B, T), boolean; without one every token is real, and no kernel pays for a mask.
    """
    names = input_names(spec, masked)
    net = models.build(spec)
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.copy_(torch.tensor(params[name]))
    size, length = EXAMPLE[0], min(EXAMPLE[1], spec.length)
    tokens = torch.arange(size * length).reshape(size, length)
    example = {
        "tokens": tokens % max(spec.vocab, 1),
        "mask": tokens % length < length - 1,
        "types": torch.zeros_like(tokens),
        "images": torch.zeros(size, spec.channels, spec.image_size, spec.image_size),
    }
    free = torch.export.Dim.DYNAMIC
    axes = tuple({0: free} if name == "images" else {0: free, 1: free} for name in names)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every package that it would also know
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter and its packages, about themselves
        torch.onnx.export(
            Exportable(net, names).eval(),
            tuple(example[name] for name in names),
            path,
            dynamo=True,
            dynamic_shapes=(axes,),
            input_names=names,
            output_names=["output"],
            external_data=False,
            verbose=False,
        )
