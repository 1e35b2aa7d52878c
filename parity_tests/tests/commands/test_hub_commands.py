"""qtx import and export, and what the other commands do with an imported model."""

import json

import numpy as np
import pytest
import torch

from parity_tests.tests.hub_models import BERT_SIZE, make, transformers
from parity_tests.tests.shell import call
from qtx.data import DataSpec
from qtx.data.corpus import load_bundled_books
from qtx.files.checkpoint import load_checkpoint, save_checkpoint
from qtx.hub import import_model


def test_commands(tmp_path):
    make("bert mlm", tmp_path / "theirs")
    words = '{"model": {"vocab": {"[PAD]": 0, "a": 1}}}\n'
    (tmp_path / "theirs/tokenizer.json").write_text(words)
    ours, out = tmp_path / "m.safetensors", tmp_path / "out"
    got = call("import", tmp_path / "theirs", "--out", ours, "--json", tmp_path / "found.json")
    assert got.exit_code == 0
    said = json.loads((tmp_path / "found.json").read_bytes())
    assert (said["family"], said["head"], said["layers"], said["width"], said["heads"]) == ("bert", "mlm", 2, 16, 2)
    assert said["parameters"] == sum(value.size for value in load_checkpoint(ours).params.values())
    assert (said["dtype"], said["tokenizer"], said["apart"]) == (["float32"], True, [])
    again = call("import", tmp_path / "theirs", "--out", ours)
    assert (again.exit_code, f"{ours} exists" in again.output) == (1, True)
    assert call("export", ours, "--format", "hf", "--out", out).exit_code == 0
    assert (out / "tokenizer.json").read_text() == words
    before = sorted((path.name, path.read_bytes()) for path in out.iterdir())
    assert "exists and is not an empty folder" in call("export", ours, "--out", out).output
    assert (
        "make integers of it with qtx quantize"
        in call("export", ours, "--format", "onnx", "--out", tmp_path / "x.onnx").output
    )
    assert not (tmp_path / "x.onnx").exists()
    json_there = call("export", ours, "--out", tmp_path / "y", "--json", tmp_path / "y/config.json")
    assert "a file that the command writes" in json_there.output
    for command, name in (("ptq", "ptq.json"), ("cost", "cost.json")):  # else --resume would find something else there
        json_there = call(command, ours, "--out", tmp_path / "z", "--json", tmp_path / "z" / name)
        assert "a file that the command writes" in json_there.output and not (tmp_path / "z").exists()
    over = call(
        "import", tmp_path / "theirs", "--out", tmp_path / "z.safetensors", "--json", tmp_path / "theirs/config.json"
    )
    assert "choose another" in over.output
    assert sorted((path.name, path.read_bytes()) for path in out.iterdir()) == before


def test_other_commands_say_what_an_imported_model_lacks(tmp_path):
    make("bert", tmp_path / "theirs")
    path = tmp_path / "run" / "model.safetensors"
    save_checkpoint(path, import_model(tmp_path / "theirs"))
    for words, message in [
        (("analyze", path), "found no tokenizer.json"),
        (("evaluate", path), "has no head"),
        (
            ("train", "--model", "bert-tiny", "--steps", 1, "--resume", "--out", path.parent),
            "was not made by qtx train",
        ),
    ]:
        got = call(*words)
        assert (got.exit_code, got.output.count("\n")) == (1, 1), got.output
        assert message in got.output


def test_other_commands_take_an_imported_model(tmp_path):
    words = load_bundled_books(DataSpec(), False)
    config = BERT_SIZE | {"vocab_size": words.vocab, "max_position_embeddings": 32, "intermediate_size": 32}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").write_bytes(words.tokenizer_json.encode())
    ours, integers = tmp_path / "m.safetensors", tmp_path / "m.qtx"
    assert call("import", tmp_path / "theirs", "--out", ours).exit_code == 0
    for command in [
        ("evaluate", ours, "--batches", 1, "--json", tmp_path / "score.json"),
        ("analyze", ours, "--data", "books", "--batches", 1),
        ("quantize", ours, "--out", integers),
        ("evaluate", integers, "--batches", 1),
    ]:
        got = call(*command)
        assert got.exit_code == 0, got.output
    batch = next(iter(words.split_batches("evaluation", load_checkpoint(ours).spec, 16, 0)))
    given = {
        "input_ids": batch["tokens"],
        "attention_mask": batch["mask"],
        "labels": np.where(batch["targets"] < 0, -100, batch["targets"]),
    }
    with torch.no_grad():
        loss = model(**{key: torch.from_numpy(value.astype(np.int64)) for key, value in given.items()}).loss.item()
    # float32 logits in another order of sums
    assert json.loads((tmp_path / "score.json").read_bytes())["loss"] == pytest.approx(loss, rel=1e-5)
