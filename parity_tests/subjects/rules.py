"""Rules of the integer arithmetic by name, as engines have them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from qtx_ref.spec import (
    ONE_ROUNDING,
    AddRule,
    Beyond,
    Dtype,
    Fixed,
    FloatProduct,
    HighProduct,
    LeftShift,
    MatmulRule,
    Order,
    Overflow,
    Products,
    Rounding,
    ZeroPoint,
)

ONE = ONE_ROUNDING
NARROW = replace(ONE, bits=15)
TWO = replace(ONE, product=HighProduct.HALF_UP, rounding=Rounding.HALF_AWAY, left=LeftShift.REPORT)  # gemmlowp
# XNNPACK's rndnu
TRUNCATED = Fixed(Dtype.FLOAT32, 31, HighProduct.TRUNCATED, Rounding.HALF_UP, LeftShift.SATURATE, Dtype.FLOAT32)
RINT = FloatProduct(Dtype.FLOAT32, Order.RATIO, ZeroPoint.AFTER, Rounding.HALF_EVEN, Beyond.SATURATE)
AWAY = FloatProduct(Dtype.FLOAT32, Order.RATIO, ZeroPoint.AFTER, Rounding.HALF_AWAY, Beyond.SATURATE)
REFERENCE = FloatProduct(Dtype.FLOAT64, Order.RATIO, ZeroPoint.BEFORE, Rounding.HALF_EVEN, Beyond.SATURATE)
ONEDNN = FloatProduct(Dtype.FLOAT32, Order.STEPS, ZeroPoint.BEFORE, Rounding.HALF_EVEN, Beyond.SATURATE)
REQUANTIZE = {"one": ONE, "narrow": NARROW, "two": TWO, "truncated": TRUNCATED, "rint": RINT, "away": AWAY}
ADD_UP, ADD_AWAY = AddRule(Rounding.HALF_UP), AddRule(Rounding.HALF_AWAY)
ROUNDINGS = tuple(rounding for rounding in Rounding if rounding is not Rounding.STOCHASTIC)
WRAPS = MatmulRule(Products.EXACT, 1, Overflow.WRAP)
PAIRS16 = MatmulRule(Products.PAIRS16, 1, Overflow.REPORT)


def list_fixed() -> list[Fixed]:
    """Every rule of requantization in integers."""
    widths = ((31, HighProduct.EXACT), (15, HighProduct.EXACT), (31, HighProduct.HALF_UP), (31, HighProduct.TRUNCATED))
    return [
        Fixed(dtype, bits, kind, rounding, left, dtype)
        for dtype, (bits, kind), rounding, left in product((Dtype.FLOAT64, Dtype.FLOAT32), widths, ROUNDINGS, LeftShift)
    ]


def list_floats() -> list[FloatProduct]:
    """Every rule of requantization in floats."""
    dtypes = (Dtype.FLOAT32, Dtype.FLOAT64, Dtype.BFLOAT16, Dtype.FLOAT16)
    places = (ZeroPoint.AFTER, ZeroPoint.BEFORE)
    return [FloatProduct(*one) for one in product(dtypes, Order, places, ROUNDINGS, Beyond)]


def list_matmuls() -> list[MatmulRule]:
    """Every rule of a matmul, runs of up to 4 pairs."""
    runs = [(kind, 1) for kind in Products if kind is not Products.RUNS16]
    runs += [(Products.RUNS16, run) for run in (2, 3, 4)]
    return [MatmulRule(kind, run, overflow) for (kind, run), overflow in product(runs, Overflow)]
