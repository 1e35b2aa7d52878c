"""Rules of the integer arithmetic by name, as engines have them."""

from __future__ import annotations

from qtx_ref.spec import (
    ONE_ROUNDING,
    AddRule,
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
NARROW = Fixed(Dtype.FLOAT64, 15, HighProduct.EXACT, Rounding.HALF_UP, LeftShift.SATURATE)
TWO = Fixed(Dtype.FLOAT64, 31, HighProduct.HALF_UP, Rounding.HALF_AWAY, LeftShift.REPORT)  # gemmlowp
TRUNCATED = Fixed(Dtype.FLOAT32, 31, HighProduct.TRUNCATED, Rounding.HALF_UP, LeftShift.SATURATE)  # XNNPACK's rndnu
RINT = FloatProduct(Dtype.FLOAT32, Order.RATIO, ZeroPoint.AFTER, Rounding.HALF_EVEN)
AWAY = FloatProduct(Dtype.FLOAT32, Order.RATIO, ZeroPoint.AFTER, Rounding.HALF_AWAY)
REQUANTIZE = {"one": ONE, "narrow": NARROW, "two": TWO, "truncated": TRUNCATED, "rint": RINT, "away": AWAY}
ADD_UP, ADD_AWAY = AddRule(Rounding.HALF_UP), AddRule(Rounding.HALF_AWAY)
WRAPS = MatmulRule(Products.EXACT, 1, Overflow.WRAP)
