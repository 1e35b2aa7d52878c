"""Families of codes to dequantize, and of ranges to take a scale of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qtx_ref.quant.rounding import round_dtype
from qtx_ref.spec import Dtype

from .vectors_numbers import LARGEST, ODD, TINY, Values, draw_scale, draw_zero, limits, step

__all__ = ["CODE_DRAWS", "RANGE_DRAWS"]

SMALLEST = -141  # the exponent of the shortest range that has a scale, 2^-149, with 8 bits

Draw = Callable[[np.random.Generator, str, int, Any], Values]  # of codes of a dtype, so many, by a scale


# --- codes ------------------------------------------------------------------------------------------------------------


def draw_codes(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Anywhere among the codes. Zero points of int32 are 0, as ONNX has them."""
    low, high = limits(dtype)
    code = rng.integers(low, high + 1, size)
    return {
        "code": code.astype(dtype if dtype in ("int16", "uint16", "int32") else "uint8" if low == 0 else "int8"),
        "scale": np.asarray(scale, np.float32),
        "zero_point": np.asarray(0 if dtype == "int32" else draw_zero(rng, dtype), np.int32),
        "dtype": dtype,
    }


def draw_code_limits(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """The lowest and the highest code, and those beside them."""
    low, high = limits(dtype)
    values = draw_codes(rng, dtype, size, scale)
    ends = np.where(rng.random(size) < 0.5, low + rng.integers(0, 2, size), high - rng.integers(0, 2, size))
    return {**values, "code": ends.astype(values["code"].dtype)}


def draw_code_channels(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Codes (C, N) with a scale and a zero point for each of C channels, which are the first axis or the last."""
    rows = [draw_codes(rng, dtype, size // 8, draw_scale(rng)) for _ in range(8)]
    joined = {name: np.stack([row[name] for row in rows]) for name in ("code", "scale", "zero_point")}
    last = bool(rng.random() < 0.5)
    return {**joined, "code": joined["code"].T.copy() if last else joined["code"], "dtype": dtype, "axis": int(last)}


def draw_code_powers(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """By a power of two from 2^-126 to 2^127, or a number beside it."""
    power = np.float32(2.0 ** rng.integers(-126, 128))
    return draw_codes(rng, dtype, size, step(power, np.asarray(rng.integers(-1, 2))))


def draw_code_float16(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """By a float16 scale."""
    narrow = np.float16(2.0 ** rng.uniform(-10, 0))
    return {**draw_codes(rng, dtype, size, narrow), "scale": np.asarray(narrow)}


def draw_code_bfloat16(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """By a bfloat16 scale, carried in float32."""
    return {**draw_codes(rng, dtype, size, round_dtype(scale, Dtype.BFLOAT16)), "x_dtype": "bfloat16"}


def draw_code_strided(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Every other element of an array."""
    values = draw_codes(rng, dtype, size, scale)
    return {**values, "code": np.repeat(values["code"], 2)[::2]}


CODE_DRAWS: dict[str, Draw] = {
    "uniform": draw_codes,
    "powers of two": draw_code_powers,
    "limits": draw_code_limits,
    # results beyond float32, and the largest scale of all
    "beyond": lambda rng, dtype, size, scale: draw_codes(
        rng, dtype, size, np.float32(rng.choice([LARGEST, 2.0 ** rng.uniform(110, 127)]))
    ),
    "subnormals": lambda rng, dtype, size, scale: draw_codes(rng, dtype, size, 2.0 ** rng.uniform(-126, -118)),
    "subnormal scales": lambda rng, dtype, size, scale: draw_codes(
        rng, dtype, size, np.floor(2.0 ** rng.uniform(0, 23)) * TINY
    ),
    "channels": draw_code_channels,
    "float16": draw_code_float16,
    "bfloat16": draw_code_bfloat16,
    "empty": lambda rng, dtype, size, scale: draw_codes(rng, dtype, 0, scale),
    "one": lambda rng, dtype, size, scale: draw_codes(rng, dtype, 1, scale),
    "odd": lambda rng, dtype, size, scale: draw_codes(rng, dtype, int(rng.choice(ODD)), scale),
    "strided": draw_code_strided,
}


# --- ranges -----------------------------------------------------------------------------------------------------------


def join_range(ends: np.ndarray, dtype: str) -> Values:
    """Ends of ranges (2, N), in either order."""
    low, high = np.sort(ends.astype(np.float32), axis=0)
    return {"low": low, "high": high, "dtype": dtype}


def draw_range_ties(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Ranges whose real zero point lies half-way between two codes, to an ulp."""
    low, high = limits(dtype)
    start = (rng.integers(0, high - low, size) + 0.5) * np.float64(scale)
    stop = (high - low) * np.float64(scale) - start
    ends = np.stack([-start, stop]).astype(np.float32)
    return join_range(step(ends, rng.integers(-1, 2, ends.shape)), dtype)


def draw_range_powers(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """From 0, or from minus the same, to each power of two, and to the numbers beside it."""
    powers = np.float32(2.0 ** np.arange(SMALLEST, 127))
    high = np.concatenate([powers, step(powers, np.ones(powers.size, int)), step(powers, -np.ones(powers.size, int))])
    return join_range(np.stack([np.concatenate([0 * high, -high]), np.concatenate([high, high])]), dtype)


def draw_range_limits(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Empty ranges at 0 and elsewhere, ranges of one sign, and the widest that float32 holds."""
    ends = np.array([0, -0.0, 1, -1, 2.0**SMALLEST, -(2.0**SMALLEST), 2.0**-126, LARGEST / 2, -LARGEST / 2], np.float32)
    return join_range(rng.choice(ends, (2, size)), dtype)


RANGE_DRAWS: dict[str, Draw] = {
    "uniform": lambda rng, dtype, size, scale: join_range(rng.uniform(-100, 100, (2, size)) * scale, dtype),
    "gaussian": lambda rng, dtype, size, scale: join_range(rng.standard_normal((2, size)) * 100 * scale, dtype),
    "near ties": draw_range_ties,
    "exact ties": lambda rng, dtype, size, scale: draw_range_ties(rng, dtype, size, np.exp2(np.floor(np.log2(scale)))),
    "powers of two": draw_range_powers,
    "limits": draw_range_limits,
    "subnormals": lambda rng, dtype, size, scale: join_range(rng.integers(-(2**23), 2**23, (2, size)) * TINY, dtype),
    # no float32 divided by the number of codes
    "vanishing": lambda rng, dtype, size, scale: join_range(rng.integers(-63, 64, (2, size)) * TINY, dtype),
    "empty": lambda rng, dtype, size, scale: join_range(np.zeros((2, 0)), dtype),
    "one": lambda rng, dtype, size, scale: join_range(rng.standard_normal((2, 1)) * 100 * scale, dtype),
}
