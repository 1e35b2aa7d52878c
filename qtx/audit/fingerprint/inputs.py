"""Real inputs on which quantizers differ: ties and what lies within two ulps of them, under scales of three kinds.

Under a power of two every tie is exact. Under a scale of few bits ties are exact too, but its reciprocal is rounded.
Under any other a tie is near at best, and the quotient may round onto it.
"""

from __future__ import annotations

import numpy as np

from qtx_ref.spec import QuantSpec

ULPS = 2
SCALES = ("power", "short", "any")


def draw_scale(rng: np.random.Generator, kind: str, dtype: type = np.float32) -> np.ndarray:
    """A scale from 2^-6 to 4, exact in `dtype`."""
    power = 2.0 ** int(rng.integers(-6, 1))
    if kind == "power":
        return np.asarray(power, dtype)
    if kind == "short":
        return np.asarray(power * int(rng.choice([3, 5, 7, 11, 13])) / 4, dtype)
    return np.asarray(power * rng.uniform(1, 4), dtype)


def move(x: np.ndarray, ulps: np.ndarray) -> np.ndarray:
    """Floats moved by whole numbers of ulps away from 0, or towards it; 0 stays."""
    bits = x.view({2: np.int16, 4: np.int32}[x.itemsize])
    return np.where(x == 0, x, (bits + ulps.astype(bits.dtype)).view(x.dtype))


def near_ties(
    rng: np.random.Generator, spec: QuantSpec, scale: np.ndarray, zero: int, count: int, dtype: type = np.float32
) -> np.ndarray:
    """x (count,): levels of the quantizer's codes and ties between them, each within ULPS of it; a tenth anything."""
    low, high = spec.code_min - zero - 2, spec.code_max - zero + 2
    level = rng.integers(low, high, count) + rng.choice([0.5, 0.5, 0.5, 0.0], count)
    level = np.where(rng.random(count) < 0.3, np.rint(level / 16) + 0.5 - zero * (rng.random(count) < 0.5), level)
    level = np.where(rng.random(count) < 0.1, rng.uniform(low, high, count), level)
    x = real(level, scale, dtype)
    return move(x, rng.integers(-ULPS, ULPS + 1, count) * (rng.random(count) < 0.7))


def real(level: np.ndarray, scale: np.ndarray, dtype: type) -> np.ndarray:
    """level * scale, within what a dtype holds."""
    limit = float(np.finfo(dtype).max) / 2
    return np.clip(level * scale.astype(np.float64), -limit, limit).astype(dtype)


def all_ties(spec: QuantSpec, scale: np.ndarray, zero: int, dtype: type = np.float32) -> np.ndarray:
    """x: every code of a spec and every tie beside it, in order; of 16 bits every 64th."""
    step = 1 if spec.bits <= 8 else 64
    level = np.arange(2 * (spec.code_min - zero) - 3, 2 * (spec.code_max - zero) + 4, step) / 2
    return real(level, scale, dtype)


def odd_zeros(spec: QuantSpec) -> list[int]:
    """Zero points of a quantizer: odd ones of either sign, near the middle and towards an end; and 0."""
    middle, span = (spec.code_min + spec.code_max) // 2, spec.code_max - spec.code_min
    chosen = [middle + span // 5, middle - span // 3, middle - 1, spec.code_min + 1]
    odd = [min(one | 1, spec.code_max) for one in chosen]
    return list(dict.fromkeys([*odd, 0]))
