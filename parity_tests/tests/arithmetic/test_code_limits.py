"""No code leaves its spec, and a scale or zero point that no quantizer has is refused by value, in both backends."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest

from qtx_ref.presets import preset
from qtx_ref.quant import affine
from qtx_ref.quant.rounding import SMALLEST
from qtx_ref.spec import (
    QTX,
    Dtype,
    FakeQuantizeRule,
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    NanPolicy,
    QuantSpec,
    Range,
    Rounding,
    SpecError,
    ZeroPoint,
)

I32, F32 = np.int32, np.float32
S8, U8 = QuantSpec(symmetric=True), QuantSpec()
E4M3, E2M1 = FloatQuantSpec(FloatFormat.E4M3), FloatQuantSpec(FloatFormat.E2M1)
OUTLIERS = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True, outliers=6.0)
BLOCKS = FloatQuantSpec(FloatFormat.E4M3, granularity=Granularity.BLOCK, dynamic=True)
RECIPROCAL = replace(QTX.quantize, reciprocal=True)
X = F32([0, 1, -1, 3e38, -np.inf, np.inf])
SCALES = F32([np.nan, 0, -0.5, np.inf, -np.inf])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rule", [QTX.quantize, RECIPROCAL, replace(QTX.quantize, nan=NanPolicy.ZERO)])
def test_a_scale_that_is_no_step_is_refused(call, scale, rule):
    """NaN, 0 at x = 0 and infinity at x = infinity gave the code -2147483648."""
    for function, whole in (("quantize", rule), ("fake_quantize", FakeQuantizeRule(rule, QTX.dequantize))):
        with pytest.raises(ValueError, match=f"scale {scale}: in float32 it must be a finite number above 0"):
            call(f"quant.affine.{function}", X, scale, I32(0), S8, whole)
    with pytest.raises(ValueError, match=f"scale {scale}: "):
        call("quant.affine.dequantize", I32([1]), scale, I32(0))
    mixed = np.where(np.arange(6) == 3, scale, 1).astype(F32)
    with pytest.raises(ValueError, match=f"scale {scale}: "):
        call("quant.affine.quantize", X, mixed, I32(0), S8, rule)


def test_a_scale_without_a_reciprocal(call):
    """1e-39 divides, but 1 / 1e-39 is infinite in float32, and 0 times it NaN."""
    tiny = F32(1e-39)
    assert call("quant.affine.quantize", X, tiny, I32(0), S8).tolist() == [0, 127, -128, 127, -128, 127]
    for function, whole in (("quantize", RECIPROCAL), ("fake_quantize", FakeQuantizeRule(RECIPROCAL, QTX.dequantize))):
        with pytest.raises(ValueError, match="scale 1.*e-39: in float32 it must be .*, and so its reciprocal"):
            call(f"quant.affine.{function}", X, tiny, I32(0), S8, whole)
    assert call("quant.affine.quantize", X, F32(2.0**-126), I32(0), S8, RECIPROCAL).tolist() == [
        0,
        127,
        -128,
        127,
        -128,
        127,
    ]


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_a_scale_is_judged_in_the_arithmetic(call, scale):
    """float16 makes 0 of 1e-9 and infinity of 1e6."""
    with pytest.raises(ValueError, match="in float16 it must be a finite number above 0"):
        call("quant.affine.quantize", X, F32(scale), I32(0), S8, replace(QTX.quantize, arithmetic=Dtype.FLOAT16))


@pytest.mark.parametrize("spec, zeros", [(U8, (-5, -1, 256, 2**31 - 1)), (S8, (-129, 128, -(2**31)))])
def test_a_zero_point_is_a_code(call, spec, zeros):
    for zero in zeros:
        for function in ("quantize", "fake_quantize"):
            with pytest.raises(ValueError, match=f"zero point {zero} is outside {spec.code_min} to {spec.code_max}"):
                call(f"quant.affine.{function}", X, F32(1), I32(zero), spec)
    narrow = replace(spec, narrow=True)
    with pytest.raises(ValueError, match=f"zero point {spec.code_min} is outside"):
        call("quant.affine.quantize", X, F32(1), I32(spec.code_min), narrow)
    with pytest.raises(ValueError, match="zero point has dtype float32"):
        call("quant.affine.quantize", X, F32(1), F32(0.5), spec)


@pytest.mark.parametrize("rounding", list(Rounding))
@pytest.mark.parametrize("adding", [ZeroPoint.AFTER, ZeroPoint.BEFORE])
@pytest.mark.parametrize("reciprocal", [False, True])
def test_no_code_is_outside_its_spec(call, rounding, adding, reciprocal):
    """The smallest and the largest scale that pass, at zero and at both infinities."""
    words = np.full(6, 7, np.uint32)
    for spec in (S8, U8, QuantSpec(bits=2), QuantSpec(bits=16), QuantSpec(bits=16, symmetric=True, narrow=True)):
        for dtype, ends in ((Dtype.FLOAT32, (2.0**-126, 3.4e38)), (Dtype.BFLOAT16, (2.0**-126, 3.3e38))):
            rule = replace(
                QTX.quantize,
                arithmetic=dtype,
                rounding=rounding,
                zero_point=adding,
                reciprocal=reciprocal,
                nan=NanPolicy.ZERO,
            )
            for scale in ends:
                for zero in (spec.code_min, spec.code_max):
                    x = np.where(np.arange(6) == 2, np.nan, X).astype(F32)
                    code = call("quant.affine.quantize", x, F32(scale), I32(zero), spec, rule, words)
                    assert spec.code_min <= code.min() and code.max() <= spec.code_max
                    assert code[0] == code[2] == zero and code[4] == spec.code_min and code[5] == spec.code_max


@pytest.mark.parametrize("spec", [S8, U8, E4M3, E2M1])
def test_a_range_reversed_is_refused(call, spec):
    """2 to -1 had the scale 1, as a range of zero length has."""
    module = "quant.formats" if isinstance(spec, FloatQuantSpec) else "quant.affine"
    for low, high in ((2, -1), ([0, 2], [1, -1])):
        with pytest.raises(ValueError, match=r"range 2.0 to -1.0: its low end is above its high end"):
            call(f"{module}.scale_zero", F32(low), F32(high), spec)
    with pytest.raises(ValueError, match="is not finite"):
        call(f"{module}.scale_zero", F32(np.nan), F32(1), spec)


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("arithmetic", list(SMALLEST))
@pytest.mark.parametrize("stored", list(SMALLEST))
def test_what_scale_zero_makes_is_a_quantizer(call, reciprocal, arithmetic, stored):
    """So that a training step need not look."""
    rule = replace(QTX.quantize, reciprocal=reciprocal, arithmetic=arithmetic)
    made = replace(QTX.scale, arithmetic=arithmetic, dtype=stored, floor=max(SMALLEST[arithmetic], SMALLEST[stored]))
    ends = F32([0, 1e-45, 1e-40, 1e-38, 1e-6, 1, 2e4])  # twice 2e4 is still a float16
    for spec in (S8, QuantSpec(bits=2), QuantSpec(bits=8, narrow=True)):
        for low, high in ((-ends, ends), (-ends, ends * 0), (ends * 0, ends), (ends, ends)):
            scale, zero = call("quant.affine.scale_zero", low, high, spec, made)
            assert call("quant.affine.quantize", ends * 0, scale, zero, spec, rule).tolist() == zero.tolist()


@pytest.mark.parametrize("kind", list(FloatFormat))
def test_scales_and_codes_of_small_floats(call, kind):
    x = F32([0, 1, -1, 3e38])
    for scale in SCALES:
        with pytest.raises(ValueError, match=f"scale {scale}: "):
            call("quant.formats.fake_quantize", x, kind, True, scale)
        with pytest.raises(ValueError, match=f"scale {scale}: "):
            call("quant.quantizer.quantize", x, scale, I32(0), FloatQuantSpec(kind))
    last = 15 if kind is FloatFormat.E2M1 else 255
    assert call("quant.formats.decode", I32([0, last]), kind).shape == (2,)
    for code in (-1, last + 1, -(2**31)):
        with pytest.raises(ValueError, match=f"code {code} is outside 0 to {last}"):
            call("quant.formats.decode", I32([code]), kind)
    with pytest.raises(ValueError, match="scale code 256 is outside 0 to 255"):
        call("quant.formats.mx_dequantize", I32([256]), np.zeros(32, np.uint8), kind)
    with pytest.raises(ValueError, match=r"scales of shape \(3,\) do not fit codes of shape \(32,\)"):
        call("quant.formats.mx_dequantize", np.zeros(3, np.uint8), np.zeros(32, np.uint8), kind)


def test_a_block_s_scale_is_a_power_of_two_or_its_nan(call):
    x = np.ones((1, 32), F32)
    x[0, 3] = np.nan
    scale, zero = call("quant.quantizer.dynamic_scale", x, BLOCKS, None, False)
    assert np.isnan(call("quant.quantizer.fake_quantize", x, scale, zero, BLOCKS)[0]).all()
    for wrong in (3.0, 0.0, -1.0, np.inf, 2.0**-128):
        with pytest.raises(ValueError, match=f"scale {F32(wrong).item()} of a block"):
            call("quant.quantizer.fake_quantize", x, np.full((1, 32), wrong, F32), zero, BLOCKS)


def test_scale_0_beside_outliers_says_float_and_nothing_else_may(call):
    x = F32([[7, 0.5, -1], [0.25, 1, 2]])
    scale, zero = call("quant.quantizer.dynamic_scale", x, OUTLIERS, None, False)
    assert (scale == 0).tolist() == [[True, False, False]] * 2
    y, inside = call("quant.quantizer.fake_quantize", x, scale, zero, OUTLIERS)
    assert y[:, 0].tolist() == [7, 0.25] and inside.all()
    assert call("quant.quantizer.quantize", x, scale, zero, OUTLIERS)[:, 0].tolist() == [0, 0]
    for wrong in (np.nan, -1, np.inf):
        broken = np.where(np.arange(3) == 1, F32(wrong), scale)
        for function in ("quantize", "fake_quantize"):
            with pytest.raises(ValueError, match=f"scale {F32(wrong)}: "):
                call(f"quant.quantizer.{function}", x, broken, zero, OUTLIERS)
    with pytest.raises(ValueError, match=r"scale 0.0: "):
        call("quant.quantizer.fake_quantize", x, scale, zero, replace(OUTLIERS, outliers=None))


def test_scales_of_the_wrong_axis_are_refused(call):
    """x (1, 3) by scales (3, 1) gave (3, 3)."""
    scale, zero, x = np.ones((3, 1), F32), np.zeros((3, 1), I32), np.ones((1, 3), F32)
    for function in ("quantize", "fake_quantize"):
        for pair in ((scale, I32(0)), (F32(1), zero)):
            with pytest.raises(ValueError, match=r"of shape \(3, 1\) does not fit shape \(1, 3\)"):
                call(f"quant.affine.{function}", x, *pair, S8)
    with pytest.raises(ValueError, match=r"of shape \(3, 1\) does not fit shape \(1, 3\)"):
        call("quant.affine.dequantize", x.astype(I32), scale, I32(0))
    with pytest.raises(ValueError, match=r"of shape \(3, 1\) does not fit shape \(1, 3\)"):
        call("quant.formats.fake_quantize", x, FloatFormat.E4M3, True, scale)


def test_dequantize_takes_codes_and_holds_their_differences(call):
    """-2^31 - 1 wrapped to 2^31 - 1."""
    assert call("quant.affine.dequantize", I32([-(2**31)]), F32(1), I32(1)).tolist() == [-(2.0**31)]
    assert call("quant.affine.dequantize", np.int64([2**40]), F32(1), I32(0)).tolist() == [2.0**40]
    with pytest.raises(ValueError, match="code has dtype float32: codes are integers"):
        call("quant.affine.dequantize", F32([1.5]), F32(1), I32(0))


@pytest.mark.parametrize("backend", ["qtx_ref", "qtx_torch"])
def test_bind_refuses_a_static_range_that_is_no_quantizer(backend):
    spec = preset("bert-tiny")
    module = importlib.import_module(f"{backend}.backend")
    model = module.Model(spec, importlib.import_module("qtx_ref.models.initial").init_params(spec, 0))
    site, one = "layer.0.ffn.output", np.ones((1, 1, 1), F32)
    good = Range(-one, one, *affine.scale_zero(-one, one, U8))
    model.bind({site: U8}, {site: good})
    for broken, match in (
        (good._replace(scale=one * np.nan), "scale nan"),
        (good._replace(scale=one * 0), "scale 0.0"),
        (good._replace(zero_point=np.full((1, 1, 1), 300, I32)), "zero point 300 is outside 0 to 255"),
    ):
        with pytest.raises(SpecError, match=f"site {site}: {match}"):
            model.bind({site: U8}, {site: broken})
