"""Hand-worked literals for affine under every field of a profile, and the profiles, in both backends."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtx_ref import profiles
from qtx_ref.quant.observers import Observer
from qtx_ref.random import stream
from qtx_ref.spec import (
    QTX,
    Beyond,
    Dtype,
    FloatProduct,
    Granularity,
    HighProduct,
    NanPolicy,
    Nudging,
    ObserverKind,
    ObserverSpec,
    Order,
    QuantSpec,
    Rounding,
    SpecError,
    SymmetricScale,
    ZeroPoint,
    to_dict,
)

I32, F32 = np.int32, np.float32
S8, U8 = QuantSpec(symmetric=True), QuantSpec()
TIES = F32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])


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
    rule = replace(QTX.quantize, rounding=rounding)
    assert call("quant.affine.quantize", TIES, F32(1), I32(1), S8, rule).tolist() == after
    rule = replace(rule, zero_point=ZeroPoint.BEFORE)
    assert call("quant.affine.quantize", TIES, F32(1), I32(1), S8, rule).tolist() == before


def test_nearest_does_not_round_what_lies_below_a_half(call):
    below = np.nextafter(F32(0.5), F32(0))  # 0.5 + below is 1 in float32: floor(x + 1/2) in one addition gives 1
    for rounding in (Rounding.HALF_EVEN, Rounding.HALF_AWAY, Rounding.HALF_UP):
        rule = replace(QTX.quantize, rounding=rounding)
        codes = call("quant.affine.quantize", F32([below, -below]), F32(1), I32(0), S8, rule)
        assert codes.tolist() == [0, 0]


def test_stochastic_rounding_takes_the_word_as_a_threshold(call):
    rule = replace(QTX.quantize, rounding=Rounding.STOCHASTIC)
    x, words = F32([0.25] * 4 + [-0.25, 3, np.inf]), np.int64([0, 2**30 - 1, 2**30, 2**32 - 1, 0, 0, 0])
    assert call("quant.affine.quantize", x, F32(1), I32(0), S8, rule, words).tolist() == [1, 1, 0, 0, 0, 3, 127]
    with pytest.raises(ValueError, match="random 32-bit word"):
        call("quant.affine.quantize", x, F32(1), I32(0), S8, rule)


def test_reciprocal_moves_a_code(call):
    """0.7500000596046448 / 0.3 is 2.5 in float32, 0.7500000596046448 * (1 / 0.3) is 2.500000238418579."""
    x, scale = F32([0.75000006]), F32(0.3)
    assert call("quant.affine.quantize", x, scale, I32(0), U8).tolist() == [2]
    assert call("quant.affine.quantize", x, scale, I32(0), U8, replace(QTX.quantize, reciprocal=True)).tolist() == [3]


@pytest.mark.parametrize(
    "rule, scale",
    [
        (SymmetricScale.ABSMAX, F32(2) / F32(127)),
        (SymmetricScale.ABSMAX_HALF, F32(2) / F32(127.5)),
        (SymmetricScale.TWO_SIDED, F32(2) / F32(128)),
    ],
)
def test_scale_rules(call, rule, scale):
    got, zero = call("quant.affine.scale_zero", F32([-2]), F32([1]), S8, replace(QTX.scale, symmetric=rule))
    assert (got.tolist(), zero.tolist()) == ([scale], [0])
    narrow = QuantSpec(symmetric=True, narrow=True)
    want = F32(2) / F32(127.5 if rule is SymmetricScale.ABSMAX_HALF else 127)
    assert call("quant.affine.scale_zero", F32([-2]), F32([1]), narrow, replace(QTX.scale, symmetric=rule))[
        0
    ].tolist() == [want]


def test_zero_points_are_nudged_from_an_end(call):
    # range -0.5 to 254.5: scale 1, real zero point 0.5 from either end, a tie
    low, high = F32([-0.5]), F32([254.5])
    assert call("quant.affine.scale_zero", low, high, U8)[1].tolist() == [0]
    away = replace(QTX.scale, zero_point_rounding=Rounding.HALF_AWAY, nudging=Nudging.CLOSER_END)
    assert call("quant.affine.scale_zero", low, high, U8, away)[1].tolist() == [1]
    narrow = QuantSpec(narrow=True)  # 1 to 255, 254 steps
    tied = F32([-0.5]), F32([253.5])  # 1 + 0.5 is a tie, and so is -0.5 alone
    assert call("quant.affine.scale_zero", *tied, narrow)[1].tolist() == [2]
    alone = replace(QTX.scale, nudging=Nudging.LOW_ROUNDED)
    assert call("quant.affine.scale_zero", *tied, narrow, alone)[1].tolist() == [1]
    assert call("quant.affine.scale_zero", F32([0]), F32([254]), narrow)[1].tolist() == [1]
    assert call("quant.affine.quantize", F32([-9, 0, 254, 300]), F32(1), I32(1), narrow).tolist() == [1, 1, 255, 255]


def test_scales_and_arithmetic_in_sixteen_bits(call):
    got, _ = call("quant.affine.scale_zero", F32([-1]), F32([1]), S8, replace(QTX.scale, dtype=Dtype.BFLOAT16))
    assert got.tolist() == [129 * 2.0**-14]  # 1/127 = 129.008 * 2^-14, and bfloat16 has multiples of 2^-14 there
    got, _ = call("quant.affine.scale_zero", F32([-1]), F32([1]), S8, replace(QTX.scale, dtype=Dtype.FLOAT16))
    assert got.tolist() == [1032 * 2.0**-17]  # 1032.06 * 2^-17
    x = F32([257, 259, 1])  # bfloat16 holds 256 and 258, and ties to even: 256, 260
    codes = call(
        "quant.affine.quantize", x, F32(1), I32(0), QuantSpec(16), replace(QTX.quantize, arithmetic=Dtype.BFLOAT16)
    )
    assert codes.tolist() == [256, 260, 1]
    half = replace(QTX.quantize, arithmetic=Dtype.FLOAT16)
    for adding in (ZeroPoint.AFTER_FLOAT, ZeroPoint.BEFORE):
        with pytest.raises(ValueError, match="code 65535 is infinite in float16"):
            call("quant.affine.quantize", x, F32(1), I32(0), QuantSpec(16), replace(half, zero_point=adding))
    # in integers: 2049 is no float16, and 2048 + 63000 is none either
    codes = call("quant.affine.quantize", F32([2049, 70000, -5]), F32(1), I32(63000), QuantSpec(16), half)
    assert codes.tolist() == [65048, 65535, 62995]
    with pytest.raises(ValueError, match="does not fit float16"):
        call("quant.affine.scale_zero", F32([-1e8]), F32([0]), S8, replace(QTX.scale, dtype=Dtype.FLOAT16))


def test_zero_ranges_and_nan(call):
    scale, zero = call("quant.affine.scale_zero", F32([0, 0]), F32([0, 2.0**-149]), U8)
    assert (scale.tolist(), zero.tolist()) == ([1, 2.0**-126], [0, 0])
    x = F32([np.nan, 1])
    for policy, code in ((NanPolicy.ZERO, 7), (NanPolicy.CODE_MIN, 0)):
        assert call("quant.affine.quantize", x, F32(1), I32(7), U8, replace(QTX.quantize, nan=policy)).tolist() == [
            code,
            8,
        ]
    with pytest.raises(ValueError, match="NaN"):
        call("quant.affine.quantize", x, F32(1), I32(7), U8)
    with pytest.raises(ValueError, match="infinity"):
        call("quant.affine.quantize", F32([np.inf]), F32(1), I32(0), U8, profiles.profile("tflite").quantize)


def test_groups_and_blocks(call):
    x = F32([[1, -20, 2, 30], [-1, 5, 3, -4]])
    group = QuantSpec(symmetric=True, granularity=Granularity.GROUP, groups=2)
    low, high = call("quant.affine.ranges", x, group, False)
    np.testing.assert_array_equal(call("quant.affine.scale_zero", low, high, group)[0] * F32(127), [[20, 20, 30, 30]])
    low, high = call("quant.affine.unite_groups", low, high, replace(group, permute=True))  # spans 2, 25, 1, 34
    assert (low.tolist(), high.tolist()) == ([[-1, -20, -1, -20]], [[3, 30, 3, 30]])
    block = QuantSpec(granularity=Granularity.BLOCK, block=2, dynamic=True)
    low, high = call("quant.affine.ranges", x, block)
    assert low.tolist() == [[-20, -20, 2, 2], [-1, -1, -4, -4]] and high[0].tolist() == [1, 1, 30, 30]
    with pytest.raises(ValueError, match="block 3 does not divide"):
        call("quant.affine.ranges", x, replace(block, block=3))
    with pytest.raises(ValueError, match="groups 3 does not divide the 4 channels"):
        call("quant.affine.scale_zero", *call("quant.affine.ranges", x, group), replace(group, groups=3))


def test_a_static_range_of_groups(call):
    """An observer finds each channel's range; the scale unites them, along the output axis of a weight too."""
    spec = QuantSpec(symmetric=True, granularity=Granularity.GROUP, groups=2)
    for weight, x in ((False, F32([[1, -20, 2, 30]])), (True, F32([[1], [-20], [2], [30]]))):
        observer = Observer(spec, weight)
        observer.update(x)
        scale, _ = call("quant.affine.scale_zero", *observer.range(), spec)
        np.testing.assert_array_equal(scale * F32(127), F32([20, 20, 30, 30]).reshape(x.shape))


@pytest.mark.parametrize("kind", ObserverKind)
@pytest.mark.parametrize("permute", [False, True])
def test_a_group_unites_what_its_channels_observers_found(call, kind, permute):
    """Neighbours, or with `permute` neighbours in the order of the calibrated high - low."""
    by_channel = QuantSpec(4, granularity=Granularity.CHANNEL, observer=ObserverSpec(kind, percentile=90.0))
    by_group = replace(by_channel, granularity=Granularity.GROUP, groups=3, permute=permute)
    single, grouped = Observer(by_channel), Observer(by_group)
    for batch in stream(0, "groups", kind).standard_t(3, (3, 20, 6)).astype(F32) * F32([1, 9, 2, 5, 7, 3]):
        single.update(batch)
        grouped.update(batch)
    low, high = (end.ravel() for end in single.range())
    order = np.argsort(high - low) if permute else np.arange(6)
    assert not permute or order.tolist() != list(range(6))
    scale, zero = call("quant.affine.scale_zero", *grouped.range(), by_group)
    for pair in order.reshape(3, 2):
        want = call("quant.affine.scale_zero", low[pair].min(), high[pair].max(), QuantSpec(4))
        assert {(s, z) for s, z in zip(scale[0, pair], zero[0, pair], strict=True)} == {(want[0][()], want[1][()])}


def leaves(tree: dict, path: str = "") -> set[str]:
    """The paths of a tree's values."""
    return {
        leaf
        for key, value in tree.items()
        for leaf in (leaves(value, f"{path}{key}.") if isinstance(value, dict) else {path + key})
    }


def test_profiles_name_their_sources():
    assert profiles.profile("qtx") == QTX
    same = {key: getattr(QTX, key) for key in ("name", "engine", "path", "requantize")}
    assert replace(profiles.profile("float32"), **same) == QTX
    kinds = {name: profiles.profile(name).requantize for name in profiles.NAMES}
    assert kinds["float32"] == FloatProduct(
        Dtype.FLOAT32, Order.RATIO, ZeroPoint.AFTER, Rounding.HALF_EVEN, Beyond.SATURATE
    )
    assert kinds["gemmlowp"].product is HighProduct.HALF_UP and kinds["tflite"].bits == 15
    for name in profiles.NAMES:
        assert profiles.profile(name).name == name and all(profiles.sources(name).values())
        assert set(profiles.sources(name)) == leaves(to_dict(profiles.profile(name))) - {
            "name",
            "version",
            "engine",
            "path",
        }
    with pytest.raises(SpecError, match="known profiles are qtx"):
        profiles.profile("tensorrt")


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
        got = np.asarray(importlib.import_module(f"{package}.quant.rounding").round_dtype(given_x, dtype))
        np.testing.assert_array_equal(got.view(I32), want.view(I32))
