"""Every rule of quantizing, scales and casts against exact fractions, in both backends."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx_ref.quant import affine, formats
from qtx_ref.spec import (
    QTX,
    Beyond,
    CastRule,
    DequantizeForm,
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
S8, U8, S16 = QuantSpec(signed=True), QuantSpec(), QuantSpec(16, signed=True)
BESIDE_A_TIE = (92.19264221191406, 184.38247680664062)  # x / s + 128 is 128.50000763 and 2^-47


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


@settings(max_examples=150)
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
