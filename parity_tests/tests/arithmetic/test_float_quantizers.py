"""Small floats and MX blocks as quantizers of a model's sites: hand-worked values, gradients, recipes, refusals."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch

from parity_tests.tests.shell import good
from qtx.recipes import named as recipes
from qtx_ref import numerics, ops
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.quant import formats, quantizer, rounding
from qtx_ref.quant.observers import Observer
from qtx_ref.random import stream
from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    ObserverKind,
    ObserverSpec,
    QuantSpec,
    Recipe,
    Rule,
    SharedScale,
    SpecError,
    from_dict,
    to_dict,
)
from qtx_ref.tape import backward, leaf
from qtx_torch import numerics as torch_numerics
from qtx_torch.quant import quantizer as torch_quantizer

F32 = np.float32
E4M3, E5M2, E2M1 = FloatFormat


def blocks(form: FloatFormat, **settings) -> FloatQuantSpec:
    return FloatQuantSpec(form, granularity=Granularity.BLOCK, dynamic=True, **settings)


@pytest.mark.parametrize(
    "form, saturate, want, inside",
    [  # of x = -896, 928, 930, 1, 0.75 and infinity by scale 2: halves are -448, 464, 465, 0.5, 0.375
        (E4M3, True, [-896, 896, 896, 1, 0.75, 896], [1, 1, 0, 1, 1, 0]),
        (E4M3, False, [-896, 896, np.nan, 1, 0.75, np.nan], [1, 1, 0, 1, 1, 0]),
        (E5M2, False, [-896, 896, 896, 1, 0.75, np.inf], [1, 1, 1, 1, 1, 0]),
    ],
)
def test_values_and_gradient_mask_by_hand(call, form, saturate, want, inside):
    x = F32([-896, 928, 930, 1, 0.75, np.inf])
    y, passes = call("quant.quantizer.fake_quantize", x, F32(2), np.int32(0), FloatQuantSpec(form, saturate))
    np.testing.assert_array_equal(y, F32(want))
    assert passes.tolist() == [bool(one) for one in inside]


@pytest.mark.parametrize("form, largest", [(E4M3, 448), (E5M2, 57344), (E2M1, 6)])
def test_a_scale_takes_the_largest_magnitude_to_the_largest_value(call, form, largest):
    low, high = F32([-3, -1, 0, 2]), F32([1, 5, 0, 4])
    scale, zero = call("quant.quantizer.scale_zero", low, high, FloatQuantSpec(form))
    np.testing.assert_array_equal(scale, np.append(F32([3, 5]) / F32(largest), [F32(1), F32(4) / F32(largest)]))
    assert zero.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="not finite"):
        call("quant.quantizer.scale_zero", F32(0), F32(np.inf), FloatQuantSpec(form))


@pytest.mark.parametrize("form", FloatFormat)
def test_what_rounds_to_the_largest_value_passes_a_gradient(call, form):
    """The limit is where the unsaturated code would be the next one: from above, halfway, ties to even."""
    layout = formats.LAYOUTS[form]
    limit = F32(layout.limit)
    tie = layout.maximum + 2.0 ** (layout.emax - layout.mantissa - 1)
    x = np.array([layout.maximum, limit, np.nextafter(limit, F32(np.inf)), -limit], F32)
    assert limit == (tie if layout.largest % 2 == 0 else np.nextafter(F32(tie), F32(0)))
    y, inside = call("quant.formats.fake_quantize", x, form)
    assert inside.tolist() == [True, True, False, True]
    np.testing.assert_array_equal(np.abs(y), F32([layout.maximum] * 4))


@pytest.mark.parametrize("form", FloatFormat)
@pytest.mark.parametrize("rule", SharedScale)
def test_a_site_of_blocks_holds_what_an_mx_file_would(call, form, rule):
    """The values under fake quantization are those of the element codes and E8M0 scales."""
    rng = stream(0, "mx sites", form, rule)
    x = (rng.standard_normal((40, 64)) * 2.0 ** rng.integers(-140, 120, (40, 1))).astype(F32)
    x[0], x[1, :32], x[2, 5], x[3, 40] = 0, 0, np.nan, np.inf
    spec = blocks(form, shared=rule)
    scale, zero = call("quant.quantizer.dynamic_scale", x, spec, None, False)
    y, inside = call("quant.quantizer.fake_quantize", x, scale, zero, spec)
    np.testing.assert_array_equal(y, formats.mx_dequantize(*formats.mx_quantize(x, form, rule), form))
    again = call("quant.formats.mx_fake_quantize", x, form, rule)
    np.testing.assert_array_equal(y, again[0])
    np.testing.assert_array_equal(inside, again[1])
    assert not inside[2, :32].any() and inside[2, 32:].any()  # a block with NaN passes nothing


@pytest.mark.parametrize("spec", [FloatQuantSpec(E4M3), FloatQuantSpec(E5M2, False), blocks(E2M1, block=2)])
def test_straight_through_gradient_of_both_backends(spec):
    """0 where it saturates, the gradient itself elsewhere; in torch also under bfloat16."""
    x = F32([[1.0, -2.5, 7.5, 1.0, 500.0, 0.1, -0.7, 70000.0]])
    scale, zero = np.ones_like(x), np.zeros(x.shape, np.int32)
    held = leaf(x)
    y = numerics.fake_quantize(held, scale, zero, spec)
    (dx,) = backward(ops.total(y), [held])
    largest = formats.LAYOUTS[spec.format].limit
    np.testing.assert_array_equal(dx, (np.abs(x) <= largest).astype(F32))
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.tensor(x, dtype=dtype, requires_grad=True)
        z = torch_numerics.fake_quantize(given, torch.tensor(scale), torch.tensor(zero), spec)
        z.sum().backward()
        assert z.dtype == given.grad.dtype == dtype
        np.testing.assert_array_equal(given.grad.float().numpy(), dx)
    np.testing.assert_array_equal(z.detach().float().numpy(), y.value)  # every value here is one of bfloat16


def test_gradient_mask_of_sixteen_bits_in_bfloat16():
    """32768 is beyond the codes and 32512 is not; bfloat16 has no number between."""
    x = torch.tensor([32768.0, 32512.0, -32768.0, -33024.0], dtype=torch.bfloat16, requires_grad=True)
    spec, zero = QuantSpec(16, symmetric=True), torch.tensor(0, dtype=torch.int32)
    torch_numerics.fake_quantize(x, torch.tensor(1.0), zero, spec).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("spec", [QuantSpec(), FloatQuantSpec(E4M3), FloatQuantSpec(E2M1), blocks(E2M1, block=1)])
def test_nan_stays_nan_in_training(spec):
    x, scale, zero = F32([np.nan, 1]), F32([1, 1]), np.int32([0, 0])
    ours = torch_numerics.fake_quantize(*map(torch.tensor, (x, scale, zero)), spec).numpy()
    for y in (ours, numerics.fake_quantize(leaf(x), scale, zero, spec).value):
        np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("kind", [ObserverKind.CURRENT, ObserverKind.MSE_GRID])
def test_a_calibrated_float(kind):
    """Min and max, or the range whose squared error is least: one value far out is cut off where many lie close."""
    observer = Observer(FloatQuantSpec(E2M1, observer=ObserverSpec(kind)))
    x = np.append(stream(0, "float").uniform(-1, 1, 4000), 4).astype(F32)
    observer.update(x)
    low, high = (end.item() for end in observer.range())
    assert (high == 4 and low < 0) if kind is ObserverKind.CURRENT else 0.9 < high < 2.5


def test_a_float_travels_as_json_and_is_told_from_codes():
    for quant in (
        FloatQuantSpec(E5M2, False),
        blocks(E2M1),
        blocks(E4M3, block=16, shared=SharedScale.EVEN),
        QuantSpec(4),
    ):
        recipe = Recipe("r", (Rule(("*",), quant, "a test"),))
        assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert (blocks(E4M3).block, blocks(E4M3).shared) == (32, SharedScale.FLOOR)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"format": "e4m3", "bits": 8}, "unknown key in Rule.quant is 'bits'"),
        ({"format": "e4m3", "learned": True}, "unknown key in Rule.quant is 'learned'"),
        ({"format": "e4m3", "symmetric": True}, "unknown key in Rule.quant is 'symmetric'"),
        ({"format": "e3m4"}, "known values are e4m3, e5m2, e2m1"),
        ({"format": "e4m3", "granularity": "group"}, "a small float has tensor, channel, token or block"),
        ({"format": "e4m3", "granularity": "token"}, "a range per token is dynamic"),
        ({"format": "e4m3", "granularity": "block"}, "a range per block is dynamic"),
        ({"format": "e4m3", "block": 32}, "they belong to granularity block"),
        ({"format": "e4m3", "granularity": "block", "dynamic": True, "block": 0}, "at least 1"),
        ({"format": "e2m1", "saturate": False}, "always saturate"),
        ({"bits": 8, "shared": "floor"}, "unknown key in Rule.quant is 'shared'"),
        ("e4m3", "expected an object"),
    ],
)
def test_what_cannot_be_is_refused(data, message):
    with pytest.raises(SpecError, match=message):
        from_dict(Rule, {"sites": ["*"], "quant": data, "source": "a test"})


@pytest.mark.parametrize(
    "quant, site, message",
    [
        (QuantSpec(granularity=Granularity.GROUP, groups=3), "layer.1.attn.value", "not divide its 128 channels"),
        (QuantSpec(granularity=Granularity.GROUP, groups=2), "embed.norm.weight", "not divide its 1 channels"),
        (QuantSpec(granularity=Granularity.GROUP, groups=2), "layer.0.attn.probs", "whose last axis is the keys"),
        (blocks(E4M3, block=48), "layer.0.ffn.hidden.weight", "not divide its last axis of 128"),
        (blocks(E4M3), "layer.0.attn.scores", "whose last axis is the keys"),
        (blocks(E4M3), "layer.0.attn.context.lhs", "whose last axis is the keys"),
        (FloatQuantSpec(E4M3, granularity=Granularity.CHANNEL), "layer.0.attn.scores", "whose last axis is the keys"),
    ],
)
def test_groups_and_blocks_that_a_site_does_not_have(quant, site, message):
    with pytest.raises(SpecError, match=message) as caught:
        recipes.resolve(Recipe("mine", (Rule((site,), quant, "a test"),)), preset("bert-tiny"))
    assert site in str(caught.value)


def test_named_recipes_fit_every_preset():
    """MX leaves out what 32 does not divide; FP8 covers what w8a8 covers."""
    for name in ("bert-tiny", "opt-tiny", "vit-tiny", "bert-base", "opt-350m", "vit-s16"):
        spec = preset(name)
        integer = recipes.resolve(recipes.recipe("w8a8", spec), spec)
        for kind, form in recipes.FLOATS.items():
            got = recipes.resolve(recipes.recipe(kind, spec), spec)
            assert {quant.format for quant in got.values()} == {form}
            if kind.startswith("fp8"):
                assert got.keys() == integer.keys()
            else:
                assert {"layer.0.ffn.hidden.input", "layer.0.ffn.hidden.weight"} <= got.keys()
                assert not any(site.endswith((".norm.weight", ".context.rhs")) for site in got)


@pytest.mark.parametrize("name", recipes.FLOATS)
def test_generation_sees_no_future(name):
    """A block lies within one token, so cached generation is allowed and both backends write the same text."""
    spec = preset("opt-tiny")
    params, prompt, texts = init_params(spec, 0), np.arange(6)[None, :] + 40, []
    chosen = recipes.recipe(name, spec)
    quants = recipes.resolve(chosen, spec)
    batch = {"tokens": prompt, "mask": prompt > 0, "targets": prompt}
    for package in ("qtx_ref", "qtx_torch"):
        model = importlib.import_module(f"{package}.backend").Model(spec, params)
        model.bind(quants, model.calibrate([batch], quants))
        texts.append(model.generate(prompt, 4, lambda logits: logits.argmax(axis=-1)).tolist())
    assert texts[0] == texts[1]


TINY = ("--model", "vit-tiny", "--batch", 8, "--steps", 6, "--backend", "ref")


@pytest.mark.parametrize("name", ["fp8-e4m3", "mxfp4"])
def test_commands(tmp_path, name):
    """Train under the format, quantize, evaluate the file in both backends."""
    good("train", *TINY, "--train-quant", name, "--out", tmp_path)
    file = tmp_path / "q.safetensors"
    good("quantize", tmp_path, "--backend", "ref", "--recipe", name, "--out", file)
    evaluate = ("evaluate", file, "--batches", 2, "--json", "-", "--backend")
    losses = [json.loads(good(*evaluate, backend).stdout)["loss"] for backend in ("ref", "torch")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # codes flip near ties


def test_a_study_has_a_column_for_each_format(tmp_path):
    names = ("fp8-e4m3", "mxfp4")
    printed = good("study", *TINY, "--attention", "vanilla", "--bits", ",".join(names), "--out", tmp_path).stdout
    assert all(f"| {name} acc %" in printed for name in names)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("kind", [Granularity.TENSOR, Granularity.TOKEN, Granularity.CHANNEL, Granularity.GROUP])
def test_what_needs_no_clamping_has_the_references_codes(bits, kind):
    """Symmetric ranges of the tensor itself, at magnitudes down to float32's smallest: the reference clamps, and finds
    every code inside."""
    spec = QuantSpec(bits, True, kind, dynamic=True, groups=2 if kind is Granularity.GROUP else None)
    hook = torch_numerics.FakeQuant("here", spec, None)
    for seed, size in enumerate((1e-45, 3e-39, 2.0**-126, 1e-6, 1.0, 7e4, 3e38)):
        x = (stream(seed, "unclamped", bits).uniform(-1, 1, (3, 5, 8)) * size).astype(F32)
        held = torch.tensor(x, requires_grad=True)
        scale, zero = quantizer.dynamic_scale(x, spec, None, False)
        y, inside = quantizer.fake_quantize(x, scale, zero, spec)
        z = hook(held, None)
        z.backward(torch.tensor(x))
        assert torch_quantizer.holds_all(spec, None) and inside.all()
        np.testing.assert_array_equal(z.detach().numpy(), y)
        np.testing.assert_array_equal(held.grad.numpy(), x)


def test_what_may_need_clamping_is_clamped():
    """An asymmetric range whose rounded ends are 256 steps apart; a range of fewer elements than are quantized."""
    x, where = torch.tensor([[-1.5, 253.5]]), torch.tensor([[True, False]])
    spec = QuantSpec(8, False, Granularity.TOKEN, dynamic=True)
    assert not torch_quantizer.holds_all(spec, None)
    level = rounding.round_level(x.numpy(), *quantizer.dynamic_scale(x.numpy(), spec, None, False))
    assert level.min() == spec.code_min and level.max() == spec.code_max + 1
    tensor = QuantSpec(8, True, Granularity.TENSOR, dynamic=True)
    assert not torch_quantizer.holds_all(tensor, where)
    held = x.clone().requires_grad_()
    torch_numerics.FakeQuant("here", tensor, None)(held, where).sum().backward()
    assert held.grad.tolist() == [[1, 0]]
