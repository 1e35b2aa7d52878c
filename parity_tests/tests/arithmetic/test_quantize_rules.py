"""Every rule of quantize, dequantize, scale and cast: hand-worked literals, exact fractions, real engines."""

from __future__ import annotations

import importlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx_ref import profiles
from qtx_ref.quant import affine, rounding
from qtx_ref.spec import (
    QTX,
    Beyond,
    DequantizeForm,
    DequantizeRule,
    Dtype,
    FakeQuantizeRule,
    NanPolicy,
    QuantSpec,
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


@settings(max_examples=400)
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
