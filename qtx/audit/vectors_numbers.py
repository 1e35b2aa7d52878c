"""Families of real numbers to quantize, around the places where engines part: ties, limits, powers of two, NaN.

A tie is half-way between two neighbouring levels in units of the scale: of codes less their zero point, or of values of
a small float.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from qtx_ref.quant.formats import values as format_values
from qtx_ref.quant.rounding import round_dtype
from qtx_ref.spec import Dtype, FloatFormat

__all__ = [
    "DRAWS",
    "LARGEST",
    "TINY",
    "Values",
    "draw_scale",
    "draw_ties",
    "draw_zero",
    "is_float",
    "limits",
    "list_levels",
    "span",
    "step",
]

ODD = (1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65)  # lengths around those of vector registers
TINY, LARGEST = 2.0**-149, 3.4028234663852886e38  # of float32
Values = dict[str, Any]
Draw = Callable[[np.random.Generator, str, int, Any], Values]  # of codes of a dtype, so many, by a scale


def is_float(dtype: str) -> bool:
    """Whether codes are those of a small float."""
    return dtype in list(FloatFormat)


def limits(dtype: str) -> tuple[int, int]:
    """The lowest and the highest code of "int8", "uint4" and the like."""
    bits = int(dtype.lstrip("uint"))
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# --- numbers ----------------------------------------------------------------------------------------------------------


def step(x: np.ndarray, ulps: np.ndarray) -> np.ndarray:
    """Float32 (or float16) x moved by so many units in its last place, -2 to 2."""
    for _ in range(2):
        moved = np.nextafter(x, np.where(ulps > 0, x.dtype.type(np.inf), x.dtype.type(-np.inf)))
        x, ulps = np.where(ulps == 0, x, moved), ulps - np.sign(ulps)
    return x


def draw_scale(rng: np.random.Generator) -> np.float32:
    """A float32 with a full mantissa, or one time in eight a power of two."""
    exponent = rng.uniform(-20, 6)
    return np.float32(2.0 ** (np.floor(exponent) if rng.random() < 0.125 else exponent))


def draw_zero(rng: np.random.Generator, dtype: str) -> int:
    """A zero point: anywhere among the codes, or one time in eight 0 or an end."""
    if is_float(dtype):
        return 0
    low, high = limits(dtype)
    if high - low > 2**15 and rng.random() < 0.5:  # some engines know no other for 16 bits
        return 0
    if rng.random() < 0.125:
        return int(rng.choice([low, max(low, 0), high]))
    return int(rng.integers(low, high + 1))


@functools.lru_cache(maxsize=16)
def list_levels(dtype: str) -> np.ndarray:
    """All levels of a small float, ascending."""
    levels = format_values(FloatFormat(dtype))
    return np.unique(levels[np.isfinite(levels)]).astype(np.float64)


def draw_ties(rng: np.random.Generator, dtype: str, zero: int, size: int) -> np.ndarray:
    """Ties, float64, the ones just outside the levels among them."""
    if is_float(dtype):
        levels = list_levels(dtype)
        beyond = levels[-1] + (levels[-1] - levels[-2]) / 2
        return rng.choice(np.concatenate([(levels[1:] + levels[:-1]) / 2, [beyond, -beyond]]), size)
    low, high = limits(dtype)
    return rng.integers(low - zero - 1, high - zero + 1, size) + 0.5


def span(dtype: str, zero: int) -> tuple[float, float]:
    """The lowest and the highest level."""
    if is_float(dtype):
        return -list_levels(dtype)[-1], list_levels(dtype)[-1]
    low, high = limits(dtype)
    return low - zero, high - zero


def join(x: np.ndarray, scale: Any, zero: int, dtype: str) -> Values:
    """x, one scale and one zero point, as `paths.run` takes them."""
    return {
        "x": x.astype(np.float32, copy=False),
        "scale": np.asarray(scale, np.float32),
        "zero_point": np.asarray(zero, np.int32),
        "dtype": dtype,
    }


# --- families of x ----------------------------------------------------------------------------------------------------


def draw_uniform(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Over the levels and a tenth beyond them."""
    zero = draw_zero(rng, dtype)
    low, high = span(dtype, zero)
    return join(rng.uniform(low - 0.1 * (high - low), high + 0.1 * (high - low), size) * scale, scale, zero, dtype)


def draw_gaussian(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """With a third of the span of the levels as deviation."""
    zero = draw_zero(rng, dtype)
    low, high = span(dtype, zero)
    return join(rng.standard_normal(size) * ((high - low) / 6) * scale, scale, zero, dtype)


def draw_near_ties(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """A tie times the scale, rounded to float32, and its neighbours within an ulp."""
    zero = draw_zero(rng, dtype)
    x = (draw_ties(rng, dtype, zero, size) * np.float64(scale)).astype(np.float32)
    return join(step(x, rng.integers(-1, 2, size)), scale, zero, dtype)


def draw_exact_ties(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Ties that the division gives exactly, with an odd zero point."""
    scale, zero = np.exp2(np.floor(np.log2(scale))), draw_zero(rng, dtype)
    if not is_float(dtype):
        zero += 1 if zero % 2 == 0 else 0
    return join(draw_ties(rng, dtype, zero, size) * scale, scale, zero, dtype)


def draw_powers(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Each power of two that float32 has, both signs, and the numbers beside it."""
    powers = 2.0 ** np.arange(-149, 128)
    x = np.concatenate([powers, -powers]).astype(np.float32)
    x = np.concatenate([x, step(x, np.ones(x.size, int)), step(x, -np.ones(x.size, int))])
    return join(x, scale, draw_zero(rng, dtype), dtype)


def draw_limits(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Around the lowest and the highest level, 0 of both signs, and the largest numbers of float32."""
    zero = draw_zero(rng, dtype)
    ends = np.repeat(span(dtype, zero), size // 2)
    x = ((ends + rng.integers(-2, 3, ends.size) / 2) * np.float64(scale)).astype(np.float32)
    x = step(x, rng.integers(-2, 3, x.size))
    return join(np.concatenate([x, np.array([0, -0.0, LARGEST, -LARGEST], np.float32)]), scale, zero, dtype)


def draw_beyond(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Levels around 2^31, 2^32, 2^63 and 2^64, and the same with the zero point counted, to some ulps."""
    zero = draw_zero(rng, dtype)
    level = 2.0 ** rng.choice([31, 32, 63, 64], size) - rng.choice([0, zero], size)
    x = (level * rng.choice([-1, 1], size) * np.float64(scale)).astype(np.float32)
    return join(step(x, rng.integers(-2, 3, size)), scale, zero, dtype)


def draw_nan(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Quiet NaN of either sign and any payload among ordinary numbers."""
    values = draw_gaussian(rng, dtype, size, scale)
    bits = rng.choice(np.array([0x7FC00000, 0xFFC00000], np.uint32), size) | rng.integers(0, 2**22, size).astype(
        np.uint32
    )
    return {**values, "x": np.where(rng.random(size) < 0.25, bits.view(np.float32), values["x"])}


def draw_infinity(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Infinities among ordinary numbers."""
    values = draw_gaussian(rng, dtype, size, scale)
    signs = np.float32(np.inf) * rng.choice(np.array([-1, 1], np.float32), size)
    return {**values, "x": np.where(rng.random(size) < 0.25, signs, values["x"])}


def draw_subnormals(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Subnormal x, of scales that are the smallest normal numbers, or ordinary."""
    scale = np.float32(2.0 ** rng.uniform(-126, -118)) if rng.random() < 0.75 else scale
    x = rng.integers(-(2**23) + 1, 2**23, size) * TINY
    return join(x, scale, draw_zero(rng, dtype), dtype)


def draw_subnormal_scales(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Scales below 2^-126, whose reciprocal is infinite below 2^-128."""
    scale, zero = np.float32(np.floor(2.0 ** rng.uniform(0, 23)) * TINY), draw_zero(rng, dtype)
    x = (draw_ties(rng, dtype, zero, size) * np.float64(scale)).astype(np.float32)
    return join(step(x, rng.integers(-2, 3, size)), scale, zero, dtype)


def draw_channels(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Near ties (C, N) with a scale and a zero point for each of C channels, which are the first axis or the last."""
    rows = [draw_near_ties(rng, dtype, size // 8, draw_scale(rng)) for _ in range(8)]
    joined = {name: np.stack([row[name] for row in rows]) for name in ("x", "scale", "zero_point")}
    last = bool(rng.random() < 0.5)
    return {**joined, "x": joined["x"].T.copy() if last else joined["x"], "dtype": dtype, "axis": int(last)}


def draw_float16(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Near ties of float16 x and scale."""
    scale, zero = np.float16(2.0 ** rng.uniform(-10, 0)), draw_zero(rng, dtype)
    with np.errstate(over="ignore"):
        x = (draw_ties(rng, dtype, zero, size) * np.float64(scale)).astype(np.float16)
    x = step(x, rng.integers(-1, 2, size))
    return {**join(x, scale, zero, dtype), "x": x, "scale": np.asarray(scale)}


def draw_bfloat16(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Near ties of bfloat16 x and scale, carried in float32."""
    scale, zero = round_dtype(scale, Dtype.BFLOAT16), draw_zero(rng, dtype)
    x = round_dtype(draw_ties(rng, dtype, zero, size) * np.float64(scale), Dtype.BFLOAT16)
    x = round_dtype(x * np.float32(2.0) ** (rng.integers(-1, 2, size) * 0.005), Dtype.BFLOAT16)
    return {**join(x, scale, zero, dtype), "x_dtype": "bfloat16"}


def draw_strided(rng: np.random.Generator, dtype: str, size: int, scale: Any) -> Values:
    """Near ties, every other element of an array."""
    values = draw_near_ties(rng, dtype, size, scale)
    return {**values, "x": np.repeat(values["x"], 2)[::2]}


DRAWS: dict[str, Draw] = {
    "uniform": draw_uniform,
    "gaussian": draw_gaussian,
    "near ties": draw_near_ties,
    "exact ties": draw_exact_ties,
    "powers of two": draw_powers,
    "limits": draw_limits,
    "beyond": draw_beyond,
    "nan": draw_nan,
    "infinity": draw_infinity,
    "subnormals": draw_subnormals,
    "subnormal scales": draw_subnormal_scales,
    "channels": draw_channels,
    "float16": draw_float16,
    "bfloat16": draw_bfloat16,
    "empty": lambda rng, dtype, size, scale: draw_near_ties(rng, dtype, 0, scale),
    "one": lambda rng, dtype, size, scale: draw_near_ties(rng, dtype, 1, scale),
    "odd": lambda rng, dtype, size, scale: draw_near_ties(rng, dtype, int(rng.choice(ODD)), scale),
    "strided": draw_strided,
}
