"""The three models as functions over a parameter dict, their parameters' shapes and first values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..numerics import Numerics
from ..ops import cross_entropy
from ..spec import Family, ModelSpec
from ..tape import V, Var
from . import bert, opt, vit


def forward(nx: Numerics[V], spec: ModelSpec, batch: Mapping[str, np.ndarray]) -> V:
    """Logits (or hidden states, for a model without head) of a batch under a numerics, which has the parameters."""
    if spec.family is Family.BERT:
        return bert.forward(nx, spec, batch)
    return opt.forward(nx, spec, batch) if spec.family is Family.OPT else vit.forward(nx, spec, batch)


def loss(logits: Var, batch: Mapping[str, np.ndarray]) -> Var:
    """Cross entropy in nats, summed over the batch's targets (or labels) and divided by their number; float64."""
    return cross_entropy(logits, batch["targets"] if "targets" in batch else batch["labels"])
