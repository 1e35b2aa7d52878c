"""Norm, softmax and polynomials of `qtx_ref.integer.ops` as nodes: int64, to the bit.

Bounds go along: ValueError where int64 could overflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qtx_ref.integer import ops
from qtx_ref.integer.ops import PROBABILITY_BITS
from qtx_ref.spec import ONE_ROUNDING, Rounding

from .export_graph import Graph
from .export_requantize import Target, round_level, shift_rounded

LAST = np.array([-1], np.int64)
Constants = Mapping[str, np.ndarray]


def normalize(g: Graph, code: str, width: int, bound: int, eps: np.ndarray) -> tuple[str, int]:
    """`ops.normalize` of codes less their zero point, no magnitude above `bound`: Q16, and its bound."""
    if (width * 2 * bound) ** 2 + 2**60 >= 2**62:
        raise ValueError(f"the variance of {width} values up to {bound} would leave int64")
    total = g.node("ReduceSum", code, LAST, keepdims=1)
    squares = g.node("ReduceSum", g.node("Mul", code, code), LAST, keepdims=1)
    spread = g.node("Sub", g.node("Mul", squares, np.int64(width)), g.node("Mul", total, total))
    w = g.node("Max", g.node("Add", spread, eps.astype(np.int64)), np.int64(1))
    factor = g.constant(np.int64(1 << ops.NORM_BITS))
    for step in (16, 8, 4, 2, 1):  # up by an even number of bits into [2^60, 2^62)
        room = g.node("Less", w, np.int64(1 << (62 - 2 * step)))
        w = g.node("Mul", w, g.node("Where", room, np.int64(1 << (2 * step)), np.int64(1)))
        factor = g.node("Mul", factor, g.node("Where", room, np.int64(1 << step), np.int64(1)))
    n = g.node("Mul", g.node("Sub", g.node("Mul", code, np.int64(width)), total), factor)
    reach = (int(width**0.5) + 1) << ops.NORM_BITS
    return g.half_up(n, square_root(g, w), reach), reach


def square_root(g: Graph, w: str) -> str:
    """`ops.square_root`: floor(sqrt(w)), w in [2^60, 2^62), by Newton's method from above."""
    root = g.constant(np.int64(2**31))
    for _ in range(6):
        root = g.node("Div", g.node("Add", root, g.node("Div", w, root)), np.int64(2))
    above = g.node("Greater", g.node("Mul", root, root), w)
    return g.node("Sub", root, g.cast(above, "int64"))


# --- softmax ----------------------------------------------------------------------------------------------------------


def softmax(g: Graph, site: str, code: str, span: int, mask: str | None, constants: Constants) -> str:
    """`ops.softmax`: Q28 from score codes, int64, no two further apart than `span`."""
    seen = code if mask is None else g.node("Where", mask, code, np.int64(-(2**31)))
    top = g.node("ReduceMax", seen, LAST, keepdims=1)
    sink = constants.get(f"{site}.sink")
    place = np.zeros(()) if sink is None else sink.astype(np.int64).reshape(-1, 1, 1)
    if sink is not None:
        top = g.node("Max", top, place)
    distance = g.node("Sub", top, code)
    if mask is not None:
        distance = g.node("Where", mask, distance, np.int64(0))
    e = exponential(g, site, distance, span, constants)
    if mask is not None:
        e = g.node("Where", mask, e, np.int64(0))
    total = g.node("ReduceSum", e, LAST, keepdims=1)
    if sink is not None:
        factor = constants[f"{site}.sink_factor"].astype(np.int64).reshape(-1, 1, 1)
        part = g.node("Mul", exponential(g, site, g.node("Sub", top, place), span, constants), factor)
        part = shift_rounded(g, part, ops.SINK_BITS, Rounding.HALF_UP, int(factor.max()) << ops.EXP_BITS)
        total = g.node("Add", total, part)
    if mask is not None or sink is not None:
        total = g.node("Max", total, np.int64(1))
    return share(g, e, total, PROBABILITY_BITS)


def exponential(g: Graph, site: str, distance: str, span: int, constants: Constants) -> str:
    """exp of minus a distance between codes, Q24: from a table, whose last entry stands for all beyond, or by the
    polynomial."""
    table = constants.get(f"{site}.table")
    if table is None:
        argument = to_argument(g, site, distance, span, constants)
        return exp_polynomial(g, argument)
    near = g.node("Min", distance, np.int64(table.size - 1))
    return g.node("Gather", g.constant(table.astype(np.int64), f"{site}.table"), near, axis=0)


def share(g: Graph, part: str, total: str, bits: int) -> str:
    """part 2^bits / total, half up; nothing is negative."""
    twice = g.node("Mul", part, np.int64(2 << bits))
    return g.node("Div", g.node("Add", twice, total), g.node("Add", total, total))


def row_gamma(g: Graph, alpha: np.ndarray, keys: str) -> str:
    """`ops.row_gamma`: minus alpha over the number of keys."""
    top = g.node("Add", np.int64(2) * alpha.astype(np.int64), keys)
    return g.node("Neg", g.node("Div", top, g.node("Add", keys, keys)))


def clip_stretch(g: Graph, p: str, zeta: np.ndarray, gamma: str, reach: int) -> str:
    """`ops.clip_stretch`; no magnitude of gamma above `reach`."""
    one = 1 << PROBABILITY_BITS
    high = g.node("Mul", p, zeta.astype(np.int64))
    high = shift_rounded(g, high, ops.ZETA_BITS, Rounding.HALF_UP, int(zeta.max()) << PROBABILITY_BITS)
    low = g.node("Mul", g.node("Sub", np.int64(one), p), gamma)
    low = shift_rounded(g, low, PROBABILITY_BITS, Rounding.HALF_UP, reach << PROBABILITY_BITS)
    return g.node("Clip", g.node("Add", high, low), np.int64(0), np.int64(one))


# --- I-BERT's polynomials ---------------------------------------------------------------------------------------------


def to_argument(g: Graph, site: str, code: str, bound: int, constants: Constants) -> str:
    """Codes less their zero point, int64, as the Q16 argument of a polynomial."""
    multiplier, shift = (constants[f"{site}.input_{key}"] for key in ("multiplier", "shift"))
    return round_level(g, code, bound, Target(multiplier, shift, np.int64(0)), ONE_ROUNDING, False)


def exp_polynomial(g: Graph, x: str) -> str:
    """`ops.exp_polynomial`: x >= 0, Q16 to Q24."""
    z = g.node("Div", x, np.int64(ops.LN2))
    r = g.node("Sub", x, g.node("Mul", z, np.int64(ops.LN2)))
    base = g.node("Sub", np.int64(ops.EXP_B), r)
    value = g.node("Mul", g.node("Mul", base, base), np.int64(ops.EXP_A))
    value = shift_rounded(g, value, ops.INPUT_BITS, Rounding.HALF_UP, ops.EXP_B**2 * ops.EXP_A)
    value = g.node("Add", value, np.int64(ops.EXP_C))
    shift = g.cast(g.node("Add", g.node("Min", z, np.int64(50)), np.int64(32 - ops.EXP_BITS)), "uint64")
    half = g.node("BitShift", np.uint64(1), g.node("Sub", shift, np.uint64(1)), direction="LEFT")
    return g.cast(g.node("BitShift", g.node("Add", g.cast(value, "uint64"), half), shift, direction="RIGHT"), "int64")


def gelu_polynomial(g: Graph, x: str) -> str:
    """`ops.gelu_polynomial`: Q16 to Q20."""
    x = limit(g, x)
    t = g.node("Mul", g.node("Abs", x), np.int64(ops.HALF_ROOT))
    t = shift_rounded(g, t, ops.INPUT_BITS, Rounding.HALF_UP, ops.ARGUMENT * ops.HALF_ROOT)
    base = g.node("Sub", g.node("Min", t, np.int64(ops.ERF_B)), np.int64(ops.ERF_B))
    curve = g.node("Mul", g.node("Mul", base, base), np.int64(ops.ERF_A))
    curve = shift_rounded(g, curve, ops.INPUT_BITS, Rounding.HALF_UP, ops.ERF_B**2 * ops.ERF_A)
    erf = g.node("Sub", np.int64(1 << 32), curve)
    erf = g.node("Where", g.node("Less", x, np.int64(0)), g.node("Neg", erf), erf)
    erf = shift_rounded(g, erf, 32 - ops.INPUT_BITS, Rounding.HALF_UP, 1 << 33)
    y = g.node("Mul", x, g.node("Add", erf, np.int64(1 << ops.INPUT_BITS)))
    return shift_rounded(g, y, 2 * ops.INPUT_BITS + 1 - ops.GELU_BITS, Rounding.HALF_UP, ops.ARGUMENT << 18)


def sigmoid_polynomial(g: Graph, x: str) -> str:
    """`ops.sigmoid_polynomial`: Q16 to Q28."""
    x = limit(g, x)
    e = exp_polynomial(g, g.node("Abs", x))
    one = np.int64(1 << ops.EXP_BITS)
    top = g.node("Where", g.node("Less", x, np.int64(0)), e, one)
    return share(g, top, g.node("Add", e, one), PROBABILITY_BITS)


def tanh_polynomial(g: Graph, x: str) -> str:
    """`ops.tanh_polynomial`: Q16 to Q28."""
    y = sigmoid_polynomial(g, g.node("Mul", limit(g, x), np.int64(2)))
    return g.node("Sub", g.node("Mul", y, np.int64(2)), np.int64(1 << PROBABILITY_BITS))


def limit(g: Graph, x: str) -> str:
    """An argument where the polynomials are not flat yet."""
    return g.node("Clip", x, np.int64(-ops.ARGUMENT), np.int64(ops.ARGUMENT))


POLYNOMIALS: dict[str, tuple[Any, int, int]] = {  # with the bits of the result, and its bound
    "gelu": (gelu_polynomial, ops.GELU_BITS, 1 << 30),
    "sigmoid": (sigmoid_polynomial, PROBABILITY_BITS, 1 << PROBABILITY_BITS),
    "tanh": (tanh_polynomial, PROBABILITY_BITS, 1 << PROBABILITY_BITS),
}
