"""AdamW with decoupled decay, clipping by global norm, and learning-rate schedules."""

from __future__ import annotations

import math

import numpy as np

from .spec import OptimSpec, Schedule, decays

__all__ = ["AdamW", "clip_by_norm", "learning_rate"]


def learning_rate(spec: OptimSpec, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up from lr / warmup or from 0, then the schedule, which reaches 0 after
    the last step (the formulas of transformers' schedules, to the bit with `first_rate_zero`)."""
    if step < spec.warmup:
        return spec.lr * ((step if spec.first_rate_zero else step + 1) / spec.warmup)
    length = max(1, spec.steps - spec.warmup)
    if spec.schedule is Schedule.LINEAR:
        return spec.lr * max(0.0, (spec.steps - step) / length)
    if spec.schedule is Schedule.COSINE:
        return spec.lr * (0.5 * (1 + math.cos(math.pi * min(1.0, (step - spec.warmup) / length))))
    return spec.lr


def clip_by_norm(grads: dict[str, np.ndarray], limit: float) -> tuple[dict[str, np.ndarray], float]:
    """Gradients by name, of any shape, scaled so that their joint 2-norm is at most `limit` (0: as they are) in their
    own dtype, and the norm before; sums in float64 (Pascanu et al. 2013, algorithm 1, with 1e-6 beside the norm as in
    torch's `clip_grad_norm_`)."""
    norm = math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in grads.values()))
    factor = limit / (norm + 1e-6)
    if limit == 0 or factor >= 1:
        return grads, norm
    return {name: g * g.dtype.type(factor) for name, g in grads.items()}, norm


class AdamW:
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w = w (1 - lr d) - lr m' / (sqrt(v') + eps)

    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t) (Kingma and Ba 2015; decay d as in Loshchilov and Hutter 2019).
    `params` are updated in place; `m` and `v` have their shapes and their dtype, float32 or float64. Clipping comes
    first.
    """

    def __init__(self, params: dict[str, np.ndarray], spec: OptimSpec) -> None:
        self.params = params
        self.spec = spec
        self.count = 0  # t
        self.m = {name: np.zeros_like(value) for name, value in params.items()}
        self.v = {name: np.zeros_like(value) for name, value in params.items()}

    def step(self, grads: dict[str, np.ndarray]) -> float:
        """One update with gradients by name; returns the gradients' norm before clipping."""
        s, lr = self.spec, learning_rate(self.spec, self.count)
        grads, norm = clip_by_norm(grads, s.clip_norm)
        self.count += 1
        first, second = 1 - s.beta1**self.count, 1 - s.beta2**self.count
        for name, w in self.params.items():
            kind, g = w.dtype.type, grads[name]
            m, v = self.m[name], self.v[name]
            m += (g - m) * kind(1 - s.beta1)
            v *= kind(s.beta2)
            v += g * g * kind(1 - s.beta2)
            if decays(name, self.params, s):
                w *= kind(1 - lr * s.weight_decay)
            w -= kind(lr / first) * m / (np.sqrt(v) / kind(math.sqrt(second)) + kind(s.eps))
        return norm
