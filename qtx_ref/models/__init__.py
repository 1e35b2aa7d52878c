"""The three models as functions of a numerics, which has the parameters; the parameters' shapes and first values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..numerics import Numerics
from ..ops import cross_entropy, soft_cross_entropy
from ..spec import Family, ModelSpec
from ..tape import V, Var
from . import bert, opt, vit

__all__ = ["asked", "count_targets", "forward", "loss"]


def forward(nx: Numerics[V], spec: ModelSpec, batch: Mapping[str, np.ndarray]) -> V:
    """Logits (B, T, V) or (B, classes) of a batch under a numerics, which has the parameters; hidden states (B, T, D)
    of a model without head. In the parameters' dtype, or integer codes. The batch is as `backend.Model.accept` gives
    it."""
    if spec.family is Family.BERT:
        return bert.forward(nx, spec, batch)
    return opt.forward(nx, spec, batch) if spec.family is Family.OPT else vit.forward(nx, spec, batch)


def loss(logits: Var, batch: Mapping[str, np.ndarray], count: int | None = None) -> Var:
    """Cross entropy in nats of logits (..., V), summed over the batch's targets, or labels, (...) integers, and divided
    by `count`: their number (None), or that of the batch that this is a part of; float64, (). Of a batch with
    `soft_labels` (B, V) each label is those weights of all classes. Raises ValueError where the count is 0."""
    if "soft_labels" in batch:
        return soft_cross_entropy(logits, batch["soft_labels"], count)
    return cross_entropy(logits, asked(batch), count)


def count_targets(batch: Mapping[str, np.ndarray]) -> int:
    """How many targets, or labels, of the batch count."""
    return int((asked(batch) >= 0).sum())


def asked(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The batch's targets (B, T), or labels (B,), integers, negative where nothing is asked."""
    return batch["targets"] if "targets" in batch else batch["labels"]
