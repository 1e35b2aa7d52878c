"""The three models as modules; their parameters have the reference's names and shapes.

Differs from the reference: forward, build: models are modules, not functions.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from qtx_ref.spec import Family, ModelSpec

from ..ops import cross_entropy, soft_cross_entropy
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


def loss(logits: Tensor, batch: Mapping[str, Tensor], count: int | None = None) -> Tensor:
    """Cross entropy in nats, summed over the batch's targets (or labels) and divided by `count`: their number (None),
    or that of the batch that this is a part of; float64. Of a batch with `soft_labels` (B, V) each label is those
    weights of all classes. Raises ValueError where the count is 0."""
    if "soft_labels" in batch:
        return soft_cross_entropy(logits, batch["soft_labels"], count)
    return cross_entropy(logits, asked(batch), count)


def count_targets(batch: Mapping[str, Tensor]) -> int:
    """How many targets, or labels, of the batch count."""
    return int((asked(batch) >= 0).sum())


def asked(batch: Mapping[str, Tensor]) -> Tensor:
    """The batch's targets (B, T), or labels (B,), negative where nothing is asked."""
    return batch["targets"] if "targets" in batch else batch["labels"]
