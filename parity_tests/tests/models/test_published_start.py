"""The published start and the published shapes, against what transformers and torch make of the published values."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the published models are built with it")

from parity_tests.long.published_start import (
    CASES,
    OPT_YAML,
    Measured,
    build_published,
    compare,
    measure_ours,
    name_ours,
)
from qtx.jobs.starts import change_attention
from qtx_ref.models.initial import init_params, shapes
from qtx_ref.presets import attention, preset
from qtx_ref.spec import AttentionSpec, Gate, ModelSpec, SpecError, Start, decays
from qtx_ref.spec.optim import OptimSpec

FIXTURES = Path(__file__).parents[2] / "fixtures"
PUBLISHED = json.loads((FIXTURES / "published_start.json").read_text())["cases"]
SMALL = {"layers": 2, "width": 16, "heads": 2, "hidden": 24, "vocab": 23, "length": 9}


def name_case(case: Measured) -> str:
    return f"{case.shape} {case.attention}"


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_first_values_have_the_published_statistics(case):
    """One seed of ours beside the fixture's five, of tensors up to 2.5 million values; the command has them all."""
    published = PUBLISHED[name_case(case)]
    assert [*published] == case.names
    quick = {name: figures for name, figures in published.items() if figures["count"] <= 5 * 2_500_000}
    assert len(quick) >= len(published) - 7
    assert compare(quick, measure_ours(case.spec, [*quick], seeds=1)) == []


def test_another_start_is_found():
    """Each planted fault is outside the sampling error: the own start, a scaled output, a normal for a uniform."""
    case, gated = CASES[3], CASES[1]
    names = [name for name in case.names if name.startswith("layer.0.attn.") or ".0.ffn.output" in name]
    published = {name: PUBLISHED[name_case(case)][name] for name in names}
    own = replace(case.spec, start=Start.OWN)
    wrong = compare(published, measure_ours(own, names, seeds=1))
    kinds = {
        f"layer.0.attn.{part}.{kind}" for part in ("query", "key", "value", "output") for kind in ("weight", "bias")
    }
    assert {line.split(":")[0] for line in wrong if line.startswith("layer.0")} == kinds
    scaled = measure_ours(replace(own, init_output_scaled=True), ["layer.0.ffn.output.weight"], seeds=1)
    assert len(compare({"layer.0.ffn.output.weight": published["layer.0.ffn.output.weight"]}, scaled)) == 1
    normal = dict(published["layer.0.attn.query.weight"], kurtosis=3.0)
    assert "kurtosis" in compare({"w": normal}, {"w": published["layer.0.attn.query.weight"]})[0]
    gate = PUBLISHED[name_case(gated)]["layer.0.attn.gate_hidden.bias"]
    assert gate["std"] == pytest.approx(1 / np.sqrt(3 * 64), rel=0.1) and not compare({"b": gate}, {"b": gate})
    table = PUBLISHED["opt-125m vanilla"]["embed.token.weight"]
    assert table["zero_rows"] == [1] and "rows" in compare({"t": table}, {"t": dict(table, zero_rows=[])})[0]


def test_padding_rows_are_zero_where_published():
    for name, row in (("bert-base", 0), ("opt-125m", 1)):
        spec = replace(preset(name), **SMALL, start=Start.PUBLISHED, init_output_scaled=False)
        table = init_params(spec, seed=0)["embed.token.weight"]
        assert np.flatnonzero((table == 0).all(axis=1)).tolist() == [row]


@pytest.mark.parametrize("shape", OPT_YAML)
def test_a_published_shape_is_what_the_published_configuration_builds(shape):
    """Every name, every shape, and the number of parameters; on no device, so that 1.3 B of them take no memory."""
    spec = preset(f"paper-{shape}")
    with torch.device("meta"):
        model = build_published(shape, AttentionSpec())
    theirs = dict(model.named_parameters())
    assert {ours: tuple(theirs[name].shape) for ours, (name,) in name_ours(model, spec)} == shapes(spec)
    assert sum(value.numel() for value in theirs.values()) == sum(int(np.prod(s)) for s in shapes(spec).values())
    config = model.config
    want = (config.dropout, config.attention_dropout, config.activation_function, config.init_std)
    assert (spec.dropout, spec.attention_dropout, str(spec.activation), spec.init_std) == want
    assert (spec.pre_norm, spec.final_norm) == (config.do_layer_norm_before, not config._remove_final_layer_norm)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_the_published_shapes_are_not_the_released_ones():
    """By hand: 768-wide embeddings, 512 or 1024 positions and pre-norm; the released ones are as they were."""
    sizes = {
        name: sum(int(np.prod(s)) for s in shapes(preset(name)).values()) for name in ("opt-350m", "paper-opt-350m")
    }
    assert sizes == {"opt-350m": 331_196_416, "paper-opt-350m": 343_543_808}
    assert (preset("paper-opt-125m").length, preset("paper-opt-1.3b").length) == (512, 1024)
    assert (preset("paper-opt-1.3b").embed_width, preset("opt-1.3b").embed_width) == (768, None)
    assert preset("paper-opt-350m").pre_norm and not preset("opt-350m").pre_norm


def test_a_start_without_scaled_outputs_says_so():
    with pytest.raises(SpecError, match=r"init_output_scaled is True: .*give false"):
        replace(preset("opt-125m"), start=Start.PUBLISHED)


# the published code's groups: what holds one of these is not decayed
NO_DECAY = {"bert-base": ("bias", "LayerNorm.weight"), "opt-125m": ("bias", "layer_norm.weight"), "gains": ("bias",)}


@pytest.mark.parametrize("kind", ["vanilla", "head", "gated", "mlp", "all_features"])
@pytest.mark.parametrize(("shape", "gains"), [("bert-base", False), ("opt-125m", False), ("opt-125m", True)])
def test_decay_groups_are_the_published_ones(shape, gains, kind):
    """By the names of the published model's parameters, of which the per-head gate's is a bare tensor named `alpha`."""
    case = Measured(shape, kind)
    with torch.device("meta"):
        model = build_published(shape, attention(kind), layers=1)
    excluded = NO_DECAY["gains" if gains else shape]
    optim = OptimSpec(decay_norm_gains=gains, decay_head_gates=True)
    prefix = "bert." if shape == "bert-base" else "model.decoder."
    seen = 0
    for ours, names in name_ours(model, case.spec):
        theirs = {not any(part in prefix + name for part in excluded) for name in names}
        assert theirs == {decays(ours, shapes(case.spec), optim)}, ours
        seen += 1
    assert seen == len(shapes(case.spec))
    gate = "layer.0.attn.gate_logit.bias"
    assert not decays(gate, shapes(case.spec), OptimSpec())


@pytest.mark.parametrize(("name", "std"), [("opt-125m", 0.001), ("bert-base", 0.01)])
def test_an_added_gate_is_as_narrow_as_published(name, std):
    """--fine_tuning: normal(0, 0.001) in their OPT attention, normal(0, 0.01) in their BERT's, bias logit(pi)."""
    small: ModelSpec = replace(preset(name), **SMALL | {"width": 256, "heads": 4})
    spec, params = change_attention(small, init_params(small, 0), "gated:pi=0.25", seed=0, length=small.length)
    weights = np.concatenate([params[f"layer.{i}.attn.gate_logit.weight"].ravel() for i in range(2)])
    assert weights.std() == pytest.approx(std, rel=5 / np.sqrt(2 * weights.size))  # 5 standard errors
    assert spec.attention.gate is Gate.LINEAR and spec.attention.rescaled
    np.testing.assert_array_equal(params["layer.0.attn.gate_logit.bias"], np.float32(-np.log(3)))
