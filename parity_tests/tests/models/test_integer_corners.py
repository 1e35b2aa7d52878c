"""Integer models at their limits: odd scales, dead tensors, far sinks, operands of their own; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import special

from parity_tests.long import integer_report
from parity_tests.subjects import small_models
from parity_tests.subjects.integer_models import Lowered, RunRecord, record_run, same
from qtx.measure.scores import IntegerScorer
from qtx.recipes import named as recipes
from qtx_ref.backend import IntegerModel as RefModel
from qtx_ref.backend import Model as RefBackend
from qtx_ref.integer import lifting, lowering, products
from qtx_ref.profiles import profile
from qtx_ref.spec import Granularity, Nonlinear, QuantSpec, Rule, SpecError
from qtx_torch.backend import IntegerModel
from qtx_torch.integer import products as torch_products


def corner(
    name: str,
    *rules: tuple[str, QuantSpec | None],
    profile_name: str = "qtx",
    nonlinear: Nonlinear = Nonlinear.TABLE,
    **changed: float,
) -> Lowered:
    """A small model under w8a8 and further rules; parameters whose name holds a key are multiplied by its value."""
    model = small_models.build(name, batch_size=4)
    params = dict(model.params)
    for part, factor in changed.items():
        for key in params:
            if part in key:
                params[key] = (params[key] * factor).astype(np.float32)
    base = recipes.recipe("w8a8", model.spec)
    more = tuple(Rule((pattern,), quant, "of this test") for pattern, quant in rules)
    quants = recipes.resolve(replace(base, rules=(*base.rules, *more)), model.spec)
    ranges = RefBackend(model.spec, params).calibrate([model.batch], quants)
    constants = lowering.lower(model.spec, params, quants, ranges, profile(profile_name), nonlinear)
    return Lowered(model.spec, params, ranges, constants, quants, profile(profile_name), model.batch)


def both(low: Lowered) -> RunRecord:
    """The reference's run, which torch's must equal."""
    want = record_run(low.model(RefModel), low.batch)
    assert all(verdict.ok for verdict in same(record_run(low.model(IntegerModel), low.batch), want))
    return want


def gap(low: Lowered) -> float:
    """RMS difference of the outputs of integers and fake quantization of the original parameters, to the outputs'
    own."""
    fake = RefBackend(low.spec, low.params)
    fake.bind(low.quants, low.ranges)
    want = fake.forward(low.batch).astype(np.float64)
    got = lifting.real(both(low).output)
    real = low.batch.get("mask", np.ones(want.shape[:-1], bool)) if want.ndim == 3 else slice(None)
    return float(np.sqrt(np.square(got - want)[real].mean() / np.square(want[real]).mean()))


ROWS, SIX = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True), QuantSpec(6, symmetric=True)


def test_an_operand_is_requantized_once() -> None:
    low = corner("opt_plain", ("*.ffn.hidden.input", SIX))
    site = "layer.0.ffn"
    want = low.constants[f"{site}.norm.scale"] / low.constants[f"{site}.hidden.input.scale"]
    got = low.constants[f"{site}.hidden.input.multiplier"] * 2.0 ** (low.constants[f"{site}.hidden.input.shift"] - 31.0)
    assert got == pytest.approx(float(want), rel=1e-6)
    assert gap(low) < 0.1


@pytest.mark.parametrize("name", ["opt_plain", "bert_gate_linear", "vit_clipped_row"])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-20])
def test_a_scale_per_token_keeps_every_bias(name: str, scale: float) -> None:
    """Rows of any size, dead ones too: the bias is added to the real product."""
    rules = [(site, ROWS) for site in ("embed.norm", "layer.*norm", "*.attn.context", "*.attn.gated")]
    assert gap(corner(name, *rules, **{"attn.value": scale})) < 0.1


def test_a_bias_beyond_int32_widens_its_accumulator() -> None:
    low = corner("bert_gate_linear", **{"attn.value": 1e-6})
    assert low.constants["layer.0.attn.output.bias"].dtype == np.int64
    assert gap(low) < 0.1
    with pytest.raises(SpecError, match="attn.output .*bias"):
        corner("bert_gate_linear", **{"attn.value": 1e-12})


def test_a_dead_layer_keeps_the_next_bias() -> None:
    model = small_models.build("opt_plain", batch_size=4)
    low = corner("opt_plain", **{"ffn.hidden.weight": 0.0, "ffn.hidden.bias": 0.0})
    assert model.params["layer.0.ffn.output.bias"].any()
    assert both(low) and not dict(both(low).sites)["layer.0.ffn.activation"].any()
    assert gap(low) < 0.1


@pytest.mark.parametrize(("logit", "shrunk"), [(-1.0, 0.1), (-3.0, 0.1), (8.0, 0.1), (-50.0, 1.0)])
def test_sinks_far_from_the_scores(logit: float, shrunk: float) -> None:
    low = corner("opt_sink", **{"attn.query": shrunk})
    params = {key: np.full_like(x, logit) if key.endswith("sink") else x for key, x in low.params.items()}
    ranges = RefBackend(low.spec, params).calibrate([low.batch], low.quants)
    constants = lowering.lower(low.spec, params, low.quants, ranges, low.profile)
    low = replace(low, params=params, ranges=ranges, constants=constants)
    assert gap(low) < 0.1
    nx = integer_report.beside(low, low.batch)
    assert max(differences.largest for site, differences in nx.ops.items() if site.endswith("probs")) <= 1


@pytest.mark.parametrize(
    ("name", "rules", "options", "words"),
    [
        ("opt_sink", [], {"attn.query": 1e-9}, "layer.0.attn.probs .*sinks"),
        ("opt_plain", [("*.residual", ROWS)], {}, "layer.0.ffn.norm .*eps"),
        ("bert_plain", [("head.norm", ROWS)], {}, "head.decoder .*bias"),
        ("bert_gate_head_conditional", [("layer.*norm", ROWS)], {}, "gate_logit .*mean over tokens"),
        ("opt_plain", [("*.attn.value", ROWS)], {}, "layer.0.attn.context .*scale per token"),
        ("bert_plain", [("head.decoder.weight", QuantSpec(4, symmetric=True))], {}, "head.decoder.weight .*tied"),
        ("opt_gate_linear", [("*.attn.context", None)], {"profile_name": "gemmlowp"}, "attn.gated .*64 bits"),
        ("opt_plain", [("*.attn.query.weight", None)], {}, "layer.0.attn.query.weight .*leaves it in float"),
    ],
)
def test_what_cannot_be_is_refused_by_site(name: str, rules: list, options: dict, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        corner(name, *rules, **options)


@pytest.mark.parametrize("where", ["*.context.rhs", "*.attn.value"])
@pytest.mark.parametrize("name", ["opt_plain", "bert_plain"])
def test_values_per_channel(where: str, name: str) -> None:
    low = corner(name, (where, QuantSpec(granularity=Granularity.CHANNEL)))
    assert gap(low) < 0.1
    if name == "opt_plain":
        start = low.batch["tokens"][:2, :3]
        texts = [low.model(kind).generate(start, 4, lambda z: z.argmax(-1)) for kind in (RefModel, IntegerModel)]
        assert np.array_equal(*texts)


def test_sums_of_accumulators_per_channel_under_a_float_profile() -> None:
    channels = QuantSpec(symmetric=True, granularity=Granularity.CHANNEL)
    low = corner(
        "opt_plain", ("*.weight", channels), ("*.attn.output", None), ("*.ffn.output", None), profile_name="onnx"
    )
    assert gap(low) < 0.1


def test_an_overflow_names_its_site() -> None:
    low = corner("opt_plain")
    site = "layer.0.ffn.hidden"
    worse = low.constants | {f"{site}.bias": np.full_like(low.constants[f"{site}.bias"], 2**31 - 1)}
    for kind in (RefModel, IntegerModel):
        with pytest.raises(SpecError, match=f"site {site}: accumulators run from"):
            replace(low, constants=worse).model(kind).run(low.batch)


def test_strict_refuses_tables_with_a_scale_per_row() -> None:
    rows = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True)
    low = corner("opt_plain", ("embed.token.weight", rows))
    both(low)
    for kind in (RefModel, IntegerModel):
        with pytest.raises(SpecError, match="embed.token.weight .*per row"):
            low.model(kind, strict=True)


CHANNELS = QuantSpec(symmetric=True, granularity=Granularity.CHANNEL)


@pytest.mark.parametrize("name", ["opt_plain", "bert_plain", "vit_plain"])
def test_a_head_with_a_scale_per_channel_is_scored_as_its_logits(name: str) -> None:
    low = corner(name, ("*.weight", CHANNELS))
    logits = lifting.real(both(low).output)
    targets = low.batch["targets"] if "targets" in low.batch else low.batch["labels"]
    picked = targets >= 0
    want = -special.log_softmax(logits, axis=-1)[picked][np.arange(picked.sum()), targets[picked]].sum()
    assert IntegerScorer(low.model(RefModel)).evaluate(low.batch)[0] == pytest.approx(float(want), rel=1e-12)


def test_accumulators_of_values_per_channel_are_refused_by_site() -> None:
    with pytest.raises(SpecError, match="layer.0.attn.context .*accumulator"):
        corner("opt_plain", ("*.weight", CHANNELS), ("*.attn.value", None))


@pytest.mark.parametrize("name", ["opt_gate_linear", "bert_gate_head_conditional"])
def test_a_gate_with_a_scale_per_token(name: str) -> None:
    low = corner(name, ("*.attn.gate", ROWS), nonlinear=Nonlinear.POLYNOMIAL)
    assert gap(low) < 0.1


@pytest.mark.parametrize("module", [products, torch_products])
def test_the_lowest_bias_overflows_aloud(module: ModuleType) -> None:
    s8 = QuantSpec(symmetric=True)
    a, b, bias = np.full((2, 4), -10, np.int8), np.full((4, 1), 10, np.int8), np.array([-(2**31)], np.int32)
    if module is torch_products:
        a, b, bias = map(torch.tensor, (a, b, bias))
    with pytest.raises(ValueError, match="accumulators run from -2147484048"):
        module.matmul(a, b, s8, s8, bias=bias)
