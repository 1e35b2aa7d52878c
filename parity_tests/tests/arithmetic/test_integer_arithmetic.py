"""Hand-worked literals and published vectors for fixed_point and integer, in both backends."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from parity_tests.subjects import rules
from qtx_ref.random import stream
from qtx_ref.spec import QuantSpec, Rounding

I32, F32 = np.int32, np.float32
S8, U8 = QuantSpec(symmetric=True), QuantSpec()
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def test_multipliers(call):
    """gemmlowp and TFLite: M = 2^shift * multiplier / 2^31."""
    real = np.float64([0.0, 0.25, 0.5, 1, 1 - 2.0**-33, 0.75, 2.0**-33, 100])
    multiplier, shift = call("integer.fixed_point.quantize_multiplier", real)
    assert multiplier.tolist() == [0, 2**30, 2**30, 2**30, 2**30, 3 * 2**29, 0, 1677721600]
    assert shift.tolist() == [0, -1, 0, 1, 1, 0, 0, 7]
    for wrong in (-1.0, np.nan, 2.0**30):
        with pytest.raises(ValueError, match="outside 0 to 2"):
            call("integer.fixed_point.quantize_multiplier", np.float64([wrong]))


def test_high_multiplies(call):
    """SaturatingRoundingDoublingHighMul: ties go up, INT_MIN squared saturates."""
    a = I32([INT_MIN, INT_MIN, 1, -1, 3, -3, -(2**30), INT_MAX])
    b = I32([INT_MIN, INT_MAX, 2**30, 2**30, 2**30, 2**30, 3, INT_MAX])
    rounding = call("integer.fixed_point.rounding_doubling_high_multiply", a, b).tolist()
    assert rounding == [INT_MAX, -INT_MAX, 1, 0, 2, -1, -1, INT_MAX - 1]
    assert call("integer.fixed_point.doubling_high_multiply", a, b).tolist() == [
        INT_MAX,
        -INT_MAX,
        0,
        -1,
        1,
        -2,
        -2,
        INT_MAX - 1,
    ]


def test_rounding_shifts(call):
    """RoundingDivideByPOT, gemmlowp's test_fixedpoint: ties away from zero; the plain shift: ties up."""
    x, e = I32([0, 1, 2, 3, -1, -2, -3, 5, -5, 6, -6, INT_MAX, INT_MIN]), I32([1] * 7 + [2] * 4 + [31, 31])
    assert call("integer.fixed_point.shift_right", x, e, Rounding.HALF_AWAY).tolist() == [
        0,
        1,
        1,
        2,
        -1,
        -1,
        -2,
        1,
        -1,
        2,
        -2,
        1,
        -1,
    ]
    assert call("integer.fixed_point.rounding_shift_right", x, e).tolist() == [
        0,
        1,
        1,
        2,
        0,
        -1,
        -1,
        1,
        -1,
        2,
        -1,
        1,
        -1,
    ]
    with pytest.raises(ValueError, match="exponent 63 is outside 0 to 62"):
        call("integer.fixed_point.shift_right", x, I32([63] * 13), Rounding.HALF_AWAY)


@pytest.mark.parametrize(
    "rule, codes",
    [
        (rules.RINT, [-2, 0, 0, 2, 2]),
        (rules.AWAY, [-2, -1, 1, 2, 3]),
        (rules.ONE, [-1, 0, 1, 2, 3]),
        (rules.TWO, [-2, -1, 1, 2, 3]),
        (rules.TRUNCATED, [-1, 0, 1, 2, 3]),
    ],
)
def test_requantizations_at_ties(call, rule, codes):
    a = I32([-6, -2, 2, 6, 10])
    assert call("integer.fixed_point.requantize", a, np.float64(0.25), I32(0), S8, rule).tolist() == codes
    assert call("integer.fixed_point.requantize", a, np.float64(0.25), I32(126), S8, rule).tolist() == [
        min(127, 126 + code) for code in codes
    ]


def test_one_and_two_roundings_part(call):
    """5 * 0.2999 = 1.4995 = 2.999 / 2: the high multiply rounds to 3, whose half rounds to 2; one rounding gives 1."""
    a, real = I32([5]), np.float64(0.2999)
    one, two = (call("integer.fixed_point.round_by", a, real, rule).tolist() for rule in (rules.ONE, rules.TWO))
    assert (one, two) == ([1], [2])


def test_wide_accumulators(call):
    """64-bit accumulators: the whole multiplier, or TFLite's 15 bits of it; and their input contract."""
    a, real = np.int64([2**40, -(2**40), 3]), np.float64(2.0**-31)
    for rule in (rules.ONE, rules.NARROW):
        assert call("integer.fixed_point.round_by", a, real, rule).tolist() == [512, -512, 0]
        with pytest.raises(ValueError, match="140737488355328 is outside"):
            call("integer.fixed_point.round_by", np.int64([2**47]), real, rule)
    with pytest.raises(ValueError, match="not defined for 64-bit"):
        call("integer.fixed_point.round_by", a, real, rules.TWO)
    near = np.int64([65535 * 2**20])  # times just below 2^-20: 65534.99...; 0x7FFF / 2^15 of it is 65533.0
    real = np.float64(0.9999999 * 2.0**-20)
    assert call("integer.fixed_point.round_by", near, real, rules.ONE).tolist() == [65535]
    assert call("integer.fixed_point.round_by", near, real, rules.NARROW).tolist() == [65533]


def test_wide_requantization_is_exact(call):
    """The product in two halves, against Python's integers."""
    rng = stream(0, "wide")
    a = np.concatenate([rng.integers(-(2**47), 2**47, 2000), [2**47 - 1, -(2**47), 0, -1, 65536, -65537]])
    for real in (*2.0 ** rng.uniform(-31, 6.9, 20), 127.9, 2.0**-31):
        multiplier, shift = (int(part) for part in call("integer.fixed_point.quantize_multiplier", np.float64(real)))
        exponent = 31 - shift
        want = [(int(x) * multiplier + (1 << (exponent - 1))) >> exponent for x in a]
        got = call("integer.fixed_point.multiply_exact", a, np.int32(multiplier), np.int32(shift), rules.ONE)
        assert got.tolist() == want


def test_matmul_by_hand(call):
    a, b = np.uint8([[0, 255], [128, 3]]), np.int8([[-128, 127], [2, -1]])
    acc = call("integer.products.matmul", a, b, U8, S8, I32(128), None, I32([10, 20]))
    want = [[-128 * -128 + 127 * 2 + 10, -128 * 127 - 127 + 20], [0 - 125 * 2 + 10, 125 + 20]]
    assert acc.tolist() == want and acc.dtype == I32
    assert call("integer.products.linear", a, b.T.copy(), U8, S8, I32(128), None, I32([10, 20])).tolist() == want


@pytest.mark.parametrize("depth", [1023, 1024, 1025, 3072])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_extreme_codes_stay_exact_across_blocks(call, depth, bits):
    spec = QuantSpec(bits, symmetric=True)
    a = np.full((2, depth), spec.code_min, I32)
    a[1] = spec.code_max
    want = a.astype(np.int64) @ a.T.astype(np.int64)
    np.testing.assert_array_equal(
        call("integer.products.matmul", a, a.T.copy(), spec, spec, None, None, None, 64), want
    )


def test_one_row_or_one_deep_with_ambiguous_strides(call):
    """Strides (1, 1), which torch._int_mm misreads."""
    column, depth_one = np.arange(-60, 60, dtype=np.int8)[:, None], np.arange(50, dtype=np.int8)[:, None]
    b = np.arange(-120, 120, dtype=np.int8).reshape(120, 2)
    want = column.T.astype(int) @ b.astype(int)
    np.testing.assert_array_equal(call("integer.products.matmul", column.T, b, S8, S8), want)
    got = call("integer.products.linear", column, depth_one, S8, S8)
    np.testing.assert_array_equal(got, column.astype(int) @ depth_one.T.astype(int))


def test_overflow_is_reported_or_wraps(call):
    spec = QuantSpec(16, symmetric=True)
    a = np.full((1, 3), -(2**15), I32)
    with pytest.raises(ValueError, match="accumulators run from 0 to 3221225472, beyond int32"):
        call("integer.products.matmul", a, a.T.copy(), spec, spec)
    assert call("integer.products.matmul", a, a.T.copy(), spec, spec, None, None, None, 32, rules.WRAPS).tolist() == [
        [3 * 2**30 - 2**32]
    ]
    eight = np.full((1, 2), 127, np.int8)
    with pytest.raises(ValueError, match="beyond int32"):  # the bias alone takes it over
        call("integer.products.matmul", eight, eight.T.copy(), S8, S8, None, None, I32([INT_MAX]))


def test_integer_contracts(call):
    a = np.int32([[0, 200]])
    with pytest.raises(ValueError, match="left operand runs from 0 to 200, outside -128 to 127"):
        call("integer.products.matmul", a, a.T.copy(), S8, U8)
    with pytest.raises(ValueError, match="vary along the sum"):
        call("integer.products.matmul", a, a.T.copy(), U8, U8, I32([[1, 2]]))
    with pytest.raises(ValueError, match="codes are integers"):
        call("integer.products.matmul", a.astype(F32), a.T.copy(), U8, U8)


def test_pairs_saturate_in_order(call):
    """255 * 127 * 2 is cut to 32767; each pair by itself, and the pairs of an acc16 kernel one after another."""
    a, b = np.full((1, 4), 255, np.uint8), np.int8([[127], [127], [-128], [-128]])
    assert call("integer.products.matmul_pairs16", a, b, 1).tolist() == [[32767 - 32768]]
    b = np.int8([[127], [127], [127], [0]])
    assert call("integer.products.matmul_pairs16", a, b, 1).tolist() == [[32767 + 255 * 127]]
    assert call("integer.products.matmul_pairs16", a, b, 2).tolist() == [[32767]]
    seven = np.int8([[63], [64], [-64], [-64]])  # weights of 7 bits never saturate: 255 * 64 * 2 < 2^15
    assert call("integer.products.matmul_pairs16", a, seven, 1).tolist() == [[255 * -1]]


def test_int4_packing(call):
    signed, unsigned = np.int8([[-8, 7, -1]]), np.uint8([[15, 0, 8]])
    packed = call("integer.products.pack_int4", signed)
    assert packed.tolist() == [[0x78, 0x0F]]
    assert call("integer.products.unpack_int4", packed, 3, True).tolist() == signed.tolist()
    assert (
        call("integer.products.unpack_int4", call("integer.products.pack_int4", unsigned), 3, False).tolist()
        == unsigned.tolist()
    )
    for wrong in ([[-9, 0]], [[16, 0]], [[-1, 15]]):
        with pytest.raises(ValueError, match="4 bits hold"):
            call("integer.products.pack_int4", np.int32(wrong))


def test_saturating_byte_products_are_not_used():
    """oneDNN told to use AVX2 saturates pairs of products in int16, on a CPU that could do better."""
    code = (
        "import torch\nfrom qtx_ref.spec import QuantSpec\nfrom qtx_torch.integer import products as integer\n"
        "a, s8 = torch.full((64, 256), 127, dtype=torch.int8), QuantSpec(symmetric=True)\n"
        "assert (integer.matmul(a, a.T.contiguous(), s8, s8) == 127 * 127 * 256).all()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
