"""Requantization and weighted sums as nodes, by the rules of `qtx_ref.integer.fixed_point` and `ops.weighted_sum`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qtx_ref.integer import float_product
from qtx_ref.integer.fixed_point import INT32_MAX, INT32_MIN
from qtx_ref.spec import (
    Beyond,
    Bias,
    Dtype,
    Fixed,
    FloatProduct,
    HighProduct,
    LeftShift,
    Profile,
    QuantizeRule,
    Rounding,
    ZeroPoint,
)

from .export_graph import Graph

LEVELS = 2.0**24  # beyond every code plus zero point, and exact in float32


def shift_rounded(g: Graph, x: str, shift: Any, rounding: Rounding, bound: int, after: Any = 0) -> str:
    """round(x / 2^shift) + after of int64, as `fixed_point.shift_right` rounds. Raises ValueError for overflow."""
    shift = np.asarray(shift, np.int64)
    some, half = np.asarray(shift > 0, np.int64), (np.int64(1) << shift) >> 1  # without a shift nothing is rounded
    if rounding is Rounding.HALF_UP:
        return g.shift_right(x, shift, half, bound, after)
    if rounding is Rounding.HALF_EVEN:
        odd = g.node("Mod", g.shift_right(x, shift, 0, bound), np.int64(2))
        return g.shift_right(g.node("Add", x, g.node("Mul", odd, some)), shift, half - some, bound + 1, after)
    if rounding is Rounding.FLOOR:
        return g.shift_right(x, shift, 0, bound, after)
    if rounding not in (Rounding.HALF_AWAY, Rounding.TOWARD_ZERO):
        raise ValueError(f"a requantization that rounds {rounding} gives no codes twice")
    negative = g.cast(g.node("Less", x, np.int64(0)), "int64")
    if rounding is Rounding.HALF_AWAY:  # ties of negative numbers go down
        return g.shift_right(g.node("Sub", x, g.node("Mul", negative, some)), shift, half, bound + 1, after)
    rest = (np.int64(1) << shift) - 1  # negative numbers go up
    return g.shift_right(g.node("Add", x, g.node("Mul", negative, rest)), shift, 0, bound + int(rest.max()), after)


@dataclass(frozen=True)
class Target:
    """What accumulators become codes with: the multiplier, or factors on an axis before, and shift of the site, its
    zero point, and a bias of floats as the rule adds it at `place`, if there is one."""

    multiplier: np.ndarray
    shift: np.ndarray | None
    zero: np.ndarray
    bias: np.ndarray | None = None
    place: Bias = Bias.INT32


def round_level(g: Graph, a: str, bound: int, target: Target, rule: Fixed | FloatProduct, wide: bool) -> str:
    """Accumulators, int64 of which no magnitude is above `bound`, as codes that are not clamped yet, int64.

    wide: they are 64-bit accumulators, not 32-bit ones that were cast. Raises ValueError where the rule is not written
    down here, or int64 could overflow.
    """
    zero = np.asarray(target.zero, np.int64)
    if isinstance(rule, FloatProduct):
        return round_product(g, a, target, rule)
    assert target.shift is not None
    m, shift = target.multiplier.astype(np.int64), target.shift.astype(np.int64)
    reach = int(m.max())
    if rule.left is LeftShift.WRAP and (bound * m * 2.0 ** (shift - 31.0)).max() >= 2**31:
        raise ValueError(f"accumulators up to {bound} times {target.multiplier.max()} may wrap at int32")
    if rule.product is HighProduct.EXACT:
        if wide and rule.bits == 15:
            m = np.where(m < 0x7FFF0000, (m + 2**15) >> 16, 0x7FFF)
            return shift_rounded(g, g.node("Mul", a, m), 15 - shift, rule.rounding, bound * int(m.max()), zero)
        if bound * reach < 2**61:
            return shift_rounded(g, g.node("Mul", a, m), 31 - shift, rule.rounding, bound * reach, zero)
        if not wide or rule.rounding is not Rounding.HALF_UP:
            raise ValueError(f"accumulators up to {bound} times {reach} may leave int64")
        if bound >= 2**47:
            raise ValueError(f"accumulators may reach {bound}, beyond 48 bits")
        high = g.shift_right(a, np.int64(16), 0, bound)
        low = g.node("Sub", a, g.node("Mul", high, np.int64(65536)))
        low = g.node("Add", g.node("Mul", low, m), np.int64(1) << (30 - shift))
        low = g.node("Div", low, np.int64(65536))  # not negative
        total = g.node("Add", g.node("Mul", high, m), low)
        return g.shift_right(total, 15 - shift, 0, ((bound >> 16) + 1) * reach + 2**46, zero)
    right = np.maximum(-shift, 1 if rule.product is HighProduct.TRUNCATED else 0)
    left = shift + right
    if left.any():
        a, bound = shift_left(g, a, left, bound, rule.left)
    half = 2**30 if rule.product is HighProduct.HALF_UP else 0
    high = g.shift_right(g.node("Mul", a, m), np.int64(31), half, bound * reach)
    return shift_rounded(g, high, right, rule.rounding, bound + 1, zero)


def shift_left(g: Graph, a: str, left: np.ndarray, bound: int, rule: LeftShift) -> tuple[str, int]:
    """a * 2^left and its bound, saturated to int32 where the rule says so. Raises ValueError where int64 may not hold
    it, or int32 may not and the rule wraps."""
    reach = bound << int(left.max())
    if reach >= 2**62 or (reach > INT32_MAX and rule is LeftShift.WRAP):
        raise ValueError(f"accumulators up to {bound}, shifted left by {left.max()} bits, may leave int32")
    a = g.node("Mul", a, np.int64(1) << left)
    if reach > INT32_MAX and rule is LeftShift.SATURATE:
        a, reach = g.node("Clip", a, np.int64(INT32_MIN), np.int64(INT32_MAX)), 2**31
    return a, reach


def round_product(g: Graph, a: str, target: Target, rule: FloatProduct) -> str:
    """`float_product.multiply`: int64 times each factor in turn, in the floats of the rule, with its bias."""
    check_float(rule)
    if target.bias is not None and target.place is Bias.FLOAT_BEFORE_FUSED:
        raise ValueError("a bias in a fused multiply-add is not exported: ONNX has no such operator")
    kind, factors = str(rule.dtype), float_product.list_factors(target.multiplier, rule)
    x = g.cast(a, kind)
    if target.bias is not None and target.place is Bias.FLOAT_BEFORE:
        x = g.node("Add", x, target.bias.astype(kind))
    for factor in factors[:2]:
        x = g.node("Mul", x, factor.astype(kind))
    if target.bias is not None and target.place is Bias.FLOAT_AFTER:
        x = g.node("Add", x, target.bias.astype(kind))
    for factor in factors[2:]:
        x = g.node("Div" if rule.order.divides else "Mul", x, factor.astype(kind))
    return round_float(g, x, rule.dtype, rule.rounding, target.zero, rule.zero_point)


def check_float(rule: FloatProduct) -> None:
    """Raises ValueError for floats that are not written down here."""
    if rule.dtype not in (Dtype.FLOAT32, Dtype.FLOAT64):
        raise ValueError(f"requantization in {rule.dtype} is not exported: float32 and float64 are")
    if rule.beyond is not Beyond.SATURATE:
        raise ValueError(f"levels beyond int32 are {rule.beyond}: exported they saturate, take a profile that says so")


def check_quantize(rule: QuantizeRule) -> None:
    """Raises ValueError for a quantize rule that is not written down here."""
    if rule.arithmetic not in (Dtype.FLOAT32, Dtype.INPUT):
        raise ValueError(f"quantization in {rule.arithmetic} is not exported: float32 is")
    if rule.zero_point is ZeroPoint.FUSED:
        raise ValueError("a zero point that is fused is not exported: one added before or after rounding is")
    if rule.beyond is not Beyond.SATURATE:
        raise ValueError(f"levels beyond int32 that are left to {rule.beyond} are not exported: saturated ones are")


def is_linear(rule: QuantizeRule) -> bool:
    """Whether QuantizeLinear of float32 gives a rule's codes of every number, of those that `check_quantize` lets."""
    return not rule.reciprocal and rule.rounding is Rounding.HALF_EVEN and rule.zero_point is ZeroPoint.AFTER


def quantize_level(g: Graph, x: str, scale: np.ndarray, zero: np.ndarray, rule: QuantizeRule) -> str:
    """float32 as codes that are not clamped yet, int64: a division or a product, rounded."""
    scale = np.asarray(scale, np.float32)
    x = g.node("Mul", x, np.float32(1) / scale) if rule.reciprocal else g.node("Div", x, scale)
    return round_float(g, x, Dtype.FLOAT32, rule.rounding, zero, rule.zero_point)


def round_float(g: Graph, x: str, dtype: Dtype, rounding: Rounding, zero: Any, order: ZeroPoint) -> str:
    """Floats rounded to int64, far beyond every code at most, with the zero point added before or after."""
    kind = str(dtype)
    if order is ZeroPoint.BEFORE:
        x, zero = g.node("Add", x, np.asarray(zero, kind)), 0
    x = g.node("Clip", x, *np.array([-LEVELS, LEVELS], kind))
    if rounding is Rounding.HALF_EVEN:
        level = g.cast(g.node("Round", x), "int64")
    elif rounding in (Rounding.HALF_AWAY, Rounding.TOWARD_ZERO):
        level = g.node("Mul", round_size(g, g.node("Abs", x), kind, rounding), g.cast(g.node("Sign", x), "int64"))
    elif rounding in (Rounding.HALF_UP, Rounding.FLOOR):
        level = round_size(g, x, kind, rounding)
    else:
        raise ValueError(f"floats that round {rounding} give no codes twice")
    return g.node("Add", level, np.asarray(zero, np.int64)) if np.any(zero) else level


def round_size(g: Graph, x: str, kind: str, rounding: Rounding) -> str:
    """The floor of floats as int64, or one more where the rest is a half or above and the rounding is by halves."""
    whole = g.node("Floor", x)
    level = g.cast(whole, "int64")
    if rounding in (Rounding.FLOOR, Rounding.TOWARD_ZERO):
        return level
    up = g.node("GreaterOrEqual", g.node("Sub", x, whole), np.array(0.5, kind))
    return g.node("Add", level, g.cast(up, "int64"))


def add_level(
    g: Graph,
    parts: list[tuple[str, int]],
    target: Target,
    profile: Profile,
) -> str:
    """Values less their zero points, int64, each with its bound, times their multipliers: the sum, rounded once, as
    codes that are not clamped yet."""
    rule, multipliers = profile.requantize, target.multiplier
    if isinstance(rule, FloatProduct):
        check_float(rule)
        kind = str(rule.dtype)
        pairs = zip(parts, multipliers, strict=True)
        products = [g.node("Mul", g.cast(x, kind), m.astype(kind)) for (x, _), m in pairs]
        total = g.node("Add", *products)
        return round_float(g, total, rule.dtype, rule.rounding, target.zero, rule.zero_point)
    assert target.shift is not None
    products = [g.node("Mul", x, m.astype(np.int64)) for (x, _), m in zip(parts, multipliers, strict=True)]
    bound = sum(limit * int(m.max()) for (_, limit), m in zip(parts, multipliers, strict=True))
    return shift_rounded(g, g.node("Add", *products), target.shift, profile.add.rounding, bound, target.zero)
