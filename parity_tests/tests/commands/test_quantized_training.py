"""Quantized training from the command line: recipes by name, imported checkpoints, a study with a run that diverges."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from parity_tests.tests.hub_models import BERT_SIZE, transformers
from parity_tests.tests.shell import call, good
from qtx.data.corpus import load_bundled_books
from qtx.data.spec import DataSpec
from qtx.files.checkpoint import load_checkpoint
from qtx.recipes.named import recipe, resolve, training_recipe
from qtx.recipes.sites import sites
from qtx_ref.presets import preset
from qtx_ref.spec import FloatFormat, Granularity, SpecError, from_dict, to_dict
from qtx_ref.spec.recipe import Recipe

TOKEN, CHANNEL, TENSOR, BLOCK = Granularity.TOKEN, Granularity.CHANNEL, Granularity.TENSOR, Granularity.BLOCK


@pytest.mark.parametrize(
    ("name", "whole", "rows", "weights", "form"),
    [
        ("w8a8", "train-w8a8", TOKEN, CHANNEL, 8),
        ("w6a6-tensor", "train-w6a6-tensor", TENSOR, TENSOR, 6),
        ("train-w4a4", "train-w4a4", TOKEN, CHANNEL, 4),
        ("fp8", "train-fp8", TOKEN, CHANNEL, FloatFormat.E4M3),
        ("train-fp8-e5m2-tensor", "train-fp8-e5m2-tensor", TENSOR, TENSOR, FloatFormat.E5M2),
        ("train-mxfp8", "train-mxfp8", BLOCK, BLOCK, FloatFormat.E4M3),
        ("train-mxfp4", "train-mxfp4", BLOCK, BLOCK, FloatFormat.E2M1),
    ],
)
@pytest.mark.parametrize("model", ["bert-base", "opt-350m", "vit-s16"])
def test_both_operands_of_every_matmul(
    name: str, whole: str, rows: Granularity, weights: Granularity, form: object, model: str
) -> None:
    spec = preset(model)
    chosen = training_recipe(name, spec)
    quants = resolve(chosen, spec)
    every = sites(spec)
    matrices = [site for site in every.weights if f"{site.removesuffix('.weight')}.input" in every.operands]
    assert chosen.name == whole
    assert set(quants) == {*every.operands, *matrices}
    assert all(quant.dynamic and quant.symmetric for quant in quants.values())
    assert {getattr(quant, "format", None) or quant.bits for quant in quants.values()} == {form}
    assert quants["layer.0.ffn.hidden.input"].granularity is rows
    assert quants["layer.0.ffn.hidden.weight"].granularity is weights
    sums = TOKEN if rows is BLOCK else rows  # the product of probabilities and values has no blocks
    assert {quants["layer.0.attn.context.lhs"].granularity, quants["layer.0.attn.context.rhs"].granularity} == {sums}


def test_gradients_by_name() -> None:
    spec = preset("bert-tiny")
    got = training_recipe("w8a8+gradfp8+grad6-tensor:weight+grad4-stochastic:wgrad.input", spec)
    assert got.name == "train-w8a8+gradfp8+grad6-tensor:weight+grad4-stochastic:wgrad.input"
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(got)))) == got
    made = got.gradients
    assert (made.dgrad_gradient.quant.format, made.dgrad_gradient.stochastic) == (FloatFormat.E5M2, True)
    assert made.wgrad_gradient == made.dgrad_gradient
    assert (made.dgrad_weight.quant.bits, made.dgrad_weight.quant.granularity) == (6, TENSOR)
    assert (made.dgrad_weight.stochastic, made.wgrad_input.stochastic, made.wgrad_input.quant.bits) == (False, True, 4)
    alone = training_recipe("float+grad8-nearest:dgrad.gradient", spec)
    assert not resolve(alone, spec) and alone.gradients.wgrad_gradient is None
    assert not alone.gradients.dgrad_gradient.stochastic
    old = to_dict(recipe("w8a8", spec))
    del old["gradients"]  # as qtx 0.2 wrote it
    assert from_dict(Recipe, old) == recipe("w8a8", spec)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("w8a8+grad9x", "'+grad9x'"),
        ("w8a8+grad8:foo", "dgrad.weight"),
        ("w8a8+grad8:", "'+grad8:'"),
        ("w8a8+grad8-nearest-stochastic", "'+grad8-nearest-stochastic'"),
        ("w8a8+grad1", "bits is 1"),
        ("w8a8+grad\u0668", "'+grad\u0668'"),  # an Arabic eight
        ("w\u0668a8", "'w\u0668a8'"),
        (f"w8a{'9' * 5000}", "is not known"),  # beyond the digits that Python reads
        (f"w8a8+grad{'9' * 5000}", "are not known"),
        ("w8a8+gradmxfp8-tensor", "leave -tensor out"),
        ("train-w8", "train-mxfp4"),
        ("float", "'float'"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(name: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=re.escape(named)):
        training_recipe(name, preset("vit-tiny"))
    got = call("train", "--model", "vit-tiny", "--train-quant", name, "--out", tmp_path / "run")
    assert (got.exit_code, got.output.count("\n")) == (1, 1) and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of transformers' with the books' tokenizer, as `qtx import` leaves it."""
    folder = tmp_path_factory.mktemp("imported")
    words = load_bundled_books(DataSpec(), False)
    sizes = {"vocab_size": words.vocab, "max_position_embeddings": 32, "intermediate_size": 32}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**(BERT_SIZE | sizes))).eval()
    model.save_pretrained(folder / "theirs")
    (folder / "theirs/tokenizer.json").write_bytes(words.tokenizer_json.encode())
    good("import", folder / "theirs", "--out", folder / "m.safetensors")
    return folder / "m.safetensors"


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_learned_ranges_of_an_imported_checkpoint(imported: Path, tmp_path: Path, backend: str) -> None:
    """Calibrated, trained, stopped and resumed to the bits of the run that was not; evaluated, made integers."""
    common = ("--init", imported, "--data", "books", "--train-quant", "lsq-w8a8+grad8", "--backend", backend)
    sizes = ("--steps", 4, "--batch", 2)
    good("train", *common, *sizes, "--out", tmp_path / "whole")
    good("train", *common, *sizes, "--out", tmp_path / "parts", "--stop", 2)
    first = load_checkpoint(tmp_path / "parts/model.safetensors")
    good("train", *common, *sizes, "--out", tmp_path / "parts", "--resume", "--stop", 4)
    whole, parts = (load_checkpoint(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.params.items():
        assert np.array_equal(parts.params[name], value), name
    site = "layer.0.attn.query.weight"
    for name, value in whole.ranges.items():
        assert np.array_equal(parts.ranges[name].scale, value.scale), name
    assert whole.ranges[site].scale != first.ranges[site].scale  # it is learned
    place, artifact = tmp_path / "whole/model.safetensors", tmp_path / "m.qtx"
    asked = ("--batches", 1, "--backend", backend, "--json", "-")
    fake = json.loads(good("evaluate", place, *asked).stdout)["loss"]
    said = good("quantize", place, "--backend", backend, "--out", artifact).output
    assert "the checkpoint's own ranges" in said
    integers = json.loads(good("evaluate", artifact, *asked).stdout)["loss"]
    assert integers == pytest.approx(fake, rel=2e-3)  # integers round where fake quantization does not


def test_a_run_that_diverges_stops_no_other(tmp_path: Path) -> None:
    """A rate that breaks everything, with quantized matmuls and gradients, beside one that trains."""
    file = tmp_path / "study.toml"
    file.write_text(
        'model.preset = "vit-tiny"\noptim.steps = 3\ndata.batch = 4\nlog.sites = ["layer.2.input"]\n'
        'quant.train = "w8a8+grad8"\nquant.recipes = ["w8a8"]\nmachine.backend = "ref"\n'
        '[study]\nmodel.attention = ["vanilla"]\noptim.lr = [1e20, 1e-3]\n'
    )
    lines = good("study", file, "--out", tmp_path / "out", "--json", tmp_path / "json").stdout.splitlines()
    header, lost, kept = lines[0], *(line for line in lines if line.startswith("| vanilla"))
    assert "as trained acc %" in header and "mean loss" in header
    assert "(diverged)" in lost and "(diverged)" not in kept
    runs = json.loads((tmp_path / "json").read_bytes())["runs"]
    assert [run["diverged"] for run in runs.values()] == [True, False]
    name, run = list(runs.items())[1]
    log = [json.loads(line) for line in (tmp_path / "out" / name / "log.jsonl").read_text().splitlines()]
    assert run["mean_loss"] == pytest.approx(np.mean([line["loss"] for line in log]))
    assert [line["step"] for line in log] == [1, 2, 3]
    assert all(line["sites"]["layer.2.input"]["inf_norm"] > 0 for line in log)
    assert (tmp_path / "out" / "inf_norm.png").stat().st_size > 0
