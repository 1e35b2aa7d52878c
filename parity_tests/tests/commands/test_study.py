"""`qtx study` as a user types it: its runs, what it keeps of them, and when it is another study."""

import json

import pytest

from parity_tests.tests.shell import STUDY, call, good
from qtx.files.checkpoint import load_checkpoint
from qtx_ref.backend import Trainer


def test_study(tmp_path):
    out = tmp_path / "study"
    command = [*STUDY, "--bits", "w8a8,w4a8", "--train-quant", "w8a8", "--seeds", 2, "--out", out]
    table = good(*command).stdout
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert rows == ["vanilla", "gated", "vanilla-FQ", "gated-FQ"]
    result = json.loads((out / "study.json").read_text())
    assert len(result["runs"]) == 8  # two attentions, with and without quantized training, two seeds
    for run in result["runs"].values():
        assert (out / run["checkpoint"]).is_file()
        assert run["recipes"].keys() == {"w8a8", "w4a8"}
        assert (run["trained"] is None) == (run["train_quant"] is None)
    assert good(*command, "--resume").stdout == table  # finished runs are not trained again
    refused = call(*command)
    assert refused.exit_code == 1
    assert "go on with --resume, or choose another --out" in refused.output
    other = call(*STUDY, "--bits", "w6a6", "--out", out, "--resume")
    assert other.exit_code == 1
    assert "is another study" in other.output
    assert json.loads((out / "study.json").read_text()) == result


def test_a_study_of_any_seed_calibrates_as_every_command_and_keeps_what_it_found(tmp_path):
    """BERT's calibration masks are drawn from one seed: study.json has the ranges that `qtx quantize` finds."""
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    from qtx.data.corpus import BUNDLED

    book, out = tmp_path / "book.txt", tmp_path / "s"
    book.write_text((BUNDLED / "text" / "alice.txt").read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    command = [
        "study",
        "--backend",
        "ref",
        "--model",
        "bert-tiny",
        "--seed",
        1,
        "--steps",
        1,
        "--batch",
        1,
        "--data",
        book,
    ]
    good(*command, "--vocab", 300, "--attention", "vanilla", "--bits", "w4a8", "--out", out)
    result = json.loads((out / "study.json").read_text())
    assert result["calibration_seed"] == 0
    run = result["runs"]["vanilla-seed1"]
    file = tmp_path / "q.safetensors"
    good("quantize", out / "vanilla-seed1", "--backend", "ref", "--recipe", "w4a8", "--out", file)
    got = load_checkpoint(file)
    kept = run["recipes"]["w4a8"]["ranges"]
    assert kept.keys() == got.ranges.keys()
    for site, known in got.ranges.items():
        assert kept[site] == {key: value.ravel().tolist() for key, value in known._asdict().items()}, site
    count = sum(value.size for value in got.params.values())
    codes = sum(value.size for name, value in got.params.items() if name in kept)
    assert run["float_bytes"] == 4 * count
    assert run["recipes"]["w4a8"]["bytes"] == 4 * (count - codes) + codes / 2 + 8 * len(kept)  # two codes to a byte


def test_a_diverged_run_is_marked_and_does_not_stop_the_others(tmp_path, monkeypatch):
    step = Trainer.step

    def broken(self, batch, **rows):
        loss, norm = step(self, batch, **rows)
        gated = "layer.0.attn.gate_logit.weight" in self.model.weights
        return (float("nan") if gated and self.adam.count == 3 else loss), norm

    monkeypatch.setattr(Trainer, "step", broken)
    out = tmp_path / "study"
    table = good(*STUDY[:-1], "gated,vanilla", "--out", out).stdout
    assert "gated (diverged)" in table
    runs = json.loads((out / "study.json").read_text())["runs"]
    assert runs["gated-seed0"]["diverged"] and runs["gated-seed0"]["float"] is None
    assert not runs["vanilla-seed0"]["diverged"] and runs["vanilla-seed0"]["float"] is not None


@pytest.mark.parametrize("rate", ["1e3", "1e39"])
def test_a_rate_that_breaks_everything_stops_nothing(tmp_path, rate):
    table = good(*STUDY[:-1], "vanilla", "--lr", rate, "--out", tmp_path / "s").stdout
    assert "vanilla" in table
    if "diverged_at" in (tmp_path / "s/vanilla-seed0/model.safetensors").read_bytes()[:20000].decode("utf-8", "ignore"):
        refused = call("evaluate", tmp_path / "s/vanilla-seed0", "--backend", "ref")
        assert refused.exit_code == 1
        assert "no model is left to use" in refused.output


def test_a_changed_text_is_another_study(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    from qtx.data.corpus import BUNDLED

    book = tmp_path / "book.txt"
    text = (BUNDLED / "text" / "alice.txt").read_bytes().decode()
    book.write_text(text, encoding="utf-8")
    command = ["study", "--backend", "ref", "--steps", 1, "--batch", 1, "--attention", "vanilla", "--data", book]
    command += ["--vocab", 300, "--out", tmp_path / "s"]
    good(*command)
    assert good("evaluate", tmp_path / "s/vanilla-seed0", "--backend", "ref", "--batches", 1)  # with its own tokenizer
    book.write_text(text.replace("Alice", "Anna"), encoding="utf-8")
    result = call(*command, "--resume")
    assert result.exit_code == 1
    assert "is another study" in result.output
