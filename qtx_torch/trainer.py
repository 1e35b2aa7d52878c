"""AdamW steps on a model, in parts, by several processes, in float16, as `StepSpec` says.

Differs from the reference: check_int8: it has no such step.
Differs from the reference: Trainer.averages, Trainer.rest, Trainer.load_rest, Trainer.is_finite, Trainer.save_shares,
Trainer.load_shares, Trainer.shares: processes may share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtx_ref.spec import (
    PLAIN_STEP,
    OptimSpec,
    SpecError,
    StepSpec,
    check_rows,
    trains,
)

from . import distributed, models, sites
from .arrays import to_numpy
from .compiler import find_compiler, tell_failure
from .model import Arrays, Batch, Model
from .numerics import Float, has_int8
from .optim import AdamW
from .quant import int8
from .step import LossScale, check_deterministic, compile_forward, fixed_order


def check_step(step: StepSpec, device: str) -> None:
    """Raises SpecError where a device gives no deterministic step as things are, nothing can be compiled for it, or its
    int8 products are slower than floats."""
    kind = torch.device(device).type
    if step.deterministic:
        check_deterministic(torch.device(device))
    if step.compiled and (reason := find_compiler(kind)):
        raise SpecError(f"step compiled is True: {reason}; leave it out")
    if step.int8 and kind == "cpu" and not torch.cpu._is_vnni_supported():
        raise SpecError("step int8 is True: this CPU has no VNNI, and float products are faster; leave it out")


def check_int8(model: Model) -> None:
    """Raises SpecError where no linear of a model is trained by int8 products, or the gradients' quantizers are not."""
    linears = sites.linears(model.net).values()
    if not any(not module.tied and has_int8(module, module.weight) for module in linears):
        raise SpecError(
            "step int8 is True: no linear has symmetric codes of 8 bits at most per token and channel; train under w8a8"
        )
    if not int8.has_products(model.gradient_quants):
        raise SpecError(
            "step int8 is True: not all gradients have symmetric codes, 8 bits at most, per token; use +grad8, or none"
        )


class Trainer:
    """AdamW steps on a model. Dropout of step t is drawn from (seed, t). In float16 the loss is scaled, and a step
    whose gradients overflow is skipped: its batch, its rate and its draws are used up."""

    def __init__(self, model: Model, optim: OptimSpec, *, seed: int = 0, step: StepSpec = PLAIN_STEP) -> None:
        """Raises SpecError where the optimizer's `only` names no parameter, and where the device gives no deterministic
        step as things are, or nothing can be compiled, or multiplied in int8."""
        check_step(step, str(model.device))
        self.model = model
        self.seed = seed
        self.spec = step
        if step.int8:
            check_int8(model)
        chosen = {name: x for name, x in model.leaves().items() if trains(name, optim)}
        if not chosen:
            raise SpecError(f"optimizer only is {optim.only!r}: that begins none of the model's parameters")
        self.scale = LossScale() if model.dtype == "float16" else None
        for block in model.net.layer:
            block.recompute = step.recompute
        if step.compiled:
            model.forward_pass = compile_forward(model.compute)
        if distributed.processes()[1] > 1:
            for name, x in model.leaves().items():
                x.requires_grad_(name in chosen)
            model.spread(step.sharding)
        self.shared = model.sharded  # whether each of several processes has a share of the state
        self.leaves = {name: x for name, x in model.leaves().items() if name in chosen}
        shares = {name: distributed.own(x) for name, x in self.leaves.items()}
        self.adam = AdamW(shares, optim, partial(distributed.sum_squares, like=self.leaves))

    def step(self, batch: Batch, *, first: int = 0, total: int | None = None) -> tuple[float, float]:
        """One update of what the optimizer's `only` names; the loss before it and the gradient norm before clipping,
        which of a skipped step is not finite.

        batch: rows `first` on of one of `total` rows (None: all of it). Raises SpecError where it is not the whole, or
        has no `accumulate` equal parts, and where a compiler is there and fails.
        """
        inputs = self.model.accept(batch)
        if distributed.processes()[1] == 1:
            check_rows(len(models.asked(inputs)), first, total)
        count = int(distributed.add(torch.tensor(models.count_targets(inputs))))
        scale = self.scale.value if self.scale else 1.0
        with tell_failure("leave step compiled out"), fixed_order(self.spec.deterministic):
            loss, grads = self.model.backward(
                inputs,
                self._numerics,
                self.adam.params,
                accumulate=self.spec.accumulate,
                first=first,
                count=count,
                scale=scale,
            )
            value, norm = loss.item(), self.adam.step({name: distributed.own(x) for name, x in grads.items()}, scale)
        if self.scale:
            self.scale.update(norm)
        return value, norm

    def _numerics(self, first_row: int, **given: Any) -> Float:
        """The numerics of a part of this step; numbers that differ by step and part are no constants of a graph."""
        numbers = {"step": self.adam.count, "first_row": first_row}
        if self.spec.compiled:
            numbers = {name: torch.tensor(number, device=self.model.device) for name, number in numbers.items()}
        return Float(training=True, seed=self.seed, int8=self.spec.int8, **numbers, **given)

    def state(self) -> Arrays:
        """All that a resumed run needs beside the parameters: `optim.m.<name>`, `optim.v.<name>`, `optim.step`, and
        `learned.<site>.scale` and `.zero_point` of learned ranges; in float16 `optim.skipped`, `optim.loss_scale` and
        `optim.good`, the steps since that changed."""
        return {name: to_numpy(distributed.gather(x)) for name, x in self.averages().items()} | self.rest()

    def rest(self) -> Arrays:
        """`state` without AdamW's averages."""
        tensors = {f"learned.{name}": to_numpy(value) for name, value in self.model.learned.items()}
        if self.scale:
            counts = {"skipped": self.adam.skipped, "good": self.scale.good}
            tensors |= {f"optim.{name}": np.array(value, np.int64) for name, value in counts.items()}
            tensors["optim.loss_scale"] = np.array(self.scale.value)
        return tensors | {"optim.step": np.array(self.adam.count, np.int64)}

    def averages(self) -> dict[str, Tensor]:
        """AdamW's two averages by the names that they are saved under, shares where processes share."""
        kept = (("optim.m", self.adam.m), ("optim.v", self.adam.v))
        return {
            f"{key}.{name}": distributed.place(values[name], like)
            for key, values in kept
            for name, like in self.leaves.items()
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` gave."""
        for name, value in self.averages().items():
            distributed.own(value).copy_(distributed.take(torch.tensor(state[name]), value))
        self.load_rest(state)

    def load_rest(self, state: Mapping[str, np.ndarray]) -> None:
        """`load_state` without AdamW's averages."""
        with torch.no_grad():
            for name, value in self.model.learned.items():
                value.copy_(torch.tensor(state[f"learned.{name}"]))
        if self.scale:
            self.scale = LossScale(float(state["optim.loss_scale"]), int(state["optim.good"]))
            self.adam.skipped = int(state["optim.skipped"])
        self.adam.count = int(state["optim.step"])

    def save_shares(self, folder: str) -> Arrays:
        """Writes the parameters and AdamW's averages into a folder, each process its shares; what else `state` has.
        Raises OSError."""
        distributed.save_shares(folder, self.shares())
        return self.rest()

    def load_shares(self, folder: str, rest: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `save_shares` wrote and gave, whatever number of processes that was. Raises OSError."""
        distributed.load_shares(folder, self.shares())
        self.load_rest(rest)

    def is_finite(self) -> bool:
        """Whether all numbers are that this process has of parameters and state."""
        tensors = [distributed.own(value) for value in self.shares().values()]
        return all(bool(torch.isfinite(x).all()) for x in (*tensors, *self.model.learned.values()))

    def shares(self) -> dict[str, Tensor]:
        """Parameters and averages by the names that they are saved under."""
        return {name: value.detach() for name, value in self.model.weights.items()} | self.averages()
