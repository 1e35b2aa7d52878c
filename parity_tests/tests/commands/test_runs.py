"""Runs as files: every field of every spec is a key, what is wrong is named, presets lie under files under options, and
a command line without a file is the run that it was."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from parity_tests.tests.commands.whole_runs import whole
from parity_tests.tests.shell import call, good
from qtx.data import documents
from qtx.data.spec import Packing, Source
from qtx.engines.machine import Machine
from qtx.jobs import opening, pretrain
from qtx.jobs.resolving import make_data, make_model, resolve
from qtx.jobs.rows import make_rows
from qtx.jobs.run import TrainSpec
from qtx.jobs.training import default_optim
from qtx.runs.keys import TABLES, list_keys, nearest
from qtx.runs.reading import (
    list_bundled,
    make_run,
    open_run,
    parse_run,
    parse_setting,
    read_bundled,
    write_run,
)
from qtx_ref.presets import attention, preset
from qtx_ref.spec import AttentionSpec, Schedule, SpecError
from qtx_ref.spec.base import field_types

# --- keys -------------------------------------------------------------------------------------------------------------


def list_leaves(table: str, spec: type) -> list[str]:
    """Every field of a spec by its key, those of specs within it too."""
    leaves = []
    for field in dataclasses.fields(spec):
        kind = field_types(spec)[field.name]
        if dataclasses.is_dataclass(kind) and kind is not AttentionSpec:
            leaves += list_leaves(f"{table}.{field.name}", kind)
        else:
            leaves.append(f"{table}.{field.name}")
    return leaves


LEAVES = [leaf for table, spec in TABLES.items() for leaf in list_leaves(table, spec)]
OTHERS = {  # a value that no preset or default has, where one made from the default would be none
    "model.family": "vit",
    "model.head": "classify",
    "model.attention": "clipped:gamma=-0.5",
    "model.heads": 2,
    "model.width": 64,
    "model.dropout": 0.5,
    "model.attention_dropout": 0.5,
    "data.augment.smoothing": 0.5,
    "model.vocab": 3000,
    "model.embed_width": 8,
    "model.channels": 4,
    "optim.warmup": 7,
    "data.sources": '["a.txt", { path = "b.txt", weight = 2 }]',
    "data.window": 9,
    "data.augment.crop": 0.5,
    "saving.keep": 2,
    "saving.every": 5,
    "machine.backend": "ref",
    "machine.device": "cuda",
    "machine.dtype": "float64",
}


def find_other(key: str, now: object) -> object:
    """Another value of a key than it has, as an option says it."""
    if key in OTHERS:
        return OTHERS[key]
    kind = list_keys()[key].kind
    if isinstance(now, bool):
        return str(not now).lower()
    if isinstance(now, (int, float)):
        return now / 2 if isinstance(now, float) and now else now + 1
    members = [str(one) for one in getattr(kind, "__members__", {}).values()]
    if members:
        return next(one for one in members if one != str(now))
    return {"tuple[str, ...]": '["embed."]', "int | None": 3, "float | None": 0.5}.get(str(kind), "document")


def dig(spec: object, key: str) -> object:
    """The field of a key within a spec."""
    for name in key.split(".")[1:]:
        spec = getattr(spec, name)
    return spec


@pytest.mark.parametrize("key", LEAVES)
def test_every_field_of_every_spec_is_set_by_its_key(key):
    """What `--set` says is what the specs then hold, and nothing else changes it."""
    presets = {"model.channels": "vit-tiny", "model.family": "bert-tiny", "model.head": "bert-tiny"}
    base = make_run({"model.preset": "vit-tiny" if "augment" in key else presets.get(key, "opt-tiny")})
    image = {"model.image_size": 8, "model.patch_size": 2, "model.channels": 1, "model.head": "classify"}
    beside = {"model.family": image | {"model.classes": 2}, "model.head": {"model.classes": 2}}
    base = base.under(make_run({"saving.every": 4, "evaluation.every": 4} | beside.get(key, {})))
    before = dict(zip(("model", "data", "machine"), (whole(base)[0].model, *whole(base)[1:]), strict=True))
    specs = before | {name: getattr(whole(base)[0], name) for name in TABLES if name not in before}
    other = find_other(key, dig(specs[key.partition(".")[0]], key))
    run = base.under(parse_setting(f"{key}={other}"))
    train, data, machine = whole(run)
    made = {"model": train.model, "data": data, "machine": machine}.get(key.partition(".")[0], train)
    got = dig(made, key) if made is not train else dig(getattr(train, key.partition(".")[0]), key)
    assert got != dig(specs[key.partition(".")[0]], key)
    if key == "data.sources":
        assert got == (Source("a.txt"), Source("b.txt", 2.0))
    elif key == "model.attention":
        assert got == attention(other)
    elif isinstance(got, tuple):
        assert list(got) == json.loads(str(other))
    else:
        assert str(got).lower() == str(other) or float(got) == float(other)


def test_every_key_says_what_it_is():
    assert [key.name for key in list_keys().values() if not key.what or not key.default] == []
    assert {key.partition(".")[0] for key in list_keys() if "." in key} == {*TABLES, "quant"}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("optim.warm_up", "optim.warmup"),
        ("lr", "optim.lr"),
        ("optim.dropout", "model.dropout"),
        ("model.lenght", "model.length"),
        ("data.source", "data.sources"),
        ("mchine.device", "machine.device"),
        ("train.seed", "seed"),
        ("data.augment.flips", "data.augment.flip"),
    ],
)
def test_the_nearest_key(name, near):
    assert nearest(name) == near
    with pytest.raises(SpecError, match=rf"x.toml: unknown key '{name}': did you mean {near}\?"):
        make_run({name: 1}, "x.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 1", "x.toml: unknown key 'lr': did you mean optim.lr?"),
        ('[optim]\nlr = "fast"', "x.toml: optim.lr is 'fast': expected a finite number"),
        ("[optim]\nlr = nan", "x.toml: optim.lr is nan: expected a finite number"),
        ("[optim]\nlr = 0", "x.toml: optim.lr: learning rate is 0: give a finite number"),
        ('[optim]\nwarmup = "1 min"', "x.toml: optim.warmup is '1 min': expected steps, or a share of optim.steps"),
        ('[optim]\nwarmup = "101%"', "x.toml: optim.warmup is '101%'"),
        ("[optim]\nwarmup = 400", "optimizer warmup is 400: give 0 to 350"),
        ('[optim]\nschedule = "liner"', "optim.schedule is 'liner': known values are constant, linear, cosine"),
        ("[optim]\nsteps = 1e3", "optim.steps is 1000.0: expected a whole number"),
        ('[saving]\nseconds = "10 days"', "saving.seconds is '10 days': expected seconds, or a text such as \"30 s\""),
        ('[step]\nrecompute = "yes"', "step.recompute is 'yes': expected true or false"),
        ("[colour]\nred = 1", "x.toml: unknown table [colour]: did you mean ["),
        ("optim = 3", "x.toml: optim is 3: expected a table, [optim]"),
        ("seed = -1", "x.toml: seed is -1: give a whole number, at least 0"),
        ("seed = 1.5", "x.toml: seed is 1.5: expected a whole number"),
        (f"seed = {10**19}", "a number of 64 bits holds no more"),
        ("stop = 351", "stop is 351: give 1 to 350"),
        ("stop = 0", "x.toml: stop is 0: give a whole number, at least 1"),
        ("[data]\nbatch = 0", "x.toml: data.batch is 0"),
        (
            '[data]\nsources = [{ path = "a", wieght = 1 }]',
            "data.sources[0]: unknown key 'wieght': did you mean weight?",
        ),
        ("[data]\nsources = [{ weight = 1 }]", "data.sources[0]: key 'path' is missing"),
        ("[data]\nsources = 3", "data.sources is 3: expected a text, or a table of path, weight"),
        ("[data]\nwindow = 129", "data.window is 129: the model has 128 positions"),
        ('[model]\nattention = "clip"', "attention 'clip' has part 'clip'"),
        ('[model]\npreset = "gpt"', "unknown model 'gpt'"),
        ("[model]\nheads = 3", "model heads is 3: it must divide the width 128"),
        ('[model]\npreset = "vit-tiny"\nlength = 5', "model.length is 5: a vit's follows"),
        ('base = "paper"', "x.toml: base is 'paper': name one of blog-bert-base"),
        ("[study]\n'optim.lr' = []", "x.toml: study.optim.lr is []: name at least one, each once"),
        ("[study]\n'optim.lr' = [1.0, 1]", "each once"),
        ("[study]\nlr = [1.0]", "x.toml: unknown key 'lr': did you mean optim.lr?"),
        ("study = 3", "x.toml: study is 3: expected a table of lists"),
        ('init = ""', "x.toml: init is '': expected a text, not empty"),
        ('[quant]\ntrain = ""', "x.toml: quant.train is '': expected a text, not empty"),
        ('[data]\ntokenizer = "a\\u0000b"', "data.tokenizer is 'a\\x00b': expected a text"),
        ('[data]\nsources = "a\\u0000b"', "data.sources.path is 'a\\x00b': expected a text"),
        ("[data]\nvocab = 0", "data vocab is 0: give at least 1"),
        ("[model]\ninit_std = -1", "model init_std is -1.0: give a number >= 0"),
        ("[model]\ninit_std = -0.0", "model init_std is -0.0: give a number >= 0"),
        ("[model]\ntypes = -1", "model types is -1: give a whole number, 0 or more"),
        ('[model]\npreset = "bert-tiny"\ntypes = 0', "model.types is 0: every token of a bert has a type"),
        ("[model]\nposition_offset = -1", "model position_offset is -1: opt takes 0 or more, another family 0"),
        ('[model]\npreset = "bert-tiny"\nposition_offset = 2', "position_offset is 2: opt takes 0 or more, another"),
        ("[model]\nembed_width = 0", "model embed_width is 0: opt takes 1 or more, another family none"),
        ('[model]\npreset = "vit-tiny"\nembed_width = 4', "embed_width is 4: opt takes 1 or more, another family none"),
        ('[model]\npreset = "bert-tiny"\nfinal_norm = true', "model final_norm is True: bert has no norm after"),
        ('[model]\nhead = "none"', "model.head is none: a model is trained by what its head says"),
        ('[step]\ncompiled = true\nsharding = "full"', "step sharding is 'full': a compiled step"),
        ("[step]\naccumulate = 3", "step accumulate is 3: a batch of 16 rows has no so many equal parts"),
        ("[evaluation]\nlimit = 0", "evaluation limit is 0: give a whole number, at least 1"),
        ('[evaluation]\nrecipes = ["w8a8"]', "evaluation recipes is ('w8a8',): give evaluation every too"),
        ("seed 3", "run x.toml is no TOML: "),
        ("a = " + "[" * 5000, "run x.toml is no TOML: "),
        ("a = " + "9" * 5000, "run x.toml is no TOML: "),
        ("a" * 10_000 + " = 1", f"unknown key '{'a' * 80}'"),
        ('"" = 1', "x.toml: unknown key ''"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, message):
    with pytest.raises(SpecError) as error:
        whole(parse_run(text, "x.toml"))
    assert message in str(error.value)


def test_units():
    assert whole(parse_setting("optim.warmup=1%").under(make_run({"optim.steps": 2000})))[0].optim.warmup == 20
    assert whole(parse_setting("optim.warmup=0.5%").under(make_run({"optim.steps": 350})))[0].optim.warmup == 1
    for text, seconds in (("30 s", 30.0), ("10 min", 600.0), ("1.5h", 5400.0), ("45", 45.0)):
        assert whole(parse_setting(f"saving.seconds={text}"))[0].saving.seconds == seconds


def test_none_takes_a_value_away():
    run = make_run({"evaluation.every": 10, "quant.train": "w8a8"})
    run = run.under(parse_setting("evaluation.every=none")).under(parse_setting("quant.train=none"))
    train, data, _ = whole(run)
    assert train.evaluation.every is None and train.train_quant is None
    assert make_data(parse_setting("data.begin=none")).begin is not None is data.begin  # a value of its own there


# --- layers -----------------------------------------------------------------------------------------------------------


def test_a_preset_lies_under_a_file_and_a_file_under_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(
        'base = "paper-bert-base"\nseed = 5\n[model]\npreset = "opt-tiny"\nlayers = 2\n'
        "[optim]\nlr = 2e-3\nsteps = 10\nwarmup = 1\n[data]\nwindow = 16\n[machine]\nbackend = 'ref'\ndevice = 'cpu'\n"
        "dtype = 'float64'\n"
    )
    got = good("runs", "run.toml", "--resolved", "--set", "optim.lr=3e-3", "--set", "model.attention=mlp").stdout
    Path("resolved.toml").write_text(got)
    for line in (
        "seed = 5  # run.toml",
        "layers = 2  # run.toml",
        "width = 128  # preset opt-tiny",
        'start = "own"  # preset opt-tiny',  # another preset is another model than the base's
        "lr = 0.003  # --set",
        'attention = "mlp"  # --set',
        "weight_decay = 0.01  # paper-bert-base",
        "steps = 10  # run.toml",
        'packing = "stream"  # paper-bert-base',
        "held_out = 0.01  # paper-bert-base",
    ):
        assert f"\n{line}\n" in got, line
    asked = []
    monkeypatch.setattr(pretrain, "train", lambda run, *rest, **_: asked.append((run, rest)) or dropped())
    monkeypatch.setattr(pretrain, "load_data", lambda spec, model: asked.append(spec))
    call("train", "run.toml", "--lr", "4e-3", "--batch", 3, "--attention", "gated", "--set", "data.batch=5")
    call("train", "resolved.toml")
    first, (run, rest), again, (resolved, _) = asked
    assert first.packing is Packing.STREAM and first == again
    assert (run.optim.lr, run.batch, run.model.layers, rest[2]) == (4e-3, 5, 2, Machine("ref", dtype="float64"))
    assert run.model.attention == attention("gated")
    assert (resolved.optim.lr, resolved.batch, resolved.model.attention) == (3e-3, 256, attention("mlp"))


def dropped():
    raise SpecError("not trained here")


def test_alpha_divides_by_the_window():
    run = make_run({"model.attention": "clipped:alpha=12", "data.window": 64})
    assert make_model(run).attention.gamma == -12 / 64
    assert make_model(make_run({"model.attention": "clipped:alpha=12"})).attention.gamma == -12 / 128


def test_another_preset_keeps_the_attention_alone():
    run = open_run("paper-opt-125m").under(make_run({"model.attention": "clipped:alpha=12"}))
    made = make_model(run.under(make_run({"model.preset": "opt-tiny", "data.window": 64})))
    assert made == dataclasses.replace(
        preset("opt-tiny"), attention=attention("clipped").__class__("clipped", -12 / 64)
    )


OLD = {  # command lines of before, and the runs that they were
    "": ("opt-tiny", "vanilla", 350, 16, None, 0, None),
    "--model bert-tiny --steps 9 --batch 3 --lr 2e-3 --seed 4": ("bert-tiny", "vanilla", 9, 3, 2e-3, 4, None),
    "--model vit-tiny --attention gated:pi=0.25 --train-quant w8a8": (
        "vit-tiny",
        "gated:pi=0.25",
        350,
        16,
        None,
        0,
        "w8a8",
    ),
    "--model bert-base --steps 200000": ("bert-base", "vanilla", 200_000, 16, None, 0, None),
}


@pytest.mark.parametrize("line", OLD)
def test_a_command_line_of_before_is_the_run_that_it_was(tmp_path, monkeypatch, line):
    name, kind, steps, batch, rate, seed, quant = OLD[line]
    asked = []
    monkeypatch.setattr(pretrain, "train", lambda *given, **_: asked.append(given) or dropped())
    monkeypatch.setattr(opening, "load", lambda about, *_, **__: asked.append(about))
    monkeypatch.setattr(pretrain, "check_run", lambda *_: None)
    assert "not trained here" in call("train", "--backend", "ref", *line.split(), "--out", tmp_path / "o").output
    model = dataclasses.replace(preset(name), attention=attention(kind))
    (run, _, path, machine) = asked[1]
    assert run == TrainSpec(model, default_optim(model, steps, rate), batch, seed, quant)
    assert (path, machine) == (tmp_path / "o" / "model.safetensors", Machine("ref"))


# --- bundled runs -----------------------------------------------------------------------------------------------------


SHAPES = {  # batch, parts, steps, warm-up, rate, decay, beta2, window, seed, gains
    "blog-bert-base": (128, 1, 1_000_000, 10_000, 1e-4, 0.01, 0.999, 128, False),
    "paper-bert-base": (256, 1, 1_000_000, 10_000, 1e-4, 0.01, 0.999, 128, False),
    "paper-opt-125m": (48 * 4, 4, 125_000, 2000, 4e-4, 0.1, 0.95, 512, True),
    "paper-opt-350m": (24 * 11, 11, 100_000, 2000, 4e-4, 0.1, 0.95, 512, False),
    "paper-opt-1.3b": (14 * 18, 18, 100_000, 2000, 4e-4, 0.1, 0.95, 512, False),
    "paper-vit-s16": (512, 1, 750_600, 50_040, 1e-3, 0.03, 0.999, None, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_bundled_run_is_read_printed_and_read_again(name, tmp_path):
    """PUBLISHED.md's figures, by hand; each line with its source; what is printed is the same run."""
    train, data, machine = whole(open_run(name))
    optim, step = train.optim, train.step
    got = (train.batch, step.accumulate, optim.steps, optim.warmup, optim.lr, optim.weight_decay, optim.beta2)
    assert (*got, data.window, optim.decay_norm_gains) == SHAPES[name]
    assert (train.seed, optim.first_rate_zero, optim.beta1) == (1000, True, 0.9)
    assert optim.schedule is (Schedule.COSINE if "vit" in name else Schedule.LINEAR)
    printed = good("runs", name).stdout
    values = [line for line in printed.splitlines() if re.match(r"^ *(\{ )?[\w.]+ = ", line)]
    assert len(values) > 35 and all(re.search(r"  # (published|assumed)", line) for line in values)
    file = tmp_path / "run.toml"
    file.write_text(printed)
    assert whole(open_run(str(file))) == (train, data, machine)
    assert whole(parse_run(write_run(resolve(open_run(name))), "resolved.toml")) == (train, data, machine)
    assert f"{name}" in good("runs").stdout and max(map(len, printed.splitlines())) <= 120


def test_every_bundled_run_is_known_here():
    assert list_bundled() == sorted(SHAPES)
    with pytest.raises(SpecError, match="unknown run 'paper-opt': did you mean paper-opt-"):
        read_bundled("paper-opt")
    assert "unknown run 'nowhere'" in call("train", "nowhere").output
    assert "cannot be read (No such file or directory)" in call("train", "nowhere.toml").output


def test_a_set_of_the_hub_may_be_named_with_its_configuration(monkeypatch):
    """As the published runs name Wiki-40B."""
    asked = []

    def load_dataset(*names, split, streaming):
        asked.append((names, split, streaming))
        return [{"text": "a"}]

    monkeypatch.setattr(documents, "need", lambda *_: SimpleNamespace(load_dataset=load_dataset))
    for name in ("google/wiki40b:en", "bookcorpus/bookcorpus"):
        assert [one.text for one in documents.read_hub(name)] == ["a"]
    assert asked == [(("google/wiki40b", "en"), "train", True), (("bookcorpus/bookcorpus",), "train", True)]


def test_the_six_configurations_of_the_post():
    rows = make_rows(open_run("blog-bert-base"))
    names = ("vanilla", "clipped:gamma=-0.025", "mlp:gate_hidden=16")
    assert [row.line for row in rows.values()] == [*names, *(f"{name}-FQ" for name in names)]
    assert {row.recipe for row in rows.values()} == {None, "train-w8a8"}
    assert {row.model.gate_hidden for row in rows.values()} == {16}
