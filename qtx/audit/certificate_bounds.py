"""What can overflow in one integer product, from its codes and their limits alone; and operands that do it.

Every bound is reached: the codes of a row are chosen one by one, so the worst case of a sum is the sum of the worst
cases of its terms. A bound within its limit is a proof, one beyond it gives the operands of a witness.

**Pairs.** x86 without VNNI multiplies uint8 by int8 and adds neighbours along the sum in saturating int16
(`vpmaddubsw`); kernels of 16-bit accumulators go on in int16 for a run of pairs (`vpaddsw`). An operand of the other
sign is moved by 128 first, as engines do. VNNI (`vpdpbusd`), s8 x s8 and u8 x u8 (`vpmaddwd` of widened codes) add in
int32 at once.

**Accumulators** are exact sums with zero points and bias: one that wraps on the way and returns holds the right bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product as combinations

import numpy as np

from qtx_ref.integer.fixed_point import multiply
from qtx_ref.integer.products import matmul_pairs16
from qtx_ref.spec import QTX, Fixed, HighProduct, LeftShift

__all__ = [
    "CENTRE",
    "INT32",
    "TARGETS",
    "Operand",
    "Product",
    "Target",
    "Verdict",
    "Witness",
    "check_overflow",
    "check_shift",
    "check_sums",
]

INT16, INT32 = (-(2**15), 2**15 - 1), (-(2**31), 2**31 - 1)
INT48 = (-(2**47), 2**47 - 1)  # what a 64-bit accumulator is requantized from
assert isinstance(QTX.requantize, Fixed)  # for the type checker
SHIFTS = replace(QTX.requantize, product=HighProduct.HALF_UP, left=LeftShift.REPORT)  # to the left first, in int32
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
    """The codes of one factor: from `low` to `high`, or, of a constant (K, N), which they are. `zero_point`: one, one
    per column, or None where any code may be it."""

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
        """The zero point, or the two that bound what any other does."""
        return [np.int64(self.low), np.int64(self.high)] if self.zero_point is None else [self.zero_point]


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


# --- accumulators -----------------------------------------------------------------------------------------------------


def check_overflow(product: Product) -> Verdict:
    """Whether an accumulator, its bias in it, can leave its width."""
    limits = INT32 if product.accumulator == 32 else INT48
    if product.bias is not None and product.accumulator == 32:
        lowest, highest = int(product.bias.min(initial=0)), int(product.bias.max(initial=0))
        if lowest < INT32[0] or highest > INT32[1]:
            worst = highest if highest > INT32[1] else lowest
            return Verdict(False, worst, limits[worst > 0], "the bias alone", witness_acc(product, worst > 0, limits))
    if product.right.codes is None and product.depth is None:
        term = max(abs(value) for value in bound_terms(product))
        return Verdict(True, term, limits[1], f"to {limits[1] // term:,} terms")
    highs, lows = bound_accumulators(product)
    high, low = int(highs.max()), int(lows.min())
    worst = high if high - limits[1] >= limits[0] - low else low
    holds = limits[0] <= low and high <= limits[1]
    return Verdict(holds, worst, limits[worst > 0], "", None if holds else witness_acc(product, worst > 0, limits))


def bound_terms(product: Product) -> tuple[int, int]:
    """The largest and the smallest product of two operands less their zero points."""
    terms = [
        (a - int(za)) * (b - int(zb))
        for za, zb in combinations(product.left.zeros(), (z for zero in product.right.zeros() for z in np.ravel(zero)))
        for a in (product.left.low, product.left.high)
        for b in (product.right.low, product.right.high)
    ]
    return max(terms), min(terms)


def bound_accumulators(product: Product) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest accumulator of each column, int64 (N,); of activations alone (1,)."""
    left, right = product.left, product.right
    bias = np.int64(0) if product.bias is None else product.bias.astype(np.int64)
    if right.codes is None:
        assert product.depth is not None  # or there is no bound
        high, low = bound_terms(product)
        return np.array([product.depth * high]) + bias, np.array([product.depth * low]) + bias
    highs, lows = [], []
    for a_zero, b_zero in combinations(left.zeros(), right.zeros()):
        above, below = split_signs(right.codes, b_zero)
        first, last = left.low - a_zero, left.high - a_zero
        highs.append(last * above + first * below + bias)
        lows.append(first * above + last * below + bias)
    return np.max(highs, axis=0), np.min(lows, axis=0)


def split_signs(codes: np.ndarray, zero_point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of the positive and of the negative of codes (K, N) less their zero point, int64 (N,)."""
    difference = codes.astype(np.int32) - np.asarray(zero_point, np.int32)
    above = np.maximum(difference, 0).sum(0, dtype=np.int64)
    return above, difference.sum(0, dtype=np.int64) - above


def witness_acc(product: Product, upward: bool, limits: tuple[int, int]) -> Witness:
    """Operands of the farthest accumulator, and what its width leaves of it."""
    left, right, sign = product.left, product.right, 1 if upward else -1
    best: tuple[int, Witness] | None = None
    for za, zb in combinations(left.zeros(), right.zeros()):
        a_zero = int(np.ravel(za)[0])
        if right.codes is not None:
            only = replace(
                product, left=replace(left, zero_point=np.int64(a_zero)), right=replace(right, zero_point=zb)
            )
            column = int(np.argmax(sign * bound_accumulators(only)[not upward]))
            w, b_zero = right.codes[:, column].astype(np.int64), int(np.broadcast_to(zb, right.codes.shape[1:])[column])
            x = np.where((w > b_zero) == upward, left.high, left.low).astype(np.int64)
        else:
            column, b_zero = None, int(np.ravel(zb)[0])
            ends = combinations((left.low, left.high), (right.low, right.high))
            a, b = max(ends, key=lambda ab: sign * (ab[0] - a_zero) * (ab[1] - b_zero))
            x, w = (np.full(product.depth or 1, one, np.int64) for one in (a, b))
        bias = 0 if product.bias is None else int(np.ravel(product.bias)[column or 0])
        exact = sum((int(p) - a_zero) * (int(q) - b_zero) for p, q in zip(x, w, strict=True)) + bias
        span = limits[1] - limits[0] + 1
        wrapped = (exact - limits[0]) % span + limits[0]
        if best is None or sign * exact > best[0]:
            best = sign * exact, Witness(x, w, column, a_zero, b_zero, exact, wrapped)
    assert best is not None  # there is a zero point
    return best[1]


def check_shift(product: Product, overflow: Verdict) -> Verdict | None:
    """Whether the left shift of the requantization, where M is 1 or more, can leave int32. None where there is no
    requantization, or no bound, or accumulators of 64 bits."""
    if product.shift is None or product.accumulator == 64 or not overflow.holds or overflow.note:
        return None
    left = np.maximum(np.asarray(product.shift, np.int64), 0)
    highs, lows = (bound << left for bound in np.broadcast_arrays(*bound_accumulators(product)))
    high, low = int(highs.max()), int(lows.min())
    worst = high if high - INT32[1] >= INT32[0] - low else low
    if INT32[0] <= low and high <= INT32[1]:
        note = "" if left.any() else "no left shift"
        return Verdict(True, worst, INT32[worst > 0], note)
    column = int(np.argmax(highs) if worst > 0 else np.argmin(lows))
    one = take_column(product, column)
    found = witness_acc(one, worst > 0, INT32)
    shift = np.ravel(np.broadcast_to(left, highs.shape))[column]
    try:
        multiply(np.int32(found.exact), np.int32(2**30), shift, SHIFTS)
        raise AssertionError(f"{found.exact} << {shift} is within int32")
    except ValueError:
        where = None if product.right.codes is None else column
        return Verdict(False, worst, INT32[worst > 0], "", replace(found, column=where, computed=None))


def take_column(product: Product, column: int) -> Product:
    """The product of one column."""

    def cut(value: np.ndarray | None) -> np.ndarray | None:
        return value if value is None or np.size(value) == 1 else np.ravel(value)[column : column + 1]

    codes = product.right.codes
    right = replace(product.right, zero_point=cut(product.right.zero_point))
    right = right if codes is None else replace(right, codes=codes[:, column : column + 1])
    return replace(product, right=right, bias=cut(product.bias), shift=cut(product.shift))
