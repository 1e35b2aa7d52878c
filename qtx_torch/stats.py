"""Outlier statistics of one batch's tensor, per unit, in float64.

A unit is a sequence (its real tokens times the channels) or a token. Callers average over units and batches; the
published "max inf norm" is the largest, over a list of sites, of the mean of `inf_norm` over units (Bondarenko et al.
2023, section 5, and the code behind it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def units(x: Tensor, where: Tensor | None, unit: str) -> tuple[Tensor, Tensor]:
    """(values (U, N) float64, mask (U, N)) of x (B, ...): U sequences, or U = B T tokens of (B, T, C)."""
    keep = torch.ones_like(x, dtype=torch.bool) if where is None else where.expand(x.shape)
    rows = x.shape[0] * (x.shape[1] if unit == "token" else 1)
    values, mask = x.double().reshape(rows, -1), keep.reshape(rows, -1)
    some = mask.any(dim=1)
    return values[some], mask[some]


def inf_norm(x: Tensor, where: Tensor | None = None, unit: str = "sequence") -> Tensor:
    """max |x| of each unit, (U,)."""
    values, mask = units(x, where, unit)
    return values.abs().masked_fill(~mask, 0).amax(dim=1)


def central_moments(x: Tensor, where: Tensor | None, unit: str) -> tuple[Tensor, Tensor, Tensor]:
    """Element count, biased variance and fourth central moment of each unit, (U,) each."""
    values, mask = units(x, where, unit)
    n = mask.sum(dim=1)
    mean = values.masked_fill(~mask, 0).sum(dim=1) / n
    square = (values - mean[:, None]).masked_fill(~mask, 0).square()
    return n, square.sum(dim=1) / n, square.square().sum(dim=1) / n


def kurtosis_published(x: Tensor, where: Tensor | None = None, unit: str = "sequence") -> Tensor:
    """m4 / (s^4 + 1e-6) with the unbiased deviation s, (U,), as in the published code; a normal variable has about 3."""
    n, variance, fourth = central_moments(x, where, unit)
    return fourth / ((variance * n / (n - 1).clamp(min=1)) ** 2 + 1e-6)


def kurtosis(x: Tensor, where: Tensor | None = None, unit: str = "sequence") -> Tensor:
    """m4 / m2^2, (U,): the textbook definition (Pearson), 3 for a normal variable; 0 where a unit is constant."""
    _, variance, fourth = central_moments(x, where, unit)
    return torch.where(variance > 0, fourth / variance**2, 0.0)


def channel_energy(x: Tensor, where: Tensor | None = None) -> Tensor:
    """Sum of squares of each channel (last axis), (C,)."""
    keep = torch.ones_like(x, dtype=torch.bool) if where is None else where.expand(x.shape)
    return x.double().square().masked_fill(~keep, 0).reshape(-1, x.shape[-1]).sum(dim=0)


def top_share(energy: Tensor, fraction: float) -> float:
    """Share of the energy in the `fraction` of channels that have most, at least one channel; 0 without energy."""
    count = max(1, round(fraction * energy.numel()))
    whole = float(energy.sum())
    return float(energy.sort().values[-count:].sum()) / whole if whole else 0.0


def beyond_sigma(x: Tensor, where: Tensor | None = None, sigmas: float = 6.0) -> Tensor:
    """Elements farther than `sigmas` biased deviations from the mean of their own sequence, (U,) counts."""
    values, mask = units(x, where, "sequence")
    n = mask.sum(dim=1)
    mean = (values.masked_fill(~mask, 0).sum(dim=1) / n)[:, None]
    deviation = ((values - mean).square().masked_fill(~mask, 0).sum(dim=1) / n).sqrt()[:, None]
    return (((values - mean).abs() > sigmas * deviation) & mask).sum(dim=1)


def attention_mass(probs: Tensor, where: Tensor, keys: Tensor) -> Tensor:
    """Mean probability that queries give to the marked keys, per head (H,).

    probs (B, H, Tq, Tk); where broadcasts to it and is true at allowed pairs; keys (B, Tk) is true at marked keys.
    """
    keep = where.expand(probs.shape)
    queries = keep.any(dim=-1)  # (B, H, Tq)
    mass = (probs.double() * (keep & keys[:, None, None, :])).sum(dim=-1)
    return mass.masked_fill(~queries, 0).sum(dim=(0, 2)) / queries.sum(dim=(0, 2)).clamp(min=1)


MOMENTS = ("count", "sum", "absmax", "gram")


def moments(x: Tensor, where: Tensor | None = None, names: tuple[str, ...] = MOMENTS) -> dict[str, Tensor]:
    """Of the rows of x (..., I) that count: their number (), and in float64 their sum (I,), the largest magnitude (I,) and
    x^T x (I, I), the Gram matrix."""
    keep = torch.ones((*x.shape[:-1], 1), dtype=torch.bool, device=x.device)
    keep = keep if where is None else where.expand(keep.shape)
    rows = x.reshape(-1, x.shape[-1])[keep.reshape(-1)].double()
    make = {
        "count": lambda: torch.tensor(len(rows)),
        "sum": lambda: rows.sum(dim=0),
        "absmax": lambda: rows.abs().amax(dim=0) if len(rows) else rows.sum(dim=0),
        "gram": lambda: rows.T @ rows,
    }
    return {name: make[name]() for name in names}


STATISTICS = ("inf_norm", "kurtosis_published", "kurtosis", "energy", "beyond", "elements")


def describe(
    x: Tensor, where: Tensor | None = None, unit: str = "sequence", names: tuple[str, ...] = STATISTICS
) -> dict[str, Tensor]:
    """The statistics of `names` for one tensor: per unit, but `energy` per channel and `beyond` per sequence."""
    make = {
        "inf_norm": lambda: inf_norm(x, where, unit),
        "kurtosis_published": lambda: kurtosis_published(x, where, unit),
        "kurtosis": lambda: kurtosis(x, where, unit),
        "energy": lambda: channel_energy(x, where),
        "beyond": lambda: beyond_sigma(x, where),
        "elements": lambda: units(x, where, unit)[1].sum(dim=1),
    }
    return {name: make[name]() for name in names}
