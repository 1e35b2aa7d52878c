"""The run files of docs/studies/effect: each is a study that can begin, and those of one setting say the same of it."""

from __future__ import annotations

import re
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
