"""`qtx study --jobs`: rows in processes of their own give what one process gives, whatever ends one of them; and
studies that begin with a checkpoint."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity_tests.tests.commands.test_signals import ENVIRONMENT
from parity_tests.tests.files.test_writing import RUN, wait_for
from parity_tests.tests.shell import call, good
from qtx.disk import open_beside
from qtx.engines.machine import Machine
from qtx.jobs import side_by_side
from qtx.jobs.side_by_side import share_threads
from qtx.jobs.study import Study
from qtx.runs.reading import open_run

RUN_FILE = """
[model]
preset = "vit-tiny"
patch_size = 4
layers = 1
width = 16
heads = 2
hidden = 24
[optim]
steps = {steps}
[data]
batch = 4
[machine]
backend = "ref"
[study]
model.attention = ["vanilla", "gated"]
"""
ONE_THREAD = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def write(folder: Path, steps: int = 3, more: str = "") -> Path:
    file = folder / "study.toml"
    file.write_text(RUN_FILE.format(steps=steps) + more)
    return file


def read(out: Path) -> dict:
    return json.loads((out / "study.json").read_text())


def same_parameters(one: Path, two: Path) -> bool:
    """Whether every row of two studies has the same checkpoint, to the bit."""
    names = [path.relative_to(one) for path in sorted(one.rglob("model.safetensors"))]
    pairs = [(load_file(one / name), load_file(two / name)) for name in names]
    return bool(names) and all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in pairs
    )


def test_processes_give_what_one_gives(tmp_path):
    file = write(tmp_path)
    alone = good("study", file, "--out", tmp_path / "one")
    both = good("study", file, "--out", tmp_path / "two", "--jobs", 2)
    assert both.stdout == alone.stdout.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert (tmp_path / "one/study.json").read_bytes() == (tmp_path / "two/study.json").read_bytes()
    assert same_parameters(tmp_path / "one", tmp_path / "two")
    assert "2 rows, 2 at once, 1 thread each" in both.stderr and "done, 2 of 2" in both.stderr
    assert "vanilla-seed0" in (tmp_path / "two/vanilla-seed0/output.txt").read_text()
    assert good("study", file, "--out", tmp_path / "two", "--jobs", 2, "--resume").stdout == both.stdout


def test_a_row_that_fails_stops_no_other(tmp_path, monkeypatch):
    """One that cannot begin, and one that the system ends as where memory is gone, are named with what they said."""
    file, out = write(tmp_path), tmp_path / "out"
    command = ["study", file, "--attention", "vanilla,clipped,gated", "--out", out, "--jobs", 2, "--resume"]
    (out / "vanilla-seed0").mkdir(parents=True)
    (out / "vanilla-seed0" / "model.safetensors").write_text("mine")
    start = side_by_side.RowProcess.start

    def crashed(task, *rest):
        row = start(task, *rest)
        if task["row"] == "clipped-seed0":
            row.process.kill()
        return row

    with monkeypatch.context() as patch:
        patch.setattr(side_by_side.RowProcess, "start", crashed)
        said = call(*command, "--json", tmp_path / "all.json")
    assert said.exit_code == 1 and "2 of 3 runs failed\n" in said.stderr
    assert "clipped-seed0 crashed (signal 9)" in said.stderr and "vanilla-seed0 ended with status 1" in said.stderr
    assert "model.safetensors exists and is not qtx's: choose another name" in said.stderr
    assert [*read(out)["runs"]] == [*json.loads((tmp_path / "all.json").read_text())["runs"]] == ["gated-seed0"]
    for line in (r"^\| vanilla +\| +- \|", r"^\| gated +\| +\d"):
        assert re.search(line, said.stdout, re.M)
    (out / "vanilla-seed0" / "model.safetensors").unlink()
    good(*command)
    assert [*read(out)["runs"]] == ["vanilla-seed0", "clipped-seed0", "gated-seed0"]


def test_a_row_leaves_the_study_file_alone(tmp_path):
    """Rows that begin at once, or while a result is kept, do not meet there."""
    with open_beside(tmp_path / "study.json"):
        study = Study(open_run(str(write(tmp_path))), tmp_path, resume=False, only="gated-seed0")
        assert study.complete("gated-seed0")["attention"] == "gated"


def test_all_rows_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    said = call("study", write(tmp_path), "--out", tmp_path / "out", "--jobs", 2)
    assert said.exit_code == 1 and "2 of 2 runs failed" in said.stderr and read(tmp_path / "out")["runs"] == {}


STEPS = 500  # more than are done before both rows are seen to have begun


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        good("study", write(folder, STEPS), "--out", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_stopped_goes_on(tmp_path, whole, number):
    """Both rows save their runs and end, also where the study's own process is killed."""
    out = tmp_path / "out"
    command = [*RUN, "study", str(write(tmp_path, STEPS)), "--out", str(out), "--jobs", "2"]
    process = subprocess.Popen(command, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    logs = [out / name / "log.jsonl" for name in ("vanilla-seed0", "gated-seed0")]
    wait_for(lambda: all(log.exists() and log.stat().st_size for log in logs))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        wait_for(lambda: not list(out.rglob("*-seed0/.qtx-lock")))
    else:
        assert process.returncode == 128 + number
        assert f"stopped with 0 of 2 rows done, the others saved in {out}; the same command with --resume" in said
    left = {path.parent.name: load_file(path) for path in out.rglob("model.safetensors")}
    assert sorted(left) == ["gated-seed0", "vanilla-seed0"]
    assert all(row["history.loss"].size < STEPS for row in left.values())  # stopped, and not gone on to the end
    assert not (out / "study.json").exists()
    good(*command[len(RUN) : -2], "--resume")  # in one process: the bits are no others
    assert same_parameters(whole, out) and (out / "study.json").read_bytes() == (whole / "study.json").read_bytes()


def test_threads_are_divided_unless_they_are_said(monkeypatch):
    monkeypatch.setattr("qtx_ref.backend.os.cpu_count", lambda: 16)
    assert share_threads(Machine("ref"), 3) == 1  # OMP_NUM_THREADS, of each
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [share_threads(Machine("ref"), jobs) for jobs in (1, 3, 16, 40)] == [16, 5, 1, 1]


# --- from a checkpoint ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The checkpoint of a vanilla model."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        good("train", write(folder), "--out", folder / "out")
    return folder / "out" / "model.safetensors"


CONTINUED = """
optim.steps = 2
data.batch = 4
machine.backend = "ref"
[study]
model.attention = ["vanilla", "clipped:gamma=-0.1", "gated:pi=0.5"]
"""


def test_a_study_begins_with_a_checkpoint(tmp_path, begun):
    file, out = tmp_path / "study.toml", tmp_path / "out"
    file.write_text(CONTINUED)
    command = ["study", file, "--init", begun, "--out", out]
    table = good(*command).stdout
    for kind in ("clipped:gamma=-0.1", "gated:pi=0.5"):
        alone = tmp_path / kind
        common = ["--backend", "ref", "--steps", 2, "--batch", 4]
        good("train", "--init", begun, "--attention", kind, *common, "--out", alone)
        row, own = (load_file(path / "model.safetensors") for path in (out / f"{kind}-seed0", alone))
        assert row.keys() == own.keys() and all(np.array_equal(row[name], own[name]) for name in own)
    assert read(out)["init"] == {str(begun): hashlib.sha256(begun.read_bytes()).hexdigest()}
    shutil.rmtree(out)
    assert good(*command, "--jobs", 2).stdout == table


def test_another_checkpoint_is_another_study(tmp_path, begun):
    file, out, init = tmp_path / "study.toml", tmp_path / "out", tmp_path / "init.safetensors"
    file.write_text(CONTINUED)
    init.write_bytes(begun.read_bytes())
    command = ["study", file, "--init", init, "--attention", "vanilla", "--out", out]
    good(*command)
    (tmp_path / "more").mkdir()
    good("train", write(tmp_path / "more", 4), "--out", tmp_path / "other")
    init.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    said = call(*command, "--resume").output
    assert "is another study: init." in said and "was '" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "model.width=32"], "--init and model.width of --set: the checkpoint has its own"),
        (["--attention", "mlp"], "adds the gate mlp: only the linear one"),
    ],
)
def test_what_a_checkpoint_cannot_take(tmp_path, begun, options, message):
    file = tmp_path / "study.toml"
    file.write_text(CONTINUED)
    said = call("study", file, "--init", begun, "--out", tmp_path / "out", *options)
    assert said.exit_code == 1 and message in said.output and not (tmp_path / "out").exists()
