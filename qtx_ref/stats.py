"""Outlier statistics of one batch's tensor, and of its attention, in float64.

A batch holds sequences: the real tokens of one, times the channels, are its elements. A unit is a sequence, or a token
of (B, T, C). What is given per unit and per channel can be pooled over batches, so that a data set takes one pass. The
published "max inf norm" is the largest, over a list of sites, of the mean of `inf_norm` over units (Bondarenko et al.
2023, section 5, and the code behind it).

Channels are the last axis of (B, T, C) and (B, C), and the heads of (B, H, T, n), whose last axis is keys or a head's
own channels. `where`, true at elements that count, is (B, T, 1) for the first and (B or 1, 1, T, n or 1) for the last.

Arrays: of any float dtype; sums and results are float64, counts int64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from scipy.special import entr

from .spec import (
    BINS,
    DROPPED,
    MOMENTS,
    SIGMAS,
    STATISTICS,
    check_where,
)

__all__ = [
    "Memo",
    "add_axes",
    "attention",
    "central_moments",
    "check_places",
    "describe",
    "kurtosis",
    "kurtosis_published",
    "magnitude_bins",
    "moments",
    "openings",
    "sizes",
    "top_share",
    "updates",
]

# infinity minus infinity is NaN and says so in the result
quiet = np.errstate(over="ignore", invalid="ignore")


def _sequences(x: np.ndarray, where: np.ndarray | None) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each sequence that has elements: its number, which of its places are real, and its real elements (places,
    channels).

    A place is a token; with heads it is a pair, or a token and one of the head's own channels.
    """
    if x.ndim == 4:
        keep = np.ones(x.shape[2:], bool) if where is None else where
        keep = np.broadcast_to(keep, (len(x), 1, *x.shape[2:])).reshape(len(x), -1)
        x = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)  # (B, H, T, n) -> (B, T n, H)
    else:
        keep = np.ones((*x.shape[:-1], 1), bool) if where is None else np.broadcast_to(where, (*x.shape[:-1], 1))
        keep, x = keep.reshape(len(x), -1), x.reshape(len(x), -1, x.shape[-1])
    for i, (values, real) in enumerate(zip(x, keep, strict=True)):
        if real.any():
            yield i, real, values[real]


class Memo:
    """A result made once for a value that comes several times in a row, as one tensor that several linears take in.

    The value is told by identity, and held until another comes, so that no new one can pass for it."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """make: called with the value and what else `get` is given, which belongs to the value."""
        self.make = make
        self.value: Any = None
        self.result: Any = None

    def get(self, value: Any, *rest: Any) -> Any:
        """make(value, *rest), or what it gave for this value just before."""
        if value is not self.value:
            self.value, self.result = value, self.make(value, *rest)
        return self.result


def add_axes(x: np.ndarray, axes: int) -> np.ndarray:
    """x with so many axes or more, (1, ..., *shape): a number is a vector of one, and a vector one row."""
    return x.reshape((1,) * (axes - x.ndim) + x.shape)


def check_places(x: np.ndarray, where: np.ndarray | None) -> None:
    """Raises ValueError where a mask is not boolean, or its shape not of x's places: one for all channels, or all
    heads."""
    if where is not None:
        places = (len(x), 1, *x.shape[2:]) if x.ndim == 4 else (*x.shape[:-1], 1)
        check_where(where.dtype == bool, where.shape, places)


@quiet
def central_moments(values: np.ndarray) -> np.ndarray:
    """Count, mean, and sums of the second, third and fourth powers of the deviations from it, of each row of (U, N):
    (U, 5) float64; zeros without elements."""
    if not values.shape[1]:
        return np.zeros((len(values), 5))
    wide = values.astype(np.float64)
    low, high = wide.min(axis=1), wide.max(axis=1)
    mean = np.where(low == high, low, wide.mean(axis=1))  # of equal numbers the mean is that number, without rounding
    deviation = wide - mean[:, None]
    powers = [(deviation**k).sum(axis=1) for k in (2, 3, 4)]
    return np.stack([np.full_like(mean, values.shape[1]), mean, *powers], axis=1)


@quiet
def kurtosis_published(moments: np.ndarray) -> np.ndarray:
    """m4 / (s^4 + 1e-6) with the unbiased deviation s, of moments (..., 5), as in the published code; a normal variable
    has about 3."""
    n, _, second, _, fourth = np.moveaxis(moments, -1, 0)
    return fourth / n / ((second / np.maximum(n - 1, 1)) ** 2 + 1e-6)


@quiet
def kurtosis(moments: np.ndarray) -> np.ndarray:
    """m4 / m2^2, of moments (..., 5): the textbook definition (Pearson), 3 for a normal variable; 0 where all are
    equal, NaN where one is not finite."""
    n, _, second, _, fourth = np.moveaxis(moments, -1, 0)
    return np.divide(n * fourth, second**2, out=np.zeros_like(fourth), where=second != 0)


@quiet
def magnitude_bins(x: np.ndarray) -> np.ndarray:
    """The bin of each |x|, in x's shape, int32 below BINS: the first bits of its float32 pattern, the sign apart."""
    return (np.abs(x.astype(np.float32)).view(np.uint32) >> DROPPED).astype(np.int32)


def top_share(energy: np.ndarray, fraction: float) -> float:
    """Share of the energy (C,) in the `fraction` of channels that have most, at least one channel; 0 without energy."""
    count = max(1, round(fraction * energy.size))
    whole = float(energy.sum())
    return float(np.sort(energy)[-count:].sum()) / whole if whole else 0.0


@quiet
def moments(x: np.ndarray, where: np.ndarray | None = None, names: tuple[str, ...] = MOMENTS) -> dict[str, np.ndarray]:
    """Of the rows of x (..., I) that count: their number (), and in float64 their sum (I,), the largest magnitude (I,)
    and x^T x (I, I), the Gram matrix. Raises ValueError as `check_places`."""
    x = add_axes(x, 1)
    check_places(x, where)
    keep = np.ones((*x.shape[:-1], 1), bool) if where is None else np.broadcast_to(where, (*x.shape[:-1], 1))
    rows = x.reshape(keep.size, x.shape[-1])[keep.reshape(-1)].astype(np.float64)
    make = {
        "count": lambda: np.array(len(rows)),
        "sum": lambda: rows.sum(axis=0),
        "absmax": lambda: np.abs(rows).max(axis=0, initial=0.0),
        "gram": lambda: rows.T @ rows,
    }
    return {name: make[name]() for name in names}


@quiet
def describe(
    x: np.ndarray, where: np.ndarray | None = None, unit: str = "sequence", names: tuple[str, ...] = STATISTICS
) -> dict[str, np.ndarray]:
    """The statistics of `names` for one tensor.

    Per unit that has elements, (U,): `inf_norm` (the largest |x|), `lowest`, `highest`, both kurtoses, and `moments`
    (U, 5): count, mean, and sums of the second, third and fourth powers of the deviations from the mean. Per channel:
    `energy`, the sum of squares, and `beyond_channels`, elements farther than SIGMAS biased deviations from the mean of
    their own sequence. `beyond_tokens`: those by token, (B, T) of (B, T, C), and by sequence, (B, 1), of other tensors.
    `histogram` (BINS,): the number of |x| in each bin. Raises ValueError as `check_places`.
    """
    x = add_axes(x, 2)
    check_places(x, where)
    channels = x.shape[1 if x.ndim == 4 else -1]
    ends, moments = [np.zeros((0, 2))], [np.zeros((0, 5))]
    energy, histogram, far_channels = np.zeros(channels), np.zeros(BINS, np.int64), np.zeros(channels, np.int64)
    far_tokens = np.zeros(x.shape[:2] if x.ndim == 3 else (len(x), 1), np.int64)
    for i, real, values in _sequences(x, where) if x.size else ():
        wide = values.astype(np.float64)
        rows = wide if unit == "token" else wide.reshape(1, -1)
        ends.append(np.stack([rows.min(axis=1), rows.max(axis=1)], axis=1))
        moments.append(central_moments(rows))
        energy += np.square(wide).sum(axis=0)
        histogram += np.bincount(magnitude_bins(values).ravel(), minlength=BINS)
        far = np.square(wide - wide.mean()) > SIGMAS**2 * wide.var()
        far_channels += far.sum(axis=0)
        if x.ndim == 3:
            far_tokens[i, real] = far.sum(axis=1)
        else:
            far_tokens[i] = far.sum()
    low, high = np.concatenate(ends).T
    units = np.concatenate(moments)
    results = {
        "inf_norm": np.maximum(-low, high),
        "kurtosis_published": kurtosis_published(units),
        "kurtosis": kurtosis(units),
        "moments": units,
        "lowest": low,
        "highest": high,
        "energy": energy,
        "histogram": histogram,
        "beyond_channels": far_channels,
        "beyond_tokens": far_tokens,
    }
    return {name: results[name] for name in names}


def attention(probs: np.ndarray, where: np.ndarray, marks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over the queries that have keys, by head, (H,) each; `queries` and `choices` are their numbers.

    probs (B, H, Tq, Tk); where broadcasts to it and is true at allowed pairs; each of marks (B, Tk) is true at marked
    keys. `mass.<mark>`: the probability given to the marked keys; `even.<mark>`: the share of the allowed keys that
    they are. `entropy` in nats, of the row scaled to sum 1 (clipping leaves less; a row of zeros has 0); `relative`:
    divided by its largest value, the logarithm of the number of keys, over the `choices`, queries with more than one
    key. `kept`: the probability given to all keys, of which clipping and sinks leave less than 1. Raises ValueError as
    `check_places`.
    """
    check_places(probs, where)
    keep = np.broadcast_to(where, (len(probs), 1, *probs.shape[2:]))
    keys = keep.sum(axis=-1)  # (B, 1, Tq)
    p = np.where(keep, probs.astype(np.float64), 0.0)
    whole = p.sum(axis=-1, keepdims=True)
    entropy = entr(p / np.where(whole == 0, 1, whole)).sum(axis=-1)  # (B, H, Tq)
    heads = np.ones(probs.shape[1], np.int64)
    sums = {
        "queries": (keys > 0).sum() * heads,
        "choices": (keys > 1).sum() * heads,
        "entropy": entropy.sum(axis=(0, 2)),
        "kept": whole.sum(axis=(0, 2, 3)),
        "relative": (entropy / np.where(keys > 1, np.log(np.maximum(keys, 1)), np.inf)).sum(axis=(0, 2)),
    }
    for mark, marked in marks.items():
        chosen = marked[:, None, None, :]
        sums[f"mass.{mark}"] = (p * chosen).sum(axis=(0, 2, 3))
        sums[f"even.{mark}"] = ((keep & chosen).sum(axis=-1) / np.maximum(keys, 1)).sum() * heads
    return sums


@quiet
def updates(
    context: np.ndarray, weight: np.ndarray, residual: np.ndarray, where: np.ndarray | None, heads: int
) -> dict[str, np.ndarray]:
    """How large each head's part of the attention's output is against what it is added to, summed over real tokens.

    context (B, T, D), what enters the output projection, heads side by side; weight (D, D) of that projection; residual
    (B, T, D); where (B, T, 1). `update` (H,): the L2 norm of a head's part over that of the residual, NaN where a
    token's is not finite; `tokens`: how many. Raises ValueError as `check_places`.
    """
    check_places(context, where)
    real = np.broadcast_to(True if where is None else where, (*context.shape[:2], 1))[..., 0]
    c, r = context[real].astype(np.float64), residual[real].astype(np.float64)  # (N, D)
    against = np.linalg.norm(r, axis=-1)
    width = c.shape[1] // heads
    sums = []
    for part in (slice(h * width, (h + 1) * width) for h in range(heads)):
        size = np.linalg.norm(c[:, part] @ weight[:, part].astype(np.float64).T, axis=-1)
        ratio = np.divide(size, against, out=np.zeros_like(size), where=against != 0)
        sums.append(np.where(np.isfinite(ratio), ratio, np.nan).sum())
    return {"update": np.array(sums), "tokens": np.full(heads, len(c))}


def sizes(
    x: np.ndarray, where: np.ndarray | None, marks: Mapping[str, np.ndarray], heads: int
) -> dict[str, np.ndarray]:
    """L2 norms of the heads' parts of a tensor, summed over real tokens, by head, (H,) each: as the figures of
    Bondarenko et al. 2023 (section 3) show values and their products with probabilities.

    x (B, T, D), heads side by side; where (B, T, 1); each of marks (B, T) is true at marked tokens. `<mark>`: of the
    marked tokens, `count.<mark>`: how many they are; `all`: of all tokens.
    """
    real = np.ones(x.shape[:2], bool) if where is None else np.broadcast_to(where, (*x.shape[:2], 1))[..., 0]
    norms = np.linalg.norm(x.astype(np.float64).reshape(*x.shape[:2], heads, -1), axis=-1)  # (B, T, H)
    sums = {}
    for name, marked in {"all": real, **marks}.items():
        chosen = real & np.broadcast_to(marked, real.shape)
        sums[name], sums[f"count.{name}"] = norms[chosen].sum(axis=0), np.full(heads, chosen.sum())
    return sums


def openings(gate: np.ndarray, where: np.ndarray | None, heads: int) -> dict[str, np.ndarray]:
    """How far gates are open: their probabilities summed by head, (H,), and how many they are.

    gate: (H,) of a head, (B, 1, H) of a sequence, (B, T, H) of a token, or (B, T, D) of a feature, whose mean over the
    head's own is taken. where (B, T, 1), true at real tokens, or None.
    """
    wide = gate.astype(np.float64).reshape(*gate.shape[:-1], heads, -1).mean(axis=-1)  # (..., H)
    keep = np.ones(wide.shape[:-1], bool) if where is None else np.broadcast_to(where, (*wide.shape[:-1], 1))[..., 0]
    return {"gate": wide[keep].sum(axis=0), "gates": np.full(heads, keep.sum())}
