"""Hand-worked literals and published vectors for affine, fixed_point, integer and profiles, in both backends."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx_ref import profiles
from qtx_ref.spec import (
    QTX,
    Dtype,
    Granularity,
    NanPolicy,
    Nudging,
    Overflow,
    QuantSpec,
    Requantization,
    Rounding,
    ScaleRule,
    SpecError,
)

I32, F32 = np.int32, np.float32
S8, U8 = QuantSpec(symmetric=True), QuantSpec()
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
TIES = F32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])


@pytest.fixture(params=["qtx_ref", "qtx_torch"])
def call(request):
    """call("module.function", ...) in one backend: NumPy in, NumPy out."""

    def run(name, *values):
        module, function = name.split(".")
        tensor = request.param == "qtx_torch"
        given = [
            torch.from_numpy(np.asarray(v)) if tensor and isinstance(v, (np.ndarray, np.generic)) else v for v in values
        ]
        result = getattr(importlib.import_module(f"{request.param}.{module}"), function)(*given)
        return tuple(map(np.asarray, result)) if isinstance(result, tuple) else np.asarray(result)

    return run


@pytest.mark.parametrize(
    "rounding, before, after",
    [  # codes of TIES by scale 1 and zero point 1
        (Rounding.HALF_EVEN, [-2, 0, 0, 2, 2, 4], [-1, -1, 1, 1, 3, 3]),
        (Rounding.HALF_AWAY, [-2, -1, 1, 2, 3, 4], [-2, -1, 0, 2, 3, 4]),
        (Rounding.HALF_UP, [-1, 0, 1, 2, 3, 4], [-1, 0, 1, 2, 3, 4]),
        (Rounding.TOWARD_ZERO, [-1, 0, 0, 1, 2, 3], [-1, 0, 1, 1, 2, 3]),
        (Rounding.FLOOR, [-2, -1, 0, 1, 2, 3], [-2, -1, 0, 1, 2, 3]),
    ],
)
def test_zero_point_before_and_after_rounding(call, rounding, before, after):
    profile = replace(QTX, rounding=rounding)
    assert call("affine.quantize", TIES, F32(1), I32(1), S8, profile).tolist() == after
    profile = replace(profile, zero_point_before_rounding=True)
    assert call("affine.quantize", TIES, F32(1), I32(1), S8, profile).tolist() == before


def test_nearest_does_not_round_what_lies_below_a_half(call):
    below = np.nextafter(F32(0.5), F32(0))  # 0.5 + below is 1 in float32: floor(x + 1/2) in one addition gives 1
    for rounding in (Rounding.HALF_EVEN, Rounding.HALF_AWAY, Rounding.HALF_UP):
        codes = call("affine.quantize", F32([below, -below]), F32(1), I32(0), S8, replace(QTX, rounding=rounding))
        assert codes.tolist() == [0, 0]


def test_stochastic_rounding_takes_the_word_as_a_threshold(call):
    profile = replace(QTX, rounding=Rounding.STOCHASTIC)
    x, words = F32([0.25] * 4 + [-0.25, 3, np.inf]), np.int64([0, 2**30 - 1, 2**30, 2**32 - 1, 0, 0, 0])
    assert call("affine.quantize", x, F32(1), I32(0), S8, profile, words).tolist() == [1, 1, 0, 0, 0, 3, 127]
    with pytest.raises(ValueError, match="random 32-bit word"):
        call("affine.quantize", x, F32(1), I32(0), S8, profile)


def test_reciprocal_moves_a_code(call):
    """0.7500000596046448 / 0.3 is 2.5 in float32, 0.7500000596046448 * (1 / 0.3) is 2.500000238418579."""
    x, scale = F32([0.75000006]), F32(0.3)
    assert call("affine.quantize", x, scale, I32(0), U8).tolist() == [2]
    assert call("affine.quantize", x, scale, I32(0), U8, replace(QTX, reciprocal=True)).tolist() == [3]


@pytest.mark.parametrize(
    "rule, scale",
    [
        (ScaleRule.ABSMAX, F32(2) / F32(127)),
        (ScaleRule.ABSMAX_HALF, F32(2) / F32(127.5)),
        (ScaleRule.TWO_SIDED, F32(2) / F32(128)),
    ],
)
def test_scale_rules(call, rule, scale):
    got, zero = call("affine.scale_zero", F32([-2]), F32([1]), S8, replace(QTX, scale_rule=rule))
    assert (got.tolist(), zero.tolist()) == ([scale], [0])
    narrow = QuantSpec(symmetric=True, narrow=True)
    want = F32(2) / F32(127.5 if rule is ScaleRule.ABSMAX_HALF else 127)
    assert call("affine.scale_zero", F32([-2]), F32([1]), narrow, replace(QTX, scale_rule=rule))[0].tolist() == [want]


def test_zero_points_are_nudged_from_an_end(call):
    # range -0.5 to 254.5: scale 1, real zero point 0.5 from either end, a tie
    low, high = F32([-0.5]), F32([254.5])
    assert call("affine.scale_zero", low, high, U8)[1].tolist() == [0]
    away = replace(QTX, zero_point_rounding=Rounding.HALF_AWAY, nudging=Nudging.CLOSER_END)
    assert call("affine.scale_zero", low, high, U8, away)[1].tolist() == [1]
    narrow = QuantSpec(narrow=True)  # 1 to 255, 254 steps
    assert call("affine.scale_zero", F32([0]), F32([254]), narrow)[1].tolist() == [1]
    assert call("affine.quantize", F32([-9, 0, 254, 300]), F32(1), I32(1), narrow).tolist() == [1, 1, 255, 255]


def test_scales_and_arithmetic_in_sixteen_bits(call):
    got, _ = call("affine.scale_zero", F32([-1]), F32([1]), S8, replace(QTX, scale_dtype=Dtype.BFLOAT16))
    assert got.tolist() == [129 * 2.0**-14]  # 1/127 = 129.008 * 2^-14, and bfloat16 has multiples of 2^-14 there
    got, _ = call("affine.scale_zero", F32([-1]), F32([1]), S8, replace(QTX, scale_dtype=Dtype.FLOAT16))
    assert got.tolist() == [1032 * 2.0**-17]  # 1032.06 * 2^-17
    x = F32([257, 259, 1])  # bfloat16 holds 256 and 258, and ties to even: 256, 260
    codes = call("affine.quantize", x, F32(1), I32(0), QuantSpec(16), replace(QTX, arithmetic=Dtype.BFLOAT16))
    assert codes.tolist() == [256, 260, 1]
    with pytest.raises(ValueError, match="code 65535 is infinite in float16"):
        call("affine.quantize", x, F32(1), I32(0), QuantSpec(16), replace(QTX, arithmetic=Dtype.FLOAT16))
    with pytest.raises(ValueError, match="does not fit float16"):
        call("affine.scale_zero", F32([-1e8]), F32([0]), S8, replace(QTX, scale_dtype=Dtype.FLOAT16))


def test_zero_ranges_and_nan(call):
    scale, zero = call("affine.scale_zero", F32([0, 0]), F32([0, 2.0**-149]), U8)
    assert (scale.tolist(), zero.tolist()) == ([1, 2.0**-126], [0, 0])
    x = F32([np.nan, 1])
    for policy, code in ((NanPolicy.ZERO, 7), (NanPolicy.CODE_MIN, 0)):
        assert call("affine.quantize", x, F32(1), I32(7), U8, replace(QTX, nan=policy)).tolist() == [code, 8]
    with pytest.raises(ValueError, match="NaN"):
        call("affine.quantize", x, F32(1), I32(7), U8)
    with pytest.raises(ValueError, match="infinity"):
        call("affine.quantize", F32([np.inf]), F32(1), I32(0), U8, profiles.profile("tflite"))


def test_groups_and_blocks(call):
    x = F32([[1, -20, 2, 30], [-1, 5, 3, -4]])
    group = QuantSpec(symmetric=True, granularity=Granularity.GROUP, groups=2)
    low, high = call("affine.ranges", x, group, False)
    np.testing.assert_array_equal(call("affine.scale_zero", low, high, group)[0] * F32(127), [[20, 20, 30, 30]])
    low, high = call("affine.unite_groups", low, high, replace(group, permute=True))  # spans 2, 25, 1, 34
    assert (low.tolist(), high.tolist()) == ([[-1, -20, -1, -20]], [[3, 30, 3, 30]])
    block = QuantSpec(granularity=Granularity.BLOCK, block=2, dynamic=True)
    low, high = call("affine.ranges", x, block)
    assert low.tolist() == [[-20, -20, 2, 2], [-1, -1, -4, -4]] and high[0].tolist() == [1, 1, 30, 30]
    with pytest.raises(ValueError, match="block 3 does not divide"):
        call("affine.ranges", x, replace(block, block=3))
    with pytest.raises(ValueError, match="groups 3 does not divide the 4 channels"):
        call("affine.scale_zero", *call("affine.ranges", x, group), replace(group, groups=3))


def test_multipliers(call):
    """gemmlowp and TFLite: M = 2^shift * multiplier / 2^31."""
    real = np.float64([0.0, 0.25, 0.5, 1, 1 - 2.0**-33, 0.75, 2.0**-33, 100])
    multiplier, shift = call("fixed_point.quantize_multiplier", real)
    assert multiplier.tolist() == [0, 2**30, 2**30, 2**30, 2**30, 3 * 2**29, 0, 1677721600]
    assert shift.tolist() == [0, -1, 0, 1, 1, 0, 0, 7]
    for wrong in (-1.0, np.nan, 2.0**30):
        with pytest.raises(ValueError, match="outside 0 to 2"):
            call("fixed_point.quantize_multiplier", np.float64([wrong]))


def test_high_multiplies(call):
    """SaturatingRoundingDoublingHighMul: ties go up, INT_MIN squared saturates."""
    a = I32([INT_MIN, INT_MIN, 1, -1, 3, -3, -(2**30), INT_MAX])
    b = I32([INT_MIN, INT_MAX, 2**30, 2**30, 2**30, 2**30, 3, INT_MAX])
    rounding = call("fixed_point.rounding_doubling_high_multiply", a, b).tolist()
    assert rounding == [INT_MAX, -INT_MAX, 1, 0, 2, -1, -1, INT_MAX - 1]
    assert call("fixed_point.doubling_high_multiply", a, b).tolist() == [
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
    assert call("fixed_point.rounding_divide_by_power_of_two", x, e).tolist() == [
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
    assert call("fixed_point.rounding_shift_right", x, e).tolist() == [0, 1, 1, 2, 0, -1, -1, 1, -1, 2, -1, 1, -1]
    with pytest.raises(ValueError, match="exponent 32 is outside 0 to 31"):
        call("fixed_point.rounding_divide_by_power_of_two", x, I32([32] * 13))


@pytest.mark.parametrize(
    "kind, codes",
    [
        (Requantization.FLOAT32, [-2, 0, 0, 2, 2]),
        (Requantization.FLOAT_HALF_AWAY, [-2, -1, 1, 2, 3]),
        (Requantization.FIXED_ONE, [-1, 0, 1, 2, 3]),
        (Requantization.FIXED_TWO, [-2, -1, 1, 2, 3]),
        (Requantization.HIGH_HALF_UP, [-1, 0, 1, 2, 3]),
    ],
)
def test_requantizations_at_ties(call, kind, codes):
    a, profile = I32([-6, -2, 2, 6, 10]), replace(QTX, requantization=kind)
    assert call("fixed_point.requantize", a, np.float64(0.25), I32(0), S8, profile).tolist() == codes
    assert call("fixed_point.requantize", a, np.float64(0.25), I32(126), S8, profile).tolist() == [
        min(127, 126 + code) for code in codes
    ]


def test_one_and_two_roundings_part(call):
    """5 * 0.2999 = 1.4995 = 2.999 / 2: the high multiply rounds to 3, whose half rounds to 2; one rounding gives 1."""
    a, real = I32([5]), np.float64(0.2999)
    one, two = (
        call("fixed_point.round_by", a, real, k).tolist() for k in (Requantization.FIXED_ONE, Requantization.FIXED_TWO)
    )
    assert (one, two) == ([1], [2])


def test_wide_accumulators(call):
    """TFLite's 16x8 form: multiplier reduced to 15 bits, and its input contract."""
    a = np.int64([2**40, -(2**40), 3])
    real = np.float64(2.0**-31)
    assert call("fixed_point.round_by", a, real, Requantization.FIXED_ONE).tolist() == [512, -512, 0]
    with pytest.raises(ValueError, match="140737488355328 is outside"):
        call("fixed_point.round_by", np.int64([2**47]), real, Requantization.FIXED_ONE)
    with pytest.raises(ValueError, match="not defined for 64-bit"):
        call("fixed_point.round_by", a, real, Requantization.FIXED_TWO)


def test_matmul_by_hand(call):
    a, b = np.uint8([[0, 255], [128, 3]]), np.int8([[-128, 127], [2, -1]])
    acc = call("integer.matmul", a, b, U8, S8, I32(128), None, I32([10, 20]))
    want = [[-128 * -128 + 127 * 2 + 10, -128 * 127 - 127 + 20], [0 - 125 * 2 + 10, 125 + 20]]
    assert acc.tolist() == want and acc.dtype == I32
    assert call("integer.linear", a, b.T.copy(), U8, S8, I32(128), None, I32([10, 20])).tolist() == want


@pytest.mark.parametrize("depth", [1023, 1024, 1025, 3072])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_extreme_codes_stay_exact_across_blocks(call, depth, bits):
    spec = QuantSpec(bits, symmetric=True)
    a = np.full((2, depth), spec.code_min, I32)
    a[1] = spec.code_max
    want = a.astype(np.int64) @ a.T.astype(np.int64)
    np.testing.assert_array_equal(call("integer.matmul", a, a.T.copy(), spec, spec, None, None, None, 64), want)


def test_one_row_or_one_deep_with_ambiguous_strides(call):
    """Strides (1, 1), which torch._int_mm misreads."""
    column, depth_one = np.arange(-60, 60, dtype=np.int8)[:, None], np.arange(50, dtype=np.int8)[:, None]
    b = np.arange(-120, 120, dtype=np.int8).reshape(120, 2)
    want = column.T.astype(int) @ b.astype(int)
    np.testing.assert_array_equal(call("integer.matmul", column.T, b, S8, S8), want)
    got = call("integer.linear", column, depth_one, S8, S8)
    np.testing.assert_array_equal(got, column.astype(int) @ depth_one.T.astype(int))


def test_overflow_is_reported_or_wraps(call):
    spec = QuantSpec(16, symmetric=True)
    a = np.full((1, 3), -(2**15), I32)
    with pytest.raises(ValueError, match="accumulators run from 0 to 3221225472, beyond int32"):
        call("integer.matmul", a, a.T.copy(), spec, spec)
    wraps = replace(QTX, overflow=Overflow.WRAP)
    assert call("integer.matmul", a, a.T.copy(), spec, spec, None, None, None, 32, wraps).tolist() == [
        [3 * 2**30 - 2**32]
    ]
    eight = np.full((1, 2), 127, np.int8)
    with pytest.raises(ValueError, match="beyond int32"):  # the bias alone takes it over
        call("integer.matmul", eight, eight.T.copy(), S8, S8, None, None, I32([INT_MAX]))


def test_integer_contracts(call):
    a = np.int32([[0, 200]])
    with pytest.raises(ValueError, match="left operand runs from 0 to 200, outside -128 to 127"):
        call("integer.matmul", a, a.T.copy(), S8, U8)
    with pytest.raises(ValueError, match="vary along the sum"):
        call("integer.matmul", a, a.T.copy(), U8, U8, I32([[1, 2]]))
    with pytest.raises(ValueError, match="codes are integers"):
        call("integer.matmul", a.astype(F32), a.T.copy(), U8, U8)


def test_pairs_saturate_in_order(call):
    """255 * 127 * 2 is cut to 32767; each pair by itself, and the pairs of an acc16 kernel one after another."""
    a, b = np.full((1, 4), 255, np.uint8), np.int8([[127], [127], [-128], [-128]])
    assert call("integer.matmul_pairs16", a, b, 1).tolist() == [[32767 - 32768]]
    b = np.int8([[127], [127], [127], [0]])
    assert call("integer.matmul_pairs16", a, b, 1).tolist() == [[32767 + 255 * 127]]
    assert call("integer.matmul_pairs16", a, b, 2).tolist() == [[32767]]
    seven = np.int8([[63], [64], [-64], [-64]])  # weights of 7 bits never saturate: 255 * 64 * 2 < 2^15
    assert call("integer.matmul_pairs16", a, seven, 1).tolist() == [[255 * -1]]


def test_int4_packing(call):
    signed, unsigned = np.int8([[-8, 7, -1]]), np.uint8([[15, 0, 8]])
    packed = call("integer.pack_int4", signed)
    assert packed.tolist() == [[0x78, 0x0F]]
    assert call("integer.unpack_int4", packed, 3, True).tolist() == signed.tolist()
    assert call("integer.unpack_int4", call("integer.pack_int4", unsigned), 3, False).tolist() == unsigned.tolist()
    for wrong in ([[-9, 0]], [[16, 0]], [[-1, 15]]):
        with pytest.raises(ValueError, match="4 bits hold"):
            call("integer.pack_int4", np.int32(wrong))


def test_profiles_name_their_sources():
    assert profiles.profile("qtx") == QTX
    assert profiles.profile("float32") == replace(QTX, name="float32", requantization=Requantization.FLOAT32)
    kinds = {name: profiles.profile(name).requantization for name in profiles.NAMES}
    assert kinds["gemmlowp"] is Requantization.FIXED_TWO and kinds["tflite"] is Requantization.FIXED_ONE
    for name in profiles.NAMES:
        assert profiles.profile(name).name == name and all(profiles.sources(name).values())
        assert set(profiles.sources(name)) == set(QTX.__dataclass_fields__) - {"name", "version"}
    with pytest.raises(SpecError, match="known profiles are qtx"):
        profiles.profile("tensorrt")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
    st.sampled_from([Dtype.FLOAT16, Dtype.BFLOAT16]),
)
def test_sixteen_bit_rounding_is_a_cast(values, dtype):
    """By bits, as both backends round, and by torch's own cast."""
    x = F32(values)
    kind = torch.float16 if dtype is Dtype.FLOAT16 else torch.bfloat16
    want = torch.from_numpy(x).to(kind).float().numpy()
    for package in ("qtx_ref", "qtx_torch"):
        given_x = x if package == "qtx_ref" else torch.from_numpy(x)
        got = np.asarray(importlib.import_module(f"{package}.rounding").round_dtype(given_x, dtype))
        np.testing.assert_array_equal(got.view(I32), want.view(I32))
