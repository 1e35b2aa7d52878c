"""Requantization and weighted sums as nodes, by the rules of `qtx_ref.integer.fixed_point` and `ops.weighted_sum`."""

from __future__ import annotations

from typing import Any

import numpy as np

from qtx_ref.integer.fixed_point import INT32_MAX, INT32_MIN
from qtx_ref.spec import (
    Dtype,
    Fixed,
    FloatProduct,
    HighProduct,
    LeftShift,
    Order,
    Profile,
    QuantizeRule,
    Rounding,
    ZeroPoint,
)

from .export_graph import Graph

LEVELS = 2.0**24  # beyond every code plus zero point, and exact in float32


def shift_rounded(g: Graph, x: str, shift: Any, rounding: Rounding, bound: int) -> str:
    """round(x / 2^shift) of int64. Raises ValueError for a rounding that is not written down here, or overflow."""
    shift = np.asarray(shift, np.int64)
    half = (np.int64(1) << shift) >> 1
    if rounding is Rounding.HALF_UP:
        return g.shift_right(x, shift, half, bound)
    if rounding is Rounding.FLOOR:
        return g.shift_right(x, shift, 0, bound)
    if rounding is not Rounding.HALF_AWAY:
        raise ValueError(f"a shift that rounds {rounding} is not exported: half_up, half_away and floor are")
    negative = g.cast(g.node("Less", x, np.int64(0)), "int64")  # ties of negative numbers go down
    if not shift.all():  # without a shift there is no tie
        negative = g.node("Mul", negative, (shift > 0).astype(np.int64))
    return g.shift_right(g.node("Sub", x, negative), shift, half, bound + 1)


def round_level(
    g: Graph,
    a: str,
    bound: int,
    multiplier: np.ndarray,
    shift: np.ndarray | None,
    rule: Fixed | FloatProduct,
    wide: bool,
) -> str:
    """Accumulators, int64 of which no magnitude is above `bound`, as whole multiples of a site's scale, int64.

    wide: they are 64-bit accumulators, not 32-bit ones that were cast. Raises ValueError where the rule is not written
    down here, or int64 could overflow.
    """
    if isinstance(rule, FloatProduct):
        return round_product(g, a, multiplier, rule)
    assert shift is not None
    m, shift = multiplier.astype(np.int64), shift.astype(np.int64)
    reach = int(m.max())
    if rule.product is HighProduct.EXACT:
        if wide and rule.bits == 15:
            m = np.where(m < 0x7FFF0000, (m + 2**15) >> 16, 0x7FFF)
            return shift_rounded(g, g.node("Mul", a, m), 15 - shift, rule.rounding, bound * int(m.max()))
        if bound * reach < 2**61:
            return shift_rounded(g, g.node("Mul", a, m), 31 - shift, rule.rounding, bound * reach)
        if not wide or rule.rounding is not Rounding.HALF_UP:
            raise ValueError(f"accumulators up to {bound} times {reach} may leave int64")
        if bound >= 2**47:
            raise ValueError(f"accumulators may reach {bound}, beyond 48 bits")
        high = g.shift_right(a, np.int64(16), 0, bound)
        low = g.node("Sub", a, g.node("Mul", high, np.int64(65536)))
        low = g.node("Add", g.node("Mul", low, m), np.int64(1) << (30 - shift))
        low = g.node("Div", low, np.int64(65536))  # not negative
        total = g.node("Add", g.node("Mul", high, m), low)
        return g.shift_right(total, 15 - shift, 0, ((bound >> 16) + 1) * reach + 2**46)
    left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
    if rule.product is HighProduct.TRUNCATED:
        right = np.maximum(-shift, 1)  # it always rounds
        left = shift + right
    if left.any():
        a, bound = shift_left(g, a, left, bound, rule.left)
    half = 2**30 if rule.product is HighProduct.HALF_UP else 0
    high = g.shift_right(g.node("Mul", a, m), np.int64(31), half, bound * reach)
    return shift_rounded(g, high, right, rule.rounding, bound + 1) if right.any() else high


def shift_left(g: Graph, a: str, left: np.ndarray, bound: int, rule: LeftShift) -> tuple[str, int]:
    """a * 2^left and its bound. Raises ValueError where int32 may not hold it, unless the rule saturates."""
    reach = bound << int(left.max())
    if reach >= 2**62 or (reach > INT32_MAX and rule is not LeftShift.SATURATE):
        raise ValueError(f"accumulators up to {bound}, shifted left by {left.max()} bits, may leave int32")
    a = g.node("Mul", a, np.int64(1) << left)
    if reach > INT32_MAX:
        a, reach = g.node("Clip", a, np.int64(INT32_MIN), np.int64(INT32_MAX)), 2**31
    return a, reach


def round_product(g: Graph, a: str, real: np.ndarray, rule: FloatProduct) -> str:
    """round(a * real) of int64, in the floats of the rule."""
    check_float(rule)
    kind = str(rule.dtype)
    return round_float(g, g.node("Mul", g.cast(a, kind), real.astype(kind)), rule.dtype, rule.rounding)


def check_float(rule: FloatProduct) -> None:
    """Raises ValueError for a float rule that is not written down here."""
    if rule.dtype not in (Dtype.FLOAT32, Dtype.FLOAT64):
        raise ValueError(f"requantization in {rule.dtype} is not exported: float32 and float64 are")
    if rule.order is Order.STEPS:
        raise ValueError("requantization by several factors in turn is not exported")
    if rule.zero_point is not ZeroPoint.AFTER:
        raise ValueError(f"a zero point added {rule.zero_point} rounding is not exported")


def is_linear(rule: QuantizeRule) -> bool:
    """Whether QuantizeLinear of float32 gives the rule's codes of every number."""
    exact = rule.arithmetic in (Dtype.FLOAT32, Dtype.INPUT) and not rule.reciprocal
    return exact and rule.rounding is Rounding.HALF_EVEN and rule.zero_point is ZeroPoint.AFTER


def quantize_level(g: Graph, x: str, scale: np.ndarray, zero: np.ndarray, rule: QuantizeRule) -> str:
    """float32 as whole multiples of a scale plus the zero point, int64, not clamped: a division or a product, rounded.

    Raises ValueError for a rule that is not written down here.
    """
    if rule.arithmetic not in (Dtype.FLOAT32, Dtype.INPUT):
        raise ValueError(f"quantization in {rule.arithmetic} is not exported: float32 is")
    scale = np.asarray(scale, np.float32)
    x = g.node("Mul", x, np.float32(1) / scale) if rule.reciprocal else g.node("Div", x, scale)
    if rule.zero_point is ZeroPoint.AFTER:
        return g.node("Add", round_float(g, x, Dtype.FLOAT32, rule.rounding), np.asarray(zero, np.int64))
    if rule.zero_point is not ZeroPoint.BEFORE:
        raise ValueError(f"a zero point that is {rule.zero_point} is not exported: before and after are")
    return round_float(g, g.node("Add", x, np.asarray(zero, np.float32)), Dtype.FLOAT32, rule.rounding)


def round_float(g: Graph, x: str, dtype: Dtype, rounding: Rounding) -> str:
    """Floats rounded to int64, far beyond every code at most."""
    kind = str(dtype)
    x = g.node("Clip", x, *np.array([-LEVELS, LEVELS], kind))
    if rounding is Rounding.HALF_EVEN:
        return g.cast(g.node("Round", x), "int64")
    if rounding is not Rounding.HALF_AWAY:
        raise ValueError(f"floats that round {rounding} are not exported: half_even and half_away are")
    size = g.node("Abs", x)
    whole = g.node("Floor", size)
    up = g.node("GreaterOrEqual", g.node("Sub", size, whole), np.array(0.5, kind))
    level = g.node("Add", g.cast(whole, "int64"), g.cast(up, "int64"))
    return g.node("Mul", level, g.cast(g.node("Sign", x), "int64"))


def add_level(
    g: Graph, parts: list[tuple[str, int]], multipliers: np.ndarray, shift: np.ndarray | None, profile: Profile
) -> str:
    """Values less their zero points, int64, each with its bound, times their multipliers: the sum, rounded once."""
    rule = profile.requantize
    if isinstance(rule, FloatProduct):
        check_float(rule)
        kind = str(rule.dtype)
        products = [
            g.node("Mul", g.cast(x, kind), m.astype(kind)) for (x, _), m in zip(parts, multipliers, strict=True)
        ]
        return round_float(g, g.node("Add", *products), rule.dtype, rule.rounding)
    assert shift is not None
    products = [g.node("Mul", x, m.astype(np.int64)) for (x, _), m in zip(parts, multipliers, strict=True)]
    bound = sum(limit * int(m.max()) for (_, limit), m in zip(parts, multipliers, strict=True))
    return shift_rounded(g, g.node("Add", *products), shift, profile.add.rounding, bound)
