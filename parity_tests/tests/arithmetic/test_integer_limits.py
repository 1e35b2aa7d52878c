"""Integers at the ends of int32 and int64, and shapes that broadcast where they must not, in both backends."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from parity_tests.subjects import rules
from qtx_ref.random import stream
from qtx_ref.spec import QTX, Granularity, QuantSpec, Rounding

I32, I64, F32, F64 = np.int32, np.int64, np.float32, np.float64
S8, U8, S16 = QuantSpec(symmetric=True), QuantSpec(), QuantSpec(bits=16, symmetric=True)
LOW, HIGH = -(2**63), 2**63 - 1
ONE, TWO = np.int8([[1]]), np.int8([[2]])  # their product is 2


# --- matmul -----------------------------------------------------------------------------------------------------------


def product(call, bias, bits, rule=QTX.matmul, a=ONE, b=TWO):
    specs = (S8, S8) if a.dtype == np.int8 else (S16, S16)
    return call("integer.products.matmul", a, b, *specs, None, None, bias, bits, rule)


@pytest.mark.parametrize("bias", [LOW, LOW + 1, -(2**40), 2**31 - 2, 2**62, HIGH - 2, HIGH])
def test_a_bias_at_the_end_of_int64(call, bias):
    """2 + bias, or the error that the accumulator's width has: never 2."""
    exact = bias + 2
    for bits, limit in ((32, 2**31), (64, 2**63)):
        if -limit <= exact < limit:
            assert product(call, I64([bias]), bits).tolist() == [[exact]]
        else:
            with pytest.raises(ValueError, match=f"accumulators .*{exact}.* beyond int"):
                product(call, I64([bias]), bits)
        wrapped = (exact + limit) % (2 * limit) - limit
        assert product(call, I64([bias]), bits, rules.WRAPS).tolist() == [[wrapped]]


def test_a_sum_below_int64_is_refused(call):
    a, b = np.int16([[-(2**15)]]), np.int16([[2**15 - 1]])  # -2^30 + 2^15
    assert product(call, I64([LOW + 2**30]), 64, QTX.matmul, a, b).tolist() == [[LOW + 2**15]]
    with pytest.raises(ValueError, match=f"accumulators reach {LOW - 2**30 + 2**15 + 5}, beyond int64"):
        product(call, I64([LOW + 5]), 64, QTX.matmul, a, b)


def test_a_bias_is_whole_numbers_that_int64_holds(call):
    with pytest.raises(ValueError, match="bias has dtype float64: codes are integers"):
        product(call, F64([2.7]), 32)
    with pytest.raises(ValueError, match=f"bias {2**63} is outside {LOW} to {HIGH}"):
        product(call, np.uint64([2**63]), 64)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_codes_of_unsigned_dtypes(call, dtype):
    good, bad = np.array([[255]], dtype), np.array([[np.iinfo(dtype).max]], dtype)
    assert call("integer.products.matmul", good, good, U8, U8).tolist() == [[255 * 255]]
    with pytest.raises(ValueError, match=f"left operand.* {np.iinfo(dtype).max}"):
        call("integer.products.matmul", bad, good, S8, U8)


# --- fixed point ------------------------------------------------------------------------------------------------------

FIXED = ["one", "narrow", "two", "truncated"]


@pytest.mark.parametrize(
    "name, a",
    [(name, a) for name in FIXED for a in (-(2**47) - 1, 2**47, LOW, HIGH, -(2**62))]
    + [(name, a) for name in FIXED[2:] for a in (2**34, -(2**31) - 1, 2**31)],
)
def test_an_accumulator_beyond_its_width_is_refused(call, name, a):
    """2^34 shifted left by 30 is 2^64, which int64 takes for 0."""
    rule, exact = rules.REQUANTIZE[name], name in FIXED[:2]
    function, shift = ("multiply_exact", 7) if exact else ("multiply_high", 30)  # one rounding takes 48 bits
    with pytest.raises(ValueError, match=f"accumulator {a} is outside"):
        call(f"integer.fixed_point.{function}", I64([a]), I32(2**30), I32(shift), rule)


@pytest.mark.parametrize("a", [-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1])
@pytest.mark.parametrize("exponent", [0, 1, 30, 31])
def test_the_ends_of_int32_round_exactly(call, a, exponent):
    exact = Fraction(a, 2**exponent)
    away = math.floor(abs(exact) + Fraction(1, 2)) * (1 if a >= 0 else -1)
    assert call("integer.fixed_point.shift_right", I32([a]), I32(exponent), Rounding.HALF_AWAY).tolist() == [away]
    assert call("integer.fixed_point.rounding_shift_right", I32([a]), I32(exponent)).tolist() == [
        math.floor(exact + Fraction(1, 2))
    ]
    for b in (-(2**31), 2**31 - 1):
        double = Fraction(2 * a * b, 2**32)
        up, down = min(math.floor(double + Fraction(1, 2)), 2**31 - 1), min(math.floor(double), 2**31 - 1)
        assert call("integer.fixed_point.rounding_doubling_high_multiply", I32([a]), I32([b])).tolist() == [up]
        assert call("integer.fixed_point.doubling_high_multiply", I32([a]), I32([b])).tolist() == [down]


def test_values_that_are_no_integers_or_wrap_are_refused(call):
    for value in (F32([np.nan]), F64([1e300]), F32([1.5])):
        with pytest.raises(ValueError, match="codes are integers"):
            call("integer.fixed_point.rounding_shift_right", value, I32(1))
        with pytest.raises(ValueError, match="codes are integers"):
            call("integer.fixed_point.round_by", value, F64(0.5), rules.RINT)
    with pytest.raises(ValueError, match=f"value {2**64 - 1} is outside"):
        call("integer.fixed_point.shift_right", np.uint64([2**64 - 1]), I32(1), Rounding.HALF_AWAY)
    with pytest.raises(ValueError, match="zero point .* is outside 0 to 255"):
        call("integer.fixed_point.requantize", I32([1]), F64(0.5), I64(HIGH), U8)


# --- sums, softmax, norms, polynomials --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [LOW, LOW + 1, -(2**62) - 1, -7, 0, 7, 2**62, HIGH])
@pytest.mark.parametrize("d", [1, 2, 3, 8, 2**62, HIGH])
def test_half_up_holds_over_all_of_int64(call, n, d):
    exact = math.floor(Fraction(n, d) + Fraction(1, 2))
    assert call("integer.ops.half_up", I64([n]), I64([d])).tolist() == [exact]


def test_a_weighted_sum_is_exact_or_refused(call):
    rule, top = rules.ADD_UP, 2**30
    for a in (-(2**31), 2**31 - 1):
        for each in (rule, rules.ADD_AWAY):
            part, m = [I32([a])] * 2, [I64(top)] * 2
            total = call("integer.ops.weighted_sum", part, m, I64(31), each)
            assert total.tolist() == [a]  # 2 a 2^30 / 2^31
    for part in (I64([2**31]), I64([LOW])):
        with pytest.raises(ValueError, match="part .* is outside"):
            call("integer.ops.weighted_sum", [part, part], [I64(top)] * 2, I64(31), rule)
    with pytest.raises(ValueError, match="multiplier .* is outside"):
        call("integer.ops.weighted_sum", [I32([1])], [I64(top + 1)], I64(31), rule)
    with pytest.raises(ValueError, match="4 parts"):
        call("integer.ops.weighted_sum", [I32([1])] * 4, [I64(1)] * 4, I64(0), rule)


def test_a_mean_whose_sum_leaves_int64_is_refused(call):
    x = np.full((1, 4, 1), 2**61 - 1, I64)
    assert call("integer.ops.mean", x, None).tolist() == [[[2**61 - 1]]]
    for value in (2**61, HIGH, LOW):
        with pytest.raises(ValueError, match=f"value {value} is outside .* the sum of 4 rows would leave int64"):
            call("integer.ops.mean", np.full((1, 4, 1), value, I64), None)


def test_softmax_refuses_what_its_integers_cannot_hold(call):
    mask, table = np.ones((1, 1, 1, 2), bool), I32([2**24, 0])
    assert call("integer.ops.softmax", I32([[[[5, -(2**30)]]]]), mask, table).tolist() == [[[[2**28, 0]]]]
    for code in (2**30, -(2**31), HIGH, LOW):
        with pytest.raises(ValueError, match="score .* is outside"):
            call("integer.ops.softmax", I64([[[[5, code]]]]), mask, table)
    with pytest.raises(ValueError, match="sink factor .* is outside"):
        call("integer.ops.softmax", I32([[[[5, 5]]]]), mask, table, (I32([5]), I64([2**40])))
    with pytest.raises(ValueError, match="sink .* is outside"):
        call("integer.ops.softmax", I32([[[[5, 5]]]]), mask, table, (I32([-(2**31)]), I64([2**20])))


def test_the_clip_refuses_what_its_integers_cannot_hold(call):
    one, zeta, gamma = I64([2**28]), I64(64 << 24), I64(-(64 << 28))
    assert call("integer.ops.clip_stretch", one, zeta, gamma).tolist() == [2**28]
    assert call("integer.ops.clip_stretch", one - one, zeta, gamma).tolist() == [0]
    for arguments in ((one + 1, zeta, gamma), (-one, zeta, gamma), (one, zeta + 1, gamma), (one, zeta, gamma - 1)):
        with pytest.raises(ValueError, match="is outside"):
            call("integer.ops.clip_stretch", *arguments)
    with pytest.raises(ValueError, match="alpha .* is outside"):
        call("integer.ops.row_gamma", I64(LOW), np.ones((1, 2), bool))


def test_a_norm_of_codes_at_their_ends(call):
    """Two codes far apart are -1 and 1 in units of their deviation, to 16 bits."""
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        limits = np.iinfo(dtype)
        assert call("integer.ops.normalize", np.array([[limits.min, limits.max]], dtype), I64(0)).tolist() == [
            [-(2**16), 2**16]
        ]
    with pytest.raises(ValueError, match="2 codes that span .* would leave int64"):
        call("integer.ops.normalize", I64([[LOW, HIGH]]), I64(0))
    with pytest.raises(ValueError, match="eps .* is outside"):
        call("integer.ops.normalize", np.int8([[0, 1]]), I64(HIGH))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_polynomials_are_flat_at_the_ends(call, dtype):
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    if dtype is np.int8:  # near 0 in Q16
        assert abs(call("integer.ops.sigmoid_polynomial", ends) - 2**27).max() < 2**18
        return
    assert call("integer.ops.sigmoid_polynomial", ends).tolist() == [0, 2**28]
    assert call("integer.ops.tanh_polynomial", ends).tolist() == [-(2**28), 2**28]
    assert call("integer.ops.gelu_polynomial", ends).tolist() == [0, 2**30]
    with pytest.raises(ValueError, match="argument .* is outside"):
        call("integer.ops.exp_polynomial", ends)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, o", [(4, 4), (1, 3), (3, 1), (5, 3)])
@pytest.mark.parametrize("rule", rules.REQUANTIZE.values(), ids=rules.REQUANTIZE)
def test_weight_scales_belong_to_columns(call, n, o, rule):
    """With scales (O, 1) as `affine.ranges` gives them, N = O gave wrong codes and N = 1 a result of (O, O)."""
    rng = stream(3, "columns", n, o)
    weight = rng.normal(size=(o, 6)).astype(F32) * np.arange(1, o + 1, dtype=F32)[:, None] ** 3
    by_row = QuantSpec(symmetric=True, granularity=Granularity.CHANNEL)
    scale, zero = call("quant.affine.scale_zero", *call("quant.affine.ranges", weight, by_row, True), by_row)
    assert scale.shape == (o, 1)
    code = call("quant.affine.quantize", weight, scale, zero, by_row).astype(np.int8)
    x, bias = rng.integers(-128, 128, (n, 6)).astype(np.int8), rng.integers(-999, 999, o).astype(I32)
    acc = call("integer.products.linear", x, code, S8, by_row, None, zero, bias)
    assert acc.tolist() == (x.astype(int) @ code.T.astype(int) + bias).tolist()
    real = call("integer.fixed_point.real_multiplier", F32(0.01), scale, F32(0.5), rule)
    assert real.shape in ((o,), ())
    got = call("integer.fixed_point.requantize", acc, real, I32(0), S8, rule)
    each = [
        call(
            "integer.fixed_point.requantize",
            acc[:, j],
            call("integer.fixed_point.real_multiplier", F32(0.01), scale[j, 0], F32(0.5), rule),
            I32(0),
            S8,
            rule,
        )
        for j in range(o)
    ]
    assert got.tolist() == np.stack(each, 1).tolist()
    exact = acc * (0.01 * scale[:, 0].astype(F64) / 0.5)
    assert np.abs(got - np.clip(exact, -128, 127)).max() <= 1.001
    plain = call("integer.fixed_point.real_multiplier", F32(0.01), scale[:, 0], F32(0.5), rule)
    assert real.tolist() == plain.tolist()


def test_a_scale_per_row_and_one_per_column_meet(call):
    real = call("integer.fixed_point.real_multiplier", F32([[1], [2]]), F32([[1], [4], [16]]), F32([[[0.5]]]))
    assert real.tolist() == [[2, 8, 32], [4, 16, 64]]
    with pytest.raises(ValueError, match=r"weight scales of shape \(2, 3, 1\)"):
        call("integer.fixed_point.real_multiplier", F32(1), np.ones((2, 3, 1), F32), F32(1))
    with pytest.raises(ValueError, match=r"weight scales of shape \(1, 3\)"):
        call("integer.fixed_point.real_multiplier", F32(1), np.ones((1, 3), F32), F32(1))


@pytest.mark.parametrize("rule", rules.REQUANTIZE.values(), ids=rules.REQUANTIZE)
def test_requantize_keeps_the_shape_of_its_accumulator(call, rule):
    acc = np.ones((1, 3), I32)
    for real in (np.ones((3, 1)), np.ones((1, 1, 3)), np.ones(2)):
        with pytest.raises(ValueError, match=r"multiplier of shape .* does not fit shape \(1, 3\)"):
            call("integer.fixed_point.requantize", acc, real, I32(0), S8, rule)
    with pytest.raises(ValueError, match=r"zero point of shape \(3, 1\) does not fit shape \(1, 3\)"):
        call("integer.fixed_point.requantize", acc, F64(0.5), np.zeros((3, 1), I32), S8, rule)


@pytest.mark.parametrize("n", [1, 3])
def test_linear_refuses_what_belongs_to_another_axis(call, n):
    x, w = np.ones((n, 2), np.uint8), np.ones((3, 2), np.uint8)
    plain = call("integer.products.linear", x, w, U8, U8, np.full((n, 1), 2, I32), I32([[0], [1], [2]]), I32([1, 2, 3]))
    assert plain.tolist() == [[-1, 2, 5]] * n  # 2 (1 - 2) (1 - z) + bias
    for bias in (np.ones((3, 1), I32), np.ones(1, I32), I32(1), np.ones((2, 1, 3), I32)):
        with pytest.raises(ValueError, match="bias of shape"):
            call("integer.products.linear", x, w, U8, U8, None, None, bias)
    for zero in (np.ones((1, 3), I32), np.ones(2, I32), np.ones((2, 3, 1), I32)):
        with pytest.raises(ValueError, match="zero points? of shape"):
            call("integer.products.linear", x, w, U8, U8, None, zero)
    for zero in (np.ones((1, 2), I32), np.ones((2, 1), I32), np.ones((2, n, 1), I32)):
        with pytest.raises(ValueError, match="zero points? of shape"):
            call("integer.products.linear", x, w, U8, U8, zero)


def test_a_weighted_sum_keeps_the_shape_of_its_parts(call):
    a, rule = np.ones((1, 3), I32), rules.ADD_UP
    assert call("integer.ops.weighted_sum", [a, a[0]], [I64([2, 4, 6]), I64(2)], I64([1]), rule).tolist() == [[2, 3, 4]]
    for m, shift in ((np.ones((3, 1), I64), I64(1)), (I64(1), np.ones((3, 1), I64))):
        with pytest.raises(ValueError, match=r"\(3, 1\) does not fit shape \(1, 3\)"):
            call("integer.ops.weighted_sum", [a, a], [m, I64(1)], shift, rule)


def test_result_scales_have_their_shape(call):
    """(O, 1) would give a multiplier (O, 1), which goes along the rows where N = O."""
    four = np.full(4, 0.5, np.float32)
    with pytest.raises(ValueError, match="result scales of shape"):
        call("integer.fixed_point.real_multiplier", np.float32(0.01), np.float32(1), four[:, None])
    assert call("integer.fixed_point.real_multiplier", four[:, None], np.float32(1), four).shape == (4, 4)


def test_ranges_of_whole_numbers(call):
    low, high = call("quant.affine.min_max", np.int32([5, -3]), (0,))
    assert (low.tolist(), high.tolist()) == ([-3], [5])
