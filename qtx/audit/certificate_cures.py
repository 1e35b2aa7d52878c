"""What mends a product whose pairs can leave int16, and what it costs: how far the product's result moves.

The right operand is what changes; the left keeps its codes. Recoded as u8 x u8 nothing moves: the kernel widens both
before it adds, and is slower. With 7 bits, or a larger scale in the columns that need one, the kernel stays, and the
right operand is rounded to fewer codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, log2

import numpy as np

from .certificate_bounds import TARGETS, Operand, Product, Verdict, check_sums
from .certificate_overflow import INT32

__all__ = ["Cure", "Tally", "list_cures"]

STEP = 1.01  # by which a scale is raised until it is enough


@dataclass(frozen=True)
class Cure:
    """`error`: RMS of the change in the result over RMS of the result: on data where there are any, else with inputs
    that are independent and of equal size; None where only data can tell."""

    name: str
    error: float | None
    note: str = ""
    operand: Operand | None = field(default=None, repr=False)  # what stands on the right then; its codes are signed
    factor: np.ndarray | float = field(default=1.0, repr=False)  # of its scale


def list_cures(product: Product, overflow: Verdict, shift: Verdict | None) -> list[Cure]:
    """What makes an accumulator and its left shift fit, then what makes pairs in int16 fit, the least change first;
    nothing for what is proved."""
    widths = [] if overflow.holds else [Cure("64-bit accumulators", 0.0)]
    if shift is not None and not shift.holds:  # M falls as the result's scale rises
        least = 2 ** ceil(log2(shift.worst / INT32[shift.worst > 0]))
        widths.append(Cure(f"result scale x {least}", None))
    return [*widths, *list_pair_cures(product)]


def list_pair_cures(product: Product) -> list[Cure]:
    """Those for pairs in int16."""
    if not (product.left.is_byte and product.right.is_byte) or check_sums(product, TARGETS["avx2"]).holds:
        return []
    cures = [Cure("u8 x u8", 0.0, "a kernel that widens first")]
    right = product.right.moved(True)
    cures.append(make_cure(product, right, "7 bits", 2.0))
    if right.codes is not None:
        factor = raise_scales(product, right)
        changed = int((factor > 1).sum())
        cures.append(make_cure(product, right, "scale", factor, f"x {factor.max():.3g} at most, {changed} columns"))
    return sorted(cures, key=lambda cure: (cure.error is None, cure.error))


def make_cure(product: Product, right: Operand, name: str, factor: np.ndarray | float, note: str = "") -> Cure:
    """The cure that divides codes by `factor` and multiplies the scale by it."""
    coarse = coarsen(right, factor)
    if right.codes is None:
        return Cure(name, None, note, coarse, factor)
    was, now = real_codes(right), real_codes(coarse) * factor
    scale = 1.0 if product.right_scale is None else product.right_scale.astype(np.float64)
    size = np.sqrt(np.sum(np.square(was * scale)))
    error = float(np.sqrt(np.sum(np.square((now - was) * scale))) / size) if size else 0.0
    return Cure(name, error, note, coarse, factor)


def coarsen(right: Operand, factor: np.ndarray | float) -> Operand:
    """Signed codes at a scale `factor` times as large, and their zero point; the limits of 7 bits where it is 2."""
    limit = 64 if np.ndim(factor) == 0 else 128
    zero = None if right.zero_point is None else np.rint(right.zero_point / factor).astype(np.int64)
    codes = None if right.codes is None else round_codes(right.codes, factor, limit)
    return Operand(-limit, limit - 1, zero, codes)


def round_codes(codes: np.ndarray, factor: np.ndarray | float, limit: int) -> np.ndarray:
    """Codes at a scale `factor` times as large."""
    return np.clip(np.rint(codes / factor), -limit, limit - 1).astype(np.int32)


def real_codes(right: Operand) -> np.ndarray:
    """Codes less their zero point, float64; the middle one where it is not known."""
    assert right.codes is not None  # asked of constants alone
    return right.codes.astype(np.float64) - (0 if right.zero_point is None else right.zero_point)


def raise_scales(product: Product, right: Operand) -> np.ndarray:
    """How much larger each column's scale must be for its pairs to stay in int16, float64 (N,)."""
    assert right.codes is not None  # a scale for all of an activation is 7 bits by another name
    factor = np.ones(right.codes.shape[1])
    left = product.left.moved(False)
    while (worst := worst_pairs(left, round_codes(right.codes, factor, 128))).max() > 1:
        factor = np.where(worst > 1, factor * np.maximum(worst, STEP), factor)
    return factor


def worst_pairs(left: Operand, codes: np.ndarray) -> np.ndarray:
    """The farthest pair of each column over what int16 holds, float64 (N,)."""
    codes = np.pad(codes, ((0, len(codes) % 2), (0, 0)))
    high, low = (np.where((codes > 0) == up, left.high * codes, left.low * codes) for up in (True, False))
    return np.maximum((high[0::2] + high[1::2]).max(0) / (2**15 - 1), -(low[0::2] + low[1::2]).min(0) / 2**15)


# --- on data ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What real operands did in one product: pairs that left int16, results that are wrong by it, and how far each cure
    moves the results."""

    pairs: int = 0
    saturated: int = 0
    results: int = 0
    wrong: int = 0
    size: float = 0.0  # sum of squares of the results
    moved: dict[str, float] = field(default_factory=dict)  # and of the changes, by cure

    def see(
        self, product: Product, cures: list[Cure], a: np.ndarray, za: np.ndarray, b: np.ndarray, zb: np.ndarray
    ) -> None:
        """Adds operands (..., M, K) and (..., K, N) with their zero points, as the file has them."""
        if product.turned:
            a, za, b, zb = b.swapaxes(-1, -2), zb, a.swapaxes(-1, -2), za
        left, right = (
            move_codes(x, side, signed) for x, side, signed in ((a, product.left, False), (b, product.right, True))
        )
        results = int(np.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))) * a.shape[-2] * b.shape[-1]
        self.results += results
        self.pairs += results * -(-a.shape[-1] // 2)
        if not cures or not results:  # proved: no pair can
            return
        saturated, wrong = count_saturated(left, right)
        self.saturated += saturated
        self.wrong += wrong
        x = (
            a.astype(np.float32) - np.asarray(za, np.float32).reshape(-1, 1)
            if np.size(za) > 1
            else a - np.float32(za.item())
        )
        scale = self.columns(product.right_scale, b, 1.0)
        was = (b.astype(np.float32) - self.columns(zb, b, 0.0)) * scale
        self.size += float(np.square(x @ was, dtype=np.float64).sum())
        for cure in cures:
            if cure.operand is None:
                continue
            factor = self.columns(np.asarray(cure.factor), b, 1.0)
            codes = round_codes(right, factor, -cure.operand.low)
            zero = np.rint((self.columns(zb, b, 0.0) - (0 if product.right.signed else 128)) / factor)
            now = (codes - zero) * factor * scale
            change = float(np.square(x @ (now - was).astype(np.float32), dtype=np.float64).sum())
            self.moved[cure.name] = self.moved.get(cure.name, 0.0) + change

    def columns(self, value: np.ndarray | None, b: np.ndarray, otherwise: float) -> np.ndarray:
        """One number, or one per column, as it broadcasts against right operands, one or one per head."""
        if value is None:
            return np.float32(otherwise)
        value = np.asarray(value, np.float32)
        if value.size == 1:
            return value.reshape(())
        heads = b.ndim >= 3 and value.size == b.shape[-3] * b.shape[-1]
        return value.reshape(b.shape[-3], 1, -1) if heads else value.reshape(-1)

    def error(self, cure: Cure) -> float | None:
        """The cure's error on these data, its own where they have nothing to say."""
        if cure.name in self.moved and self.size:
            return float(np.sqrt(self.moved[cure.name] / self.size))
        return cure.error


def move_codes(codes: np.ndarray, side: Operand, signed: bool) -> np.ndarray:
    """Codes as a kernel of that sign takes them, int32."""
    return codes.astype(np.int32) + 128 * (side.signed - signed)


def count_saturated(a: np.ndarray, b: np.ndarray) -> tuple[int, int]:
    """Pairs along the sum that int16 does not hold, and results that have one; a (..., M, K), b (..., K, N)."""
    if a.shape[-1] % 2:
        a = np.concatenate([a, np.zeros_like(a[..., :1])], -1)
        b = np.concatenate([b, np.zeros_like(b[..., :1, :])], -2)
    total, wrong = 0, np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), bool)
    for k in range(0, a.shape[-1], 2):
        x, w = a[..., k : k + 2], b[..., k : k + 2, :]
        low, high = x.min(-2)[..., None], x.max(-2)[..., None]  # (..., 2, 1)
        far = np.maximum(high * w, low * w).sum(-2), np.minimum(high * w, low * w).sum(-2)  # (..., N)
        beyond = (far[0] > 2**15 - 1) | (far[1] < -(2**15))
        columns = np.flatnonzero(beyond.any(tuple(range(beyond.ndim - 1))))
        if columns.size == 0:  # whatever the row
            continue
        w = w[..., columns]
        pair = x[..., :1] * w[..., :1, :] + x[..., 1:] * w[..., 1:, :]  # (..., M, columns)
        beyond = (pair > 2**15 - 1) | (pair < -(2**15))
        total += int(beyond.sum())
        wrong[..., columns] |= beyond
    return total, int(wrong.sum())
