"""The three models as functions over a parameter dict, their parameters' shapes and first values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..numerics import Float
from ..ops import cross_entropy
from ..spec import Family, ModelSpec
from ..tape import Var
from . import bert, opt, vit

FORWARD = {Family.BERT: bert.forward, Family.OPT: opt.forward, Family.VIT: vit.forward}


def forward(nx: Float, p: Mapping[str, Var], spec: ModelSpec, batch: dict[str, np.ndarray]) -> Var:
    """Logits (or hidden states, for a model without head) of a batch under a numerics."""
    return FORWARD[spec.family](nx, p, spec, batch)


def loss(logits: Var, batch: dict[str, np.ndarray]) -> Var:
    """Cross entropy in nats, summed over the batch's targets (or labels) and divided by their number; float64."""
    return cross_entropy(logits, batch["targets"] if "targets" in batch else batch["labels"])
