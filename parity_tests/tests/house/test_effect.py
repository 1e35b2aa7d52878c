"""The run files of docs/studies/effect: each is a study that can begin, and those of one setting say the same of it."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest

from parity_tests.tests.shell import good
from qtx.jobs.rows import list_recipes, make_rows
from qtx.recipes.named import recipe, training_recipe
from qtx.runs.reading import open_run

FOLDER = Path(__file__).parents[3] / "docs" / "studies" / "effect"
FILES = sorted(path.stem for path in FOLDER.glob("*.toml"))
VARIES = {  # of the setting, beside what is measured
    "start": {"data.begin"},
    "decay": {"optim.weight_decay"},
    "windows": {"data.batch"},
    "finetune": {"stop"},
}
SETTING = ("model.", "data.", "optim.", "machine.", "stop", "seed")


@pytest.mark.parametrize("name", FILES)
def test_every_row_can_begin(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run(str(FOLDER / f"{name}.toml"))
    if (init := run.get("init")) is not None:  # the vanilla model of another file
        shape = [
            "--set",
            "model.layers=1",
            "--set",
            "model.width=16",
            "--set",
            "model.heads=2",
            "--set",
            "model.hidden=8",
        ]
        good("train", "--backend", "ref", *shape, "--steps", 1, "--batch", 1, "--out", Path(init).parent)
    rows = make_rows(run)
    held_out = (*run.get("evaluation.recipes", ()), *run.get("evaluation.integers", ()))
    for row in rows.values():
        for each in {*list_recipes(run), *held_out}:
            recipe(each, row.model)
        assert row.quant is None or training_recipe(row.quant, row.model)
    assert len(rows) > 1


@pytest.mark.parametrize(
    "name", ["start", "decay", "windows", "blog", "gamma", "alpha", "pi", "gates", "bits", "finetune"]
)
def test_a_setting_is_one_in_all_its_files(name):
    """What a file says of the setting of sinks.toml is what that says, but for what it is there to change."""
    first, run = (open_run(str(FOLDER / f"{each}.toml")) for each in ("sinks", name))
    keys = {key for key in run.settings if key.startswith(SETTING)}
    assert {key for key in keys if run.get(key) != first.get(key)} == VARIES.get(name, set())


def test_the_index_names_every_file():
    text = (FOLDER / "README.md").read_text()
    assert sorted({*re.findall(r"\(([\w-]+)\.toml\)", text)}) == FILES


# --- the tool that tabulates what came out ----------------------------------------------------------------------------

TOOL = runpy.run_path(str(FOLDER.parents[2] / "tools" / "effect")) | vars(sys.modules["effect_tables"])
RESULTS = sorted((FOLDER / "results").glob("*.json"))
PAGES = [FOLDER.parents[2] / "README.md", *sorted(FOLDER.glob("*.md"))]
HEADERS = ("| row ", "| run ", "| first-token mass of each head ")  # of the tool's tables


def write(path: Path, *values: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, values)))


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def log_line(step: int, mass: float, added: float) -> dict:
    integers = {f"integer.{bits}.loss": added for bits in ("w8a8", "w6a6", "w4a8")}
    shared = {"heads.idle": 3.0, "inf_norm": 8.0, "kurtosis": 2.0}
    values = {"float.loss": 0.0, **integers, "sink.first": mass, **shared}
    return {"step": step, "loss": 1.0, "evaluation": values, "heads": {"first": [[mass, 0.25], [0.0, 0.125]]}}


def test_seeds_are_one_row_with_mean_and_ends(tmp_path):
    write(tmp_path / "gated:pi=0.25-seed0" / "log.jsonl", {"step": 1, "loss": 2.0}, log_line(2, 0.5, 0.125))
    write(tmp_path / "gated:pi=0.25-seed1" / "log.jsonl", log_line(2, 0.25, 0.25))
    write(tmp_path / "left-seed0" / "log.jsonl", log_line(2, 0.75, 0.5))
    found = TOOL["collect"](tmp_path, ["left*"])
    assert list(found) == ["gated:pi=0.25-seed0", "gated:pi=0.25-seed1"]
    spread = "0.188 (0.125..0.250)"  # of 1/8 and 1/4; a perplexity of e^0
    row = ["gated:pi=0.25", "2", "2", "1.00 (1.00)", "0.38 (0.25..0.50)", "3 (3)", "8.0 (8.0)", "2.0 (2.0)"]
    assert cells(TOOL["tabulate_curves"](found)) == [[*row, spread, spread, spread]]
    assert cells(TOOL["tabulate_heads"](found))[1] == ["gated:pi=0.25-seed1", "2", "0.25 0.25", "0.00 0.12"]


def test_what_is_trained_quantized_has_its_own_perplexity(tmp_path):
    line = log_line(2, 0.5, 0.125)
    write(tmp_path / "a-seed0" / "log.jsonl", line)
    quantized = {**line, "evaluation": line["evaluation"] | {"trained.loss": math.log(2)}}
    write(tmp_path / "a-w4a4-seed0" / "log.jsonl", quantized)
    rows = cells(TOOL["tabulate_curves"](TOOL["collect"](tmp_path, [])))
    first, second = (row[:6] for row in rows)
    assert first == ["a", "2", "1", "1.00", "", "0.50"]
    assert second == ["a-w4a4", "2", "1", "1.00", "2.00", "0.50"]


def test_heads_and_peaks_of_an_analysis(tmp_path):
    heads = [{"reason": "gate", "mass": {"[CLS]": 0.5}}, {"reason": None, "mass": {"[SEP]": 0.25}}]
    sites = [
        {"site": "layer.0.ffn.output", "inf_norm": 7.0, "kurtosis": 4.0},
        {"site": "embed.sum", "inf_norm": 2.0, "kurtosis": 8.0},
    ]
    write(tmp_path / "vanilla-0.analyze.json", {"heads": heads, "sites": sites})
    rows = cells(TOOL["tabulate_analysis"](TOOL["collect"](tmp_path, [])))
    assert rows == [["vanilla", "1", "1 of 2", "gate 1", "0.50 / 0.25", "7.0 layer.0.ffn.output", "8", "6"]]


def test_a_spared_part_and_a_model_that_is_destroyed(tmp_path):
    plain = {"value": 10.0, "loss": 2.0, "low": 0.0, "high": 0.0, "runs_as": "float"}
    part, whole = ({"nats": nats, "low": nats - 0.5, "high": nats + 0.5} for nats in (1.0, 3.0))
    broken = plain | {"loss": 5.0, "low": 1.0, "high": 2.0, "damage": {"whole": whole, "part": None}}
    mended = broken | {"damage": {"whole": whole, "part": part}}
    write(tmp_path / "m" / "ptq.json", {"rows": {"float": plain, "w4a8": broken, "w8a8": mended}})
    rows = cells(TOOL["tabulate_recipes"](TOOL["collect"](tmp_path, [])))
    assert rows[1] == ["m", "w4a8", "1", "10.00", "3.000", "+1.0..+2.0 %", "+3.0000 (+2.5000..+3.5000)", "destroyed"]
    assert rows[2][-1] == "+1.0000 (+0.5000..+1.5000)"


def test_a_study_has_integers_where_it_can_and_counts_what_diverged(tmp_path):
    run = {
        "diverged": False,
        "mean_loss": 1.5,
        "float": {"loss": 0.0, "targets": 9},
        "trained": {"loss": 0.0},
        "outliers": {"max_inf_norm": 4.0, "average_kurtosis": 3.0},
        "sinks": {"mass": {"first": [[0.25, 0.5], [0.0, 0.0]]}, "idle": 1},
        "recipes": {"w8a8": {"loss": 0.5}, "w4a8": {"loss": 1.0, "ranges": {}}},
        "integers": {"w8a8": {"loss": 0.25}},
    }
    lost = run | {"diverged": True, "float": None, "outliers": None, "sinks": None, "trained": None, "recipes": {}}
    write(tmp_path / "study.json", {"runs": {"a-seed0": run, "a-seed1": lost, "b-seed0": lost | {"mean_loss": None}}})
    rows = cells(TOOL["tabulate_studies"](TOOL["collect"](tmp_path, ["c"])))
    numbers = ["1.500", "1.000", "1.000", "0.50", "1", "4.0", "3.0", "0.2500", "1.0000"]
    assert rows == [["a", "2", "1", *numbers], ["b", "1", "1", *[""] * len(numbers)]]


def test_a_head_that_rests_and_what_it_costs(tmp_path):
    evaluation = {"float.loss": 2.0, "kurtosis": 4.0} | dict(
        zip(("integer.w8a8.loss", "integer.w6a6.loss", "integer.w4a8.loss"), (2.5, 3.0, 1.75), strict=True)
    )
    run = {
        "run": "gated", "layers": 2, "step": 9, "least_loss": 1.5, "evaluation": evaluation,
        "mass_idle": [[0.25, 0.75], [1.0, 1.0]], "mass_trigger": [[0.5, 0.125], [1.0, 1.0]],
        "peak_first": {"embed.sum": 9.0, "layer.1.ffn.residual": 3.0},
        "peak_elsewhere": {"embed.sum": 9.0, "layer.1.ffn.residual": 4.0},
    }  # fmt: skip
    row = cells(TOOL["tabulate_chains"]({"a": {"chains": run}, "b": {}}))
    costs = ["+0.5000", "+1.0000", "-0.2500"]
    assert row == [["gated", "2", "9", "0.5000", "0.75 / 0.12", "3.0 / 4.0", "4.0", *costs]]


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no row there has"):
        TOOL["collect"](tmp_path, [])


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_the_tables_of_the_pages_are_those_of_the_results(path):
    """Each line that the tool prints of the kept figures stands on a page that names the file."""
    assert path.stat().st_size < 100_000
    found = json.loads(path.read_text())
    pages = [page for page in map(Path.read_text, FOLDER.glob("*.md")) if f"results/{path.name}" in page]
    assert pages
    for part, tables in TOOL["TABLES"].items():
        if any(part in each for each in found.values()):
            for line in (line for table in tables for line in table(found).splitlines()):
                assert any(line in page for page in pages), line


def print_tables(path: Path) -> set[str]:
    """What `show` prints of a file: each of its tables, and with --step that of one step."""
    found = json.loads(path.read_text())
    parts = [tables for part, tables in TOOL["TABLES"].items() if any(part in each for each in found.values())]
    steps = {line["step"] for each in found.values() for line in each.get("curves", [])}
    whole = {table(found) for tables in parts for table in tables}
    return whole | {TOOL["tabulate_curves"](found, step) for step in steps}


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(FOLDER.parents[2])) for path in PAGES])
def test_a_page_has_no_figure_in_a_table_that_its_files_have_not(path):
    """Each table of the tool's kind is, whole, one of a file that the page names."""
    text = path.read_text()
    printed = set().union(
        *(print_tables(FOLDER / "results" / name) for name in re.findall(r"results/([\w-]+\.json)", text))
    )
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        if table.startswith(HEADERS):
            assert table.rstrip("\n") in printed
