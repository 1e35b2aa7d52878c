"""The page of published settings: each key is one that a run has, each value that of the run that comes with qtx."""

import dataclasses
import re
from pathlib import Path

import pytest

from parity_tests.long.published_settings import RUNS, write_page
from qtx.jobs.resolving import make_model
from qtx.runs.keys import TABLES, count_steps, find_key
from qtx.runs.reading import RunSpec, make_run, open_run
from qtx_ref.presets import attention, preset

PAGE = Path(__file__).parents[3] / "docs" / "published-settings.md"
EVERY = [(name, one) for name, settings in RUNS.items() for one in settings]


def find_value(run: RunSpec, key: str) -> object:
    """What a run has at a key: said in it, of its preset, or the default of the spec's field."""
    table, _, name = key.partition(".")
    if table == "model" and key not in ("model.preset", "model.attention"):
        return getattr(make_model(run), name)
    if key == "optim.warmup":
        return count_steps(run.get(key), run.get("optim.steps"))
    default = {f.name: f.default for f in dataclasses.fields(TABLES[table])}.get(name) if table in TABLES else None
    return run.get(key, default)


def test_the_page_is_what_the_command_prints():
    assert PAGE.read_text() == write_page()


def test_every_key_is_one_and_may_have_its_value():
    for name, one in EVERY:
        if one.key is not None:
            find_key(one.key, name)
            if one.value is not None:
                make_run({one.key: one.value})


def list_differences(name: str, run: RunSpec) -> dict[str, object]:
    """The values of a run that are not the page's, by key."""
    compared = {one.key: one.value for one in RUNS[name] if one.key and one.value is not None}
    ours = {key: find_value(run, key) for key in compared}
    return {key: value for key, value in ours.items() if value != make_run({key: compared[key]}).get(key)}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_comes_with_qtx_has_the_published_values(name):
    assert list_differences(name, open_run(name)) == {}


@pytest.mark.parametrize("name", ["paper-opt-125m", "paper-opt-350m", "paper-opt-1.3b"])
def test_a_run_builds_the_shape_that_is_held_to_transformers(name):
    """As `test_published_start` does with the preset."""
    assert make_model(open_run(name)) == preset(name)


def test_another_value_is_found():
    changed = make_run({"optim.lr": 2e-4, "model.length": 128, "data.order": "windows", "optim.warmup": "2%"})
    run = open_run("paper-bert-base").under(changed)
    assert [*list_differences("paper-bert-base", run)] == ["model.length", "optim.lr", "optim.warmup", "data.order"]


# the flags of scripts/*.sh, all of them
EVERY_SCRIPT = """
    with_tracking report_to seed dataset_setup preprocessing_num_workers data_cache_dir model_cache_dir model_type
    tokenizer_name max_seq_length learning_rate lr_scheduler_type max_train_steps num_warmup_steps
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_grad_norm weight_decay
    checkpointing_steps attn_softmax attn_gate_type output_dir
"""
STATISTICS = "extra_tb_stats tb_scalar_log_interval tb_hist_log_interval"
OPT = f"{EVERY_SCRIPT} pad_to_max_length block_size config_path"
FLAGS = {
    "paper-bert-base": f"{EVERY_SCRIPT} {STATISTICS} mlm_probability config_name attn_gate_mlp",
    "paper-opt-125m": f"{OPT} {STATISTICS} wd_LN_gamma alpha attn_gate_init",
    "paper-opt-350m": f"{OPT} attn_gate_init",
    "paper-opt-1.3b": f"{OPT} attn_gate_linear_all_features",
}


@pytest.mark.parametrize("name", FLAGS)
def test_no_flag_of_a_script_is_missing(name):
    told = {*re.findall(r"--(\w+)", " ".join(one.name for one in RUNS[name]))}
    assert told >= {*FLAGS[name].split()}


@pytest.mark.parametrize(
    ("name", "text", "gamma"),
    [
        ("paper-bert-base", "clipped:gamma=-0.025", -0.025),
        ("paper-opt-125m", "clipped:alpha=12", -12 / 512),
        ("paper-opt-1.3b", "clipped:alpha=12", -12 / 512),
    ],
)
def test_alpha_divides_by_the_window(name, text, gamma):
    """theirs: gamma = -alpha / block_size, 512, where the 1.3b has 1,024 positions."""
    assert text.split(":")[0] == str(attention(text).softmax)
    run = open_run(name).under(make_run({"model.attention": text}))
    assert make_model(run).attention.gamma == gamma


@pytest.mark.parametrize("name", RUNS)
def test_the_other_scripts_attentions_are_the_grid_of_a_study(name):
    notes = " ".join(f"{one.note} {one.value}" for one in RUNS[name] if one.key == "model.attention")
    told = {*re.findall(r"`([\w:=.+-]+)`", notes), "vanilla"}
    if name != "paper-vit-s16":  # whose text names no gamma
        assert told == {*open_run(name).grids["model.attention"]}
