"""The optimizer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .base import Name, Spec, refuse

__all__ = ["OptimSpec", "Schedule", "decays", "trains"]


class Schedule(Name):
    """What the learning rate is multiplied by after the warmup, as the steps go on."""

    CONSTANT = "constant"
    LINEAR = "linear"  # to 0 at the last step
    COSINE = "cosine"  # half a cosine to 0 at the last step


@dataclass(frozen=True)
class OptimSpec(Spec):
    """AdamW (Loshchilov and Hutter 2019): decoupled decay, on matrices and tables, and what the switches add."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_norm_gains: bool = False  # the paper's switch: norm gains decay too
    decay_head_gates: bool = False  # the per-head gate's one parameter decays too: a bare tensor in the published code
    clip_norm: float = 1.0  # global gradient norm; 0 leaves gradients alone
    schedule: Schedule = Schedule.LINEAR
    warmup: int = 0  # steps from 0 to lr
    first_rate_zero: bool = False  # a warm-up's rates are lr t / warmup from t = 0, as in transformers; else (t + 1)
    steps: int = 1  # steps of the whole schedule
    only: tuple[str, ...] = ()  # beginnings of the names of the parameters that are trained; none: all of them

    def check(self) -> None:
        for key in ("lr", "eps", "weight_decay", "clip_norm"):
            if getattr(self, key) < 0:
                refuse(f"optimizer {key}", getattr(self, key), "give a number >= 0")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                refuse(f"optimizer {key}", getattr(self, key), "give a number in [0, 1)")
        if self.steps < 1:
            refuse("optimizer steps", self.steps, "give at least 1")
        if not 0 <= self.warmup <= self.steps:
            refuse("optimizer warmup", self.warmup, f"give 0 to {self.steps}, the number of steps")
        if "" in self.only:
            refuse("optimizer only", self.only, "a name's beginning has at least one character")


def decays(name: str, names: Collection[str], spec: OptimSpec) -> bool:
    """Whether AdamW decays the parameter of that name, one of all `names` of the model.

    Weights do, biases and sinks do not; norm gains and the per-head gate's parameter by the spec's switches. That gate
    is the one whose logit has a bias and no weight (`gate_logit.bias`; the published code calls it `alpha`, and
    excludes what has `bias` in its name, and `LayerNorm.weight` or, without `--wd_LN_gamma`, `layer_norm.weight`).
    """
    owner, _, kind = name.rpartition(".")
    if owner.endswith(".gate_logit") and f"{owner}.weight" not in names:
        return spec.decay_head_gates
    if kind != "weight":
        return False
    return spec.decay_norm_gains if owner.endswith("norm") else True


def trains(name: str, spec: OptimSpec) -> bool:
    """Whether the optimizer updates the parameter; one it does not has no gradient, no decay and no state."""
    return not spec.only or name.startswith(spec.only)
