"""What a quantized model takes, and its ranges, as JSON values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qtx_ref.spec import FloatFormat, FloatQuantSpec, Quant, QuantSpec, Range

from ..files.artifact import PACKED_BITS, count_packed


def count_stored_bytes(
    params: Mapping[str, np.ndarray], quants: Mapping[str, Quant], ranges: Mapping[str, Range]
) -> int:
    """Bytes of the parameters under a recipe: codes as an artifact stores them (up to 4 bits two to a byte, up to 8
    one, else two), what stays in float as it is, and float32 scale and int32 zero point of every static range.

    Small floats likewise, their MX blocks with a byte of scale each.
    """
    total = sum(range_.scale.nbytes + range_.zero_point.nbytes for range_ in ranges.values())
    for name, value in params.items():
        quant = quants.get(name)
        if quant is None:
            total += value.nbytes
        elif count_bits(quant) <= PACKED_BITS:
            total += count_packed(value.shape)
        else:
            total += value.size * (1 if count_bits(quant) <= 8 else 2)
        if isinstance(quant, FloatQuantSpec) and quant.block:
            total += value.size // quant.block
    return total


def count_bits(quant: Quant) -> int:
    """Bits of a code."""
    if isinstance(quant, QuantSpec):
        return quant.bits
    return 4 if quant.format is FloatFormat.E2M1 else 8


def ranges_json(ranges: Mapping[str, Range]) -> dict[str, dict[str, list[float] | list[int]]]:
    """Static ranges as JSON values, by site: low, high, scale and zero point, each as a flat list."""
    return {
        site: {key: np.asarray(value).ravel().tolist() for key, value in range_._asdict().items()}
        for site, range_ in ranges.items()
    }
