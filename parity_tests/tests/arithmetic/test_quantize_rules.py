"""Every rule of quantize, dequantize, scale and cast: hand-worked literals, exact fractions, real engines."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx_ref import profiles
from qtx_ref.quant import affine, formats, rounding
from qtx_ref.spec import (
    QTX,
    Beyond,
    CastRule,
    DequantizeForm,
    DequantizeRule,
    Dtype,
    FakeQuantizeRule,
    FloatFormat,
    InfinityPolicy,
    NanPolicy,
    QuantizeRule,
    QuantSpec,
    Rounding,
    SpecError,
    ZeroPoint,
)

I32, F32, F16 = np.int32, np.float32, np.float16
S8, U8, S16, U16 = QuantSpec(signed=True), QuantSpec(), QuantSpec(16, signed=True), QuantSpec(16)
HALF = replace(QTX.quantize, arithmetic=Dtype.INPUT)  # of ONNX: in the type of x, the zero point in integers
FUSED = replace(QTX.quantize, reciprocal=True, zero_point=ZeroPoint.FUSED)
OLD = "ignore:torch.quantize_per_tensor"  # tensors of quantized dtypes are on their way out of torch
BESIDE_A_TIE = (92.19264221191406, 184.38247680664062)  # x / s + 128 is 128.50000763 and 2^-47


def nearest(value: Fraction) -> np.float32:
    """A fraction as float32, nearest, ties to even, with Python's integers."""
    if not value:
        return F32(0)
    magnitude, exponent = abs(value), -149
    while magnitude >= Fraction(2) ** (exponent + 24):
        exponent += 1
    units = magnitude / Fraction(2) ** exponent
    whole = round(units)  # half to even
    return F32(np.copysign(np.ldexp(float(whole), exponent), float(value)))


# --- one fused multiply-add -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(OLD)
def test_fused_is_rounded_once(call):
    """The float64 sum is 128.50000763 without 2^-47: a tie of float32, whose even side is 128.5, which is code 128."""
    x, scale = F32([BESIDE_A_TIE[0]]), F32(BESIDE_A_TIE[1])
    assert F32(np.float64(x[0]) * np.float64(1 / scale) + 128) == 128.5
    assert call("quant.affine.quantize", x, scale, I32(128), U8, FUSED).tolist() == [129]
    assert call("quant.affine.quantize", x, scale, I32(128), U8, replace(FUSED, zero_point="before")).tolist() == [128]
    assert torch.quantize_per_channel(
        torch.tensor(x)[None], torch.tensor([scale]), torch.tensor([128]), 0, torch.quint8
    ).int_repr().tolist() == [[128]]


def floats(exponents: st.SearchStrategy[int]) -> st.SearchStrategy[float]:
    """A float32 of 24 random bits at a random exponent."""
    mantissa = st.integers(-(2**24) + 1, 2**24 - 1)
    return st.builds(lambda m, e: float(np.ldexp(float(m), e)), mantissa, exponents)


@settings(max_examples=400, deadline=None)
@given(floats(st.integers(-60, 20)), floats(st.integers(-60, 20)), st.integers(-(2**16), 2**16))
def test_fused_multiply_add_is_the_nearest_to_the_fraction(x, y, z):
    want = nearest(Fraction(x) * Fraction(y) + z)
    got = rounding.fused_multiply_add(F32([x]), F32([y]), F32([z]))[0]
    ours = importlib.import_module("qtx_torch.quant.rounding").fused_multiply_add(
        *(torch.tensor([v], dtype=torch.float32) for v in (x, y, z))
    )
    assert got == want and ours.item() == want.item()


@pytest.mark.parametrize("tie", [0.5, 1.5, 127.5])
def test_fused_multiply_add_beside_every_kind_of_tie(tie):
    """Products a little off what makes the sum a tie of float32: in the last bits of the 48 that they have."""
    rng = np.random.default_rng(0)
    x = F32(tie) * (1 + rng.integers(-(2**10), 2**10, 3000) * F32(2.0**-23))
    y = (1 + rng.integers(-(2**10), 2**10, 3000) * F32(2.0**-23)).astype(F32)
    z = F32(rng.integers(-40000, 40000, 3000))
    want = [nearest(Fraction(float(a)) * Fraction(float(b)) + int(c)) for a, b, c in zip(x, y, z, strict=True)]
    assert rounding.fused_multiply_add(x, y, z).tolist() == [float(w) for w in want]
    naive = (x.astype(float) * y.astype(float) + z).astype(F32)
    assert (naive != F32(want)).sum() < len(x) / 100  # so rare is a second rounding: the one above was sought


@pytest.mark.filterwarnings(OLD)
def test_fused_is_torch_s_quantize_per_tensor(call):
    """Near ties of every level, each with its neighbours; a slice of what `qtx audit conformance` runs."""
    rng = np.random.default_rng(1)
    for index in range(8):
        scale, zero = F32(10 ** rng.uniform(-4, 1)), int(rng.integers(0, 256))
        x = ((np.arange(-300, 300) + 0.5 - zero) * scale).astype(F32)
        x = np.concatenate([x, np.nextafter(x, F32(np.inf)), np.nextafter(x, F32(-np.inf)), F32([BESIDE_A_TIE[0]])])
        scale = F32(BESIDE_A_TIE[1]) if index == 0 else scale
        want = torch.quantize_per_tensor(torch.tensor(x), float(scale), zero, torch.quint8).int_repr()
        np.testing.assert_array_equal(call("quant.affine.quantize", x, scale, I32(zero), U8, FUSED), want)


def test_fused_needs_a_reciprocal_in_float32():
    for wrong in ({"reciprocal": False}, {"arithmetic": Dtype.FLOAT64}, {"arithmetic": Dtype.INPUT}):
        with pytest.raises(SpecError, match="rule zero_point is 'fused'"):
            replace(FUSED, **wrong)


# --- sixteen-bit inputs -----------------------------------------------------------------------------------------------


def test_float16_is_divided_as_such_and_the_zero_point_added_in_integers(call):
    """-67.9 / .006042 is -11240 in float16, whose neighbours there lie 8 apart, and rounds to -11232; 21253 is none."""
    x, scale = F16([-67.9]), F16(0.006042)
    assert call("quant.affine.quantize", x, scale, I32(21253), S16, HALF).tolist() == [10021]
    in_floats = replace(HALF, zero_point=ZeroPoint.AFTER_FLOAT)
    assert call("quant.affine.quantize", x, scale, I32(21253), S16, in_floats).tolist() == [10016]
    exact = call("quant.affine.quantize", x.astype(F32), scale.astype(F32), I32(21253), S16, HALF)
    assert exact.tolist() == [round(21253 + float(x[0]) / float(scale))]
    assert call("quant.affine.quantize", F16([1, 60000]), F16(1), I32(60000), U16, HALF).tolist() == [60001, 65535]


def test_onnx_s_reference_on_float16():
    onnx = pytest.importorskip("onnx")
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    kinds = (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT16, onnx.TensorProto.INT16)
    x, s, z, y = (helper.make_tensor_value_info(n, k, None) for n, k in zip("xszy", kinds, strict=True))
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    model = helper.make_model(helper.make_graph([node], "q", [x, s, z], [y]))
    rng = np.random.default_rng(2)
    values = (rng.standard_normal(20000) * 60).astype(F16)
    scale, zero = F16(0.006042), np.int16(21253)
    (want,) = ReferenceEvaluator(model).run(None, {"x": values, "s": scale, "z": zero})
    np.testing.assert_array_equal(affine.quantize(values, scale, zero.astype(I32), S16, HALF), want)


def test_bfloat16_by_its_own_type():
    """257 / 1 is no bfloat16; in float32 it is itself."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.array([258, 3.0, -1.5], ml_dtypes.bfloat16)
    scale = F32(0.3)
    want = (x / scale.astype(ml_dtypes.bfloat16)).astype(F32)  # ml_dtypes divides and rounds once
    codes = affine.quantize(x, scale, I32(5), U16, HALF)
    assert codes.tolist() == np.clip(np.rint(want) + 5, 0, 65535).tolist() and codes[0] != round(258 / 0.3) + 5
    theirs = importlib.import_module("qtx_torch.quant.affine")
    tensor = torch.tensor(x.astype(F32)).bfloat16()
    given_torch = tensor, torch.tensor(scale), torch.tensor(5)
    assert theirs.quantize(*given_torch, U16, HALF).tolist() == codes.tolist()
    fake = FakeQuantizeRule(HALF, replace(QTX.dequantize, arithmetic=Dtype.INPUT))
    y, _ = affine.fake_quantize(x, scale, I32(5), U16, fake)
    ours, _ = theirs.fake_quantize(*given_torch, U16, fake)
    assert y.dtype == ml_dtypes.bfloat16 and ours.dtype is torch.bfloat16
    np.testing.assert_array_equal(y.astype(F32), ours.float().numpy())


# --- dequantize -------------------------------------------------------------------------------------------------------


def test_dequantize_in_float32_and_cast(call):
    """-32768 + 15379 is -17389, which float16 has not: it has -17392."""
    code, scale, zero = I32([-32768]), F16(0.001838), I32(-15379)
    cast = DequantizeRule(DequantizeForm.DIFFERENCE, Dtype.INPUT)
    y = call("quant.affine.dequantize", code, scale, zero, cast)
    assert y.dtype == F16 and y.tolist() == [F16(-17389 * np.float64(scale))] == [-31.953125]
    assert call("quant.affine.dequantize", code, scale, zero, replace(cast, arithmetic="float16")).tolist() == [
        -31.96875
    ]
    assert call("quant.affine.dequantize", code, scale.astype(F32), zero, cast).dtype == F32


def test_dequantize_expanded(call):
    """0.1 (1 - 7) is -0.6 in float32; 0.1 - 0.7, each rounded, the next number."""
    code, scale, zero = I32([1]), F32(0.1), I32(7)
    apart = replace(QTX.dequantize, form=DequantizeForm.EXPANDED)
    assert call("quant.affine.dequantize", code, scale, zero).tolist() == [-0.6000000238418579]
    want = -0.5999999642372131
    assert call("quant.affine.dequantize", code, scale, zero, apart).tolist() == [want]
    y, _ = call("quant.affine.fake_quantize", F32([-0.6]), scale, zero, U8, FakeQuantizeRule(QTX.quantize, apart))
    assert y.tolist() == [want]


# --- NaN, infinity and what lies beyond -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, unsigned, below",
    [  # codes of NaN: uint8 with zero point 7, int8 with zero point -7
        (NanPolicy.ZERO, 7, -7),
        (NanPolicy.RAW_ZERO, 0, 0),
        (NanPolicy.CODE_MIN, 0, -128),
        (NanPolicy.CODE_MAX, 255, 127),
        (NanPolicy.CONVERTED, 0, 127),  # -2^31 - 7 wraps to 2^31 - 7
    ],
)
def test_codes_of_nan(call, policy, unsigned, below):
    rule, x = replace(QTX.quantize, nan=policy), F32([np.nan, 1])
    assert call("quant.affine.quantize", x, F32(1), I32(7), U8, rule).tolist() == [unsigned, 8]
    assert call("quant.affine.quantize", x, F32(1), I32(-7), S8, rule).tolist() == [below, -6]
    y, inside = call("quant.affine.fake_quantize", x, F32(1), I32(-7), S8, FakeQuantizeRule(rule, QTX.dequantize))
    assert (y.tolist(), inside.tolist()) == ([below + 7, 1], [False, True])
    narrow = replace(U8, narrow=True)  # 1 to 255
    assert call("quant.affine.quantize", x, F32(1), I32(7), narrow, rule)[0] == max(unsigned, 1)


@pytest.mark.filterwarnings(OLD)
def test_a_scale_without_a_reciprocal_makes_nan_of_0(call):
    """1 / 1e-39 is infinite, and 0 times that NaN: a code of NaN, where the rule has one, as in torch."""
    x, scale = F32([0, 1, -1]), F32(1e-39)
    rule = replace(FUSED, nan=NanPolicy.CODE_MAX)
    want = torch.quantize_per_tensor(torch.tensor(x).repeat(16), float(scale), 7, torch.quint8).int_repr()
    assert call("quant.affine.quantize", x, scale, I32(7), U8, rule).tolist() == want[:3].tolist() == [255, 255, 0]
    y, inside = call("quant.affine.fake_quantize", x, scale, I32(7), U8, FakeQuantizeRule(rule, QTX.dequantize))
    assert y.tolist() == [F32(248) * scale, F32(248) * scale, F32(-7) * scale] and not inside.any()
    with pytest.raises(ValueError, match="and so its reciprocal"):
        call("quant.affine.quantize", x, scale, I32(7), U8, FUSED)


def test_converted_nan_where_the_zero_point_was_added_before(call):
    rule = replace(QTX.quantize, nan=NanPolicy.CONVERTED, zero_point=ZeroPoint.BEFORE)
    assert call("quant.affine.quantize", F32([np.nan]), F32(1), I32(-7), S8, rule).tolist() == [-128]


@pytest.mark.parametrize(
    "beyond, want",
    [  # int8 codes by zero point -7 of 2^31, -2^31, 2^33, 2^63, infinity, -infinity
        (Beyond.SATURATE, [127, -128, 127, 127, 127, -128]),
        (Beyond.WRAP32, [127, 127, 127, 127, 127, 127]),  # INT_MIN - 7 wraps to 2^31 - 7
        (Beyond.INT64, [127, -128, 127, 127, 127, 127]),  # 2^63 becomes INT64_MIN, and INT64_MIN - 7 wraps
    ],
)
def test_beyond(call, beyond, want):
    x = F32([2.0**31, -(2.0**31), 2.0**33, 2.0**63, np.inf, -np.inf])
    rule = replace(QTX.quantize, beyond=beyond)
    assert call("quant.affine.quantize", x, F32(1), I32(-7), S8, rule).tolist() == want
    plain = call("quant.affine.quantize", x, F32(1), I32(7), S8, rule).tolist()  # by zero point 7 nothing wraps
    ends = {Beyond.SATURATE: [], Beyond.WRAP32: [0, 2, 3, 4], Beyond.INT64: [3, 4]}[beyond]
    assert plain == [-128 if i in ends or x[i] < 0 else 127 for i in range(6)]
    y, inside = call("quant.affine.fake_quantize", x, F32(1), I32(-7), S8, FakeQuantizeRule(rule, QTX.dequantize))
    assert y.tolist() == [code + 7 for code in want] and not inside.any()


def test_a_level_that_int32_holds_until_the_zero_point_is_added(call):
    """2^31 - 128, the largest float32 below 2^31, plus 200."""
    x, wrap = F32([2147483520]), replace(QTX.quantize, beyond=Beyond.WRAP32)
    assert call("quant.affine.quantize", x, F32(1), I32(200), U8, wrap).tolist() == [0]
    added = replace(wrap, zero_point=ZeroPoint.AFTER_FLOAT)  # 2^31 in float32, converted after that
    assert call("quant.affine.quantize", x, F32(1), I32(200), U8, added).tolist() == [0]
    assert call("quant.affine.quantize", x, F32(1), I32(100), U8, wrap).tolist() == [255]


def test_torch_s_fake_quantization_is_in_the_vocabulary():
    """Per channel, what lies beyond 2^63 is converted to INT64_MIN; per tensor it saturates. Both sum as floats."""
    x = F32([[np.nan, np.inf, -np.inf, 1e10, -1e10, 1e19, -1e19, 0.5, 1.5]])
    rule = replace(
        QTX.quantize, reciprocal=True, zero_point="after_float", nan=NanPolicy.CODE_MIN, beyond=Beyond.SATURATE
    )
    y, mask = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(torch.tensor(x), 1.0, 7, 0, 255)
    ours, inside = affine.fake_quantize(x, F32(1), I32(7), U8, FakeQuantizeRule(rule, QTX.dequantize))
    np.testing.assert_array_equal(ours, y)
    np.testing.assert_array_equal(inside, mask)
    zero = torch.tensor([7], dtype=torch.int32)
    y = torch.fake_quantize_per_channel_affine(torch.tensor(x), torch.ones(1), zero, 0, 0, 255)
    converted = FakeQuantizeRule(replace(rule, beyond=Beyond.INT64), QTX.dequantize)
    np.testing.assert_array_equal(affine.fake_quantize(x, F32(1), I32(7), U8, converted)[0], y)


def test_nan_and_infinity_are_reported_and_the_rest_is_quantized(call):
    x = F32([[1, np.nan, -3], [np.inf, 2.4, -np.inf]])
    tflite = profiles.profile("tflite").quantize  # raises for both
    codes, broken = call("quant.affine.quantize_reporting", x, F32(1), I32(7), U8, tflite)
    assert codes.tolist() == [[8, 7, 4], [255, 9, 0]]
    assert broken.tolist() == [[False, True, False], [True, False, True]]
    rule = replace(QTX.quantize, nan=NanPolicy.CODE_MAX)
    assert call("quant.affine.quantize_reporting", x, F32(1), I32(7), U8, rule)[0][0].tolist() == [8, 255, 4]
    with pytest.raises(ValueError, match="scale 0.0: "):
        call("quant.affine.quantize_reporting", x, F32(0), I32(7), U8)


# --- over every rule --------------------------------------------------------------------------------------------------


def test_no_code_is_outside_its_spec_under_any_rule(call):
    """All combinations but those of rounding, which the next test draws; codes, and values on the codes' grid."""
    x = F32([0, -0.0, 1, -1, 0.5, 1e10, -1e10, 3e38, -3e38, np.inf, -np.inf, np.nan])
    for adding, reciprocal, arithmetic, nan, beyond in product(
        ZeroPoint, (False, True), Dtype, tuple(NanPolicy)[1:], Beyond
    ):
        if adding is ZeroPoint.FUSED and not (reciprocal and arithmetic is Dtype.FLOAT32):
            continue
        rule = QuantizeRule(Rounding.HALF_EVEN, adding, reciprocal, arithmetic, nan, InfinityPolicy.SATURATE, beyond)
        for spec, zero in ((S8, -7), (U8, 7), (replace(U8, bits=2, narrow=True), 1), (S16, -30720)):
            scale = F32(2.0**-7)
            code = call("quant.affine.quantize", x, scale, I32(zero), spec, rule)
            assert code.min() >= spec.code_min and code.max() <= spec.code_max, rule
            assert code[0] == code[1] == zero
            y, inside = call(
                "quant.affine.fake_quantize", x, scale, I32(zero), spec, FakeQuantizeRule(rule, QTX.dequantize)
            )
            np.testing.assert_array_equal(y, (code - zero) * scale, err_msg=str(rule))
            assert not inside[-1]


RULES = st.builds(
    lambda fused, **fields: QuantizeRule(
        **(
            fields | {"zero_point": ZeroPoint.FUSED, "reciprocal": True, "arithmetic": Dtype.FLOAT32}
            if fused
            else fields
        )
    ),
    fused=st.booleans(),
    rounding=st.sampled_from(Rounding),
    zero_point=st.sampled_from([z for z in ZeroPoint if z is not ZeroPoint.FUSED]),
    reciprocal=st.booleans(),
    arithmetic=st.sampled_from(Dtype),
    nan=st.sampled_from(tuple(NanPolicy)[1:]),
    infinity=st.just(InfinityPolicy.SATURATE),
    beyond=st.sampled_from(Beyond),
)
SPECS = st.builds(
    lambda bits, signed, narrow: QuantSpec(bits, signed=signed, narrow=narrow),
    st.integers(2, 15),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    RULES,
    SPECS,
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.floats(2.0**-14, 2.0**14, width=32),
    st.floats(0, 1),
    st.sampled_from([F32, F16]),
)
def test_any_rule_any_numbers(rule, spec, values, scale, place, kind):
    """No code outside, equal in both backends, and the least and greatest finite numbers at their ends."""
    with np.errstate(over="ignore"):
        x, scale = np.array(values, F32).astype(kind), F16(scale).astype(F32)
    zero = I32(spec.code_min + round(place * (spec.code_max - spec.code_min)))
    words = np.arange(len(values), dtype=np.int64) * 2**28
    code = affine.quantize(x, scale, zero, spec, rule, words)
    assert code.min() >= spec.code_min and code.max() <= spec.code_max
    theirs = importlib.import_module("qtx_torch.quant.affine").quantize(
        torch.tensor(x), torch.tensor(scale), torch.tensor(zero), spec, rule, torch.tensor(words)
    )
    np.testing.assert_array_equal(theirs, code)


# --- scales -----------------------------------------------------------------------------------------------------------


def test_scale_floors_and_empty_ranges(call):
    """The smallest subnormal, torchao's 2^-23, 1 / 255 of nothing."""
    low, high = F32([0, 0, 0]), F32([0, 2.0**-149, 1])
    keep = replace(QTX.scale, floor=2.0**-149)
    assert call("quant.affine.scale_zero", low, high, U8, keep)[0].tolist() == [1, 2.0**-149, F32(1) / F32(255)]
    eps = replace(QTX.scale, floor=2.0**-23, empty=2.0**-23)
    assert call("quant.affine.scale_zero", low, high, U8, eps)[0].tolist() == [2.0**-23, 2.0**-23, F32(1) / F32(255)]
    part = replace(QTX.scale, empty=1 / 255)
    assert call("quant.affine.scale_zero", low, high, U8, part)[0][0] == F32(1 / 255)
    with pytest.raises(ValueError, match="scale .* does not fit float16 in float32; .* or a higher floor"):
        call("quant.affine.scale_zero", low, high, U8, replace(keep, dtype=Dtype.FLOAT16))


def test_a_scale_near_the_end_of_float32_gives_infinities_and_no_warning(call):
    """Expanded, 100 s + 51 s: each infinite where s is 3e38, and of two signs no number."""
    expanded = replace(QTX.dequantize, form=DequantizeForm.EXPANDED)
    y = call("quant.affine.dequantize", I32([100, -100]), F32(3e38), I32(-51), expanded)
    assert y[0] == np.inf and np.isnan(y[1])


# --- casts ------------------------------------------------------------------------------------------------------------

ML_DTYPES = CastRule(0x7E, 8, negative_zero=True, e4m3_saturates=False, e5m2_saturates=False)


@pytest.mark.parametrize(
    "kind, outside",
    [
        (FloatFormat.E5M2, "float8_e5m2"),
        (FloatFormat.E4M3, "float8_e4m3fn"),
        (FloatFormat.E2M1, "float4_e2m1fn"),
    ],
)
def test_casts_are_ml_dtypes_own(call, kind, outside):
    """NaN is 0x7E in E5M2; in E2M1, which has none, minus zero, and plus zero of a negative NaN."""
    x = F32([np.nan, -np.nan, -0.0, 0, 1, -1, -0.1, 464, 465, 61439, -61440, np.inf])
    want = x.astype(getattr(pytest.importorskip("ml_dtypes"), outside)).view(np.uint8)
    assert call("quant.formats.encode", x, kind, None, None, ML_DTYPES).tolist() == want.tolist()
    with pytest.raises(ValueError, match="e2m1 has no NaN"):
        call("quant.formats.encode", x, FloatFormat.E2M1)


def test_minus_zero_through_a_zero_point_is_plus_zero(call):
    """QuantizeLinear adds its zero point, +0, to -0.0; -0.1 rounds to minus zero all the same."""
    x, rule = F32([-0.0, -0.1, 0.0]), replace(ML_DTYPES, negative_zero=False)
    assert call("quant.formats.encode", x, FloatFormat.E2M1, True, None, rule).tolist() == [0, 8, 0]
    assert call("quant.formats.encode", x, FloatFormat.E2M1).tolist() == [8, 8, 0]
    y, _ = call("quant.formats.fake_quantize", F32([np.nan, 7]), FloatFormat.E2M1, True, F32(1), rule)
    assert y.tolist() == [0, 6] and np.signbit(y[0])


def test_codes_of_nan_that_no_format_has_are_refused():
    for wrong in ({"e5m2_nan": 0x7C}, {"e2m1_nan": 16}):
        with pytest.raises(SpecError, match=f"rule {next(iter(wrong))} is"):
            replace(QTX.cast, **wrong)


def test_the_real_valued_ceiling():
    """Of absmax / 448: 448 itself needs 2^0, the next float 2^1, where the ceiling of 448 alone has 2^(9 - 8)."""
    for largest, exponent in ((448, 0), (np.nextafter(F32(448), F32(999)), 1), (449, 1), (224, -1), (1e-45, -127)):
        x = F32([[largest, 0]])
        got, _ = formats.mx_exponent(x, FloatFormat.E4M3, formats.SharedScale.RCEIL, 2)
        assert got.tolist() == [[exponent]]
    assert formats.mx_exponent(F32([[448, 0]]), FloatFormat.E4M3, formats.SharedScale.CEIL, 2)[0].tolist() == [[1]]


def test_every_field_of_a_rule_is_read():
    """Each value of each field of quantize's and dequantize's rules moves a code or a value, or refuses something."""
    x = F32([np.nan, np.inf, -1e10, -1e19, 0.75000006, 2.5, *BESIDE_A_TIE, *np.linspace(-1, 36, 300)])

    words = np.zeros(len(x), np.int64)

    def answer(rule: QuantizeRule, scale: float) -> object:
        try:
            half = scale < 0.2
            given_x = np.clip(x, -65504, 65504).astype(F16) if half else x
            return affine.quantize(given_x, F32(scale), I32(-7), S8, rule, words).tolist()
        except ValueError as error:
            return str(error)

    base = replace(QTX.quantize, nan=NanPolicy.ZERO)
    bases = {"beyond": replace(base, zero_point="after")}
    for field in dataclasses.fields(QuantizeRule):
        start = bases.get(field.name, base)
        kind = type(getattr(start, field.name))
        for value in (False, True) if kind is bool else kind:
            fields = {field.name: value}
            if value is ZeroPoint.FUSED:
                fields["reciprocal"] = True
            if value == getattr(start, field.name) or value in (ZeroPoint.AFTER_FLOAT, Dtype.FLOAT64):
                continue  # which the tests above tell apart
            scales = (1.0, 0.3, 0.1)
            assert [answer(replace(start, **fields), s) for s in scales] != [answer(start, s) for s in scales], fields
