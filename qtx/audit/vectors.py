"""Families of vectors for every operation of an engine's path, drawn from a seed, of any count.

A batch is what one call takes (`engines.paths.OPERATIONS`): arrays that share a scale and a zero point. Each is drawn
from a stream of its own, so that seed, operation, family, dtype and number name the same bits anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qtx_ref.random import stream

from .vectors_blocks import BLOCK_DRAWS
from .vectors_codes import CODE_DRAWS, RANGE_DRAWS
from .vectors_numbers import DRAWS, Draw, Values, draw_scale, limits
from .vectors_products import PRODUCT_DRAWS

__all__ = ["Batch", "DRAWN", "SHARES", "count_batches", "draw", "draw_batches", "take_codes"]

SHARES = {  # of the vectors asked for; a family has at least one batch of each dtype of codes
    "uniform": 0.1,
    "gaussian": 0.2,
    "near ties": 0.4,
    "exact ties": 0.1,
    "powers of two": 0.0,
    "limits": 0.04,
    "beyond": 0.04,
    "nan": 0.0,
    "infinity": 0.0,
    "subnormals": 0.02,
    "subnormal scales": 0.02,
    "bias": 0.1,
    "channels": 0.02,
    "float16": 0.02,
    "bfloat16": 0.02,
    "vanishing": 0.0,
    "empty": 0.0,
    "one": 0.0,
    "odd": 0.0,
    "strided": 0.0,
}
LEAST = {"odd": 24, "nan": 3, "powers of two": 2}  # batches of a dtype, where not 1
OF_ONE_SCALE = ("subnormal scales", "channels")  # families that a cast, which has none, has not
DRAWN: dict[str, Mapping[str, Draw]] = {
    "quantize": DRAWS,
    "fake_quantize": DRAWS,
    "cast": {family: draw for family, draw in DRAWS.items() if family not in OF_ONE_SCALE},
    "dequantize": CODE_DRAWS,
    "scale": RANGE_DRAWS,
    "mx": BLOCK_DRAWS,
    "matmul": {family: draw for family, draw in PRODUCT_DRAWS.items() if family not in ("bias", "channels")},
    "linear": PRODUCT_DRAWS,
}
MAIN = ("x", "code", "low")  # what is counted of a batch


WIDE = ("int32",)  # codes that can be dequantized, and are beyond the 16 bits of a quantizer


@dataclass(frozen=True)
class Batch:
    """What one call takes."""

    family: str
    dtype: str  # of its codes
    values: Values

    @property
    def count(self) -> int:
        """How many vectors it holds: numbers, or results of a product."""
        if "w" in self.values:
            return int(self.values["x"].shape[0] * self.values["w"].shape[1])
        return int(next(self.values[name] for name in MAIN if name in self.values).size)


def measure_chunk(count: int) -> int:
    """How many numbers share a scale: few, so that there are many scales, and more where millions are asked for."""
    return 256 if count <= 2**18 else 1024


def take_codes(op: str, codes: Sequence[str]) -> list[str]:
    """The dtypes of codes that `qtx_ref` has a quantizer of."""
    return [dtype for dtype in codes if op == "dequantize" or dtype not in WIDE]


def count_batches(op: str, codes: Sequence[str], count: int) -> dict[str, int]:
    """How many batches each family has for about `count` vectors, over all dtypes of codes together."""
    codes = take_codes(op, codes)
    each = count / measure_chunk(count) / sum(SHARES[family] for family in DRAWN[op])
    return {family: max(len(codes) * LEAST.get(family, 1), round(each * SHARES[family])) for family in DRAWN[op]}


def draw_batches(
    op: str, codes: Sequence[str], count: int, seed: int = 0, families: Sequence[str] | None = None
) -> Iterator[Batch]:
    """About `count` vectors for an operation, family by family, over all dtypes of codes in turn."""
    codes = take_codes(op, codes)
    for family, batches in count_batches(op, codes, count).items():
        if families is None or family in families:
            for number in range(batches):
                yield draw(op, family, codes[number % len(codes)], number // len(codes), measure_chunk(count), seed)


def draw(op: str, family: str, dtype: str, number: int, size: int, seed: int) -> Batch:
    """One batch."""
    rng = stream(seed, "audit", op, family, dtype, number)
    scale = np.float32(1) if op == "cast" else draw_scale(rng)
    values = DRAWN[op][family](rng, dtype, size, scale)
    if op == "matmul" and number % 2:  # some products know no zero points
        values["x_zero"] = np.zeros_like(values["x_zero"])
    return Batch(family, dtype, SHAPED[op](values) if op in SHAPED else values)


def as_fake(values: Values) -> Values:
    """Numbers with the limits of their codes in place of a dtype."""
    low, high = limits(values["dtype"])
    return {name: value for name, value in values.items() if name != "dtype"} | {"code_min": low, "code_max": high}


def as_cast(values: Values) -> Values:
    """Numbers and the format to cast them to."""
    return {name: values[name] for name in ("x", "x_dtype") if name in values} | {"format": values["dtype"]}


def as_matmul(values: Values) -> Values:
    """Codes and zero points alone."""
    return {name: values[name] for name in ("x", "x_zero", "w", "w_zero")}


SHAPED = {"fake_quantize": as_fake, "cast": as_cast, "mx": as_cast, "matmul": as_matmul}
