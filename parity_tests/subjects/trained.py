"""The small presets after 50 training steps on bundled data: where the cases about training and quantization start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from parity_tests.proof.case import Context
from qtx.data import load
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention, preset
from qtx_ref.spec import ModelSpec, OptimSpec
from qtx_torch.backend import Model, Trainer

PRESETS = ("bert-tiny", "opt-tiny", "vit-tiny")
ATTENTIONS = {"vanilla": "vanilla", "clipped": "clipped", "gated": "gated"}
SHARED, STEPS = 50, 20
OPTIM = OptimSpec(lr=1e-3, weight_decay=0.01, clip_norm=1.0, warmup=30, steps=300)  # as qtx train does for 300 steps
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Trained:
    """A preset at its own size: parameters, optimizer state and the batches of the next steps."""

    spec: ModelSpec
    params: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    batches: tuple[Batch, ...]


def train_preset(name: str, kind: str, context: Context) -> Trained:
    """4 texts of 128 tokens, or 128 images, a step; the 50 shared steps are torch's.

    With 32 images vit-tiny is chaotic: float32 and float64 torch part fivefold each step, whatever the backend.
    """

    def make() -> Trained:
        spec = replace(preset(name), attention=attention(ATTENTIONS[kind]))
        batches = load(None, spec).train_batches(spec, 128 if name.startswith("vit") else 4, seed=0)
        model = Model(spec, init_params(spec, 0), device=context.device)
        trainer = Trainer(model, OPTIM)
        for batch in islice(batches, SHARED):
            trainer.step(batch)
        return Trained(spec, model.params(), trainer.state(), tuple(islice(batches, STEPS)))

    return context.once(("trained", name, kind), make)
