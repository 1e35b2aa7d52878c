"""`qtx recipes`: what it prints is a recipe, and comes back as it was."""

import json
from dataclasses import replace

import pytest

from parity_tests.tests.shell import call, good
from qtx.recipes.named import recipe
from qtx_ref.presets import attention, preset


def test_a_recipe_is_printed_and_written(tmp_path):
    printed = json.loads(good("recipes", "paper-opt", "--model", "opt-tiny").stdout)
    good("recipes", "paper-opt", "--model", "opt-tiny", "--json", tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text()) == printed
    assert all(rule["source"] for rule in printed["recipe"]["rules"])


KINDS = (
    "w8a8",
    "w6a16",
    "w8a8-p99.9",
    "w8a8-mse",
    "w4a8-wmse",
    "w8a8-channel",
    "w8a8-token",
    "w8a8-r16",
    "w8a8-ffn16",
    "w8a8-ffnfloat",
    "w8a8-float[layer.*.ffn.output+layer.0.attn.probs]",
    "w8a8-peg4",
    "w8a8-peg4p",
    "w8a8-out3",
    "w8a8-bias",
    "w4a16-channel-gptq",
    "w4a16-adaround",
    "linear-w8a8",
    "linear-w8a8-llmint8",
    "linear-w8a8-smooth0.5",
    "linear-w4a4-hadamard",
    "token-w8a8",
    "token-w8a8-r16",
    "lsq-w4a6",
    "train-w8a8",
    "fp8-e4m3",
    "fp8-e5m2",
    "mxfp8",
    "mxfp8-e5m2",
    "mxfp4",
    "paper",
)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"recipe": 1, "sites": 2}', '{"name": "x"}', "\\xff", "[]"]
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, text):
    file = tmp_path / "r.json"
    file.write_text(text)
    result = call("recipes", file)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: recipe file {file}: ") and result.output.count("\n") == 1


@pytest.mark.parametrize("model", ["bert-tiny", "opt-tiny", "vit-tiny"])
def test_every_kind_of_recipe_comes_back_as_it_was_printed(model, tmp_path):
    for kind in KINDS:
        name = f"paper-{model[: model.index('-')]}" if kind == "paper" else kind
        for given in ("vanilla", "clipped+gated"):
            file = tmp_path / f"{given}.{name}.json"
            command = ("--model", model, "--attention", given)
            good("recipes", name, *command, "--json", file)
            spec = replace(preset(model), attention=attention(given))
            assert recipe(str(file), spec) == recipe(name, spec), (name, given)
            assert good("recipes", file, *command).stdout == file.read_text()
