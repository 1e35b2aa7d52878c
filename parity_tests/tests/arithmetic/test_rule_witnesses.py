"""Numbers at which two rules of matmul, bias, requantize or add part: literals, both backends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parity_tests.subjects import rules
from qtx_ref.integer import fixed_point
from qtx_ref.random import stream
from qtx_ref.spec import (
    Beyond,
    Bias,
    Dtype,
    FloatProduct,
    Order,
    QuantSpec,
    Rounding,
    ZeroPoint,
)

I32, I64, F32, F64 = np.int32, np.int64, np.float32, np.float64
S8, U8, I8 = QuantSpec(symmetric=True), QuantSpec(), QuantSpec(symmetric=False, signed=True)
INT_MAX = 2**31 - 1
AWAY = replace(rules.ONE, rounding=Rounding.HALF_AWAY)
OPTIMISED = replace(rules.TWO, rounding=Rounding.HALF_UP)


# --- witnesses --------------------------------------------------------------------------------------------------------


def test_litert_and_tflite_part_at_a_tie(call) -> None:
    """-8 of 2^-5 2^-6 in units of 2^-7: M = 2^-4, -8 M = -1/2; half up is 0, half away -1."""
    a, scales = I32([-8]), [F32(2.0**-n) for n in (5, 6, 7)]
    for rule, code in ((rules.ONE, 19), (rules.NARROW, 19), (AWAY, 18), (OPTIMISED, 19), (rules.TWO, 18)):
        real = call("integer.fixed_point.real_multiplier", *scales, rule)
        assert call("integer.fixed_point.requantize", a, real, I32(19), I8, rule).tolist() == [code]


def test_15_bits_of_a_multiplier_lose_a_code(call) -> None:
    """738377 M = 7025.4: 15 bits of M make it 7025.54."""
    a, scales = I64([738377]), [F32(s) for s in (0.00018145863, 0.017178232, 0.0003276135)]
    spec = QuantSpec(16, symmetric=True)
    for rule, code in ((rules.NARROW, 7026), (rules.ONE, 7025), (AWAY, 7025), (replace(AWAY, bits=15), 7026)):
        real = call("integer.fixed_point.real_multiplier", *scales, rule)
        assert call("integer.fixed_point.requantize", a, real, I32(0), spec, rule).tolist() == [code]


def test_onnx_adds_the_zero_point_before_it_rounds(call) -> None:
    """1/2 + 3 rounds to even 4; 1/2 alone to 0, and 3."""
    a, half = I32([-1, 1, 3, 5]), F64(0.5)
    for rule, codes in (
        (rules.REFERENCE, [2, 4, 4, 6]),
        (replace(rules.REFERENCE, zero_point=ZeroPoint.AFTER), [3, 3, 5, 5]),
    ):
        assert call("integer.fixed_point.requantize", a, half, I32(3), U8, rule).tolist() == codes


def test_orders_of_factors_are_other_floats(call) -> None:
    """3.5 0.3 / 0.3 in float32: 3.5, 3.5000002 and 3.4999998, which half up makes 4, 4 and 3."""
    x, w, y = F32(3.5), F32(0.3), F32(0.3)
    one = F32(1)
    expected = {
        Order.RATIO: (x * w) / y,
        Order.RECIPROCAL: (x * w) * (one / y),
        Order.STEPS: [one / (one / x), one / (one / w), one / y],
    }
    for order, want in expected.items():
        got = call("integer.fixed_point.real_multiplier", x, w, y, replace(rules.ONEDNN, order=order))
        assert got.tolist() == np.asarray(want).tolist() and got.dtype == F32
    up = [replace(rules.ONEDNN, order=order, rounding=Rounding.HALF_UP) for order in expected]
    reals = [call("integer.fixed_point.real_multiplier", x, w, y, rule) for rule in up]
    products = [real.item() if real.ndim == 0 else (real[0] * real[1] * real[2]).item() for real in reals]
    assert products == [3.5, F32(3.5000002), F32(3.4999998)]
    codes = [call("integer.fixed_point.round_by", I32([1]), real, rule) for real, rule in zip(reals, up, strict=True)]
    assert [code.item() for code in codes] == [4, 4, 3]
    seven = F32(7e-39)  # 1 / (1 / s) of the smallest, whose reciprocal overflows, is 0: refused
    with pytest.raises(ValueError, match="factor 0.0 .*outside 0 to 2\\^64"), np.errstate(divide="ignore"):
        steps = call("integer.fixed_point.real_multiplier", F32(1e-39), seven, one, rules.ONEDNN)
        call("integer.fixed_point.requantize", I32([1]), steps, I32(0), S8, rules.ONEDNN)
    with pytest.raises(ValueError, match=r"factors of shape \(2,\): order steps has 3"):
        call("integer.fixed_point.requantize", I32([1]), F32([1, 1]), I32(0), S8, rules.ONEDNN)


def test_a_product_of_scales_in_float32_under_a_quotient_in_float64(call) -> None:
    """0.1 0.3 is 0.030000001 in float32 and 0.03000000156 in float64; over 0.7 either is another M."""
    x, w, y = F32(0.1), F32(0.3), F32(0.7)
    for scales, unit in ((Dtype.FLOAT32, F64(x * w)), (Dtype.FLOAT64, F64(x) * F64(w))):
        got = call("integer.fixed_point.real_multiplier", x, w, y, replace(OPTIMISED, scales=scales))
        assert got.dtype == F64 and got.item() == unit / F64(y)
    assert F64(x * w) != F64(x) * F64(w)


def test_steps_and_one_product_part(call) -> None:
    """A million accumulators under one M and under its three factors: other codes near ties, none by more than one."""
    rng = stream(0, "steps")
    a = rng.integers(-(2**20), 2**20, 2**20).astype(I32)
    scales = F32(0.0123), F32(0.0031), F32(0.37)
    spec, codes = QuantSpec(16, symmetric=True), []
    for order in (Order.RATIO, Order.STEPS):
        rule = replace(rules.ONEDNN, order=order)
        codes.append(fixed_point.requantize(a, fixed_point.real_multiplier(*scales, rule), I32(0), spec, rule))
    gap = np.abs(codes[0] - codes[1])
    assert gap.max() == 1 and 0 < gap.sum() < 2000


def test_a_bias_of_floats_before_and_after_scaling(call) -> None:
    """1596 units of 1/16 are 99.75. A bias of 4 units makes that 100, one of 3.5 units 99.97, before and after; as
    int32 codes both are 4."""
    a, unit, y = I32([[1596, 1596]]), F64(0.0625), F32(1)
    bias = F32([0.25, 0.21875])
    for order in Order:
        rule = FloatProduct(Dtype.FLOAT32, order, ZeroPoint.AFTER, Rounding.FLOOR, Beyond.SATURATE)
        real = call("integer.fixed_point.real_multiplier", F32(0.5), F32(0.125), y, rule)
        for place in (Bias.FLOAT_BEFORE, Bias.FLOAT_AFTER):
            units = call("integer.float_product.scale_bias", bias, unit, y, rule, place)
            want = [4, 3.5] if place is Bias.FLOAT_BEFORE else bias.tolist()
            assert units.tolist() == want
            got = call("integer.fixed_point.requantize", a, real, I32(0), S8, rule, units, place)
            assert got.tolist() == [[100, 99]]
        assert call("integer.fixed_point.requantize", a + I32([4, 4]), real, I32(0), S8, rule).tolist() == [[100, 100]]
    fused = FloatProduct(Dtype.FLOAT32, Order.RATIO, ZeroPoint.AFTER, Rounding.FLOOR, Beyond.SATURATE)
    third = F32(1 / 3)
    parts = call("integer.float_product.scale_bias", F32([0.33333334]), third, y, fused, Bias.FLOAT_BEFORE_FUSED)
    assert parts.tolist() == [[F32(0.33333334)], [3.0]]
    with pytest.raises(ValueError, match="bias is int32: it is added to the accumulator"):
        call("integer.float_product.scale_bias", bias, unit, y, rules.RINT, Bias.INT32)
    for rule, said in ((rules.RINT, "bias is int32"), (rules.ONE, "a requantization in integers")):
        with pytest.raises(ValueError, match=said):
            call("integer.fixed_point.requantize", a, F64(0.5), I32(0), S8, rule, bias)


def test_float_biases_after_one_factor_are_in_units_of_the_result(call) -> None:
    bias, y = F32([3]), F32(0.7)
    for order, want in ((Order.RATIO, bias / y), (Order.RECIPROCAL, bias * (F32(1) / y)), (Order.STEPS, bias)):
        rule = FloatProduct(Dtype.FLOAT32, order, ZeroPoint.AFTER, Rounding.HALF_EVEN, Beyond.SATURATE)
        got = call("integer.float_product.scale_bias", bias, F64(0.1), y, rule, Bias.FLOAT_AFTER)
        assert got.tolist() == want.tolist()


def test_narrow_floats(call) -> None:
    """257 is 256 in bfloat16; 2049 is 2048 in float16, which ends at 65504."""
    for dtype, a, want in ((Dtype.BFLOAT16, 257, 256), (Dtype.FLOAT16, 2049, 2048), (Dtype.FLOAT32, 2**24 + 1, 2**24)):
        rule = replace(rules.RINT, dtype=dtype)
        assert call("integer.fixed_point.round_by", I32([a]), F32(1), rule).tolist() == [want]
    with pytest.raises(ValueError, match="accumulator 65505 is outside .*float16 ends there"):
        call("integer.fixed_point.round_by", I32([65505]), F32(1), replace(rules.RINT, dtype=Dtype.FLOAT16))
    assert call("integer.fixed_point.round_by", I64([2**53 - 1]), F64(1), rules.REFERENCE).tolist() == [INT_MAX]
