"""Beginning with a checkpoint: a classifier on its encoder, all of it or the head alone."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qtx_ref.backend
import qtx_torch.backend
from parity_tests.tests.files.test_labelled import sentence, write_csv
from parity_tests.tests.shell import call, good
from qtx.data import load
from qtx.data.splits import digest
from qtx.data.tokenizing import read_bundled_tokenizer
from qtx.files.artifact import load_artifact
from qtx.files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qtx_ref.models.initial import init_params
from qtx_ref.spec import (
    Family,
    Head,
    ModelSpec,
    OptimSpec,
    SpecError,
)

pytest.importorskip("tokenizers", reason="the extra text is not installed")

BERT = ModelSpec(Family.BERT, 2, 16, 2, 32, Head.MLM, vocab=2048, length=24, types=2, dropout=0.1, init_std=0.1)
VIT = ModelSpec(
    Family.VIT,
    1,
    16,
    2,
    32,
    Head.CLASSIFY,
    pre_norm=True,
    final_norm=True,
    classes=12,
    image_size=8,
    patch_size=4,
    channels=1,
)
OPT = ModelSpec(Family.OPT, 1, 16, 2, 32, Head.CAUSAL, vocab=2048, length=24)


def answer(*arguments):
    return json.loads(good(*arguments, "--json", "-").stdout)


def refused(*arguments) -> str:
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    return result.output


def saved(path: Path, spec: ModelSpec, extra: dict | None = None) -> Path:
    tokenizer = read_bundled_tokenizer()
    text = {"tokenizer": tokenizer, "data": {"kind": "text", "tokenizer_sha256": digest(tokenizer.encode())}}
    meta = {} if spec.family is Family.VIT else text
    save_checkpoint(path, Checkpoint(spec, init_params(spec, 5), extra or {}, meta=meta))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An encoder without head, an OPT, a ViT, and 120 texts whose label is their first word."""
    folder = tmp_path_factory.mktemp("finetune")
    saved(folder / "bert.safetensors", replace(BERT, head=Head.NONE))
    saved(folder / "mlm.safetensors", BERT)
    saved(folder / "opt.safetensors", OPT)
    saved(folder / "vit.safetensors", VIT)
    split = ["train"] * 80 + ["calibration"] * 20 + ["evaluation"] * 20
    rows = [
        (("good good ", "bad bad ")[i % 2] + sentence(i, 3 + i % 9), ("yes", "no")[i % 2], split[i]) for i in range(120)
    ]
    write_csv(folder / "set.csv", rows, ("text", "label", "split"))
    return folder


def tuned(place, out, *more, backend="ref"):
    return answer(
        "finetune",
        place / "bert.safetensors",
        "--data",
        place / "set.csv",
        "--out",
        out,
        "--batch",
        8,
        "--backend",
        backend,
        *more,
    )


@pytest.fixture(scope="module")
def model(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    result = tuned(place, out, "--epochs", 6, "--lr", 1e-2, "--length", 12, "--dropout", 0)
    return out / "model.safetensors", result


def test_a_classifier_learns_and_every_command_takes_it(place, model, tmp_path):
    path, result = model
    assert result["steps"] == 60 and result["targets"] == 20
    assert result["accuracy"] == 100  # the label is a word of the text
    got = load_checkpoint(path)
    assert got.spec.head is Head.CLASSIFY and got.spec.classes == 2
    assert got.meta["data"]["names"] == ["no", "yes"] and got.meta["data"]["length"] == 12
    again = answer("evaluate", path, "--backend", "ref")
    assert (again["loss"], again["accuracy"]) == (result["loss"], 100)  # the source, length and classes are its own
    other = write_csv(
        tmp_path / "other.csv",
        [(f"good old town {i}", "yes", "evaluation") for i in range(9)],
        ("text", "label", "split"),
    )
    assert answer("evaluate", path, "--data", other)["targets"] == 9
    assert "the model knows no, yes" in refused("evaluate", path, "--data", "books")
    for file in ("q.safetensors", "q.qtx"):
        good("quantize", path, "--out", tmp_path / file)
        assert answer("evaluate", tmp_path / file)["accuracy"] > 90
    assert len(answer("analyze", path, "--batches", 1)["sites"]) > 20
    assert answer("parity", path)["rows"]
    assert answer("parity", tmp_path / "q.qtx")["rows"]


def test_the_head_alone(place, tmp_path):
    """Both backends train the head alone, agree, and leave the encoder's bytes as they were."""
    before = load_checkpoint(place / "bert.safetensors").params
    got = {}
    for backend in ("ref", "torch"):
        tuned(place, tmp_path / backend, "--head-only", "--steps", 6, "--lr", 1e-2, backend=backend)
        got[backend] = load_checkpoint(tmp_path / backend / "model.safetensors")
        for name, value in before.items():
            assert got[backend].params[name].tobytes() == value.tobytes(), name
        states = {name for name in got[backend].extra if name.startswith("optim.m.")}
        assert states == {
            f"optim.m.head.{part}" for part in ("pool.weight", "pool.bias", "classifier.weight", "classifier.bias")
        }
    ref, ours = got["ref"], got["torch"]
    first = init_params(ref.spec, 0)
    for name in ("head.pool.weight", "head.classifier.weight", "head.classifier.bias"):
        moved = ref.params[name] - first[name]
        # AdamW divides by the root of the squared gradient, so a step's float noise is relative to the step: 1e-3 of it
        assert np.abs(ours.params[name] - ref.params[name]).max() < 1e-3 * np.abs(moved).max(), name
    np.testing.assert_allclose(ours.extra["history.loss"], ref.extra["history.loss"], rtol=1e-6)  # float32 forward


def test_without_head_only_the_encoder_moves(place, tmp_path):
    tuned(place, tmp_path, "--steps", 2)
    before, after = (load_checkpoint(p).params for p in (place / "bert.safetensors", tmp_path / "model.safetensors"))
    assert all((after[name] != value).any() for name, value in before.items() if name.endswith("weight"))


@pytest.mark.parametrize("backend", [qtx_ref.backend, qtx_torch.backend], ids=["ref", "torch"])
def test_gradients_of_some_are_those_of_all(backend):
    """A gradient does not depend on which others are asked for."""
    spec = replace(BERT, head=Head.CLASSIFY, classes=2)
    model = backend.Model(spec, init_params(spec, 0))
    tokens = np.arange(5, 5 + 24).reshape(2, 12)
    batch = {"tokens": tokens, "mask": np.ones((2, 12), bool), "types": tokens * 0, "labels": np.array([0, 1])}
    some = {"head.classifier.weight", "layer.1.ffn.output.bias"}
    loss, every = model.gradients(batch)
    again, got = model.gradients(batch, only=some)
    assert loss == again and got.keys() == some
    assert all(np.array_equal(got[name], every[name]) for name in some)
    assert model.gradients(batch)[1].keys() == every.keys()  # and the next call is free again


@pytest.mark.parametrize("backend", [qtx_ref.backend, qtx_torch.backend], ids=["ref", "torch"])
def test_a_trainer_of_nothing_is_refused(backend):
    model = backend.Model(VIT, init_params(VIT, 0))
    with pytest.raises(SpecError, match="begins none of the model's parameters"):
        backend.Trainer(model, OptimSpec(only=("hat.",)))


def test_dropout_and_images(place, tmp_path):
    result = answer(
        "finetune",
        place / "vit.safetensors",
        "--data",
        "digits",
        "--out",
        tmp_path,
        "--steps",
        3,
        "--head-only",
        "--dropout",
        0.25,
        "--backend",
        "ref",
    )
    assert result["targets"] == 180
    spec = load_checkpoint(tmp_path / "model.safetensors").spec
    assert (spec.classes, spec.dropout, spec.attention_dropout) == (10, 0.25, 0.25)


def test_the_pooler_that_came_along_is_used(place, tmp_path):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(16, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    spec = replace(BERT, head=Head.NONE)
    came = {"hub.pooler.dense.weight": weight, "hub.pooler.dense.bias": bias}
    path = saved(tmp_path / "came.safetensors", spec, came)
    answer(
        "finetune",
        path,
        "--data",
        place / "set.csv",
        "--out",
        tmp_path / "out",
        "--steps",
        1,
        "--lr",
        1e-9,
        "--backend",
        "ref",
    )
    params = load_checkpoint(tmp_path / "out" / "model.safetensors").params
    np.testing.assert_allclose(params["head.pool.weight"], weight, rtol=0, atol=1e-8)  # one step of 1e-9
    drawn = init_params(replace(BERT, head=Head.CLASSIFY, classes=2), 0)["head.classifier.weight"]
    np.testing.assert_allclose(params["head.classifier.weight"], drawn, rtol=0, atol=1e-8)


def interrupt(monkeypatch, at: int) -> None:
    step = qtx_ref.backend.Trainer.step

    def interrupted(self, batch, **rows):
        if self.adam.count == at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, **rows)

    monkeypatch.setattr(qtx_ref.backend.Trainer, "step", interrupted)


@pytest.mark.parametrize("what", ["finetune", "head only", "init"])
def test_interrupt_and_resume_give_the_same_bits(place, tmp_path, monkeypatch, what):
    if what == "init":
        command = ["train", "--init", place / "mlm.safetensors", "--attention", "gated", "--batch", 2]
    else:
        command = ["finetune", place / "bert.safetensors", "--data", place / "set.csv", "--batch", 8]
        command += ["--head-only"] if what == "head only" else []
    command += ["--backend", "ref", "--steps", 6, "--lr", 1e-3]
    good(*command, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        stopped = call(*command, "--out", tmp_path / "broken")
    assert stopped.exit_code == 130 and "step 3 of 6" in stopped.output
    good(*command, "--out", tmp_path / "broken", "--resume")
    whole, broken = (load_checkpoint(tmp_path / name) for name in ("whole", "broken"))
    for one, two in ((whole.params, broken.params), (whole.extra, broken.extra)):
        assert one.keys() == two.keys()
        assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    other = refused(*command[:-1], 2e-3, "--out", tmp_path / "broken", "--resume")
    assert "optim.lr was 0.001" in other and "--change optim.lr" in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "opt.safetensors", "--data", "books"], "is an opt, which has no classifier"),
        (["finetune", "vit.safetensors", "--data", "books"], "data 'books' is not images"),
        (["finetune", "bert.safetensors", "--data", "digits"], "data 'digits' is images"),
        (["finetune", "bert.safetensors", "--data", "books", "--steps", "1", "--epochs", "2"], "give one of them"),
        (["finetune", "vit.safetensors", "--data", "digits", "--length", "9"], "images have none"),
        (["finetune", "nowhere.safetensors", "--data", "digits"], "no such checkpoint"),
        (["finetune", "quantized.safetensors", "--data", "set.csv"], "is quantized"),
        (["finetune", "diverged.safetensors", "--data", "set.csv"], "training diverged at step 3"),
        (["finetune", "bert.safetensors", "--data", "half.csv"], "has no calibration rows"),
        (["finetune", "bert.safetensors", "--data", "lone.csv"], "has no train rows of class 'b'"),
        (["train", "--init", "mlm.safetensors", "--model", "bert-tiny"], "--init and --model bert-tiny"),
        (["train", "--init", "mlm.safetensors", "--vocab", "9"], "--init and --vocab 9"),
        (["train", "--init", "quantized.safetensors"], "is quantized"),
        (["train", "--init", "classifier.safetensors"], "use qtx finetune"),
        (["train", "--init", "mlm.safetensors", "--attention", "mlp"], "only the linear one"),
        (["train", "--init", "mlm.safetensors", "--data", "digits"], "data 'digits' is images"),
    ],
)
def test_what_cannot_be_begun_with_is_refused(place, model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    if not Path("quantized.safetensors").exists():
        good("quantize", model[0], "--out", "quantized.safetensors")
        got = load_checkpoint(Path("bert.safetensors"))
        save_checkpoint(Path("diverged.safetensors"), replace(got, meta={**got.meta, "diverged_at": 3}))
        save_checkpoint(Path("classifier.safetensors"), replace(load_checkpoint(model[0]), extra={}))
        rows = [(sentence(i, 4), i % 2, ("train", "evaluation")[i % 2]) for i in range(10)]
        write_csv(Path("half.csv"), rows, ("text", "label", "split"))
        rows = [(sentence(i, 4), "ab"[i == 2], ("train", "calibration", "evaluation")[i % 3]) for i in range(9)]
        write_csv(Path("lone.csv"), rows, ("text", "label", "split"))
    assert message in refused(*arguments, "--out", tmp_path / "out", "--backend", "ref")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("epochs", ["nan", "inf"])
def test_epochs_are_a_number(place, tmp_path, epochs):
    result = call(
        "finetune", place / "bert.safetensors", "--data", place / "set.csv", "--out", tmp_path, "--epochs", epochs
    )
    assert result.exit_code == 2 and "--epochs" in result.output


def test_what_an_earlier_training_saw_evaluates_nothing(place, model, tmp_path):
    """Two trainings on: texts of the first one's train split are refused, also in the artifact."""
    second = tmp_path / "second.csv"
    rows = [
        (sentence(200 + i, 5), ("yes", "no")[i % 2], ("train", "calibration", "evaluation")[i // 8]) for i in range(24)
    ]
    write_csv(second, rows, ("text", "label", "split"))
    command = ["--steps", 1, "--batch", 2, "--backend", "ref"]
    good("finetune", model[0], "--data", second, "--out", tmp_path / "two", *command)
    good("quantize", tmp_path / "two", "--out", tmp_path / "two.qtx", "--backend", "ref")
    first = load(str(place / "set.csv"), replace(BERT, head=Head.NONE), tokenizer=read_bundled_tokenizer())
    seen = set(first.hashes("train"))
    assert set(load_checkpoint(tmp_path / "two").meta["trained_on"]) == seen
    for split, commands in (
        ("evaluation", [("evaluate", "two"), ("evaluate", "two.qtx"), ("ptq", "two", "--out", tmp_path / "ptq")]),
        ("calibration", [("quantize", "two", "--out", tmp_path / "x.qtx")]),
    ):
        leak = tmp_path / f"{split}.csv"
        known = ("good good " + sentence(0, 3), "yes", split)  # the first train row
        other = [s for s in ("train", "calibration", "evaluation") if s != split]
        fresh = [(sentence(300 + i, 5), ("yes", "no")[i % 2], other[i // 4]) for i in range(8)]
        write_csv(leak, [known, *fresh], ("text", "label", "split"))
        commands.append(("finetune", "two", "--out", tmp_path / "three", *command[:4]))
        for name, path, *rest in commands:
            said = refused(name, tmp_path / path, "--data", leak, *rest, "--backend", "ref")
            assert f"1 section(s) of the {split} data are this model's earlier train data" in said, name
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("command", ["evaluate", "analyze", "ptq", "quantize"])
def test_data_that_moved_are_asked_for(place, model, tmp_path, command):
    got = load_checkpoint(model[0])
    meta = {**got.meta, "data": got.meta["data"] | {"source": "moved/set.csv"}}
    save_checkpoint(tmp_path / "model.safetensors", replace(got, meta=meta))
    more = ["--out", tmp_path / "out.qtx"] if command in ("ptq", "quantize") else []
    said = refused(command, tmp_path / "model.safetensors", *more, "--backend", "ref")
    assert "model.safetensors has its data from moved/set.csv" in said and "with --data" in said


def test_an_artifact_keeps_how_its_pixels_are_scaled(place, tmp_path):
    """A ViT whose pixels have another mean and deviation than 0.5: integers see the same images."""
    pytest.importorskip("PIL.Image", reason="the extra images is not installed")
    got = load_checkpoint(place / "vit.safetensors")
    scaling = {"mean": [0.25], "std": [0.125]}
    save_checkpoint(tmp_path / "vit.safetensors", replace(got, meta={**got.meta, "images": scaling}))
    good("quantize", tmp_path / "vit.safetensors", "--out", tmp_path / "vit.qtx", "--backend", "ref")
    assert load_artifact(tmp_path / "vit.qtx").meta["images"] == scaling
