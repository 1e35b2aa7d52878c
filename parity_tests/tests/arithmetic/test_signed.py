"""Signedness is a field of its own: int8 codes with a zero point are calibrated, faked, lowered and run."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from parity_tests.subjects.integer_models import record_run
from qtx.data import load
from qtx.recipes import named as recipes
from qtx_ref import backend
from qtx_ref.integer.lowering import lower
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import QTX, QuantSpec, SpecError, from_dict, to_dict
from qtx_torch.backend import IntegerModel

F32, I32 = np.float32, np.int32
INT8 = QuantSpec(signed=True)


def test_codes_follow_the_sign():
    assert (INT8.code_min, INT8.code_max) == (-128, 127)
    assert (replace(INT8, narrow=True).code_min, replace(INT8, bits=16).code_max) == (-127, 32767)
    same = QuantSpec(symmetric=True)
    assert replace(same, signed=True).code_min == same.code_min and QuantSpec(signed=False).code_max == 255
    with pytest.raises(SpecError, match="quantizer signed is False: a symmetric quantizer's codes are signed"):
        QuantSpec(symmetric=True, signed=False)
    with pytest.raises(SpecError, match="quantizer signed is True: mirrored"):
        QuantSpec(mirrored=True, signed=True)


def test_files_of_before_have_no_sign():
    data = to_dict(INT8)
    assert data["signed"] is True and from_dict(QuantSpec, data) == INT8
    del data["signed"]
    assert from_dict(QuantSpec, data) == QuantSpec() and QuantSpec().signed is None


def test_int8_with_a_zero_point(call):
    """-1 to 1.55 in steps of 0.01: real 0 is 100 codes above the lowest, -28."""
    scale, zero = call("quant.affine.scale_zero", F32([-1]), F32([1.55]), INT8)
    assert (scale.tolist(), zero.tolist()) == ([F32(2.55) / F32(255)], [-28])
    x = F32([-9, -1, 0, 0.014, 1.55, 9])
    codes = call("quant.affine.quantize", x, scale, zero, INT8)
    assert codes.tolist() == [-128, -128, -28, -27, 127, 127]
    unsigned = call("quant.affine.quantize", x, scale, zero + 128, QuantSpec())
    assert (codes + 128).tolist() == unsigned.tolist()
    y, inside = call("quant.affine.fake_quantize", x, scale, zero, INT8)
    np.testing.assert_array_equal(y, call("quant.affine.dequantize", codes, scale, zero))
    assert inside.tolist() == [False, True, True, True, True, False]
    with pytest.raises(ValueError, match="zero point 200 is outside -128 to 127"):
        call("quant.affine.quantize", x, scale, I32(200), INT8)


def test_products_of_int8_with_zero_points(call):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (5, 33)), rng.integers(-128, 128, (33, 7))
    want = (a - 11) @ (b + 90)
    got = call("integer.products.matmul", a.astype(np.int8), b.astype(np.int8), INT8, INT8, I32(11), I32(-90), None, 32)
    np.testing.assert_array_equal(got, want)
    none = call("integer.products.matmul", a.astype(np.int8), b.astype(np.int8), INT8, INT8)  # no zero point: it is 0
    np.testing.assert_array_equal(none, a @ b)


@pytest.mark.parametrize("name", ["bert-tiny", "vit-tiny"])
def test_a_model_of_int8_activations(name):
    """Every code of a signed model is the unsigned one's less 128, in both backends."""
    spec = preset(name)
    batches = list(islice(load(None, spec).train_batches(spec, 1, seed=0), 2))
    params = init_params(spec, 0)
    quants = recipes.resolve(recipes.recipe("w8a8", spec), spec)
    signed = {site: quant if quant.symmetric else replace(quant, signed=True) for site, quant in quants.items()}
    assert sum(quant.has_sign and not quant.symmetric for quant in signed.values()) > 20
    runs = []
    for these in (quants, signed):
        ranges = backend.Model(spec, params).calibrate(batches, these)
        constants = lower(spec, params, these, ranges, QTX)
        models = [kind(spec, constants, these, QTX) for kind in (backend.IntegerModel, IntegerModel)]
        runs.append([dict(record_run(model, batches[0]).sites) for model in models])
    (unsigned, _), (ours, theirs) = runs
    moved = 0
    for site, code in unsigned.items():
        np.testing.assert_array_equal(ours[site], theirs[site])
        down = 128 * (site in signed and not signed[site].symmetric)
        np.testing.assert_array_equal(ours[site].astype(I32), code.astype(I32) - down)
        moved += bool(down)
    assert moved > 20
