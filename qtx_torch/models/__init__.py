"""The three models as modules; their parameters have the reference's names and shapes.

Differs from the reference: forward, build: models are modules, not functions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from qtx_ref.spec import Family, ModelSpec

from ..ops import cross_entropy
from ..sites import name_sites
from .bert import Bert
from .opt import Opt
from .vit import Vit

NETS = {Family.BERT: Bert, Family.OPT: Opt, Family.VIT: Vit}


def build(spec: ModelSpec) -> nn.Module:
    """A model with its sites named and its parameters zero. Call it with a numerics and a batch of tensors."""
    net = NETS[spec.family](spec)
    name_sites(net)
    return net


def loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy in nats, summed over the batch's targets (or labels) and divided by their number; float64."""
    return cross_entropy(logits, batch["targets"] if "targets" in batch else batch["labels"])
