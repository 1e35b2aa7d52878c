"""Transforms of inputs and weights in whole models: in float nothing changes, files keep them, integers refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import linalg

from parity_tests.subjects import small_models
from parity_tests.tests.files.test_checkpoint import rewrite
from qtx.files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qtx.files.container import CheckpointError
from qtx.jobs.training import Machine
from qtx.prepare import calibration, prepare
from qtx.recipes.named import resolve
from qtx.recipes.sites import linears
from qtx.recipes.transforms import list_left_transforms
from qtx_ref.quant import rewriting
from qtx_ref.spec import (
    QTX,
    Gate,
    Granularity,
    InputTransform,
    QuantSpec,
    Recipe,
    Rewrite,
    Rule,
    SpecError,
    Transform,
    TransformKind,
    check_integer,
    from_dict,
    to_dict,
)

MODELS = ("bert_plain", "bert_gate_mlp", "opt_plain", "opt_gate_linear", "opt_post_norm_projected", "vit_clipped")
FOLDED = ("layer.*.attn.query", "layer.*.attn.key", "layer.*.attn.value", "layer.*.ffn.hidden")
MACHINES = [Machine("ref"), Machine("torch")]
FLOAT32 = {"rtol": 2e-4, "atol": 2e-5}  # float32 through two layers of a model of width 16


def smooth(*sites: str, strength: float = 0.5) -> Transform:
    return Transform(sites or ("layer.*",), TransformKind.SMOOTH, "a test", strength)


def hadamard(*sites: str, block: int | None = None) -> Transform:
    return Transform(sites or ("layer.*",), TransformKind.HADAMARD, "a test", block=block)


def weights(bits: int, *transforms: Transform, how: Rewrite | None = None, **reach: Any) -> Recipe:
    """Weights of the layers' linears in codes of a scale per channel, the rest in float."""
    quant = QuantSpec(bits, True, **({"granularity": Granularity.CHANNEL} | reach))
    rules = Rule(("layer.*.weight",), quant, "a test"), Rule(("*norm.weight",), None, "a test")
    return Recipe("mine", rules, batches=2, transforms=transforms, rewrite=how)


@cache
def batches_of(name: str) -> tuple[dict[str, np.ndarray], ...]:
    spec = small_models.specs()[name]
    return tuple(small_models.make_batch(spec, size) for size in (3, 4))


def prepared(name: str, recipe: Recipe, machine: Machine, **given: Any) -> prepare.Prepared:
    small = small_models.build(name)
    return prepare.prepare(machine, small.spec, small.params, lambda n: batches_of(name)[:n], recipe, **given)


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.backend)
@pytest.mark.parametrize("name", MODELS)
def test_transforms_change_nothing_in_float(name: str, machine: Machine) -> None:
    small = small_models.build(name)
    plain = machine.model(small.spec, small.params).forward(small.batch)
    mixed = smooth(strength=0.8), hadamard("layer.0.*"), hadamard("layer.1.ffn.output", block=4)
    for transforms in ((smooth(),), (hadamard(),), mixed):
        got = prepared(name, weights(8, *transforms), machine)
        moved = [key for key, value in got.params.items() if (value != small.params[key]).any()]
        assert {f"{site}.weight" for site in linears(small.spec) if site.startswith("layer.")} <= set(moved)
        model = machine.model(small.spec, got.params)
        model.bind({}, {}, transforms=got.transforms)
        np.testing.assert_allclose(model.forward(small.batch), plain, **FLOAT32)
        site = "layer.0.ffn.residual"  # a float pass of another kind has them too
        record = model.record(small.batch, [site])[site][0]
        want = machine.model(small.spec, small.params).record(small.batch, [site])[site][0]
        np.testing.assert_allclose(record, want, **FLOAT32)
        if got.transforms:  # and without them the weights are wrong
            model.bind({}, {})
            assert np.abs(model.forward(small.batch) - plain).max() > 0.01


@pytest.mark.parametrize("name", MODELS)
def test_a_norm_takes_in_the_divisor_where_it_feeds_nothing_else(name: str) -> None:
    spec, got = small_models.specs()[name], prepared(name, weights(8, smooth(*FOLDED)), MACHINES[0])
    hidden = {f"layer.{i}.ffn.hidden" for i in range(2)}
    heads = {f"layer.{i}.attn.{part}" for i in range(2) for part in ("query", "key", "value")}
    read = spec.attention.gate is Gate.LINEAR  # by the gate, which has no divisor
    left = hidden | heads if not spec.pre_norm else heads if read else set()
    assert set(got.transforms) == left == set(list_left_transforms(weights(8, smooth(*FOLDED)), spec))
    two = weights(8, smooth("*.query", "*.key"))  # the value would get a tensor that it does not expect
    assert set(list_left_transforms(two, spec)) == {site for site in heads if not site.endswith("value")}


def test_smoothing_shares_the_range_between_input_and_weights() -> None:
    """Strength 1/2: afterwards max|X_j| and max|W_j| are both sqrt(max|X_j| max|W_j|) (Xiao et al. 2023, section 4)."""
    small = small_models.build("bert_plain")
    names = [f"layer.0.attn.{part}" for part in ("query", "key", "value")]
    x = np.abs(np.random.default_rng(0).standard_t(2, 16))
    params, divisors = rewriting.smooth(small.spec, small.params, {n: x for n in names}, 0.5, names)
    before = np.abs(np.concatenate([small.params[f"{n}.weight"] for n in names])).max(0)
    after = np.abs(np.concatenate([params[f"{n}.weight"] for n in names])).max(0)
    assert all(divisors[n] is divisors[names[0]] for n in names)
    np.testing.assert_allclose(after, np.sqrt(x * before), rtol=1e-6)  # float32 weights
    np.testing.assert_allclose(x / divisors[names[0]], np.sqrt(x * before), rtol=1e-6)
    dead = np.where(np.arange(16) == 3, 0, x)
    _, divisors = rewriting.smooth(small.spec, small.params, {n: dead for n in names}, 0.5, names)
    assert divisors[names[0]][3] == 1


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (smooth("head.decoder"), "site head.decoder has no weight of its own"),
        (hadamard("layer.0.ffn.output", block=16), "transform block 16 at layer.0.ffn.output, of width 24"),
        (smooth("layer.9.*"), "transforms no linear of this model"),
    ],
)
def test_what_cannot_be_transformed_is_refused(transform: Transform, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        prepared("bert_plain", weights(8, transform), MACHINES[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantSpec(outliers=6.0), "use token"),
        (lambda: QuantSpec(granularity=Granularity.TOKEN, dynamic=True, outliers=0), "above 0"),
        (lambda: smooth(strength=1.5), "in \\[0, 1\\]"),
        (lambda: replace(smooth(), strength=None), "in \\[0, 1\\]"),
        (lambda: replace(smooth(), block=4), "belongs to hadamard"),
        (lambda: hadamard(block=12), "power of two"),
        (lambda: hadamard(block=1), "power of two"),
        (lambda: replace(hadamard(), strength=0.5), "belongs to smooth"),
    ],
)
def test_what_no_recipe_can_say(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_recipes_travel_as_json_and_old_ones_still_do() -> None:
    recipe = weights(4, smooth("a"), hadamard("b", block=8), smooth("b"), how=Rewrite.GPTQ)
    assert from_dict(Recipe, to_dict(recipe)) == recipe
    assert recipe.transform("b") == smooth("b") and recipe.transform("c") is None
    old = to_dict(weights(4))
    del old["transforms"], old["rewrite"]
    assert from_dict(Recipe, old) == weights(4)


# --- inputs of linears ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.backend)
def test_moments_of_inputs_are_those_of_the_tensor_before(machine: Machine) -> None:
    """In a post-norm model the tensor that query and hidden take in has a name of its own, and padding does not
    count."""
    small = small_models.build("bert_plain")
    model = machine.model(small.spec, small.params)
    sources = {f"layer.0.attn.{part}": "embed.norm" for part in ("query", "value")}
    sources["layer.1.ffn.hidden"] = "layer.1.attn.norm"
    got = model.input_moments(small.batch, list(sources))
    for site, source in sources.items():
        x = model.record(small.batch, [source])[source][0].astype(np.float64)[small.batch["mask"]]
        assert x.shape[0] < small.batch["mask"].size
        want = {"count": len(x), "sum": x.sum(0), "absmax": np.abs(x).max(0), "gram": np.einsum("ni,nj->ij", x, x)}
        for name, value in want.items():
            np.testing.assert_allclose(got[site][name], value, rtol=1e-12, atol=1e-12, err_msg=name)
            assert name == "count" or got[site][name].dtype == np.float64
    assert list(model.input_moments(small.batch, ["layer.0.attn.query"], ("sum",))["layer.0.attn.query"]) == ["sum"]


def test_ranges_are_those_of_the_transformed_input() -> None:
    """Of x / s and x R, made here from the tensor before, in both backends; a transform does not linger."""
    small = small_models.build("bert_plain")
    site, source = "layer.0.ffn.hidden", "layer.0.attn.norm"
    divisor = np.linspace(0.5, 2, 16, dtype=np.float32)
    rotation = linalg.block_diag(*4 * [linalg.hadamard(4) / 2])
    for machine in MACHINES:
        model = machine.model(small.spec, small.params)
        x = model.record(small.batch, [source])[source][0][small.batch["mask"]].astype(np.float64)
        for how, want in (
            (InputTransform(divisor, 0), x / divisor),
            (InputTransform(None, 4), x @ rotation),
            (None, x),
        ):
            transforms = {site: how} if how else None
            got = model.calibrate([small.batch], {f"{site}.input": QuantSpec()}, transforms=transforms)[f"{site}.input"]
            np.testing.assert_allclose([got.low.item(), got.high.item()], [want.min(), want.max()], rtol=1e-5)


# --- files and integers -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Any) -> Any:
    """A post-norm model with divisors left at some inputs and rotations at others, in a file."""
    small = small_models.build("bert_plain")
    recipe = weights(4, smooth(*FOLDED), hadamard("*.ffn.output"))
    got = prepared("bert_plain", recipe, MACHINES[0])
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(small.spec, got.params, {}, recipe, got.ranges, {}, got.transforms))
    return path, got, recipe


def test_a_file_keeps_transforms(saved: Any) -> None:
    path, got, recipe = saved
    again, small = load_checkpoint(path), small_models.build("bert_plain")
    assert set(again.transforms) == set(got.transforms) and not again.extra
    assert again.transforms["layer.0.ffn.output"].block == 8  # 24 = 8 * 3
    model = MACHINES[0].model(small.spec, again.params)
    calibration.bind(model, again.recipe, again.ranges, again.transforms)
    want = got.model(MACHINES[0], small.spec, recipe).forward(small.batch)
    np.testing.assert_array_equal(model.forward(small.batch), want)


NAME = "transform.layer.0.ffn.hidden.divisor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: tensors.pop(NAME), "do not belong together"),
        (lambda tensors, header: tensors.update({NAME: tensors[NAME][:3]}), "must be 16 positive numbers"),
        (lambda tensors, header: tensors.update({NAME: -tensors[NAME]}), "must be 16 positive numbers"),
        (lambda tensors, header: tensors.update({NAME.replace("hidden", "output"): tensors[NAME]}), "not belong"),
        (lambda tensors, header: header["recipe"].update(transforms=[]), "do not belong together"),
        (lambda tensors, header: header["recipe"]["transforms"][1].update(block=16), "block 16 at layer.0.ffn.output"),
    ],
)
def test_a_file_whose_transforms_are_wrong_is_refused(saved: Any, change: Any, message: str) -> None:
    path, _, _ = saved
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_integers_refuse_what_is_left_in_float() -> None:
    spec = small_models.specs()["bert_plain"]
    recipe = weights(8, smooth(*FOLDED))
    with pytest.raises(SpecError, match="site layer.0.attn.query cannot run in integers: a transform of its input"):
        check_integer(resolve(recipe, spec), QTX, transforms=list_left_transforms(recipe, spec))
    rows = QuantSpec(granularity=Granularity.TOKEN, dynamic=True, outliers=6.0)
    with pytest.raises(SpecError, match="site embed.norm cannot run in integers: its outlier channels"):
        check_integer({"embed.norm": rows}, QTX)


def test_outlier_channels_would_see_the_future() -> None:
    spec = small_models.specs()["opt_plain"]
    rows = QuantSpec(granularity=Granularity.TOKEN, dynamic=True, outliers=6.0)
    for machine in MACHINES:
        model = machine.model(spec, small_models.build("opt_plain").params)
        model.bind({"layer.0.attn.query.input": replace(rows, outliers=None)}, {})
        model.generate(np.zeros((1, 2), np.int64), 1, lambda logits: logits.argmax(-1))
        model.bind({"layer.0.attn.query.input": rows}, {})
        with pytest.raises(SpecError, match="see the future"):
            model.generate(np.zeros((1, 2), np.int64), 1, lambda logits: logits.argmax(-1))
