"""Files that qtx 0.1.0 wrote still open, run, and give what they gave then.

Codes and what is read back are equal to the last digit; a loss in floats may differ by what another BLAS rounds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity_tests.tests.shell import REF, good
from qtx.files.artifact import load_artifact
from qtx.files.checkpoint import load_checkpoint
from qtx.jobs.opening import make_artifact_model
from qtx.jobs.training import Machine
from qtx.recipes.named import recipe
from qtx_ref.presets import PRESETS
from qtx_ref.profiles import parse, profile
from qtx_ref.spec import Family

WRITTEN = next(folder for above in Path(__file__).parents if (folder := above / "fixtures" / "v0.1").is_dir())
EXPECTED = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
ARTIFACTS = ("opt", "opt-int4", "bert", "bert-int4", "vit", "vit-int4")
FLOAT = "study/vanilla-seed0/model.safetensors"
KINDS = ("half", "learned", "ranges", "rotated", "smooth", "imported")
CHECKPOINTS = (FLOAT, *(f"{kind}.safetensors" for kind in KINDS))
ROUNDING = 1e-4  # relative, of a mean loss: float32 sums in another order, and the few codes that flip with them
TRAIN = ("--steps", 8, "--batch", 4, "--data", "words.txt")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A copy of the files, as the folder that the commands run in, and the model that was trained."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    small = {"layers": 2, "width": 16, "heads": 2, "hidden": 24, "vocab": 96, "length": 12}
    monkeypatch.setitem(PRESETS, "opt-small", replace(PRESETS["opt-tiny"], **small))
    return tmp_path


def values(*arguments: object) -> dict:
    """What a command says in JSON."""
    return json.loads(good(*arguments, "--json", "-").stdout)


def text_hash(value: np.ndarray) -> str:
    """Sixteen digits for dtype, shape and every bit."""
    whole = np.ascontiguousarray(value)
    return hashlib.sha256(f"{whole.dtype} {whole.shape} ".encode() + whole.tobytes()).hexdigest()[:16]


def codes(name: str, backend: str) -> dict[str, str]:
    """A hash of the codes of each site of an artifact, in the order of the forward pass, and of its output."""
    artifact = load_artifact(Path(f"{name}.qtx"))
    inputs = load_file("inputs.safetensors")
    keys = {Family.BERT: ("tokens", "mask", "types"), Family.OPT: ("tokens", "mask"), Family.VIT: ("images",)}
    hashes: dict[str, str] = {}

    def keep(site: str, value: np.ndarray) -> None:
        hashes[site] = text_hash(np.asarray(value))

    batch = {key: inputs[key] for key in keys[artifact.spec.family]}
    output = make_artifact_model(artifact, Machine(backend)).run(batch, keep)
    return hashes | {f"output {part}": text_hash(np.asarray(value)) for part, value in output._asdict().items()}


def score(path: str, *options: object) -> dict[str, float]:
    """Loss and targets of a model on its evaluation split."""
    data = () if path.startswith("vit") else ("--data", "words.txt")
    got = values("evaluate", path, *data, *REF, *options)
    return {"loss": got["loss"], "targets": got["targets"]}


def same_score(got: dict[str, float], want: dict[str, float], tolerance: float) -> None:
    assert got["targets"] == want["targets"]
    assert got["loss"] == pytest.approx(want["loss"], rel=tolerance, abs=0)


@pytest.mark.parametrize("backend", ["ref", "torch"])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifact_gives_the_same_codes(name: str, backend: str) -> None:
    got, want = codes(name, backend), EXPECTED["codes"][name]
    assert list(got) == list(want)
    assert [site for site in want if got[site] != want[site]] == []


@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifact_is_evaluated_and_shown(name: str) -> None:
    same_score(score(f"{name}.qtx"), EXPECTED["scores"][f"{name}.qtx"], 1e-9)  # float64, of the same integers
    assert name.endswith("int4") == any(row["bits"] == 4 for row in values("show", f"{name}.qtx")["sites"])


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_vectors_hold(backend: str) -> None:
    got = values("vectors", "opt.qtx", "--check", "opt.vectors.safetensors", "--backend", backend)
    assert (got["tensors"], got["differ"]) == (EXPECTED["vectors"], [])


@pytest.mark.parametrize("path", CHECKPOINTS)
def test_checkpoint_is_evaluated(path: str) -> None:
    same_score(score(path), EXPECTED["scores"][path], ROUNDING)


def test_checkpoint_holds_what_it_held() -> None:
    whole = load_checkpoint(Path(FLOAT))
    smooth, rotated = (load_checkpoint(Path(f"{kind}.safetensors")).transforms for kind in ("smooth", "rotated"))
    assert whole.extra["history.loss"].tolist() == EXPECTED["history"]
    assert {name.split(".")[0] for name in whole.extra} == {"history", "optim"}
    assert smooth and all(how.divisor is not None for how in smooth.values())
    assert rotated and all(how.block for how in rotated.values())
    assert load_checkpoint(Path("ranges.safetensors")).ranges
    assert any(name.startswith("learned.") for name in load_checkpoint(Path("learned.safetensors")).extra)


def test_checkpoint_is_quantized_and_exported() -> None:
    good("quantize", "ranges.safetensors", *REF, "--data", "words.txt", "--out", "again.qtx")
    was, now = load_artifact(Path("opt.qtx")).constants, load_artifact(Path("again.qtx")).constants
    assert list(now) == list(was) and [name for name in was if not np.array_equal(was[name], now[name])] == []
    good("export", "imported.safetensors", "--out", "folder")
    good("import", "folder", "--out", "again.safetensors")
    one, other = (load_checkpoint(Path(name)).params for name in ("imported.safetensors", "again.safetensors"))
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def test_half_a_run_is_resumed() -> None:
    Path("cut").mkdir()
    shutil.copy("half.safetensors", "cut/model.safetensors")
    got = values("train", "--model", "opt-small", "--attention", "gated", *TRAIN, *REF, "--out", "cut", "--resume")
    assert got["loss"] == pytest.approx(EXPECTED["resumed"], rel=1e-5)


def test_study_is_read_again() -> None:
    study = ("study", "--model", "opt-small", "--attention", "vanilla", "--bits", "w8a8,w4a8", *TRAIN, *REF)
    now = values(*study, "--out", "study", "--resume")["runs"]["vanilla-seed0"]
    was = json.loads((WRITTEN / "study" / "study.json").read_text(encoding="utf-8"))["runs"]["vanilla-seed0"]
    assert {key: now[key] for key in was} == was


def test_comparison_is_read_again() -> None:
    was = json.loads((WRITTEN / "ptq" / "ptq.json").read_text(encoding="utf-8"))["rows"]
    names = ",".join(name for name in was if name != "float")
    given = ("ptq", FLOAT, "--data", "words.txt", "--recipes", names, "--sequences", 24, "--calibration", 2, *REF)
    assert values(*given, "--out", "ptq", "--resume")["rows"] == was


def test_recipe_and_profile_are_read() -> None:
    assert recipe("recipe.json", PRESETS["opt-small"]) == recipe(EXPECTED["recipe"], PRESETS["opt-small"])
    same_score(score(FLOAT, "--recipe", "recipe.json"), EXPECTED["scores"]["recipe.json"], ROUNDING)
    was, now = parse(json.loads(Path("profile.json").read_text(encoding="utf-8"))), profile("gemmlowp")
    assert replace(was, path=now.path) == now
