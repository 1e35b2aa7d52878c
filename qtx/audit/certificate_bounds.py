"""What can overflow in one integer product, from its codes and their limits alone; and operands that do it.

Every bound is reached: the codes of a row are chosen one by one, so the worst case of a sum is the sum of the worst
cases of its terms. A bound within its limit is a proof, one beyond it gives the operands of a witness.

**Pairs.** x86 without VNNI multiplies uint8 by int8 and adds neighbours along the sum in saturating int16
(`vpmaddubsw`); kernels of 16-bit accumulators go on in int16 for a run of pairs (`vpaddsw`). An operand of the other
sign is moved by 128 first, as engines do. VNNI (`vpdpbusd`), s8 x s8 and u8 x u8 (`vpmaddwd` of widened codes) add in
int32 at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product as combinations

import numpy as np

from qtx_ref.integer.products import matmul_pairs16

__all__ = [
    "CENTRE",
    "TARGETS",
    "Operand",
    "Product",
    "Target",
    "Verdict",
    "Witness",
    "check_sums",
]

INT16 = (-(2**15), 2**15 - 1)
CENTRE = 128  # by which codes of a byte are moved to the other sign


@dataclass(frozen=True)
class Target:
    """How a kernel takes its operands, and what it adds in int16: nothing (run 0), pairs, or runs of pairs."""

    left_signed: bool
    right_signed: bool
    run: int


TARGETS = {
    "avx2": Target(False, True, 1),
    "vnni": Target(False, True, 0),
    "s8s8": Target(True, True, 0),
    "u8u8": Target(False, False, 0),
    "acc16": Target(False, True, 128),  # FBGEMM's block of 256 along the sum
}


@dataclass(frozen=True)
class Operand:
    """The codes of one factor: from `low` to `high`, or, of a constant (K, N), which they are. `zero_point`: one;
    several, of a constant one per column, else one for each that has its own; or None where any code may be it."""

    low: int
    high: int
    zero_point: np.ndarray | None
    codes: np.ndarray | None = None

    @property
    def signed(self) -> bool:
        """Whether its dtype has negative codes."""
        return self.low < 0

    @property
    def is_byte(self) -> bool:
        """Whether a byte holds the codes."""
        return self.low >= -128 and self.high <= (127 if self.signed else 255)

    def moved(self, signed: bool) -> Operand:
        """The codes as a kernel of that sign takes them. The zero point moves along."""
        by = CENTRE * (self.signed - signed)
        zero = None if self.zero_point is None else self.zero_point + by
        return Operand(self.low + by, self.high + by, zero, None if self.codes is None else self.codes + by)

    def zeros(self) -> list[np.ndarray]:
        """The zero point, or the two that bound what any other does: a result is linear in it."""
        if self.zero_point is None:
            return [np.int64(self.low), np.int64(self.high)]
        if self.codes is None and self.zero_point.size > 1:  # which row it is of does not matter
            return [self.zero_point.min(), self.zero_point.max()]
        return [self.zero_point]


@dataclass(frozen=True)
class Product:
    """Left codes (..., M, K) times right codes (..., K, N). The right is constant or neither is."""

    name: str
    left: Operand
    right: Operand
    depth: int | None  # K; the longest that can be, None where the file does not say
    bias: np.ndarray | None = None  # integers in the accumulator's unit, one per column
    shift: np.ndarray | None = None  # of the requantization, 2^shift; one or one per column
    accumulator: int = 32
    right_scale: np.ndarray | None = None  # one, or one per column
    turned: bool = False  # whether the file has the right operand first, and both transposed

    @property
    def columns(self) -> int | None:
        """N of a constant."""
        return None if self.right.codes is None else self.right.codes.shape[1]


@dataclass(frozen=True)
class Witness:
    """Operands, as the file has their codes, that go beyond: the exact result and the one that is computed. `engines`:
    what engines made of them, by name."""

    left: np.ndarray = field(repr=False)  # (K,)
    right: np.ndarray = field(repr=False)  # (K,)
    column: int | None
    left_zero: int
    right_zero: int
    exact: int
    computed: int | None  # None: refused
    engines: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether a limit holds for every operand; the farthest value that is reached; a witness where it does not."""

    holds: bool
    worst: int
    limit: int
    note: str = ""
    witness: Witness | None = None


# --- sums in int16 ----------------------------------------------------------------------------------------------------


def check_sums(product: Product, target: Target) -> Verdict:
    """Whether a pair, or a run of them, can leave int16. Raises ValueError where an operand is no byte."""
    if not (product.left.is_byte and product.right.is_byte):
        raise ValueError(f"product {product.name} has codes beyond a byte")
    left, right = product.left.moved(target.left_signed), product.right.moved(target.right_signed)
    length = 2 * target.run
    if right.codes is not None:
        codes = pad(right.codes, length)
        high = np.where(codes > 0, left.high * codes, left.low * codes)
        low = np.where(codes > 0, left.low * codes, left.high * codes)
    else:
        count = min(product.depth or length, length)
        corners = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
        high, low = (pad(np.full((count, 1), end(corners)), length) for end in (max, min))
    worst, place = farthest([*reach(high, target.run), *reach(low, target.run)])
    holds = INT16[0] <= worst <= INT16[1]
    limit = INT16[1] if worst > 0 else INT16[0]
    return Verdict(holds, worst, limit, "", None if holds else witness_sum(product, target, worst > 0, place))


Place = tuple[int, int, int]  # first row, last row + 1, column
Extreme = tuple[int, Place]


def pad(codes: np.ndarray, length: int) -> np.ndarray:
    """Rows of 0 to a multiple of `length`, as packed operands have them."""
    return np.pad(codes.astype(np.int32), ((0, -len(codes) % length), (0, 0)))


def reach(terms: np.ndarray, run: int) -> list[Extreme]:
    """The largest and smallest of pairs of terms (K, N), and of what a run has summed after each of its pairs."""
    pairs = terms[0::2] + terms[1::2]
    found: list[Extreme] = []
    for end in (np.argmax, np.argmin):
        pair, column = np.unravel_index(int(end(pairs)), pairs.shape)
        found.append((int(pairs[pair, column]), (2 * int(pair), 2 * int(pair) + 2, int(column))))
        if run > 1:
            sums = np.cumsum(pairs.reshape(-1, run, pairs.shape[1]), axis=1)
            first, step, column = np.unravel_index(int(end(sums)), sums.shape)
            place = (2 * run * int(first), 2 * (run * int(first) + int(step) + 1), int(column))
            found.append((int(sums[first, step, column]), place))
    return found


def farthest(extremes: list[Extreme]) -> Extreme:
    """The one that is farthest beyond int16, or nearest to its ends."""
    return max(extremes, key=lambda one: max(one[0] - INT16[1], INT16[0] - one[0]))


def witness_sum(product: Product, target: Target, upward: bool, place: Place) -> Witness:
    """Operands of one column, all that is not in `place` as near to 0 as its codes are; the emulator's result."""
    left, right = product.left.moved(target.left_signed), product.right.moved(target.right_signed)
    first, last, column = place
    idle = min(max(0, left.low), left.high)
    if right.codes is not None:
        w = right.codes[:, column].astype(np.int64)
        x = np.full(len(w), idle, np.int64)
        part = slice(first, last)
        x[part] = np.where((w[part] > 0) == upward, left.high, left.low)
    else:
        count = min(last, product.depth or last) - first
        end = max if upward else min
        a, b = end(combinations((left.low, left.high), (right.low, right.high)), key=lambda ab: ab[0] * ab[1])
        x, w = np.full(count, a, np.int64), np.full(count, b, np.int64)
    computed = matmul_pairs16(x.astype(np.uint8)[None], w.astype(np.int8)[:, None], target.run)[0, 0]
    back = (
        x - CENTRE * (product.left.signed - target.left_signed),
        w - CENTRE * (product.right.signed - target.right_signed),
    )
    which = column if right.codes is not None else None
    return Witness(*back, which, 0, 0, int(x @ w), int(computed))
