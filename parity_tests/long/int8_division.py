"""That a number of 8 or 11 bits is divided by a float32 as IEEE asks, by a product and one remainder, which
`qtx_torch.kernels.int8_codes.divide` does: for every mantissa of both.

    python -m parity_tests.long.int8_division                # bfloat16's; --bits 11: float16's, eight times as many

Exponents only move all that is computed, where nothing is below the normal numbers: numbers and scales from 1 to 2.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

from qtx_torch.quant.rounding import fused_multiply_add


def count_wrong(numbers: np.ndarray, bits: int, scales: np.ndarray, remainder: bool = True) -> int:
    """Of how many pairs of mantissas, as integers without their first bit, the quotient is wrong; remainder: whether
    it is taken."""
    wrong = 0
    scale = torch.from_numpy((1 + scales * 2.0**-23).astype(np.float32))
    inverse = 1 / scale
    for number in numbers:
        x = torch.full_like(scale, 1 + float(number) * 2.0 ** (1 - bits))
        ratio = x * inverse
        if remainder:
            ratio = fused_multiply_add(fused_multiply_add(ratio, -scale, x), inverse, ratio)
        wrong += int((ratio != x / scale).sum())
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, choices=(8, 11), default=8)
    options = parser.parse_args()
    count = 2 ** (options.bits - 1)
    wrong = sum(count_wrong(np.arange(count), options.bits, np.arange(at, at + 2**18)) for at in range(0, 2**23, 2**18))
    print(f"{count} x {2**23} quotients, {wrong} wrong")
    return 0 if wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
