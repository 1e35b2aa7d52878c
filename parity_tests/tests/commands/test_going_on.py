"""Going on pre-training from a checkpoint: where its run begins, and the gates and softmax that it may be given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import qtx_ref.backend
from parity_tests.subjects.small_models import build
from parity_tests.tests.commands.test_finetune import BERT, answer, refused, saved
from parity_tests.tests.shell import good
from qtx.data import load
from qtx.engines.machine import Machine
from qtx.files.checkpoint import Checkpoint, load_checkpoint
from qtx.files.container import sha_of
from qtx.jobs.run import Start, TrainSpec
from qtx.jobs.starts import continue_model
from qtx.jobs.training import train
from qtx.measure.scores import evaluate
from qtx_ref.spec import (
    Gate,
    Head,
    ModelSpec,
    OptimSpec,
    Softmax,
    SpecError,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder without head, and with one."""
    folder = tmp_path_factory.mktemp("going_on")
    saved(folder / "bert.safetensors", replace(BERT, head=Head.NONE))
    saved(folder / "mlm.safetensors", BERT)
    return folder


def test_another_init_is_another_run(place, tmp_path):
    command = ["--backend", "ref", "--steps", 1, "--batch", 2, "--out", tmp_path]
    good("train", "--init", place / "mlm.safetensors", *command)
    assert load_checkpoint(tmp_path).meta["train"]["init"] == sha_of(place / "mlm.safetensors")
    assert "init was" in refused("train", "--init", place / "bert.safetensors", *command, "--resume")


def first_loss(spec, params, tmp_path):
    """The loss of step 0 of a run, and of an evaluation of the same parameters on the batch of that step."""
    data = load("books", spec)
    run = TrainSpec(spec, OptimSpec(lr=1e-3, steps=1), 4, 0, init="0" * 64)
    made = train(run, data, tmp_path / "model.safetensors", Machine("ref"), start=Start(params))
    batch = next(data.train_batches(spec, 4, 0))
    return made.extra["history.loss"][0], evaluate(Machine("ref").model(spec, params), [batch]).loss


def test_going_on_begins_where_the_model_stands(place, tmp_path):
    got = load_checkpoint(place / "mlm.safetensors")
    spec, params = continue_model(replace(got, spec=replace(BERT, dropout=0.0)), None, 0)
    assert all(params[name] is got.params[name] for name in params)
    trained, evaluated = first_loss(spec, params, tmp_path)
    assert trained == evaluated


@pytest.mark.parametrize("pi", [0.5, 0.25])
def test_an_added_gate_changes_little(pi):
    """Each gate is sigmoid(logit(pi) + d) / pi = 1 + (1 - pi) d + O(d^2). d is the product of K weights of deviation
    0.01 with K of the D features of a normalised vector, of norm sqrt(D): its deviation is about 0.01 sqrt(K). It
    scales one of the two terms of a sum that is then normalised, once per layer, so the hidden states change by less
    than layers (1 - pi) 0.01 sqrt(K) of their RMS. Without the factor 1 / pi the term is 1 - pi smaller: by far
    more."""
    small = build("bert_headless")
    got = Checkpoint(small.spec, small.params)  # gets an MLM head, which has no part in this
    named = "gated" if pi == 0.5 else f"gated:pi={pi}"  # the default opening probability is a half
    made, gated = continue_model(got, named, 0)
    assert (made.attention.gate, made.attention.pi, made.attention.rescaled) == (Gate.LINEAR, pi, True)

    def hidden(spec: ModelSpec, params: dict) -> np.ndarray:
        return qtx_ref.backend.Model(replace(spec, head=Head.NONE), params).forward(small.batch)

    plain = hidden(small.spec, small.params)

    def change(spec: ModelSpec) -> float:
        return float(np.sqrt(np.square(hidden(spec, gated) - plain).mean() / np.square(plain).mean()))

    bound = made.layers * (1 - pi) * 0.01 * made.head_width**0.5
    assert 0 < change(made) < bound
    assert change(replace(made, attention=replace(made.attention, rescaled=False))) > 3 * bound


def test_a_softmax_is_switched_and_a_gate_kept(place):
    got = load_checkpoint(place / "mlm.safetensors")
    spec, params = continue_model(got, "clipped:gamma=-0.03", 0)
    assert (spec.attention.softmax, spec.attention.gamma) == (Softmax.CLIPPED, -0.03)
    assert params.keys() == got.params.keys()
    gated, more = continue_model(got, "gated:pi=0.25", 0)
    both, same = continue_model(Checkpoint(gated, more), "clipped+gated", 0)
    assert (both.attention.softmax, both.attention.pi, both.attention.rescaled) == (Softmax.CLIPPED, 0.25, True)
    assert all(same[name] is more[name] for name in more)
    with pytest.raises(SpecError, match="drops the model's gate linear"):
        continue_model(Checkpoint(gated, more), "clipped", 0)
    with pytest.raises(SpecError, match="a gate that the model has already"):
        continue_model(Checkpoint(gated, more), "gated:pi=0.5", 0)


def test_an_encoder_without_head_gets_one(place, tmp_path):
    result = answer(
        "train", "--init", place / "bert.safetensors", "--backend", "ref", "--steps", 2, "--batch", 2, "--out", tmp_path
    )
    got = load_checkpoint(tmp_path)
    assert got.spec.head is Head.MLM and len(result["loss"]) == 2
    assert got.meta["data"]["source"] == "books" and got.meta["begun_from"].endswith("bert.safetensors")
    assert answer("evaluate", tmp_path, "--backend", "ref", "--batches", 1)["targets"] > 0


def test_alpha_divides_by_the_window_that_the_checkpoint_was_trained_with(place, tmp_path):
    """A head alone is trained on windows of 12 of the model's 24 positions; the branch that clips says nothing of its
    data and has theirs: gamma is -3 / 12."""
    quick = ("--backend", "ref", "--steps", 1, "--batch", 2)
    head = ("--set", "data.window=12", "--set", 'optim.only=["head."]')
    good("train", "--init", place / "bert.safetensors", *quick, *head, "--out", tmp_path / "head")
    good("train", "--init", tmp_path / "head", *quick, "--attention", "clipped:alpha=3", "--out", tmp_path / "clipped")
    body = load_checkpoint(place / "bert.safetensors").params
    trained, clipped = load_checkpoint(tmp_path / "head"), load_checkpoint(tmp_path / "clipped")
    assert all(np.array_equal(trained.params[name], value) for name, value in body.items())
    assert clipped.meta["data"]["settings"] == {"window": 12}
    assert (clipped.spec.length, clipped.spec.attention.gamma) == (24, -0.25)
