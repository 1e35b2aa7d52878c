"""Files that were changed since they were written are noticed, and what qtx did not write is left alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity_tests.long import fuzz
from parity_tests.subjects import hostile
from parity_tests.subjects.mutations import flip_bit
from parity_tests.tests.shell import call, good
from qtx.files import artifact
from qtx.files.artifact import load_artifact
from qtx.files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qtx.files.container import (
    RESULT,
    STUDY,
    VECTORS,
    CheckpointError,
    FileError,
    digest,
    read_sealed,
    write_beside,
    write_sealed_json,
)
from qtx.files.formats import check_replaceable, kind_of
from qtx.files.results import read_comparison, read_study
from qtx.jobs import finetune, opening, quantize
from qtx_ref import spec
from qtx_ref.backend import Model
from qtx_ref.integer import lowering
from qtx_ref.models.initial import init_params


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of small models, results and data that the fuzz has."""
    folder, here = tmp_path_factory.mktemp("seal"), Path.cwd()
    try:
        fuzz.make_folder(folder)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    """A copy of it, in which the test stands."""
    folder = tmp_path / "place"
    shutil.copytree(whole, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def refuse(*arguments: object) -> str:
    """The one line by which a command is refused."""
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ") and len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def unsealed(path: Path, change=lambda tensors: None) -> None:
    """The checkpoint as it was before there was a sha256."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(json.loads(file.read(size))["__metadata__"]["qtx"])
    tensors = load_file(path)
    change(tensors)
    del header["sha256"]
    save_file(tensors, path, {"qtx": json.dumps(header)})


# --- noticed ----------------------------------------------------------------------------------------------------------


def test_a_fuzz_of_a_few_seconds_finds_nothing():
    tally = fuzz.fuzz(files=60, commands=0, flips=20, seed=7)
    assert tally.failures == []
    assert sum(tally.counts.values()) == 80


@pytest.mark.parametrize("name", ["vit.safetensors", "vit.qtx", "vectors.safetensors"])
def test_each_flip_of_a_tensor_or_the_header_is_noticed(place, name):
    content = (place / name).read_bytes()
    read = ("vectors", "vit.qtx", "--check", name, "--backend", "ref") if "vectors" in name else ("show", name)
    for i in range(20):
        (place / name).write_bytes(flip_bit(content, np.random.default_rng(i)))
        if name == "vit.safetensors":
            with pytest.raises(CheckpointError):
                load_checkpoint(place / name)
        else:
            refuse(*read)


def test_a_text_that_changed_and_means_the_same_is_noticed(place):
    content = (place / "vit.safetensors").read_bytes()
    assert content.count(b"1e-05") == 1  # norm_eps
    (place / "vit.safetensors").write_bytes(content.replace(b"1e-05", b"1E-05"))
    assert "sha256 differs" in refuse("evaluate", "vit.safetensors", "--backend", "ref")


EARLIER_STUDY = {  # `hostile.STUDY` as studies said it before they had a format
    "model": "vit-tiny",
    "steps": 1,
    "batch": 1,
    "attention": ["vanilla"],
    "recipes": ["w8a8"],
    "seeds": [0],
    "machine": {"backend": "ref", "device": "cpu", "dtype": "float32"},
}


def test_a_file_without_a_seal_opens_with_a_note(place):
    wanted = good("evaluate", "vit.safetensors", "--backend", "ref")
    shutil.copy(place / "vit.safetensors", place / "kept.safetensors")
    unsealed(place / "vit.safetensors")
    result = good("evaluate", "vit.safetensors", "--backend", "ref")
    assert result.stdout == wanted.stdout
    assert result.stderr.count("note: vit.safetensors is from before files had a sha256") == 1
    shutil.copy(place / "kept.safetensors", place / "vit.safetensors")  # which ptq.json names by its sha256
    for name in ("ptq/ptq.json", "study/study.json"):
        content = json.loads((place / name).read_text())
        del content["sha256"], content["format"]
        if "study" in name:
            content["spec"] = EARLIER_STUDY
        (place / name).write_text(json.dumps(content, indent=1))
    for command in (hostile.PTQ, hostile.STUDY):
        assert "from before files had a sha256" in good(*command, "--backend", "ref").stderr
    assert {"format", "sha256"} <= json.loads((place / "ptq/ptq.json").read_text()).keys()  # written anew


@pytest.mark.parametrize(("name", "command"), [("ptq/ptq.json", hostile.PTQ), ("study/study.json", hostile.STUDY)])
def test_a_changed_figure_is_not_printed(place, name, command):
    content = json.loads((place / name).read_text())
    figures = content["rows"]["w8a8"] if "rows" in content else content["runs"]["vanilla-seed0"]["float"]
    figures["loss"] = 0.001
    (place / name).write_text(json.dumps(content, indent=1))
    assert "sha256 differs" in refuse(*command, "--backend", "ref")


def test_results_of_another_kind_of_value_are_refused_in_a_line(place):
    """Also where they have no seal, or a right one."""
    path = place / "ptq/ptq.json"
    known = json.loads(path.read_text())
    del known["sha256"]
    for key, value in (("worst", [1]), ("value", "x"), ("bytes", 10**300), ("low", []), ("runs_as", "magic")):
        content = json.loads(json.dumps(known))
        content["rows"]["w8a8"][key] = value
        path.write_text(json.dumps(content | {"sha256": digest(content, {})}, indent=1))
        assert "w8a8" in refuse(*hostile.PTQ, "--backend", "ref") or key == "bytes"
    for text in ("[" * 100_000, '{"of": ' + "[" * 100_000, '{"of": 1e999}', '{"of": ' + "9" * 5000 + "}"):
        path.write_text(text)
        refuse(*hostile.PTQ, "--backend", "ref")


def test_a_study_that_says_no_runs_is_refused_in_a_line(place):
    """Also where it has a right seal: another kind of value, or one of its two parts alone."""
    path = place / "study/study.json"
    known = json.loads(path.read_text())
    del known["sha256"]
    settings, grids = known["spec"]["settings"], known["spec"]["grids"]
    odd = (
        {"settings": settings},
        {"grids": grids},
        {"settings": [], "grids": grids},
        {"settings": settings, "grids": 1},
    )
    for said in (*odd, EARLIER_STUDY | {"machine": []}):
        content = known | {"spec": said}
        path.write_text(json.dumps(content | {"sha256": digest(content, {})}, indent=1))
        assert "study.json" in refuse(*hostile.STUDY, "--backend", "ref")


NO_RECIPES = ("[" * 100_000, '{"name": ' * 100_000, "9" * 5000, "NaN", '{"name": 1e999}', "\udcff")


@pytest.mark.parametrize("text", [*NO_RECIPES, '{"name": "\\ud800", "rules": []}'])
def test_a_recipe_file_that_is_none(place, text):
    Path("r.json").write_text(text, errors="surrogateescape")
    assert "recipe file r.json" in refuse("evaluate", "vit.safetensors", "--recipe", "r.json", "--backend", "ref")


# --- divergence -------------------------------------------------------------------------------------------------------


def test_a_model_without_a_finite_number_is_no_success(place):
    params = init_params(hostile.VIT, 0)
    params["head.classifier.weight"] = np.full_like(params["head.classifier.weight"], 3e38)
    save_checkpoint(place / "wild.safetensors", Checkpoint(hostile.VIT, params))
    with np.errstate(all="ignore"):
        result = call("evaluate", "wild.safetensors", "--backend", "ref")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "Error: wild.safetensors diverges: loss is" in result.stderr
        lines = call("ptq", "wild.safetensors", *hostile.PTQ[2:-2], "wild", "--backend", "ref").stderr
    assert "the float model diverges" in lines


# --- left alone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "vit.safetensors", "--json", "user.json"),
        ("evaluate", "vit.safetensors", "--json", "link.json"),
        ("evaluate", "vit.safetensors", "--json", "dangling.json"),
        ("evaluate", "vit.safetensors", "--json", "study/study.json"),
        ("analyze", "vit.safetensors", "--out", "folder"),
        (*hostile.PTQ[:-3], "--out", "folder", "--keep", "w8a8", "--resume"),
        (*hostile.PTQ, "--keep", "w8a8"),
        ("quantize", "vit.safetensors", "--out", "dangling.qtx"),
    ],
)
def test_nothing_of_others_is_replaced(place, arguments):
    (place / "dangling.qtx").symlink_to("nowhere.qtx")
    save_checkpoint(
        place / "ptq/w8a8.safetensors", Checkpoint(hostile.VIT, init_params(hostile.VIT, 5))
    )  # ours, of other work
    before = fuzz.snapshot(place)
    refuse(*arguments, "--backend", "ref")
    assert fuzz.snapshot(place) == before


def test_a_file_is_replaced_by_its_own_kind_alone(tmp_path):
    path = tmp_path / "a.json"
    path.touch()  # empty: nobody's
    write_sealed_json(path, STUDY, {"runs": {}})
    write_sealed_json(path, STUDY, {"runs": {"a": 1}})
    assert kind_of(path.read_bytes()[:512]) == STUDY
    check_replaceable(path)
    for content in (b'{\n "format": "qtx-result"\n}\n', b"anything"):
        with pytest.raises(CheckpointError, match="exists and is a qtx-study"):
            write_beside(path, content)
    with pytest.raises(CheckpointError, match="choose another name"):
        check_replaceable(path, RESULT)


def test_a_result_is_written_again(place):
    for _ in range(2):
        good("evaluate", "vit.safetensors", "--backend", "ref", "--json", "mine.json")
    assert json.loads(Path("mine.json").read_text())["format"] == RESULT


# --- before the data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "vit.safetensors", "--device", "cuda"), "device is 'cuda'"),
        (("evaluate", "vit.safetensors", "--recipe", "w8a8-nothing"), "w8a8-nothing"),
        (("evaluate", "vit.qtx", "--numerics", "fake", "--strict"), "--strict"),
        (("generate", "vit.safetensors", "--prompt", "a"), "model family is vit"),
        (("generate", "opt.safetensors", "--prompt", "a", "--tokens", 24), "length is 24"),
        (("ptq", "vit.safetensors", "--out", "ptq"), "exists: go on with --resume"),
        (("ptq", "vit.safetensors", "--recipes", "w8a8-nothing", "--out", "new"), "w8a8-nothing"),
        (("ptq", "vit.safetensors", "--device", "cuda", "--out", "new"), "device is 'cuda'"),
        (("analyze", "vit.safetensors", "--device", "cuda"), "device is 'cuda'"),
        (("analyze", "vit.safetensors", "--out", "folder"), "folder/analysis.json exists"),
        (("cost", "vit.safetensors", "--device", "cuda"), "device is 'cuda'"),
        (("quantize", "vit.safetensors", "--out", "vit.qtx"), "exists"),
        (("quantize", "vit.safetensors", "--out", "new.qtx", "--recipe", "mxfp8"), "float format"),
        (("vectors", "vit.qtx", "--out", "vectors.safetensors"), "exists"),
    ],
)
def test_options_are_tried_before_data_are_read(place, monkeypatch, arguments, message):
    def load(*_, **__):
        raise AssertionError("data are read")

    for module in (finetune, opening):
        monkeypatch.setattr(module, "load", load)
    assert message in refuse(*arguments, "--backend", "ref")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e-400", "1e400", "", "x"])
def test_a_temperature_that_is_none(place, value):
    result = call("generate", "opt.safetensors", "--prompt", "It was", "--temperature", value, "--backend", "ref")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: Invalid value for '--temperature'")


def test_a_prompt_without_words_is_refused(place):
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    assert "has no token" in refuse("generate", "opt.safetensors", "--prompt", "", "--tokens", 2, "--backend", "ref")


def test_quantize_checks_once_and_builds_what_it_calibrates(place, monkeypatch):
    checked, built = [], []
    whole_check, make = spec.check_integer, Model.__init__

    def check(*arguments, **more):
        checked.append(1)
        return whole_check(*arguments, **more)

    for module in (quantize, artifact, lowering):
        monkeypatch.setattr(module, "check_integer", check)
    monkeypatch.setattr(Model, "__init__", lambda *given, **more: built.append(1) or make(*given, **more))
    good("quantize", "vit.safetensors", "--backend", "ref", "--out", "new.qtx")
    assert (len(checked), len(built)) == (1, 1)
    built.clear()
    good("quantize", "ranges.safetensors", "--backend", "ref", "--out", "own.qtx")
    assert built == []  # it has its ranges


READERS = {
    "checkpoint": load_checkpoint,
    "artifact": load_artifact,
    "vectors": lambda path: read_sealed(path, VECTORS),
    "study": read_study,
    "comparison": lambda path: read_comparison(path, "perplexity", ["w8a8"]),
}


@pytest.mark.parametrize("kind", ["a device", "a pipe"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_named(tmp_path, reader, kind):
    """None of them has an end; a pipe would be waited for."""
    path = tmp_path / "file"
    if kind == "a device":
        path.symlink_to("/dev/full")  # is read as /dev/zero is
    else:
        os.mkfifo(path)
    with pytest.raises(FileError, match=f"file cannot be read \\(it is {kind}, not a regular file\\)"):
        READERS[reader](path)


def test_the_earlier_name_of_the_error_catches_it(tmp_path):
    assert CheckpointError is FileError
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none")


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    """A rename would replace one as it does a file: as root, `--json /dev/null` took the machine's /dev/null away."""
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    with pytest.raises(FileError, match="pipe.json cannot be replaced .it is a pipe, not a regular file.: choose"):
        check_replaceable(path)
    with pytest.raises(FileError, match="it is a pipe"):
        write_beside(path, b"{}")
    assert "it is a pipe" in refuse("recipes", "w8a8", "--json", path)
    assert path.is_fifo()


def test_a_file_that_quotes_the_mark_is_not_ours(place):
    notes = place / "notes.json"
    notes.write_text('My notes: the file has {"format": "qtx-result"} in it\n')
    assert "not qtx's" in refuse("recipes", "w8a8", "--json", notes)
    assert notes.read_text().startswith("My notes")
