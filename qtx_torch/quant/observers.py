"""Observers: from calibration batches to a static range.

Each observer takes tensors by `update(x, where)` and answers `range()` with float32 (low, high) that broadcast against
the tensor. Elements where `where` is false never enter.
"""

from __future__ import annotations

import math

import torch
from scipy import optimize
from torch import Tensor

from qtx_ref.spec import Granularity, ObserverKind, Quant, range_axes

from .affine import min_max
from .quantizer import scale_zero, simulate, static_scale


def groups(x: Tensor, spec: Quant, weight: bool, where: Tensor | None) -> Tensor:
    """The elements that share a range, one row per range, in the dtype of x: (ranges, elements).

    Raises ValueError where ranges per channel would have different numbers of unmasked elements.
    """
    if spec.granularity is Granularity.TENSOR:
        picked = x if where is None else x[where.expand(x.shape)]
        return picked.reshape(1, -1)
    if spec.axis is not None:  # as the last, which is that of an activation's channels
        if where is not None:
            where = torch.movedim(where.expand(x.shape), spec.axis, -1)
            where = where[..., :1] if (where == where[..., :1]).all() else where
        x, weight = torch.movedim(x, spec.axis, -1), False
    rows = x.reshape(-1, x.shape[-1])
    if weight:
        return rows
    if where is not None:
        if where.shape[-1] != 1:
            raise ValueError("a range per channel cannot be taken under a mask over channels")
        rows = rows[where.expand(*x.shape[:-1], 1).reshape(-1)]
    return rows.T


def percentile(values: Tensor, q: float) -> Tensor:
    """The q-th percentile of each row (linear interpolation between order statistics), float32 (rows, 1)."""
    position = (values.shape[-1] - 1) * (q / 100)
    below = math.floor(position)
    above = min(below + 1, values.shape[-1] - 1)
    a, b = (values.kthvalue(at + 1, dim=-1).values.double() for at in (below, above))
    t = position - below
    return (a + (b - a) * t)[:, None].float()


def squared_error(values: Tensor, low: float, high: float, spec: Quant) -> float:
    """Sum of squared quantization errors of one group under a range; float64."""
    ends = torch.tensor([low, high], dtype=torch.float32, device=values.device)
    approximation, _ = simulate(values, *scale_zero(ends[0], ends[1], spec), spec)
    return float((values.double() - approximation.double()).square_().sum())


def least_error(values: Tensor, spec: Quant) -> tuple[float, float]:
    """The fraction of a group's (widened) range with the least squared error; the smallest of equals.

    Symmetric, and mirrored with a negative value: [-R f, R f] with R the largest magnitude plus the margin. Else: both
    ends times f.
    """
    margin = spec.observer.margin
    low, high = float(values.min()), float(values.max())
    low, high = low - margin if low < 0 else 0.0, high + margin if high > 0 else 0.0
    if spec.symmetric or (spec.mirrored and low < 0):
        low, high = -max(-low, high), max(-low, high)

    def error(fraction: float) -> float:
        return squared_error(values, low * fraction, high * fraction, spec)

    if spec.observer.kind is ObserverKind.MSE_GRID:
        count = spec.observer.candidates
        best = min(((i + 1) / count for i in range(count)), key=error)
    else:
        best = optimize.minimize_scalar(
            lambda f: error(f) if 0.01 <= f <= 1 else math.inf, bracket=(0.01, 1.0), method="golden", tol=1e-3
        ).x
    return low * best, high * best


class Observer:
    """The range of one site. `kind` of the spec's observer decides how batches are combined."""

    def __init__(self, spec: Quant, weight: bool = False) -> None:
        self.spec = spec
        self.weight = weight
        self.kind = spec.observer.kind
        self.shape: tuple[int, ...] = ()
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.silent: Tensor | None = None  # where every element so far was 0
        self.held: list[Tensor] = []

    def update(self, x: Tensor, where: Tensor | None = None) -> None:
        """Takes one batch's tensor. Raises ValueError on NaN or infinity that counts, and for a
        weight under a mask; without elements nothing changes."""
        if self.weight and where is not None:
            raise ValueError("every element of a weight counts: give no mask")
        if not x.numel() or (where is not None and not where.any()):
            return
        x = x.detach()
        low, high = min_max(x, range_axes(self.spec, x.ndim, self.weight), where)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise ValueError(f"values run from {low.min().item()} to {high.max().item()}; a range needs finite numbers")
        self.silent = (low == 0) & (high == 0) & (True if self.silent is None else self.silent)
        self.shape = tuple(low.shape)
        if self.kind in (ObserverKind.CURRENT, ObserverKind.RUNNING):
            self._combine(low, high)
            return
        values = groups(x, self.spec, self.weight, where).float()
        if values.shape[-1] == 0:
            return
        if self.kind is ObserverKind.RUNNING_PERCENTILE:
            self._combine(*self._percentiles(values))
        else:
            self.held.append(values.clone())

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), float32. Raises ValueError before the first update with an element."""
        if self.held:
            values = torch.cat(self.held, dim=-1)
            if self.kind is ObserverKind.PERCENTILE:
                self.low, self.high = self._percentiles(values)
            else:
                ends = torch.tensor([least_error(row, self.spec) for row in values], dtype=torch.float32)
                self.low, self.high = ends.to(values.device).unbind(dim=1)
        if self.low is None or self.high is None:
            raise ValueError("the observer has seen no element")
        return self.low.reshape(self.shape), self.high.reshape(self.shape)

    def scale_zero(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the range so far: `quantizer.static_scale`. Raises ValueError as `range`."""
        return static_scale(*self.range(), self.silent, self.spec)

    def _combine(self, low: Tensor, high: Tensor) -> None:
        """Running: momentum * old + (1 - momentum) * new, both factors rounded to float32 as the published code's are
        (0.1 and not 1 - float32(0.9)). Current: new."""
        if self.low is not None and self.high is not None and self.kind is not ObserverKind.CURRENT:
            parts = (self.spec.observer.momentum, 1 - self.spec.observer.momentum)
            old, new = torch.tensor(parts, dtype=torch.float32, device=low.device).unbind()
            low = new * low + old * self.low
            high = new * high + old * self.high
        self.low, self.high = low, high

    def _percentiles(self, values: Tensor) -> tuple[Tensor, Tensor]:
        q = self.spec.observer.percentile
        return percentile(values, 100 - q), percentile(values, q)
