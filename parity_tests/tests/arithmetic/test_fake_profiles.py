"""Fake quantization under an engine's rules: a site, its gradient, a model, its scales; the default is untouched."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from qtx.data import load
from qtx.prepare import calibration
from qtx.recipes import named as recipes
from qtx_ref import backend as ref_backend
from qtx_ref import numerics as ref_numerics
from qtx_ref import ops
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.quant import affine, quantizer
from qtx_ref.spec import (
    QTX,
    Beyond,
    DequantizeForm,
    FakeQuantizeRule,
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    NanPolicy,
    QuantSpec,
    Range,
    SymmetricScale,
    ZeroPoint,
)
from qtx_ref.tape import Var, backward, const, leaf
from qtx_torch import backend as torch_backend
from qtx_torch import numerics as torch_numerics
from qtx_torch.quant import straight_through

F32, I32 = np.float32, np.int32
QUANTIZE = replace(
    QTX.quantize,
    zero_point=ZeroPoint.FUSED,
    reciprocal=True,
    nan=NanPolicy.CODE_MAX,
    beyond=Beyond.WRAP32,
)
ENGINE = replace(
    QTX,
    name="engine",
    scale=replace(QTX.scale, symmetric=SymmetricScale.ABSMAX_HALF),
    quantize=QUANTIZE,
    fake_quantize=FakeQuantizeRule(QUANTIZE, replace(QTX.dequantize, form=DequantizeForm.EXPANDED)),
    cast=replace(QTX.cast, e2m1_nan=8),
)
STATIC = Range(F32([[-1]]), F32([[1.5]]), F32([[0.01]]), I32([[100]]))
ROWS = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True)
X = np.concatenate([np.random.default_rng(0).standard_normal((6, 16)), [[np.nan, 3e9, -3e9, 0.125] * 4]]).astype(F32)


G = np.random.default_rng(1).standard_normal(X.shape).astype(F32)


def run_ref(spec, range, x, profile):
    """Values and the gradients by x, and by a learned scale and zero point."""
    given = leaf(x)
    learned: dict[str, Var] = {}
    if spec.learned:
        learned = {"a.scale": leaf(range.scale), "a.zero_point": leaf(range.zero_point.astype(F32))}
    y = ref_numerics.FakeQuant({"a": spec}, {"a": range}, learned, profile=profile).apply("a", given, None)
    return [y.value, *backward(ops.total(ops.mul(y, const(G))), [given, *learned.values()])]


def run_torch(spec, range, x, profile):
    """The same."""
    given = torch.tensor(x, requires_grad=True)
    tensors = None if range is None else Range(*map(torch.tensor, range))
    site = torch_numerics.FakeQuant("a", spec, tensors, profile=profile)
    y = site(given, None)
    y.backward(torch.tensor(G))
    return [y.detach().numpy(), given.grad.numpy(), *(parameter.grad.numpy() for parameter in site.parameters())]


@pytest.mark.parametrize("spec", [QuantSpec(), ROWS, QuantSpec(dynamic=True), QuantSpec(learned=True)])
def test_a_site_under_an_engine_s_rules(spec):
    """In both backends the values and the mask of `affine.fake_quantize` under the rule; a dynamic scale by the rule
    too."""
    x = X if not spec.dynamic else np.nan_to_num(X[:6])
    global_g = G[: len(x)]
    with mock.patch(f"{__name__}.G", global_g):
        got, ours = (run(spec, None if spec.dynamic else STATIC, x, ENGINE) for run in (run_ref, run_torch))
    scale, zero = STATIC.scale, STATIC.zero_point
    if spec.dynamic:
        scale, zero = affine.scale_zero(*affine.ranges(x, spec), spec, ENGINE.scale)
        assert spec.symmetric is False or not np.array_equal(scale, quantizer.dynamic_scale(x, spec, None, False)[0])
    want, inside = affine.fake_quantize(x, scale, zero, spec, ENGINE.fake_quantize)
    np.testing.assert_array_equal(got[0], want)
    np.testing.assert_array_equal(got[1], global_g * inside)
    for a, b in zip(got[:2], ours[:2], strict=True):
        np.testing.assert_array_equal(b, a)
    for a, b in zip(got[2:], ours[2:], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)  # sums in another order
    assert not np.array_equal(want, affine.fake_quantize(x, scale, zero, spec)[0])


def test_small_floats_take_the_cast_rule():
    spec = FloatQuantSpec(FloatFormat.E2M1)
    range = Range(F32([-6]), F32([6]), F32([1]), I32([0]))
    for run in (run_ref, run_torch):
        assert np.isnan(run(spec, range, X, QTX)[0]).any()
        assert not np.isnan(run(spec, range, X, ENGINE)[0]).any()


def test_an_engine_without_a_kernel_for_it_quantizes_and_dequantizes():
    seen = replace(ENGINE, fake_quantize=QTX.fake_quantize)
    assert seen.simulated() is seen
    made = replace(seen, unseen=("fake_quantize", "add")).simulated()
    assert made.fake_quantize == FakeQuantizeRule(QUANTIZE, seen.dequantize) and made.unseen == ("add",)


def test_the_default_takes_the_short_kernels():
    """A profile equal to QTX is QTX: no pass is added to a training step."""
    with mock.patch.object(straight_through.Selected, "apply", side_effect=AssertionError):
        same = replace(QTX, name="again")
        site = torch_numerics.FakeQuant(
            "a", QuantSpec(), Range(*map(torch.tensor, STATIC)), profile=replace(same, name="qtx")
        )
        assert site.profile is QTX
        site(torch.tensor(X), None)
        torch_numerics.FakeQuant("a", QuantSpec(), Range(*map(torch.tensor, STATIC)))(torch.tensor(X), None)


def test_a_model_under_an_engine_s_rules():
    """`calibration.bind` makes static scales anew by the profile's rule, and both backends answer near alike."""
    spec = preset("bert-tiny")
    batch = next(iter(load(None, spec).train_batches(spec, 2, seed=0)))
    recipe, params = recipes.recipe("w8a8", spec), init_params(spec, 0)
    losses = []
    for module in (ref_backend, torch_backend):
        model = module.Model(spec, params)
        ranges = calibration.find_ranges(model, [batch], recipe, {})
        one = []
        for profile in (QTX, ENGINE):
            calibration.bind(model, recipe, ranges, None, profile)
            weight = model.ranges()["layer.0.ffn.hidden.weight"]
            absmax = max(-weight.low.min(), weight.high.max())
            want = affine.scale_zero(F32(-absmax), F32(absmax), QuantSpec(symmetric=True), profile.scale)[0]
            np.testing.assert_array_equal(weight.scale.ravel(), want)
            one.append(model.evaluate(batch)[0])
        losses.append(one)
    (qtx, engine), theirs = losses
    assert qtx != engine
    np.testing.assert_allclose(theirs, [qtx, engine], rtol=1e-4)  # float noise flips a code here and there
