"""Families of operands for matmul and linear, x (N, I) and w (I, O), chosen by the accumulators that they make.

A row of x that is v everywhere (less its zero point) times a column of w that sums to s makes the accumulator v s. With
M = (m + 1/2) / s every odd v then makes a tie, whichever codes w consists of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .vectors_numbers import TINY, Values, draw_scale, draw_zero, limits, step

__all__ = ["PRODUCT_DRAWS"]

Draw = Callable[[np.random.Generator, str, int, Any], Values]  # x codes of a dtype, so many results, by a scale
COLUMNS, DEPTH = 8, 24  # of a product, unless a family is about them


def draw_operands(rng: np.random.Generator, dtype: str, rows: int, depth: int, columns: int, narrow: int = 1) -> Values:
    """Codes anywhere, w of int8 without its lowest code; `narrow` divides the magnitude of x. No bias."""
    low, high = limits(dtype)
    x_zero, y_zero = draw_zero(rng, dtype), draw_zero(rng, dtype)
    if dtype == "int16":  # 16x8 kernels are symmetric
        x_zero = y_zero = 0
    x = np.clip(
        x_zero + rng.integers((low - x_zero) // narrow, (high - x_zero) // narrow + 1, (rows, depth)), low, high
    )
    return {
        "x": x.astype(dtype),
        "x_scale": np.asarray(draw_scale(rng), np.float32),
        "x_zero": np.asarray(x_zero, dtype),
        "w": rng.integers(-127, 128, (depth, columns)).astype(np.int8),
        "w_scale": np.asarray(draw_scale(rng), np.float32),
        "w_zero": np.asarray(0, np.int8),
        "bias": None,
        "y_scale": np.asarray(1, np.float32),
        "y_zero": np.asarray(y_zero, dtype),
    }


def scale_to(values: Values, multiplier: float) -> Values:
    """The same with a y_scale that makes M = x_scale w_scale / y_scale about `multiplier`."""
    y_scale = np.float64(values["x_scale"]) * np.float64(values["w_scale"]) / multiplier
    return {**values, "y_scale": np.asarray(np.clip(y_scale, 2.0**-126, 2.0**127), np.float32)}


def fit(values: Values, dtype: str, share: float = 3.0) -> Values:
    """The same with a y_scale by which accumulators spread over the codes, `share` deviations to either side."""
    x = values["x"].astype(np.float64) - values["x_zero"]
    total = x @ values["w"].astype(np.float64)
    deviation = max(float(np.sqrt(np.mean(total**2))), 1.0) if total.size else 1.0
    low, high = limits(dtype)
    return scale_to(values, (high - low) / 2 / share / deviation)


def draw_uniform(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Codes anywhere."""
    return fit(draw_operands(rng, dtype, -(-size // COLUMNS), DEPTH, COLUMNS), dtype)


def draw_gaussian(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Codes as quantized activations and weights have them."""
    values = draw_operands(rng, dtype, -(-size // COLUMNS), DEPTH, COLUMNS)
    low, high = limits(dtype)
    x = np.rint(rng.standard_normal(values["x"].shape) * ((high - low) / 8) + values["x_zero"])
    w = np.clip(np.rint(rng.standard_normal(values["w"].shape) * 40), -127, 127)
    return fit({**values, "x": np.clip(x, low, high).astype(dtype), "w": w.astype(np.int8)}, dtype)


def draw_ties(rng: np.random.Generator, dtype: str, size: int, exact: bool) -> Values:
    """Ties, exact or to some ulps of M, of either sign: columns of w are one column in another order."""
    low, high = limits(dtype)
    values = draw_operands(rng, dtype, -(-size // COLUMNS), DEPTH, COLUMNS)
    x_zero = int(values["x_zero"])
    v = rng.integers(low - x_zero, high - x_zero + 1, (values["x"].shape[0], 1)) | 1
    v = np.where(v > high - x_zero, v - 2, v)
    column = rng.integers(-60, 61, DEPTH)
    if exact:  # a sum that is a power of two
        column[1:] //= 6
        column[0] = 0
        target = 2 ** int(rng.integers(4, 7))
        column[0] = np.clip(target - column.sum(), -127, 127)
    if (total := int(column.sum())) == 0:
        column[0], total = column[0] + 1, 1
    w = np.stack([rng.permutation(column) * sign for sign in rng.choice([-1, 1], COLUMNS)], 1)
    values |= {"x": np.broadcast_to(v + x_zero, values["x"].shape).astype(dtype), "w": w.astype(np.int8)}
    if exact:
        values |= {"x_scale": power(values["x_scale"]), "w_scale": power(values["w_scale"])}
        y_zero = int(values["y_zero"])
        values["y_zero"] = np.asarray(0 if dtype == "int16" else y_zero + (y_zero % 2 == 0), dtype)
    values = scale_to(values, ((0 if exact else int(rng.integers(0, 3))) + 0.5) / abs(total))
    return values if exact else {**values, "y_scale": step(values["y_scale"], np.asarray(rng.integers(-2, 3)))}


def power(scale: np.ndarray) -> np.ndarray:
    """The power of two at or below a scale."""
    return np.asarray(np.exp2(np.floor(np.log2(scale))), np.float32)


def draw_powers(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Accumulators two around every power of two up to 2^20, both signs, by M that brings the largest to the ends."""
    around = (2 ** np.arange(0, 21)[:, None] + np.array([-1, 0, 1])).ravel()
    accumulators = np.concatenate([around, -around])
    values = draw_operands(rng, dtype, accumulators.size, 2 + 2**20 // (127 * 100), 1)
    low, high = limits(dtype)
    x_zero = np.clip(int(values["x_zero"]), low + 127, high - 127) if high - low > 254 else 0
    w = np.full(values["w"].shape, 127)
    w[-1] = 1
    whole, rest = np.divmod(accumulators, 127)
    parts = w.shape[0] - 1
    each, more = np.divmod(whole, parts)
    x = np.concatenate([each[:, None] + (np.arange(parts) < more[:, None]), rest[:, None]], 1) + x_zero
    values |= {"x": np.clip(x, low, high).astype(dtype), "w": w.astype(np.int8), "x_zero": np.asarray(x_zero, dtype)}
    return scale_to(values, (high - low) / 2 ** float(rng.integers(8, 22)))


def draw_limits(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Codes at their ends alone: what pairs of products in int16 do not hold."""
    values = draw_operands(rng, dtype, -(-size // COLUMNS), DEPTH, COLUMNS)
    x = rng.choice(limits(dtype), values["x"].shape, p=[0.3, 0.7])
    w = rng.choice([-128, -127, 127], values["w"].shape, p=[0.1, 0.2, 0.7])
    return fit({**values, "x": x.astype(dtype), "w": w.astype(np.int8)}, dtype)


def draw_bias(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Ties to some ulps before a bias, which is whole in units of the accumulator."""
    values = draw_ties(rng, dtype, size, False)
    level = np.float64(values["y_scale"]) / (np.float64(values["x_scale"]) * np.float64(values["w_scale"]))
    bias = np.rint(rng.integers(-30, 31, COLUMNS) * level)
    return {**values, "bias": np.clip(bias, -(2**30), 2**30).astype(np.int32)}


def draw_channels(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """A scale of w for each column."""
    values = draw_uniform(rng, dtype, size, scale)
    factors = np.exp2(rng.uniform(-2, 2, COLUMNS))
    return {**values, "w_scale": (values["w_scale"] * factors).astype(np.float32), "w_zero": np.zeros(COLUMNS, np.int8)}


def draw_shape(rng: np.random.Generator, dtype: str, rows: int, depth: int, columns: int) -> Values:
    """Codes anywhere, in a shape."""
    return fit(draw_operands(rng, dtype, rows, depth, columns), dtype)


def draw_strided(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Every other element of an array."""
    values = draw_uniform(rng, dtype, size, scale)
    return {**values, "x": np.repeat(values["x"], 2, axis=-1)[..., ::2]}


PRODUCT_DRAWS: dict[str, Draw] = {
    "uniform": draw_uniform,
    "gaussian": draw_gaussian,
    "near ties": lambda rng, dtype, size, scale: draw_ties(rng, dtype, size, False),
    "exact ties": lambda rng, dtype, size, scale: draw_ties(rng, dtype, size, True),
    "powers of two": draw_powers,
    "limits": draw_limits,
    # levels beyond int32
    "beyond": lambda rng, dtype, size, scale: scale_to(
        draw_uniform(rng, dtype, size, scale), 2.0 ** rng.uniform(16, 29)
    ),
    "subnormals": lambda rng, dtype, size, scale: scale_to(  # M that moves nothing
        draw_uniform(rng, dtype, size, scale), 2.0 ** rng.uniform(-40, -20)
    ),
    "subnormal scales": lambda rng, dtype, size, scale: fit(
        {
            **draw_operands(rng, dtype, size // COLUMNS, DEPTH, COLUMNS),
            "x_scale": np.asarray(rng.integers(1, 2**23) * TINY, np.float32),
        },
        dtype,
    ),
    "bias": draw_bias,
    "channels": draw_channels,
    "empty": lambda rng, dtype, size, scale: draw_shape(rng, dtype, 0, DEPTH, COLUMNS),
    "one": lambda rng, dtype, size, scale: draw_shape(rng, dtype, 1, 1, 1),
    "odd": lambda rng, dtype, size, scale: draw_shape(
        rng, dtype, *(int(n) for n in rng.choice([1, 3, 5, 7, 17, 33], 3))
    ),
    "strided": draw_strided,
}
