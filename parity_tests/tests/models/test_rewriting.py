"""Weights rewritten to lie better on their grid, in whole models: what they gain, and what they leave as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from parity_tests.subjects import small_models
from parity_tests.tests.models.test_transforms import FOLDED, MACHINES, batches_of, hadamard, prepared, smooth, weights
from qtx.jobs.training import Machine
from qtx.prepare import calibration
from qtx.prepare import rewriting as preparation
from qtx.recipes import named as recipes
from qtx.recipes.named import resolve
from qtx.recipes.sites import linears
from qtx_ref.integer.lowering import lower
from qtx_ref.quant import affine, rewriting
from qtx_ref.quant.rounding_choice import row_errors
from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    QuantSpec,
    Recipe,
    Rewrite,
    Rule,
    SpecError,
)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.backend)
def test_a_recipe_without_remedies_takes_the_steps_it_always_took(machine: Machine) -> None:
    small, recipe = small_models.build("opt_plain"), weights(8)
    recipe = replace(recipe, rules=(Rule(("*",), QuantSpec(), "a test"), *recipe.rules))
    found = prepared("opt_plain", recipe, machine)
    model = machine.model(small.spec, small.params)
    want = model.calibrate(batches_of("opt_plain"), resolve(recipe, small.spec))
    assert set(found.ranges) == set(want) and not found.transforms
    for site, range in want.items():
        for got, part in zip(found.ranges[site], range, strict=True):
            np.testing.assert_array_equal(got, part)
    assert all(
        found.params[key] is not None and (found.params[key] == value).all() for key, value in small.params.items()
    )
    calibration.bind(model, recipe, want)
    np.testing.assert_array_equal(
        found.model(machine, small.spec, recipe).forward(small.batch), model.forward(small.batch)
    )


@pytest.mark.parametrize("how", [Rewrite.GPTQ, Rewrite.ADAROUND])
@pytest.mark.parametrize("name", ["bert_gate_mlp", "opt_gate_linear"])
def test_rewritten_weights_stand_on_the_grid_of_the_ranges_before(name: str, how: Rewrite) -> None:
    """And every linear errs less on its inputs, those after its transform, than rounding to nearest does."""
    plain, recipe = weights(3, hadamard("*.ffn.hidden")), weights(3, hadamard("*.ffn.hidden"), how=how)
    before, after = (prepared(name, one, MACHINES[1]) for one in (plain, recipe))
    given = prepared(name, recipe, MACHINES[1], ranges=before.ranges)
    spec = small_models.specs()[name]
    model = MACHINES[1].model(spec, before.params)
    model.bind({}, {}, transforms=before.transforms)
    sites = [site for site in linears(spec) if site.startswith("layer.")]
    seen = [model.input_moments(batch, sites) for batch in batches_of(name)]
    lower = 0
    for site in sites:
        key, quant = f"{site}.weight", resolve(recipe, spec)[f"{site}.weight"]
        for got, want in zip(after.ranges[key], before.ranges[key], strict=True):
            np.testing.assert_array_equal(got, want)
        made, _ = affine.fake_quantize(after.params[key], after.ranges[key].scale, after.ranges[key].zero_point, quant)
        np.testing.assert_array_equal(made, after.params[key])
        np.testing.assert_array_equal(given.params[key], after.params[key])
        nearest = rewriting.simulate_weight(before.params[key], quant, before.ranges[key])
        if made.ndim == 2:
            gram = sum(moments[site]["gram"] for moments in seen)
            errors = [row_errors(w - before.params[key].astype(np.float64), gram) for w in (made, nearest)]
            assert (errors[0] <= errors[1]).all()
            lower += errors[0].sum() < 0.95 * errors[1].sum()
    assert lower > 8  # of 12
    others = {key for key in before.params if key.removesuffix(".weight") not in sites}
    assert all((before.params[key] == after.params[key]).all() for key in others)


def test_the_gram_matrices_are_made_in_runs_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = weights(4, how=Rewrite.GPTQ)
    whole = prepared("bert_plain", recipe, MACHINES[0])
    monkeypatch.setattr(preparation, "GRAM_ELEMENTS", 600)
    parts = prepared("bert_plain", recipe, MACHINES[0])
    assert all((whole.params[key] == value).all() for key, value in parts.params.items())


def test_bias_correction_takes_the_mean_error_away() -> None:
    """Layer by layer, on the calibration inputs: E[Q(W) x + b'] = E[W x + b] (Nagel et al. 2019, section 4.2)."""
    name, recipe = "opt_plain", weights(3, how=Rewrite.BIAS)
    small, got = small_models.build(name), prepared(name, recipe, MACHINES[0])
    model, quants = MACHINES[0].model(small.spec, small.params), resolve(recipe, small.spec)
    site = "layer.1.ffn.hidden"
    x = [model.record(batch, ["layer.1.ffn.norm"])["layer.1.ffn.norm"][0][batch["mask"]] for batch in batches_of(name)]
    mean = np.concatenate(x).astype(np.float64).mean(0)
    w, b = (small.params[f"{site}.{key}"].astype(np.float64) for key in ("weight", "bias"))
    coarse = rewriting.simulate_weight(
        small.params[f"{site}.weight"], quants[f"{site}.weight"], got.ranges[f"{site}.weight"]
    )
    error = (coarse - w) @ mean
    assert np.abs(error).max() > 0.01
    np.testing.assert_allclose(coarse @ mean + got.params[f"{site}.bias"], w @ mean + b, atol=1e-6)  # float32 biases
    assert (got.params[f"{site}.weight"] == small.params[f"{site}.weight"]).all()


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (QuantSpec(4, True, dynamic=True), "layer.0.attn.query.weight is dynamic"),
        (FloatQuantSpec(FloatFormat.E4M3), "layer.0.attn.query.weight is a small float"),
    ],
)
def test_what_has_no_grid_is_not_rounded_otherwise(quant: Any, message: str) -> None:
    recipe = Recipe("mine", (Rule(("layer.*.weight",), quant, "a test"),), batches=1, rewrite=Rewrite.GPTQ)
    with pytest.raises(SpecError, match=message):
        prepared("bert_plain", recipe, MACHINES[0])
    nothing = Recipe("mine", (Rule(("*.residual",), QuantSpec(), "a test"),), batches=1, rewrite=Rewrite.BIAS)
    with pytest.raises(SpecError, match="quantizes no linear's weight"):
        prepared("bert_plain", nothing, MACHINES[0])


def test_integers_have_the_codes_that_were_chosen() -> None:
    """Folded smoothing and GPTQ go into an integer model: its weight codes are those of the rewritten weights."""
    spec = small_models.specs()["opt_plain"]
    recipe = replace(recipes.recipe("w4a8", spec), batches=2, transforms=(smooth(*FOLDED),), rewrite=Rewrite.GPTQ)
    got, quants = prepared("opt_plain", recipe, MACHINES[0]), resolve(recipe, spec)
    assert not got.transforms
    constants = lower(spec, got.params, quants, got.ranges)
    for site in ("layer.0.attn.query", "layer.1.ffn.hidden"):
        key = f"{site}.weight"
        np.testing.assert_array_equal(constants[key] * constants[f"{key}.scale"], got.params[key])


def test_weights_alone_by_least_squares_are_those_of_the_published_simulator() -> None:
    spec = small_models.build("opt_plain").spec
    plain, given, published = (recipes.recipe(name, spec) for name in ("w4a8", "w4a8-wmse", "paper-opt"))
    weight, tensor = "layer.0.ffn.output.weight", "layer.0.ffn.output"
    assert given.quant(weight) == replace(plain.quant(weight), observer=published.quant(weight).observer)
    assert given.quant(tensor) == plain.quant(tensor) != given.quant(weight)
