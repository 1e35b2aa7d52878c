"""Outlier statistics of one batch's tensor, per unit, in float64.

A unit is a sequence (its real tokens times the channels) or a token. Callers average over units and batches; the
published "max inf norm" is the largest, over a list of sites, of the mean of `inf_norm` over units (Bondarenko et al.
2023, section 5, and the code behind it).
"""

from __future__ import annotations

import numpy as np


def units(x: np.ndarray, where: np.ndarray | None, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(values (U, N) float64, mask (U, N)) of x (B, ...): U sequences, or U = B T tokens of (B, T, C)."""
    keep = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    rows = x.shape[0] * (x.shape[1] if unit == "token" else 1)
    values, mask = x.astype(np.float64).reshape(rows, -1), keep.reshape(rows, -1)
    some = mask.any(axis=1)
    return values[some], mask[some]


def inf_norm(x: np.ndarray, where: np.ndarray | None = None, unit: str = "sequence") -> np.ndarray:
    """max |x| of each unit, (U,)."""
    values, mask = units(x, where, unit)
    return np.max(np.abs(values), axis=1, where=mask, initial=0.0)


def central_moments(x: np.ndarray, where: np.ndarray | None, unit: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Element count, biased variance and fourth central moment of each unit, (U,) each."""
    values, mask = units(x, where, unit)
    n = mask.sum(axis=1)
    mean = values.sum(axis=1, where=mask) / n
    square = np.where(mask, values - mean[:, None], 0.0) ** 2
    return n, square.sum(axis=1) / n, (square * square).sum(axis=1) / n


def kurtosis_published(x: np.ndarray, where: np.ndarray | None = None, unit: str = "sequence") -> np.ndarray:
    """m4 / (s^4 + 1e-6) with the unbiased deviation s, (U,), as in the published code; a normal variable has about 3."""
    n, variance, fourth = central_moments(x, where, unit)
    return fourth / ((variance * n / np.maximum(n - 1, 1)) ** 2 + 1e-6)


def kurtosis(x: np.ndarray, where: np.ndarray | None = None, unit: str = "sequence") -> np.ndarray:
    """m4 / m2^2, (U,): the textbook definition (Pearson), 3 for a normal variable; 0 where a unit is constant."""
    _, variance, fourth = central_moments(x, where, unit)
    return np.divide(fourth, variance**2, out=np.zeros_like(fourth), where=variance > 0)


def channel_energy(x: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """Sum of squares of each channel (last axis), (C,)."""
    keep = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    return np.square(x.astype(np.float64)).reshape(-1, x.shape[-1]).sum(axis=0, where=keep.reshape(-1, x.shape[-1]))


def top_share(energy: np.ndarray, fraction: float) -> float:
    """Share of the energy in the `fraction` of channels that have most, at least one channel; 0 without energy."""
    count = max(1, round(fraction * energy.size))
    whole = float(energy.sum())
    return float(np.sort(energy)[-count:].sum()) / whole if whole else 0.0


def beyond_sigma(x: np.ndarray, where: np.ndarray | None = None, sigmas: float = 6.0) -> np.ndarray:
    """Elements farther than `sigmas` biased deviations from the mean of their own sequence, (U,) counts."""
    values, mask = units(x, where, "sequence")
    n = mask.sum(axis=1)
    mean = (values.sum(axis=1, where=mask) / n)[:, None]
    deviation = np.sqrt(np.where(mask, (values - mean) ** 2, 0.0).sum(axis=1) / n)[:, None]
    return ((np.abs(values - mean) > sigmas * deviation) & mask).sum(axis=1)


def attention_mass(probs: np.ndarray, where: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Mean probability that queries give to the marked keys, per head (H,).

    probs (B, H, Tq, Tk); where broadcasts to it and is true at allowed pairs; keys (B, Tk) is true at marked keys.
    """
    keep = np.broadcast_to(where, probs.shape)
    queries = keep.any(axis=-1)  # (B, H, Tq)
    mass = (probs.astype(np.float64) * (keep & keys[:, None, None, :])).sum(axis=-1)
    return mass.sum(axis=(0, 2), where=queries) / np.maximum(queries.sum(axis=(0, 2)), 1)


MOMENTS = ("count", "sum", "absmax", "gram")


def moments(x: np.ndarray, where: np.ndarray | None = None, names: tuple[str, ...] = MOMENTS) -> dict[str, np.ndarray]:
    """Of the rows of x (..., I) that count: their number (), and in float64 their sum (I,), the largest magnitude (I,) and
    x^T x (I, I), the Gram matrix."""
    keep = np.ones((*x.shape[:-1], 1), bool) if where is None else np.broadcast_to(where, (*x.shape[:-1], 1))
    rows = x.reshape(-1, x.shape[-1])[keep.reshape(-1)].astype(np.float64)
    make = {
        "count": lambda: np.array(len(rows)),
        "sum": lambda: rows.sum(axis=0),
        "absmax": lambda: np.abs(rows).max(axis=0, initial=0.0),
        "gram": lambda: rows.T @ rows,
    }
    return {name: make[name]() for name in names}


STATISTICS = ("inf_norm", "kurtosis_published", "kurtosis", "energy", "beyond", "elements")


def describe(
    x: np.ndarray, where: np.ndarray | None = None, unit: str = "sequence", names: tuple[str, ...] = STATISTICS
) -> dict[str, np.ndarray]:
    """The statistics of `names` for one tensor: per unit, but `energy` per channel and `beyond` per sequence."""
    make = {
        "inf_norm": lambda: inf_norm(x, where, unit),
        "kurtosis_published": lambda: kurtosis_published(x, where, unit),
        "kurtosis": lambda: kurtosis(x, where, unit),
        "energy": lambda: channel_energy(x, where),
        "beyond": lambda: beyond_sigma(x, where),
        "elements": lambda: units(x, where, unit)[1].sum(axis=1),
    }
    return {name: make[name]() for name in names}
