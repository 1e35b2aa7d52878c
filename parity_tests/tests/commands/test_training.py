"""Runs that are killed, stopped, lengthened and moved: their bits, their log, what is kept and what is told."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qtx.data import load
from qtx.engines.backend import MissingExtra, backend
from qtx.engines.machine import Machine
from qtx.files.checkpoint import Checkpoint, load_checkpoint
from qtx.files.container import FileError
from qtx.files.lines import cut_lines
from qtx.jobs import log as logs
from qtx.jobs import training
from qtx.jobs.identity import MOVE, find_changes, identify
from qtx.jobs.run import TrainSpec
from qtx.jobs.training import train
from qtx.jobs.watch import find_sites, measure_sites
from qtx.measure.history import History
from qtx.runs.spec import EvaluationSpec, LogSpec, SavingSpec
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import OptimSpec, SpecError

MODEL = replace(preset("vit-tiny"), width=16, hidden=32, dropout=0.1)
DATA = load(None, MODEL)
PLAIN = TrainSpec(MODEL, OptimSpec(lr=1e-3, warmup=2, steps=8), batch=8, seed=0)
WATCHED = replace(
    PLAIN,
    evaluation=EvaluationSpec(every=3, batches=1, recipes=("w8a8",), integers=("w8a8",)),
    saving=SavingSpec(every=2, keep=2),
    log=LogSpec(sites=("layer.1.input", "layer.0.ffn.norm")),
)
REF = Machine("ref")


class Killed(Exception):
    """Stands for the end of the process."""


def go(run: TrainSpec, out: Path, machine: Machine = REF, **more) -> Checkpoint:
    return train(run, DATA, out / "model.safetensors", machine, resume=True, **more)


def kill(monkeypatch, run: TrainSpec, out: Path, step: int, machine: Machine = REF) -> None:
    """The run until it is killed in its step number `step`."""
    trainer = backend(machine.backend).Trainer
    whole = trainer.step

    def killed(self, batch, **rest):
        if self.adam.count == step - 1:
            raise Killed
        return whole(self, batch, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "step", killed)
        with pytest.raises(Killed):
            go(run, out, machine)


def read_log(out: Path) -> list[dict]:
    """Its lines, without what depends on time."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in logs.UNEQUAL} for line in lines]


def same_files(one: Path, other: Path) -> None:
    """Every checkpoint of two runs, bit for bit, and their logs."""
    names = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in other.iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            whole, again = load_file(one / name), load_file(other / name)
            assert whole.keys() == again.keys()
            assert [key for key in whole if whole[key].tobytes() != again[key].tobytes()] == [], name
    assert read_log(one) == read_log(other)


@pytest.mark.parametrize("name", ["ref", "torch"])
def test_a_killed_run_ends_as_the_one_that_was_not(tmp_path, monkeypatch, name):
    machine = Machine(name)
    go(WATCHED, tmp_path / "whole", machine)
    files = ["log.jsonl", "model-000006.safetensors", "model-000008.safetensors", "model.safetensors"]
    assert sorted(os.listdir(tmp_path / "whole")) == files
    lines = read_log(tmp_path / "whole")
    assert [line["step"] for line in lines] == [*range(9)]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 3, 6, 8]
    kill(monkeypatch, WATCHED, tmp_path / "cut", 6, machine)
    assert [line["step"] for line in read_log(tmp_path / "cut")] == [*range(6)]  # the checkpoint has 4
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    go(WATCHED, tmp_path / "cut", machine)
    same_files(tmp_path / "whole", tmp_path / "cut")
    history = History.of(load_file(tmp_path / "cut" / "model.safetensors"))
    assert history.loss == [line["loss"] for line in lines[1:]]
    curves = {
        name: [(line["step"], line["evaluation"][name]) for line in lines if "evaluation" in line]
        for name in lines[0]["evaluation"]
    }
    assert history.curves == curves
    assert {*curves} == {
        f"{kind}.{what}" for kind in ("float", "w8a8", "integer.w8a8") for what in ("loss", "accuracy")
    } | {"kurtosis", "inf_norm", "sink.first", "sink.background", "heads.idle", "energy"}


def test_what_is_watched_changes_no_bit(tmp_path):
    plain, watched = go(PLAIN, tmp_path / "a"), go(WATCHED, tmp_path / "b")
    for name, value in plain.params.items():
        assert value.tobytes() == watched.params[name].tobytes()
    assert plain.extra["history.loss"].tolist() == watched.extra["history.loss"].tolist()
    assert [line["step"] for line in read_log(tmp_path / "a")] == [*range(1, 9)]


def test_the_log_says_what_the_step_had(tmp_path):
    """Against a model by hand: the parameters before the step, its batch in float."""
    go(replace(WATCHED, stop=1), tmp_path)
    batch = next(iter(DATA.train_batches(MODEL, 8, 0)))
    model = REF.model(MODEL, init_params(MODEL, 0))
    stream = model.record(batch)["layer.0.ffn.residual"][0]  # ViT is pre-norm: what layer 1 takes in
    line = read_log(tmp_path)[1]
    assert line["sites"]["layer.1.input"]["inf_norm"] == pytest.approx(np.abs(stream).max(axis=(1, 2)).mean(), rel=1e-6)
    assert line["rate"] == 1e-3 / 2 and line["norm"] > 0
    names = find_sites(MODEL, ["layer.1.input"])
    larger = next(iter(DATA.train_batches(MODEL, 20, 0)))
    first = {name: value[:16] for name, value in larger.items()}
    assert measure_sites(model, larger, names) == measure_sites(model, first, names)


def test_a_stopped_run_goes_on_to_the_bits_of_the_one_that_did_not(tmp_path):
    whole = go(WATCHED, tmp_path / "whole")
    stopped = go(replace(WATCHED, stop=5), tmp_path / "cut")
    assert stopped.meta["done"] and stopped.extra["history.loss"].size == 5
    again = go(replace(WATCHED, stop=5), tmp_path / "cut")
    assert again.meta == stopped.meta  # nothing is left to do
    longer = go(WATCHED, tmp_path / "cut")
    same_files(tmp_path / "whole", tmp_path / "cut")
    assert longer.meta["changes"] == [{"step": 5, "field": "stop", "was": 5, "now": None}]
    assert "changes" not in whole.meta
    with pytest.raises(SpecError, match="stop is 3: .* has 8 steps already"):
        go(replace(WATCHED, stop=3), tmp_path / "cut")
    with pytest.raises(SpecError, match="stop is 9: give 1 to 8"):
        replace(WATCHED, stop=9)


def test_a_schedule_changes_only_where_that_is_asked(tmp_path):
    go(PLAIN, tmp_path)
    longer = replace(PLAIN, optim=replace(PLAIN.optim, steps=10, warmup=3))
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileError, match="optim.warmup was 2 and is 3; .* go on with --change optim.warmup"):
        go(longer, tmp_path, change=["optim.steps"])
    assert (tmp_path / "model.safetensors").read_bytes() == before
    changed = go(longer, tmp_path, change=["optim.steps", "optim.warmup"])
    told = {(one["step"], one["field"], one["was"], one["now"]) for one in changed.meta["changes"]}
    assert told == {(8, "optim.steps", 8, 10), (8, "optim.warmup", 2, 3)}
    assert changed.extra["history.loss"].size == 10 and changed.meta["done"]
    last = go(replace(longer, optim=replace(longer.optim, steps=11)), tmp_path, change=["optim"])
    assert [one["step"] for one in last.meta["changes"]] == [8, 8, 10]


@pytest.mark.parametrize("field", ["seed", "model.width", "optim.only", "data"])
def test_what_no_run_can_change(tmp_path, field):
    with pytest.raises(SpecError, match=f"change is '{field}'"):
        go(PLAIN, tmp_path, change=[field])
    assert not list(tmp_path.iterdir())


def test_other_runs_are_refused(tmp_path):
    go(PLAIN, tmp_path)
    for other, what in (
        (replace(PLAIN, seed=1), "seed was 0 and is 1"),
        (replace(PLAIN, batch=4), "batch was 8 and is 4"),
        (replace(PLAIN, model=replace(MODEL, dropout=0.25)), "model.dropout was"),
    ):
        with pytest.raises(FileError, match=what):
            go(other, tmp_path, change=["optim"])


def test_a_run_moves_where_that_is_asked(tmp_path, monkeypatch):
    go(replace(PLAIN, stop=4), tmp_path)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    with pytest.raises(FileError, match="threads was .* and is 7 .*, or go on with --move"):
        go(PLAIN, tmp_path)
    with pytest.raises(FileError, match="machine.dtype was 'float32' and is 'float64'; .* --change machine.dtype"):
        go(PLAIN, tmp_path, Machine("ref", dtype="float64"), change=MOVE)
    moved = go(PLAIN, tmp_path, Machine("torch"), change=MOVE)
    assert {(one["step"], one["field"], one["now"]) for one in moved.meta["changes"]} >= {
        (4, "machine.backend", "torch"),
        (4, "stop", None),
    }
    assert moved.extra["history.loss"].size == 8


def test_data_are_known_by_what_they_hold(tmp_path):
    go(replace(PLAIN, stop=4), tmp_path / "a")
    elsewhere = load(None, MODEL)
    elsewhere.source = "/elsewhere"
    moved = train(PLAIN, elsewhere, tmp_path / "a" / "model.safetensors", REF, resume=True)
    assert {"step": 4, "field": "data.source", "was": DATA.source, "now": "/elsewhere"} in moved.meta["changes"]
    go(PLAIN, tmp_path / "b")
    same_files(tmp_path / "a", tmp_path / "b")
    elsewhere.fingerprint = lambda split: "0" * 64
    with pytest.raises(FileError, match="data.fingerprints.train was"):
        train(PLAIN, elsewhere, tmp_path / "a" / "model.safetensors", REF, resume=True, change=MOVE)


def test_a_field_that_a_file_does_not_know_has_its_default(tmp_path):
    """What 0.2.0 wrote, which had no step, no evaluation and hashes of every item; and where a mixture lies."""
    meta = json.loads(json.dumps(go(replace(PLAIN, stop=1), tmp_path).meta))
    now = identify(PLAIN, DATA, REF)
    for name in ("step", "stop", "evaluation", "saving", "log", "init"):
        del meta["train"][name]
    del meta["train"]["model"]["start"], meta["train"]["optim"]["first_rate_zero"]
    meta["train"]["watch_integer"] = 5
    meta["data"]["hashes"] = {"train": ["0"]}
    assert find_changes(tmp_path, meta, now, ()) == []
    meta["data"]["sources"], now["data"] = ["a", "b"], {**now["data"], "sources": ["c", "d"]}
    told = {"field": "data.sources", "was": ["a", "b"], "now": ["c", "d"]}
    assert find_changes(tmp_path, meta, now, ()) == [told]
    meta["data"]["weights"] = [1.0, 2.0]
    with pytest.raises(FileError, match="data.weights was"):
        find_changes(tmp_path, meta, now, MOVE)
    del meta["train"]["optim"]["lr"]
    with pytest.raises(FileError, match="optim.lr was"):
        find_changes(tmp_path, meta, identify(replace(PLAIN, optim=OptimSpec(lr=2e-3)), DATA, REF), MOVE)


def test_a_log_of_another_is_refused(tmp_path):
    mine = tmp_path / "log.jsonl"
    mine.write_text("my own words\n")
    for text in ("my own words\n", '{"step": 3, "mine": 1}\n'):
        mine.write_text(text)
        with pytest.raises(FileError, match=r"log\.jsonl is no log that qtx wrote"):
            go(PLAIN, tmp_path)
        assert mine.read_text() == text
    mine.write_text("my own words\n")
    with pytest.raises(FileError, match=r"log\.jsonl exists: go on with --resume"):
        train(PLAIN, DATA, tmp_path / "model.safetensors", REF)
    assert mine.read_text() == "my own words\n" and os.listdir(tmp_path) == ["log.jsonl"]


@pytest.mark.parametrize(
    ("text", "step", "left"),
    [
        ('{"step": 1}\n{"step": 2}\n', 2, 2),
        ('{"step": 1}\n{"step": 2}\n', 1, 1),
        ('{"step": 1}\n{"step": 2}\n', -1, 0),
        ('{"step": 1}\n{"step": 2', 2, 1),  # cut short by a kill
        ('{"step": 1}\n\0\0\0\0\n{"step": 2}\n', 2, 1),  # a disk that lost a page
        ('{"st', 2, 0),
        ("", 2, 0),
    ],
)
def test_lines_are_cut(tmp_path, text, step, left):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    cut_lines(path, step)
    assert path.read_text() == "".join(f'{{"step": {number + 1}}}\n' for number in range(left))


def test_a_log_that_cannot_be_written_is_said_once_and_made_up_for(tmp_path, monkeypatch, capsys):
    whole = logs.Lines.add
    calls = iter(range(100))

    def full(self, record):
        if next(calls) in (2, 3, 4):
            with monkeypatch.context() as patch:
                patch.setattr(self, "path", tmp_path / "nowhere" / "log.jsonl")
                return whole(self, record)
        return whole(self, record)

    monkeypatch.setattr(logs.Lines, "add", full)
    go(PLAIN, tmp_path)
    assert capsys.readouterr().err.count("training goes on") == 1
    assert [line["step"] for line in read_log(tmp_path)] == [*range(1, 9)]


def test_tensorboard_has_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    run = replace(WATCHED, log=replace(WATCHED.log, tensorboard=True))
    kill(monkeypatch, run, tmp_path, 6)
    go(run, tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert len(os.listdir(tmp_path / "tensorboard")) == 2
    lines = read_log(tmp_path)
    for tag, points in {
        "loss": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "sites/layer.1.input/kurtosis": [
            (line["step"], line["sites"]["layer.1.input"]["kurtosis"]) for line in lines if "sites" in line
        ],
        "evaluation/float.loss": [
            (line["step"], line["evaluation"]["float.loss"]) for line in lines if "evaluation" in line
        ],
    }.items():
        got = [(event.step, event.value) for event in board.Scalars(tag)]
        assert got == [(step, np.float32(value)) for step, value in points], tag


def test_tensorboard_that_is_missing_is_said(tmp_path, monkeypatch):
    def missing(package, extra, what, without):
        raise MissingExtra(f"{what} needs {package}: qtx[{extra}]; {without}")

    monkeypatch.setattr(logs, "need", missing)
    with pytest.raises(MissingExtra, match="tensorboard"):
        go(replace(PLAIN, log=LogSpec(tensorboard=True)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_is_marked_and_ends(tmp_path, capsys):
    wild = replace(WATCHED, optim=replace(WATCHED.optim, lr=1e30, warmup=0, clip_norm=0))
    lost = go(wild, tmp_path)
    at = lost.meta["diverged_at"]
    assert lost.meta["diverged"] and lost.meta["done"] and at <= 4
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [*range(at + 1)] and lines[-1]["loss"] is None
    assert go(wild, tmp_path).meta == lost.meta


@pytest.mark.parametrize(("strange", "ends"), [({3, 4}, None), (range(3, 9), 5)])
def test_overflow_in_float16_is_no_divergence_unless_it_lasts(tmp_path, monkeypatch, strange, ends):
    """A trainer that skips steps, as `qtx_torch`'s does in float16; the machine is said to compute in it."""
    trainer = backend("ref").Trainer
    whole = trainer.step

    def overflow(self, batch, **part):
        loss, norm = whole(self, batch, **part)
        return (math.inf, math.nan) if self.adam.count in strange else (loss, norm)

    monkeypatch.setattr(trainer, "step", overflow)
    monkeypatch.setattr(training, "SKIPS", 3)
    begin = training.Loop.begin

    def pretend(self):
        begin(self)
        self.machine = replace(REF, dtype="float16")

    monkeypatch.setattr(training.Loop, "begin", pretend)
    made = go(PLAIN, tmp_path)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines if line["loss"] is None] == [s for s in strange if ends is None or s <= ends]
    assert made.meta.get("diverged_at") == ends
    if ends is None:
        loss = made.extra["history.loss"]
        assert loss[2] == loss[3] == loss[1] != loss[4]


def test_what_cannot_be_logged_is_refused_before_a_step(tmp_path):
    with pytest.raises(SpecError, match="log site 'layer.9.input'"):
        go(replace(PLAIN, log=LogSpec(sites=("layer.9.input",))), tmp_path)
    with pytest.raises(SpecError, match="nonsense"):
        go(replace(PLAIN, evaluation=EvaluationSpec(every=2, recipes=("nonsense",))), tmp_path)
    assert not list(tmp_path.iterdir())


def test_seldom_lines(tmp_path):
    """A line every so many steps, at the last, and where something is evaluated."""
    go(replace(WATCHED, log=LogSpec(every=5)), tmp_path)
    assert [line["step"] for line in read_log(tmp_path)] == [0, 3, 5, 6, 8]


def test_kept_checkpoints_are_whole_runs(tmp_path):
    """Any of them goes on to the same bits."""
    go(WATCHED, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").write_bytes((tmp_path / "a" / "model-000006.safetensors").read_bytes())
    assert load_checkpoint(tmp_path / "b").extra["history.loss"].size == 6
    again = go(WATCHED, tmp_path / "b")
    for name, value in load_file(tmp_path / "a" / "model.safetensors").items():
        assert value.tobytes() == {**again.params, **again.extra}[name].tobytes()
    assert math.isfinite(again.extra["history.loss"][-1])
