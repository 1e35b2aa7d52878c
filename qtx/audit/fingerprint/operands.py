"""Operands of a linear layer whose accumulators are chosen: ties of the requantization, and what lies beside them.

One row x (1, K) meets N rows of weights, each of which makes one accumulator. Between two numbers of x that count there
is one that is its zero point, so that no pair of products, and no two of them, leaves 16 bits unless it is meant to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

COARSE = 32  # numbers of x that make up the most of an accumulator
WEIGHT = 127
SHORT = (1, 3, 5, 7, 11, 13, 49, 103)  # factors of scales; of the last two 1 / (1 / s) is not s, in float64 either


@dataclass(frozen=True)
class Scales:
    """float32 scales of x, of w and of the result."""

    x: np.ndarray
    w: np.ndarray
    y: np.ndarray

    @property
    def unit(self) -> float:
        """Of an accumulator."""
        return float(self.x) * float(self.w)

    @property
    def ratio(self) -> float:
        """What an accumulator is multiplied by."""
        return self.unit / float(self.y)


def make_operands(targets: np.ndarray, codes: str, zero: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, K) and w (N, K), int8, whose exact products less the zero point are `targets` (N,)."""
    step = int(min(WEIGHT, np.iinfo(codes).max - zero))
    x = np.full((1, 2 * COARSE + 2), zero, np.int64)
    x[0, 0 : 2 * COARSE : 2] += step
    x[0, -2] += 1 if step else 0
    whole = np.rint(targets / step).astype(np.int64)
    w = np.zeros((targets.size, x.shape[1]), np.int64)
    w[:, -2] = targets - whole * step
    for place in range(0, 2 * COARSE, 2):
        w[:, place] = np.clip(whole, -WEIGHT, WEIGHT)
        whole = whole - w[:, place]
    return x.astype(codes), w.astype(np.int8)


def reach(codes: str, zero: int) -> int:
    """The largest accumulator that `make_operands` makes."""
    return COARSE * WEIGHT * int(min(WEIGHT, np.iinfo(codes).max - zero))


def draw_scales(rng: np.random.Generator, kind: str, exponent: int) -> Scales:
    """Scales whose ratio is about 2^exponent: powers of two, of few bits, or any."""
    powers = [int(rng.integers(-7, -1)) for _ in range(2)]
    if kind == "power":
        factors: list[float] = [1, 1, 1]
    elif kind == "short":
        factors = [int(one) for one in rng.choice(SHORT, 3)]
    else:
        factors = list(rng.uniform(1, 2, 3))
    last = sum(powers) - exponent + int(np.floor(np.log2(factors[0] * factors[1] / factors[2])))
    x, w, y = (np.float32(f * 2.0**p) for f, p in zip(factors, [*powers, last], strict=True))
    return Scales(np.asarray(x), np.asarray(w), np.asarray(y))


def draw_targets(
    rng: np.random.Generator, scales: Scales, levels: tuple[int, int], limit: int, count: int, offset: np.ndarray
) -> np.ndarray:
    """Accumulators (count,) within `limit` whose levels, with `offset` (count,) added in accumulator's units, are as
    near to ties between `levels` as can be found, or one beside; a quarter are any."""
    tie = rng.integers(*levels, (count, 64)) + 0.5
    exact = tie / scales.ratio - offset[:, None]
    nearest = np.clip(np.rint(exact), -limit, limit)
    off = np.abs((nearest + offset[:, None]) * scales.ratio % 1 - 0.5)
    targets = np.take_along_axis(nearest, np.argmin(off, axis=1)[:, None], 1)[:, 0]
    beside = rng.choice([-1, 0, 0, 1], count)
    ends = np.clip(np.sort(np.array(levels) / scales.ratio), -limit, limit).astype(np.int64)
    anywhere = rng.integers(ends[0], ends[1] + 1, count)
    chosen = np.where(rng.random(count) < 0.25, anywhere, targets + beside).astype(np.int64)
    return np.clip(chosen, -limit, limit)


def every_tie(scales: Scales, levels: tuple[int, int], limit: int) -> np.ndarray:
    """Accumulators nearest to each code of a range and to each tie beside it, those within `limit`."""
    targets = np.rint(np.arange(2 * levels[0] - 1, 2 * levels[1] + 2) / 2 / scales.ratio).astype(np.int64)
    return targets[np.abs(targets) <= limit]


def saturating_operands(rng: np.random.Generator, codes: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, 128) and w (count, 128): rows of large products of one sign, in pairs and in longer runs, small ones
    between."""
    ends = np.iinfo(codes)
    high = min(ends.max, 255)
    x = rng.integers(high // 3, high, (1, 128), endpoint=True)
    size = rng.choice([20, 50, 90, 127], (count, 1))
    sign = np.repeat(rng.choice([-1, 1], (count, 16)), 8, axis=1)
    flips = rng.choice([1, 1, 1, -1], (count, 128))
    w = np.clip(rng.integers(size // 2, size, (count, 128), endpoint=True) * sign * flips, -WEIGHT, WEIGHT)
    return x.astype(codes), w.astype(np.int8)


def describe(arrays: dict[str, np.ndarray], index: int) -> dict[str, Any]:
    """One column of a linear layer: its exact accumulator and what scales it."""
    x, w = arrays["x_codes"].astype(np.int64), arrays["w_codes"][index].astype(np.int64)
    products = (x[0] - int(arrays["x_zero"])) * w
    described: dict[str, Any] = {"accumulator": int(products.sum())}
    raw = np.abs(x[0] * w)[: len(w) // 2 * 2].reshape(-1, 2).sum(1)
    if raw.max() >= 2**15:
        at = 2 * int(raw.argmax())
        described |= {"x_codes": x[0, at : at + 2].tolist(), "w_codes": w[at : at + 2].tolist(), "K": len(w)}
    for name in ("x_scale", "w_scale", "y_scale"):
        described[name] = float(arrays[name])
    for name in ("x_zero", "y_zero"):
        described[name] = int(arrays[name])
    if arrays.get("bias") is not None:
        described["bias"] = arrays["bias"][index].item()
    return {**described, "codes": str(arrays["x_codes"].dtype)}
