"""Sinks against masses worked by hand, of a model whose first token's key is planted; and what a run writes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from parity_tests.subjects import small_models
from parity_tests.tests.models.test_analysis import BACKENDS, SPECIALS, TOKENIZER
from qtx.data import load
from qtx.engines.machine import Machine
from qtx.files.lines import read_lines
from qtx.jobs.run import TrainSpec
from qtx.jobs.training import default_optim, train
from qtx.jobs.watch import HeldOut
from qtx.measure.history import History
from qtx.measure.sinks import measure_sinks
from qtx.runs.spec import EvaluationSpec
from qtx_ref.models.initial import init_params, shapes

LENGTH, TIMES = 7, 100.0
DATA = SimpleNamespace(specials=SPECIALS, tokenizer_json=TOKENIZER)
EVEN = np.mean([1 / (1 + others) for others in range(LENGTH)])  # on one key of all that a causal query sees
MASS = np.mean([TIMES / (TIMES + others) for others in range(LENGTH)])  # where that key weighs TIMES as much: 0.971
TOKENS = np.array([[1, 4, 4, 4, 4, 4, 4]] * 2)  # [CLS], then words: no delimiters
BATCH = {"tokens": TOKENS, "mask": np.ones((2, LENGTH), bool)}


def plant_sink():
    """An OPT of two layers and two heads whose first token is e_0 and whose others are e_1, so that its norms give
    sqrt(15) and -1 / sqrt(15) at channel 0. Head 0 of layer 1 scores its key ln TIMES above the others; every other
    head scores all keys 0. Nothing is added to the stream."""
    spec = small_models.OPT
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes(spec).items()}
    for name in params:
        if name.endswith("norm.weight"):
            params[name][:] = 1
    params["embed.token.weight"][1, 0] = params["embed.token.weight"][4, 1] = 10
    difference = np.sqrt(15) + 1 / np.sqrt(15)
    params["layer.1.attn.query.bias"][0] = 1
    params["layer.1.attn.key.weight"][0, 0] = np.log(TIMES) * np.sqrt(spec.head_width) / difference
    return spec, params


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_planted_sink_is_measured(backend):
    spec, params = plant_sink()
    sinks = measure_sinks(BACKENDS[backend](spec, params), DATA, [BATCH, BATCH])
    assert list(sinks.mass) == ["first"]  # a batch without delimiters has no curve of them
    np.testing.assert_allclose(sinks.mass["first"], [[EVEN, EVEN], [MASS, EVEN]], rtol=1e-5)  # float32, and norm_eps
    assert sinks.reasons == [["small values"] * 2, ["marked keys", "small values"]]
    assert (sinks.idle, sinks.heads) == (4, 4)
    assert sinks.energy == pytest.approx(6 / 7, rel=1e-6)  # of the six words' channel, in float32
    assert sinks.values() == {
        "sink.first": pytest.approx(0.97124, abs=5e-6),  # (1 + 100/101 + ... + 100/106) / 7
        "heads.idle": 4,
        "energy": sinks.energy,
    }
    kept = json.loads(json.dumps(sinks.to_json_values()))
    assert kept["mass"] == {"first": [[0.3704, 0.3704], [0.9712, 0.3704]]}
    assert kept["causes"] == {"marked keys": 1, "small values": 3} and kept["idle"] == 4


def test_delimiters_are_a_sink_of_their_own():
    spec, params = plant_sink()
    batch = BATCH | {"tokens": np.array([[1, 4, 4, 2, 4, 4, 3]])}  # [SEP] fourth, a full stop last
    sinks = measure_sinks(BACKENDS["ref"](spec, params), DATA, [{key: value[:1] for key, value in batch.items()}])
    # of even attention: [SEP] is one key of 4, 5, 6 and 7, the full stop one of the last query's 7
    assert sinks.mass["separator"][0, 0] == pytest.approx((1 / 4 + 1 / 5 + 1 / 6 + 2 / 7) / 7, rel=1e-6)


def test_a_model_whose_texts_begin_anyhow_has_no_first_token():
    """A BERT's first token is [CLS]: windows without one have no such key."""
    small = small_models.build("bert_plain")
    model = BACKENDS["ref"](small.spec, small.params)
    tokens = np.where(small.batch["tokens"] == SPECIALS.cls, 4, small.batch["tokens"])
    assert "sink.first" not in measure_sinks(model, DATA, [small.batch | {"tokens": tokens}]).values()
    tokens[0, 0] = SPECIALS.cls
    assert "sink.first" in measure_sinks(model, DATA, [small.batch | {"tokens": tokens}]).values()


def test_images_have_their_class_token_and_their_background():
    small = small_models.build("vit_plain")
    images = np.zeros_like(small.batch["images"])
    images[:, :, :2, :2] = [[1, -1], [-1, 1]]  # three of the four patches are plain
    zero = {name: np.zeros_like(value) for name, value in small.params.items()}
    zero |= {name: value for name, value in small.params.items() if name.startswith("embed")}
    sinks = measure_sinks(BACKENDS["ref"](small.spec, zero), DATA, [small.batch | {"images": images}])
    np.testing.assert_allclose(sinks.mass["first"], 1 / 5, rtol=1e-6)
    np.testing.assert_allclose(sinks.mass["background"], 3 / 5, rtol=1e-6)


def test_probabilities_that_are_not_finite_are_said():
    spec, params = plant_sink()
    params["layer.1.attn.key.weight"][:] = np.nan
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="not finite"):
        measure_sinks(BACKENDS["ref"](spec, params), DATA, [BATCH])


class OneBatch:
    """Data of one batch, whatever is asked for."""

    specials, tokenizer_json = SPECIALS, TOKENIZER

    def split_batches(self, split, spec, batch_size, seed, limit=None):
        yield BATCH | {"targets": TOKENS}


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_sinks_are_watched(backend):
    spec, params = plant_sink()
    run = TrainSpec(spec, default_optim(spec, 1), 2, 0, evaluation=EvaluationSpec(every=1, batches=1))
    machine = Machine(backend)
    point = HeldOut(run, OneBatch(), machine).measure(machine.model(spec, params))
    assert not point.faults and point.heads == {"first": [[0.3704, 0.3704], [0.9712, 0.3704]]}
    assert point.values["heads.idle"] == 4 and point.values["sink.first"] == pytest.approx(MASS, rel=1e-5)
    assert {"float.loss", "kurtosis", "inf_norm", "energy"} <= point.values.keys()
    params["layer.1.attn.key.weight"][:] = np.nan
    with np.errstate(all="ignore"):
        point = HeldOut(run, OneBatch(), machine).measure(machine.model(spec, params))
    assert not point.heads and any(fault.startswith("sinks: ") for fault in point.faults)


def test_the_log_has_every_head(tmp_path):
    spec = replace(small_models.OPT, vocab=600, length=16)
    data = load("books", spec)
    spec = replace(spec, vocab=data.vocab)
    run = TrainSpec(spec, default_optim(spec, 2), 2, 0, evaluation=EvaluationSpec(every=1, batches=1))
    checkpoint = train(run, data, tmp_path / "model.safetensors", Machine("ref"))
    lines = [line for line in read_lines(tmp_path / "log.jsonl") if "heads" in line]
    curves = History.of(checkpoint.extra).curves
    assert [line["step"] for line in lines] == [0, 1, 2] == [step for step, _ in curves["sink.first"]]
    for line in lines:
        assert {name: np.shape(mass) for name, mass in line["heads"].items()} == {"first": (2, 2), "separator": (2, 2)}
        assert np.max(line["heads"]["first"]) == pytest.approx(line["evaluation"]["sink.first"], abs=5e-5)  # 4 digits
    begin = measure_sinks(
        Machine("ref").model(spec, init_params(spec, 0)), data, data.split_batches("calibration", spec, 16, 0, limit=1)
    )
    assert curves["sink.first"][0] == (0, begin.values()["sink.first"])
