"""The commands as a user types them: what they write, what they refuse, and that Ctrl-C loses nothing."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity_tests.tests.shell import STUDY, TRAIN, call, good
from qtx.files.checkpoint import load_checkpoint
from qtx.progress import Progress
from qtx.recipes.named import recipe
from qtx_ref.backend import Trainer
from qtx_ref.spec import Rewrite, Transform, TransformKind, to_dict


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    good(*TRAIN, "--out", out, "--attention", "clipped+gated")
    return out / "model.safetensors"


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A small trained opt."""
    out = tmp_path_factory.mktemp("writer")
    good("train", "--backend", "ref", "--model", "opt-tiny", "--batch", "2", "--steps", "2", "--out", out)
    return out / "model.safetensors"


def test_evaluate_quantize_and_analyze(trained, tmp_path):
    float_score = json.loads(good("evaluate", trained, "--backend", "ref", "--json", "-").stdout)
    assert float_score["numerics"] == "float"
    assert float_score["targets"] == 180
    file = tmp_path / "q.safetensors"
    good("quantize", trained, "--backend", "ref", "--recipe", "w8a8", "--out", file)
    stored = json.loads(good("evaluate", file, "--backend", "ref", "--json", "-").stdout)
    fresh = json.loads(good("evaluate", trained, "--backend", "ref", "--recipe", "w8a8", "--json", "-").stdout)
    assert stored == fresh  # the file's ranges are those of the same calibration
    assert stored["loss"] != float_score["loss"]
    sites = json.loads(good("analyze", trained, "--backend", "ref", "--batches", 1, "--json", "-").stdout)
    assert {"embed.image", "layer.3.attn.gated", "head.classifier"} <= {s["site"] for s in sites["sites"]}
    assert len(sites["heads"]) == 16  # 4 of each layer


def test_a_recipe_that_rewrites_weights(trained, tmp_path):
    """The file holds what was rewritten: it scores as the checkpoint does under the recipe, in float as before."""
    base = recipe("w4a8", load_checkpoint(trained).spec)
    rotated = Transform(("*.ffn.output",), TransformKind.HADAMARD, "a test")
    chosen = replace(base, name="mine", batches=2, transforms=(rotated,), rewrite=Rewrite.GPTQ)
    named, file = tmp_path / "mine.json", tmp_path / "q.safetensors"
    named.write_text(json.dumps(to_dict(chosen)))
    good("quantize", trained, "--backend", "ref", "--recipe", named, "--out", file)

    def score(*arguments):
        return json.loads(good("evaluate", *arguments, "--backend", "ref", "--json", "-").stdout)

    stored, fresh = score(file), score(trained, "--recipe", named)
    assert stored["loss"] == fresh["loss"] != score(trained, "--recipe", "w4a8")["loss"]
    before, after = score(trained)["loss"], score(file, "--recipe", "float")["loss"]
    assert before != after and abs(before - after) < 0.05  # 4-bit weights, float activations
    again = call("evaluate", file, "--backend", "ref", "--recipe", "w8a8")
    assert again.exit_code == 1 and "made for the transforms of mine" in again.output
    integers = call("quantize", trained, "--backend", "ref", "--recipe", named, "--out", tmp_path / "q.qtx")
    assert integers.exit_code == 1 and "layer.0.ffn.output cannot run in integers: a transform" in integers.output
    training = call(*TRAIN, "--train-quant", named, "--out", tmp_path / "run")
    assert training.exit_code == 1 and "rewrites weights, which training moves" in training.output


def test_generate(writer):
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    command = ["generate", writer, "--backend", "ref", "--prompt", "It was the best", "--tokens", 5, "--json", "-"]
    first = json.loads(good(*command).stdout)
    assert len(first["tokens"]) == first["prompt_tokens"] + 5
    assert json.loads(good(*command, "--recipe", "w8a8").stdout)["prompt_tokens"] == first["prompt_tokens"]
    sampled = [json.loads(good(*command, "--temperature", 1, "--seed", s).stdout)["tokens"] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_learned_ranges_train_and_resume(tmp_path):
    good(*TRAIN, "--train-quant", "lsq-w4a8", "--out", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["learned.layer.0.ffn.hidden.weight.scale"].shape == (1, 1)
    score = json.loads(good("evaluate", tmp_path, "--backend", "ref", "--json", "-").stdout)
    assert score["numerics"] == "lsq-w4a8"


@pytest.mark.parametrize("extra", [[], ["--train-quant", "lsq-w4a8"]], ids=["float", "learned"])
def test_interrupt_and_resume_give_the_same_bits(tmp_path, monkeypatch, extra):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    good(*TRAIN, *extra, "--out", whole)
    step = Trainer.step

    def interrupted(self, batch, **rows):
        if self.adam.count == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, **rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        stopped = call(*TRAIN, *extra, "--out", broken)
    assert stopped.exit_code == 130
    assert "--resume goes on" in stopped.output
    assert load_file(broken / "model.safetensors")["history.loss"].shape == (4,)
    good(*TRAIN, *extra, "--out", broken, "--resume")
    one, other = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_an_interrupt_after_the_last_step_is_not_swallowed(tmp_path, monkeypatch):
    leave = Progress.__exit__

    def interrupted(self, *error):
        os.kill(os.getpid(), signal.SIGINT)
        leave(self, *error)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__exit__", interrupted)
        stopped = call(*TRAIN, "--out", tmp_path)
    assert stopped.exit_code == 130
    assert "after the last step" in stopped.output
    assert "8 steps" in good(*TRAIN, "--out", tmp_path, "--resume").output  # all of it was saved


def test_float64_is_trained_evaluated_and_resumed(tmp_path):
    wide = [*TRAIN[:-1], "2", "--dtype", "float64", "--out", tmp_path]
    good(*wide)
    good("evaluate", tmp_path, "--backend", "ref", "--dtype", "float64")
    good(*wide, "--resume")


def test_places_are_tried_before_the_work(trained, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for command in (
        [*TRAIN, "--out", file],
        [*STUDY, "--out", file],
        ["evaluate", trained, "--backend", "ref", "--json", file],
        ["evaluate", trained, "--backend", "ref", "--json", trained],
        ["quantize", trained, "--backend", "ref", "--out", file / "q.safetensors"],
    ):
        result = call(*command)
        assert result.exit_code == 1, command
        assert result.output.startswith("Error: ") and result.output.count("\n") == 1, result.output
    assert file.read_text() == "mine"


def test_a_printed_recipe_is_a_recipe(trained, tmp_path):
    """What `qtx recipes` writes goes back in, under any option that takes a recipe, and is what it was printed from."""
    file = tmp_path / "mine.json"
    good("recipes", "w4a8", "--model", "vit-tiny", "--attention", "clipped+gated", "--json", file)
    ours = json.loads(good("evaluate", trained, "--backend", "ref", "--recipe", file, "--json", "-").stdout)
    named = json.loads(good("evaluate", trained, "--backend", "ref", "--recipe", "w4a8", "--json", "-").stdout)
    assert ours == named
    study = [*STUDY[:-1], "clipped+gated", "--steps", "1", "--bits", f"{file},w4a8", "--out", tmp_path / "study"]
    good(*study)
    (run,) = json.loads((tmp_path / "study" / "study.json").read_text())["runs"].values()
    assert run["recipes"][str(file)] == run["recipes"]["w4a8"]
    good("quantize", trained, "--backend", "ref", "--recipe", file, "--out", tmp_path / "q.safetensors")
    assert load_checkpoint(tmp_path / "q.safetensors").recipe == recipe("w4a8", load_checkpoint(trained).spec)
    good(
        "ptq",
        trained,
        "--backend",
        "ref",
        "--recipes",
        file,
        "--sequences",
        2,
        "--calibration",
        1,
        "--out",
        tmp_path / "p",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "gpt-5"], "unknown model 'gpt-5'"),
        (["train", "--attention", "clipped:gamma=0.1"], "gamma is 0.1: clipped softmax needs gamma <= 0"),
        (["train", "--attention", "clipped:gamma=abc"], "gamma to 'abc': give a number"),
        (["train", "--attention", "head_conditional"], "would see its future"),
        (["train", "--attention", "vanilla+vanilla"], "has part 'vanilla'"),
        (["train", "--backend", "jax"], "backend is 'jax': choose one of ref, torch"),
        (["train", "--backend", "ref", "--device", "cuda"], "device is 'cuda': the reference runs on cpu"),
        (["train", "--backend", "ref", "--dtype", "bfloat16"], "dtype is 'bfloat16'"),
        (["train", "--data", "no/such/place"], "no/such/place"),
        (["train", "--backend", "ref", "--steps", "2", "--train-quant", "w1a8"], "bits is 1: give a whole number"),
        (["study", "--bits", "w8a17"], "bits is 17: give a whole number from 2 to 16"),
        (["study", "--bits", "w0a8"], "bits is 0: give a whole number from 2 to 16"),
        (["study", "--recipe", "w8a8", "--bits", "w6a6"], "give one of them"),
        (["study", "--recipe", "int8"], "recipe 'int8' is not known"),
        (["study", "--recipe", "paper-bert"], "use paper-opt"),
        (["study", "--recipe", "nowhere.json"], "recipe file nowhere.json cannot be read (No such file or directory)"),
        (["study", "--attention", ""], "name at least one"),
        (["study", "--attention", "vanilla,vanilla"], "each once"),
        (["train", "--attention", "clipped:gamma=-0.1:gamma=-0.2"], "gives a setting twice"),
        (["train", "--data", ""], "data.sources.path is ''"),
        (["evaluate", "nowhere"], "nowhere: no such checkpoint"),
        (["recipes", "w3"], "recipe 'w3' is not known"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_refused_commands_leave_no_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("evaluate", "nowhere", "--json", "a/b/c.json")
    call("quantize", trained, "--backend", "ref", "--recipe", "w0a8", "--out", "a/b/m.qtx")
    assert not list(tmp_path.iterdir())


def test_no_bar_without_a_total(capsys):
    for total, lines in ((0, 0), (2, 1)):
        with Progress("work", total) as bar:
            bar.advance()
        assert capsys.readouterr().err.count("\n") == lines


def test_every_command_says_what_it_does_in_a_line():
    assert call("--help").output.count("...") == 1  # of the usage line


def test_nothing_is_overwritten(trained, tmp_path):
    before = trained.read_bytes()
    for command in ([*TRAIN, "--out", trained.parent], ["quantize", trained, "--backend", "ref", "--out", trained]):
        result = call(*command)
        assert result.exit_code == 1
        assert "exists" in result.output
    other = call(*TRAIN[:-1], "9", "--out", trained.parent, "--resume", "--attention", "clipped+gated")
    assert other.exit_code == 1
    assert "optim.steps was 8 and is 9" in other.output and "--change optim.steps" in other.output
    assert trained.read_bytes() == before


def test_evaluation_refuses_training_data(writer, tmp_path):
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    from qtx.data.corpus import BUNDLED, split_chapters

    alice = (BUNDLED / "text" / "alice.txt").read_bytes().decode()
    book = tmp_path / "book.txt"  # backwards, so that a chapter trained on is now for evaluation
    book.write_bytes("\n\n".join(text for _, text in reversed(split_chapters(alice))).encode())
    result = call("evaluate", writer, "--backend", "ref", "--data", book, "--tokenizer", BUNDLED / "tokenizer.json")
    assert result.exit_code == 1
    assert "this model's" in result.output and "give other data" in result.output


def test_missing_extra_names_itself(tmp_path, monkeypatch):
    import importlib

    real = importlib.import_module

    def without_torch(name, *rest):
        if name.startswith("torch"):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without_torch)
    monkeypatch.chdir(tmp_path)
    result = call("study", "--steps", 2)
    assert result.exit_code == 1
    assert 'pip install "qtx[torch]"' in result.output and "--backend ref runs without it" in result.output
