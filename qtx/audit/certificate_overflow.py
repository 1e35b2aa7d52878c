"""What an accumulator can reach, its bias in it, and whether the left shift of its requantization leaves int32.

An accumulator is an exact sum with zero points and bias: one that wraps on the way and returns holds the right bits.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product as combinations

import numpy as np

from qtx_ref.integer.fixed_point import multiply
from qtx_ref.spec import QTX, Fixed, HighProduct, LeftShift

from .certificate_bounds import Product, Verdict, Witness

__all__ = ["INT32", "check_overflow", "check_shift"]

INT32 = (-(2**31), 2**31 - 1)
INT48 = (-(2**47), 2**47 - 1)  # what a 64-bit accumulator is requantized from
assert isinstance(QTX.requantize, Fixed)  # for the type checker
SHIFTS = replace(QTX.requantize, product=HighProduct.HALF_UP, left=LeftShift.REPORT)  # to the left first, in int32


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
        bias = 0
        if product.bias is not None:
            which = np.argmax(sign * product.bias) if column is None else min(column, product.bias.size - 1)
            bias = int(np.ravel(product.bias)[which])
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
