"""Studies and commands from run files: grids, what is refused, files that runs leave and go on from."""

import json
from pathlib import Path

import pytest

import qtx_ref
from parity_tests.tests.shell import call, good
from qtx.data.spec import Source
from qtx.jobs.rows import make_rows, read_kept
from qtx.runs.reading import (
    make_run,
    open_run,
    parse_run,
    write_run,
)
from qtx_ref.spec import SpecError

ROOT = Path(qtx_ref.__file__).parent.parent


# --- studies ----------------------------------------------------------------------------------------------------------


def list_lines(table: str) -> list[str]:
    """The names of a table's rows."""
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]


def test_a_study_varies_any_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("study.toml").write_text(
        '[model]\npreset = "vit-tiny"\npatch_size = 4\nlayers = 1\nwidth = 16\nheads = 2\nhidden = 24\n'
        '[optim]\nsteps = 2\n[data]\nbatch = 4\n[machine]\nbackend = "ref"\n'
        '[study]\n"optim.lr" = [1e-3, 3e-4]\nmodel.attention = ["vanilla", "clipped"]\n'
    )
    command = ["study", "study.toml", "--out", "out"]
    table = good(*command).stdout
    lines = list_lines(table)
    assert lines == ["vanilla-lr=0.001", "clipped-lr=0.001", "vanilla-lr=0.0003", "clipped-lr=0.0003"]
    result = json.loads(Path("out/study.json").read_text())
    assert list(result["runs"]) == [f"{line}-seed0" for line in lines]
    assert [run["settings"] for run in result["runs"].values()] == [{"optim.lr": x} for x in (1e-3, 1e-3, 3e-4, 3e-4)]
    assert good(*command, "--resume").stdout == table
    said = call(*command, "--resume", "--set", "data.batch=5").output
    assert "is another study: study.vanilla-lr=0.001-seed0.train.batch was 4 and is 5" in said
    (line,) = list_lines(good(*command[:-1], "two", "--set", "optim.lr=1e-3", "--attention", "vanilla").stdout)
    assert line == "vanilla"  # an option lies over a grid
    assert "x: no such checkpoint" in call(*command, "--set", "init=x").output


def test_a_study_goes_on_to_a_later_stop(tmp_path):
    """As if it had never stopped, and its runs are evaluated anew."""
    common = ["study", "--model", "vit-tiny", "--backend", "ref", "--attention", "vanilla,clipped", "--batch", 4,
              "--set", "model.layers=1", "--set", "model.width=16", "--set", "model.heads=2", "--set", "model.hidden=8",
              "--steps", 5]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    good(*common, "--out", one, "--set", "stop=2")
    table = good(*common, "--out", one, "--set", "stop=4", "--resume").stdout
    assert table == good(*common, "--out", two, "--set", "stop=4").stdout.replace(str(two), str(one))
    assert json.loads((one / "study.json").read_text())["runs"] == json.loads((two / "study.json").read_text())["runs"]
    assert "stop is 3" in call(*common, "--out", one, "--set", "stop=3", "--resume").output
    assert good(*common, "--out", one, "--set", "stop=4", "--resume").stdout == table


def test_what_a_study_of_before_said_is_the_same_study():
    kept = {
        "model": "bert-tiny",
        "data": None,
        "tokenizer": None,
        "vocab": None,
        "steps": 30,
        "batch": 8,
        "lr": 0.002,
        "attention": ["vanilla", "mlp"],
        "recipes": ["w8a8"],
        "train_quant": "w8a8",
        "watch_integer": None,
        "seeds": [3, 4],
        "machine": {"backend": "ref", "device": "cpu", "dtype": "float32"},
    }
    said = {
        "model.preset": "bert-tiny",
        "optim.steps": 30,
        "data.batch": 8,
        "optim.lr": 0.002,
        "machine.backend": "ref",
    }
    grids = {"model.attention": ["vanilla", "mlp"], "seed": [3, 4], "quant.train": ["none", "w8a8"]}
    old, new = make_rows(read_kept(kept, "study.json")), make_rows(make_run(said, grids=grids))
    assert [*old] == [*new] and len(old) == 8 and [*old][2] == "vanilla-FQ-seed3"
    assert {name: row.identify() for name, row in old.items()} == {name: row.identify() for name, row in new.items()}


def test_recipes_are_no_grid():
    with pytest.raises(SpecError, match="name them there"):
        make_rows(make_run({"model.attention": "vanilla"}, grids={"quant.recipes": [["w8a8"], ["w4a8"]]}))


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(SpecError, match="two runs of the study would be called"):
        make_rows(make_run({}, grids={"data.sources": ["a/b.txt", "a_b.txt"]}))


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_guide_has_every_key():
    """docs/guide.md has the table that `qtx runs --keys` prints."""
    printed = good("runs", "--keys").stdout
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert printed in page, "put what qtx runs --keys prints in place of the table of keys"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "--keys", "paper-bert-base"], "--keys is about all runs"),
        (["runs", "--set", "seed=1"], "--set belongs to --resolved"),
        (["runs", "--resolved", "--set", "optim.warm_up=1"], "--set optim.warm_up=1: unknown key 'optim.warm_up'"),
        (["train", "--set", "seed"], "--set seed: expected KEY=VALUE"),
        (["ptq", "x", "--set", "optim.lr=1"], "qtx ptq takes keys of data and machine, and quant.recipes, alone"),
        (["finetune", "x", "--out", "o"], "name the labelled data with --data"),
        (["finetune", "x", "--out", "o", "--data", "books", "--set", "model.layers=3"], "the checkpoint has its own"),
        (["finetune", "x", "--out", "o", "--data", "books", "--head-only", "--set", "optim.only=head."], "one of them"),
        (["train", "--backend", "ref", "--set", "step.accumulate=3"], "step accumulate is 3: a batch of 16 rows"),
        (["train", "--backend", "ref", "--resume", "--change", "seed"], "change is 'seed': a run can change"),
    ],
)
def test_commands_refuse(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1, result.output
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_evaluated_is_one_line(tmp_path):
    """Before there is a bar, which would be a line of its own."""
    said = ["--model", "vit-tiny", "--backend", "ref", "--batch", 2, "--steps", 1, "--set", "evaluation.every=1"]
    result = call("train", *said, "--set", "evaluation.integers=nosuch", "--out", tmp_path)
    assert result.exit_code == 1 and "nosuch" in result.output and result.output.count("\n") == 1, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize("name", ["model-000050.safetensors", "model-000050.shares", "inf_norm.png", "tensorboard"])
def test_json_is_no_file_of_a_run(tmp_path, name):
    result = call("train", "--model", "vit-tiny", "--steps", 1, "--out", tmp_path, "--json", tmp_path / name)
    assert result.exit_code == 1 and "is a file that the command writes" in result.output
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_one_line(tmp_path):
    said = ["train", "--model", "vit-tiny", "--backend", "ref", "--batch", 2, "--steps", 1]
    long = call(*said, "--out", tmp_path / ("a" * 300))
    assert long.exit_code == 1 and "cannot be written (File name too long): choose another" in long.output
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("mine")
    board = call(*said, "--set", "log.tensorboard=true", "--out", tmp_path)
    assert board.exit_code == 1 and "tensorboard cannot be written (File exists): choose another" in board.output
    assert (tmp_path / "tensorboard").read_text() == "mine"


def test_a_run_leaves_its_file_and_goes_on_from_it(tmp_path):
    """Stopped, lengthened and moved from OUT/run.toml alone; a refused change leaves it as it was."""
    out = tmp_path / "out"
    said = ["--model", "vit-tiny", "--backend", "ref", "--batch", 4, "--steps", 6, "--set", "optim.warmup=1"]
    good("train", *said, "--stop", 3, "--out", out)
    file = out / "run.toml"
    first = file.read_text()
    assert first.startswith("# A run of qtx") and "stop = 3  # --stop" in first and "warmup = 1  # --set" in first
    refused = call("train", file, "--set", "stop=none", "--steps", 8, "--out", out, "--resume")
    assert refused.exit_code == 1 and "--change optim.steps" in refused.output and file.read_text() == first
    good("train", file, "--set", "stop=none", "--out", out, "--resume")
    good("train", *said, "--out", tmp_path / "whole")
    assert 'stop = "none"  # --set' in file.read_text()
    curves = [
        json.loads(good("train", *said, "--out", o, "--resume", "--json", "-").stdout)["loss"]
        for o in (out, tmp_path / "whole")
    ]
    assert len(curves[0]) == 6 and curves[0] == curves[1]
    good("train", file, "--steps", 8, "--change", "optim.steps", "--out", out, "--resume")
    assert "steps = 8  # --steps" in file.read_text()


def test_the_file_of_a_run_from_a_checkpoint_trains_its_bits_again(tmp_path):
    """The checkpoint's own data, with their augmentation, unless others are named: the file must not name any."""
    tiny = ["--backend", "ref", "--batch", 4, "--steps", 2]
    augment = ["--set", "data.augment.flip=0.5", "--set", "data.augment.smoothing=0.3"]
    good("train", "--model", "vit-tiny", *tiny, *augment, "--out", tmp_path / "first")
    good("train", "--init", tmp_path / "first", *tiny, "--out", tmp_path / "next")
    good("train", tmp_path / "next" / "run.toml", "--out", tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("next", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["new\nline.toml", "bell\x07.toml", "\udcff.toml", "snow \u2603.toml"])
def test_a_run_file_of_any_name_is_named_in_what_the_run_leaves(name):
    run = parse_run('seed = 3\n[data]\nsources = "a\\u007fb"', name)
    text = write_run(run.settings)
    assert text.count("\n") == len(text.splitlines()) and text.encode()
    assert parse_run(text, "again").settings.keys() == run.settings.keys()
    assert parse_run(text, "again").get("data.sources") == (Source("a\x7fb"),)


def test_a_run_file_may_begin_with_a_mark_of_its_bytes(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 7\r\n")
    assert open_run(str(tmp_path / "run.toml")).get("seed") == 7


def test_a_study_printed_keeps_its_grids(tmp_path):
    """What `qtx runs --resolved` prints, `qtx study` takes for the same rows."""
    file = tmp_path / "study.toml"
    file.write_text(good("runs", "blog-bert-base", "--resolved").stdout)
    assert list(make_rows(open_run(str(file)))) == list(make_rows(open_run("blog-bert-base")))
    said = json.loads(good("runs", file, "--json", "-").stdout)
    assert said["grids"]["quant.train"] == [None, "w8a8"]
    own = tmp_path / "own.toml"
    own.write_text(good("runs", file).stdout)
    assert open_run(str(own)).grids == open_run("blog-bert-base").grids


def test_a_recipe_file_that_was_edited_is_another_run(tmp_path):
    """Its name is all that the run says; what it said stands in the checkpoint."""
    recipe, out = tmp_path / "w8.json", tmp_path / "out"
    good("recipes", "w8a8", "--json", recipe)
    said = ["train", "--model", "vit-tiny", "--backend", "ref", "--batch", 2, "--steps", 3, "--train-quant", recipe]
    good(*said, "--stop", 1, "--out", out)
    first, kept = recipe.read_text(), (out / "model.safetensors").read_bytes()
    recipe.write_text(first.replace('"bits": 8', '"bits": 6'))
    refused = call(*said, "--out", out, "--resume")
    assert refused.exit_code == 1 and "is another run: what" in refused.output and refused.output.count("\n") == 1
    assert (out / "model.safetensors").read_bytes() == kept
    recipe.write_text(first)
    good(*said, "--out", out, "--resume")


def test_a_foreign_run_file_is_not_replaced(tmp_path):
    (tmp_path / "run.toml").write_text("mine")
    result = call("train", "--model", "vit-tiny", "--backend", "ref", "--steps", 1, "--out", tmp_path)
    assert result.exit_code == 1 and "run.toml exists and is not qtx's" in result.output
    assert (tmp_path / "run.toml").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
