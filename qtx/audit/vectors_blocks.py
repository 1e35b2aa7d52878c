"""Families of blocks to cast to MX formats: 32 neighbours that share a power of two, which their largest decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qtx_ref.quant.rounding import round_dtype
from qtx_ref.spec import Dtype

from .vectors_numbers import TINY, Values, draw_ties, list_levels, step

__all__ = ["BLOCK_DRAWS"]

Draw = Callable[[np.random.Generator, str, int, Any], Values]  # of codes of a dtype, so many, by a scale
BLOCK = 32


def join(x: np.ndarray, dtype: str) -> Values:
    """Blocks, a row each."""
    return {"x": x.astype(np.float32, copy=False).reshape(-1, BLOCK), "dtype": dtype}


def draw_powers(rng: np.random.Generator, rows: int) -> np.ndarray:
    """A power of two for each row (N, 1)."""
    return np.exp2(rng.integers(-100, 100, (rows, 1)).astype(np.float64))


def draw_gaussian(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Rows of any magnitude."""
    rows = -(-size // BLOCK)
    return join(rng.standard_normal((rows, BLOCK)) * draw_powers(rng, rows), dtype)


def draw_near_ties(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Elements half-way between levels, to an ulp, beside one that makes the power of two what it is."""
    rows = -(-size // BLOCK)
    x = draw_ties(rng, dtype, 0, rows * BLOCK).reshape(rows, BLOCK)
    x[:, 0] = list_levels(dtype)[-1]
    x = (x * draw_powers(rng, rows)).astype(np.float32)
    return join(step(x, rng.integers(-1, 2, x.shape)), dtype)


def draw_largest(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Blocks whose largest element is a power of two, or a level, or a tie, times one, or beside it."""
    rows = -(-size // BLOCK)
    levels = list_levels(dtype)
    ties = np.concatenate([levels, levels[1:] - np.diff(levels) / 2])
    largest = np.where(rng.random((rows, 1)) < 0.5, 1.0, np.abs(rng.choice(ties[ties != 0], (rows, 1))))
    largest = step((largest * draw_powers(rng, rows)).astype(np.float32), rng.integers(-1, 2, (rows, 1)))
    x = rng.uniform(-1, 1, (rows, BLOCK)) * largest
    x[:, :1] = largest
    return join(x, dtype)


def draw_limits(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Blocks of zeros, of the largest numbers of float32, and of the smallest."""
    rows = -(-size // BLOCK)
    largest = rng.choice([0.0, -0.0, 3.4028234663852886e38, 2.0**127, 2.0**-126, TINY], (rows, 1))
    return join(largest * rng.choice([1.0, -1.0, 0.5, 0.0], (rows, BLOCK)), dtype)


def draw_special(rng: np.random.Generator, dtype: str, size: int, value: float) -> Values:
    """NaN or infinity in some blocks."""
    values = draw_gaussian(rng, dtype, size, 1)
    x = values["x"]
    return join(np.where(rng.random(x.shape) < 0.02, np.float32(value) * rng.choice([-1, 1], x.shape), x), dtype)


def draw_bfloat16(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Numbers of bfloat16."""
    values = draw_near_ties(rng, dtype, size, scale)
    return {**values, "x": round_dtype(values["x"], Dtype.BFLOAT16), "x_dtype": "bfloat16"}


BLOCK_DRAWS: dict[str, Draw] = {
    "uniform": lambda rng, dtype, size, scale: join(rng.uniform(-1, 1, -(-size // BLOCK) * BLOCK) * scale, dtype),
    "gaussian": draw_gaussian,
    "near ties": draw_near_ties,
    "powers of two": draw_largest,
    "limits": draw_limits,
    "nan": lambda rng, dtype, size, scale: draw_special(rng, dtype, size, np.nan),
    "infinity": lambda rng, dtype, size, scale: draw_special(rng, dtype, size, np.inf),
    "subnormals": lambda rng, dtype, size, scale: join(
        rng.integers(-(2**23), 2**23, -(-size // BLOCK) * BLOCK) * TINY * 2.0 ** rng.integers(0, 12), dtype
    ),
    "bfloat16": draw_bfloat16,
    "one": lambda rng, dtype, size, scale: draw_near_ties(rng, dtype, BLOCK, scale),
}
