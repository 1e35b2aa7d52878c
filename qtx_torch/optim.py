"""AdamW with decoupled decay, clipping by global norm, and learning-rate schedules.

Differs from the reference: total, add_up: each process has squares of its own shares.
Differs from the reference: scale: losses are scaled in float16, which the reference has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qtx_ref.spec import OptimSpec, Schedule, decays


def learning_rate(spec: OptimSpec, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up from lr / warmup or from 0, then the schedule, which reaches 0 after
    the last step."""
    if step < spec.warmup:
        return spec.lr * ((step if spec.first_rate_zero else step + 1) / spec.warmup)
    length = max(1, spec.steps - spec.warmup)
    if spec.schedule is Schedule.LINEAR:
        return spec.lr * max(0.0, (spec.steps - step) / length)
    if spec.schedule is Schedule.COSINE:
        return spec.lr * (0.5 * (1 + math.cos(math.pi * min(1.0, (step - spec.warmup) / length))))
    return spec.lr


Total = Callable[[Mapping[str, Tensor]], Tensor]


def add_up(squares: Mapping[str, Tensor]) -> Tensor:
    """The sum of numbers by name."""
    return torch.stack(list(squares.values())).sum()


def _square(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """||g||^2 by name in float64. On a GPU of all at once: one by one, starting kernels took longest."""
    if all(g.device.type != "cpu" for g in grads.values()):
        norms = torch._foreach_norm(list(grads.values()), 2, torch.float64)
        return dict(zip(grads, torch.stack(norms).square().unbind(), strict=True))
    return {name: _square_pieces(g) for name, g in grads.items()}


def _square_pieces(g: Tensor) -> Tensor:
    """||g||^2 in float64, on a CPU: of the whole, torch would first make a float64 copy, and of a step that took a
    twentieth."""
    pieces = g.flatten().split(2**16)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]).square().sum()


def clip_by_norm(grads: dict[str, Tensor], limit: float, total: Total = add_up) -> tuple[dict[str, Tensor], float]:
    """Gradients scaled, in place, so that their joint 2-norm is at most `limit` (0: as they are), and the norm before;
    float64 sums. `total` adds up what each tensor has of the norm's square."""
    norm = math.sqrt(float(total(_square(grads))))
    factor = limit / (norm + 1e-6)
    if limit == 0 or factor >= 1:
        return grads, norm
    torch._foreach_mul_(list(grads.values()), factor)
    return grads, norm


class AdamW:
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w = w (1 - lr d) - lr m' / (sqrt(v') + eps)

    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t) (Kingma and Ba 2015; decay d as in Loshchilov and Hutter 2019),
    by torch's fused kernel. `params` are updated in place; `m` and `v` have their dtype.
    """

    def __init__(self, params: dict[str, Tensor], spec: OptimSpec, total: Total = add_up) -> None:
        """total: as `clip_by_norm` takes it."""
        self.params = params
        self.total = total
        self.spec = spec
        self.m = {name: torch.zeros_like(value) for name, value in params.items()}
        self.v = {name: torch.zeros_like(value) for name, value in params.items()}
        groups = [
            {"params": [w for name, w in params.items() if decays(name, params, spec) is wanted], "weight_decay": decay}
            for wanted, decay in ((True, spec.weight_decay), (False, 0.0))
        ]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True
        )
        self.skipped = 0  # of the steps
        self.count = 0

    @property
    def count(self) -> int:
        """Steps taken, skipped ones among them; t is how many were not. Setting it, after `skipped`, is how a resumed
        run goes on."""
        return self._count

    @count.setter
    def count(self, value: int) -> None:
        self._count = value
        for name, w in self.params.items():  # torch's own state, over our m and v
            step = torch.tensor(float(value - self.skipped), device=w.device)
            self.inner.state[w] = {"step": step, "exp_avg": self.m[name], "exp_avg_sq": self.v[name]}

    def step(self, grads: dict[str, Tensor], scale: float = 1.0) -> float:
        """One update with gradients by name, of `scale` times the loss; returns the norm before clipping of those of
        the loss itself.

        Where it is not finite under a scale above 1, the step is skipped: it counts in the schedule, and changes
        neither parameters nor averages.
        """
        if scale != 1:
            torch._foreach_mul_(list(grads.values()), 1 / scale)
        grads, norm = clip_by_norm(grads, self.spec.clip_norm, self.total)
        if scale > 1 and not math.isfinite(norm):
            self._count += 1
            self.skipped += 1
            return norm
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(self.spec, self._count)
        for name, w in self.params.items():
            w.grad = grads[name]
        self.inner.step()
        self.inner.zero_grad()
        self._count += 1
        return norm
