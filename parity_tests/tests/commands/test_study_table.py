"""What a study measures of its runs, its table, its pictures, and its file."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from parity_tests.tests.shell import call, good
from qtx.files.container import STUDY, FileError, write_sealed_json
from qtx.files.results import read_study
from qtx.jobs import measuring
from qtx.jobs.drawing import list_panels
from qtx.jobs.rows import make_rows
from qtx.report.sinks import Panel, make_growth_figure, make_sink_figure, subtract_curve
from qtx.report.study import Layout, tabulate_study
from qtx.report.tables import format_range
from qtx.runs.reading import make_run

TINY = ("--model", "opt-tiny", "--backend", "ref", "--steps", 2, "--batch", 2, "--attention", "vanilla,gated")
SMALL = [
    option
    for key in ("layers=1", "width=8", "heads=2", "hidden=8", "length=16")
    for option in ("--set", f"model.{key}")
]
LIMIT = ("--set", "evaluation.limit=2")


def score(perplexity):
    """A score of a language model."""
    return {"loss": None if perplexity is None else math.log(perplexity), "perplexity": perplexity, "accuracy": 1.0}


def make_result(perplexity, quantized, integers, mass, reasons, diverged=False):
    """One run of `study.json`; the masses are of one layer."""
    return {
        "diverged": diverged,
        "float": score(perplexity),
        "outliers": {"max_inf_norm": 8.0, "average_kurtosis": 3.0},
        "sinks": {
            "mass": {"first": [mass]},
            "reasons": [reasons],
            "idle": len(reasons) - reasons.count(None),
            "heads": 2,
        },
        "recipes": {"w8a8": score(quantized)},
        "integers": {"w8a8": integers},
    }


def read_cells(table):
    """The cells of each row by column; a name that stands twice has its number behind it."""
    header, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[0] == "|"
    )
    names = [name if header.count(name) == 1 else f"{name}{i}" for i, name in enumerate(header)]
    return [dict(zip(names, line, strict=True)) for line in lines]


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_table_has_sinks_and_nats():
    first = make_result(10.0, 20.0, score(30.0), [0.5, 0.91], ["marked keys", None])
    second = make_result(10.0, 20.0, score(30.0), [0.97, 0.2], ["marked keys", "gate closed"])
    layout = Layout("perplexity", ["w8a8"], ["w8a8"], notes=["below"])
    one, two = read_cells(tabulate_study({"vanilla": [first], "both": [first, second]}, layout))
    assert one == {
        "attention": "vanilla",
        "FP ppl": "10.000",
        "max inf norm": "8.00",
        "avg kurtosis": "3.00",
        "sink": "0.91",
        "idle heads": "1 of 2",
        "W8A8 ppl": "20.000",
        "degradation": "100.0 %",
        "+nats8": "0.6931",  # ln 2
        "W8A8 integers ppl": "30.000",
        "+nats10": "1.0986",  # ln 3
    }
    assert (two["sink"], two["idle heads"]) == ("0.91..0.97", "1..2 of 2")
    assert two["+nats8"] == "0.6931 ± 0.0000"
    assert tabulate_study({"vanilla": [first]}, layout).splitlines()[-1] == "below"


def test_what_was_not_measured_is_a_dash():
    """A run of a file from before; one without integers; one that was destroyed."""
    old = make_result(10.0, 20.0, None, [0.5, 0.5], [None, None])
    del old["sinks"], old["integers"]
    none = make_result(10.0, 20.0, {"why": "e4m3 is a float format"}, [0.5, 0.5], [None, None])
    lost = make_result(10.0, None, score(None), [0.5, 0.5], [None, None])
    layout = Layout("perplexity", ["w8a8"], ["w8a8"])
    rows = read_cells(tabulate_study({"old": [old], "none": [none], "lost": [lost], "both": [old, none]}, layout))
    assert [row["sink"] for row in rows] == ["-", "0.50", "0.50", "-"]
    assert [row["idle heads"] for row in rows] == ["-", "0 of 2", "0 of 2", "-"]
    assert [row["W8A8 integers ppl"] for row in rows] == ["-", "-", "diverged", "-"]
    assert [row["+nats10"] for row in rows] == ["-", "-", "diverged", "-"]
    assert [row["degradation"] for row in rows] == ["100.0 %", "100.0 %", "diverged", "100.0 ± 0.00 %"]


def test_ranges():
    assert format_range([0.5]) == "0.500" and format_range([2, 10], 0) == "2..10" and format_range([1, 1], 0) == "1"
    assert format_range([]) == "-" == format_range([1.0, None])


# --- a whole study ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study with integers, which is evaluated on its way."""
    out = tmp_path_factory.mktemp("study") / "s"
    watched = ("--set", "evaluation.every=1", "--set", "evaluation.batches=1", "--set", "evaluation.integers=w8a8")
    good("study", *TINY, *SMALL, *LIMIT, *watched, "--out", out)
    return out


def test_a_study_runs_its_models_in_integers(folder):
    runs = read_study(folder / "study.json")["runs"]
    for run in runs.values():
        assert run["float"]["targets"] == run["integers"]["w8a8"]["targets"] == 2 * 16 * 16  # 2 batches of 16
        assert run["integers"]["w8a8"]["loss"] != run["recipes"]["w8a8"]["loss"]
        assert run["integers"]["w8a8"]["loss"] == pytest.approx(run["float"]["loss"], abs=0.05)  # an untrained model
        assert 0 < run["integers"]["w8a8"]["bytes"] < run["float_bytes"] * 3
        assert np.shape(run["sinks"]["mass"]["first"]) == (1, 2) and run["sinks"]["heads"] == 2


def test_what_was_evaluated_is_part_of_a_study(folder):
    said = call("study", *TINY, *SMALL, "--set", "evaluation.limit=3", "--resume", "--out", folder)
    assert said.exit_code == 1 and "limit was 2 and is 3" in said.output


def test_a_study_from_before_goes_on_and_has_dashes(folder, tmp_path):
    """As 0.2.0 left it: without sinks and integers in its file."""
    shutil.copytree(folder, tmp_path / "s")
    path = tmp_path / "s" / "study.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("format", "sha256")}
    for run in content["runs"].values():
        del run["sinks"], run["integers"]
    write_sealed_json(path, STUDY, content)
    said = good("study", *TINY, *SMALL, *LIMIT, "--resume", "--out", tmp_path / "s").stdout
    assert [row["sink"] for row in read_cells(said)] == ["-", "-"]


def test_integers_that_a_study_has_not_are_measured_when_it_goes_on(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "s")
    more = ("--set", 'evaluation.integers=["w8a8", "w6a6"]')
    good("study", *TINY, *SMALL, *LIMIT, *more, "--resume", "--out", tmp_path / "s")
    was, now = (read_study(one / "study.json")["runs"] for one in (folder, tmp_path / "s"))
    for name, run in now.items():
        assert run["integers"]["w6a6"]["loss"] != was[name]["integers"]["w8a8"]["loss"]
        assert {**run, "integers": {"w8a8": run["integers"]["w8a8"]}} == was[name]  # what was trained stands


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("sinks", {"mass": {"first": [[0.5]]}}, "sinks must be sinks or null"),
        ("sinks", {"mass": {"first": [["a"]]}, "reasons": [[None]], "idle": 0, "heads": 1}, "sinks must be sinks or"),
        ("integers", [], "integers must be an object"),
        ("integers", {"w8a8": {"loss": "a"}}, "integers.w8a8 must be scores or null"),
    ],
)
def test_a_file_that_was_edited_is_refused(folder, tmp_path, place, value, message):
    content = json.loads((folder / "study.json").read_text())
    content = {key: one for key, one in content.items() if key not in ("format", "sha256")}
    content["runs"]["vanilla-seed0"][place] = value
    write_sealed_json(tmp_path / "study.json", STUDY, content)
    with pytest.raises(FileError, match=message):
        read_study(tmp_path / "study.json")


def test_one_that_has_no_integers_stops_no_other(tmp_path):
    said = call(
        "study", *TINY, *SMALL, *LIMIT, "--set", 'evaluation.integers=["fp8-e4m3", "w8a8"]', "--out", tmp_path / "s"
    )  # without evaluation.every: of the finished models alone
    assert said.exit_code == 0 and "fp8-e4m3: site embed.sum cannot run in integers" in said.output
    for run in read_study(tmp_path / "s" / "study.json")["runs"].values():
        assert "cannot run in integers" in run["integers"]["fp8-e4m3"]["why"] and run["integers"]["w8a8"]["loss"] > 0
    assert "fp8-e4m3 integers ppl" in said.output and "W8A8 integers ppl" in said.output


def test_a_model_that_cannot_be_calibrated_stops_no_other(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("site a has no\nfinite value")

    monkeypatch.setattr(measuring, "prepare", refuse)
    monkeypatch.setattr(measuring, "measure_sinks", refuse)
    said = call("study", *TINY, *SMALL, *LIMIT, "--set", "evaluation.integers=w8a8", "--out", tmp_path / "s")
    assert said.exit_code == 0 and "vanilla-seed0 evaluate w8a8: site a has no finite value" in said.output
    assert (cells := read_cells(said.stdout)[0])["W8A8 integers ppl"] == "-" == cells["sink"] == cells["idle heads"]


@pytest.mark.parametrize("command", ["train", "finetune"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.integers=w8a8", "evaluation integers is ('w8a8',): give evaluation every too"),
        ("step.int8=true", "step int8 is True: give quant train too"),
    ],
)
def test_a_key_without_the_one_it_needs_is_refused_before_data_are_read(command, setting, message, tmp_path):
    named = {"train": ("--data", "nowhere.txt"), "finetune": (tmp_path / "a.safetensors", "--data", "digits")}[command]
    said = call(command, *named, "--set", setting, "--out", tmp_path / "s")
    assert said.exit_code == 1 and message in said.output


def test_a_step_that_the_machine_has_not_is_refused_before_data_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr("qtx_torch.trainer.find_compiler", lambda device: f"nothing for {device}")
    said = call("train", "--data", "nowhere.txt", "--set", "step.compiled=true", "--out", tmp_path / "s")
    assert said.exit_code == 1 and "step compiled is True: nothing for cpu; leave it out" in said.output


def test_a_recipe_that_does_not_exist_is_refused_before_training(tmp_path):
    said = call("study", *TINY, *SMALL, "--set", "evaluation.integers=nonsense", "--out", tmp_path / "s")
    assert said.exit_code == 1 and "nonsense" in said.output and not (tmp_path / "s" / "vanilla-seed0").exists()


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_pictures_are_written(folder):
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    assert {path.name for path in folder.glob("*.png")} == {"curves.png", "sinks.png", "growth.png"}


def test_a_picture_of_heads_says_how_much_and_which_are_idle():
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    panels = [Panel("vanilla $x$", [[0.25, 0.75]], [[None, "marked keys"]]), Panel("b", [[0.0, 1.0]], [[None, None]])]
    figure = make_sink_figure(panels, "heads")
    figure.draw_without_rendering()
    axis = figure.axes[0]
    assert axis.images[0].get_array().tolist() == [[0.25, 0.75]] and axis.images[0].get_clim() == (0, 1)
    assert [text.get_text() for text in axis.texts] == ["0.25", "0.75"]
    assert [line.get_xdata()[0] > 0.5 for line in axis.get_lines()] == [True] and not figure.axes[1].get_lines()


def test_a_picture_of_growth_has_what_was_watched():
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    curves = {
        "float.loss": [(0, 3.0), (5, 2.0)],
        "trained.loss": [(0, 3.0)],
        "integer.w8a8.loss": [(5, 2.5)],
        "sink.first": [(0, 0.01), (5, 0.4)],  # a share, though it spans more than a decade and a half
    }
    figure = make_growth_figure({"vanilla-seed0": curves, "gated-seed0": {"inf_norm": [(0, 5.0)]}}, "growth")
    figure.draw_without_rendering()
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "first-token mass, largest of a head",
        "nats that W8A8 in integers adds",
        "max inf norm",
    ]
    assert (figure.axes[0].get_yscale(), figure.axes[0].get_ylim()[0]) == ("linear", 0.0)
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == [0.5]
    assert subtract_curve([(0, 1.0), (1, 5.0)], [(1, 2.0), (2, 9.0)]) == ([1], [3.0])


def test_a_panel_for_each_line_of_the_table():
    rows = make_rows(make_run({"model.preset": "opt-tiny"}, grids={"seed": (0, 1), "model.attention": ("vanilla",)}))
    runs = {name: make_result(1.0, 1.0, {}, [0.25, 0.5], [None, None]) for name in rows}
    (panel,) = list_panels(rows, runs, ["first", "background"])
    assert panel == Panel("vanilla, seed 0: first", [[0.25, 0.5]], [[None, None]])
    assert not [*list_panels(rows, {name: run | {"sinks": None} for name, run in runs.items()}, ["first"])]
