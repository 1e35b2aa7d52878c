"""AdamW steps on a model, in parts where `StepSpec` says so."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import models
from .model import Arrays, Batch, Model, check_device, quiet
from .optim import AdamW
from .spec import (
    PLAIN_STEP,
    OptimSpec,
    SpecError,
    StepSpec,
    check_rows,
    trains,
)

__all__ = ["Trainer", "check_step"]


def check_step(step: StepSpec, device: str) -> None:
    """Raises SpecError for a way to compute a step that the reference does not have."""
    check_device(device)
    for key in ("recompute", "compiled", "int8", "sharding"):
        if getattr(step, key) != getattr(PLAIN_STEP, key):
            raise SpecError(f"step {key} is {getattr(step, key)}: the reference has none; use --backend torch")


class Trainer:
    """AdamW steps on a model. Dropout of step t is drawn from (seed, t)."""

    shared = False  # whether each of several processes has a share of the state

    def __init__(self, model: Model, optim: OptimSpec, *, seed: int = 0, step: StepSpec = PLAIN_STEP) -> None:
        """Raises SpecError where the optimizer's `only` names no parameter, and for a way to compute a step that the
        reference does not have."""
        check_step(step, "cpu")
        self.model = model
        self.seed = seed
        self.spec = step
        chosen = {name: x for name, x in model.trainable().items() if trains(name, optim)}
        if not chosen:
            raise SpecError(f"optimizer only is {optim.only!r}: that begins none of the model's parameters")
        self.adam = AdamW(chosen, optim)

    @quiet
    def step(self, batch: Batch, *, first: int = 0, total: int | None = None) -> tuple[float, float]:
        """One update of what the optimizer's `only` names; the loss before it and the gradient norm before clipping.

        batch: rows `first` on of one of `total` rows (None: all of it). Raises SpecError where it is not the whole, or
        has no `accumulate` equal parts.
        """
        check_rows(len(models.asked(batch)), first, total)
        step, names = self.adam.count, self.adam.params
        loss, grads = self.model.gradients(
            batch, training=True, seed=self.seed, step=step, only=names, accumulate=self.spec.accumulate
        )
        return loss, self.adam.step(grads)

    def state(self) -> Arrays:
        """All that a resumed run needs beside the parameters: `optim.m.<name>`, `optim.v.<name>`, `optim.step`, and
        `learned.<site>.scale` and `.zero_point` of learned ranges."""
        tensors = {f"optim.m.{name}": value.copy() for name, value in self.adam.m.items()}
        tensors |= {f"optim.v.{name}": value.copy() for name, value in self.adam.v.items()}
        tensors |= {f"learned.{name}": value.copy() for name, value in self.model.learned.items()}
        return tensors | {"optim.step": np.array(self.adam.count, np.int64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        self.adam.count = int(state["optim.step"])
        for name in self.adam.params:
            self.adam.m[name][...] = state[f"optim.m.{name}"]
            self.adam.v[name][...] = state[f"optim.v.{name}"]
        for name, value in self.model.learned.items():
            value[...] = state[f"learned.{name}"]
