"""Files that are written while something goes wrong: a full disk, a killed process, another process in the same
folder."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity_tests.tests.shell import TRAIN, call, good
from qtx.files import locks, writing
from qtx.files.locks import hold, make_scratch
from qtx.files.writing import UNDER_WAY, WriteError, check_space, write_whole
from qtx.jobs import resume, saving, training
from qtx.jobs.run import checkpoint_bytes
from qtx_ref.presets import preset

fcntl = pytest.importorskip("fcntl", reason="Windows has no flock")
RUN = [sys.executable, "-m", "qtx"]


def stale(path: Path) -> Path:
    """What a process that was killed while it wrote `path` has left."""
    beside = path.with_name(f".{path.name}{UNDER_WAY}")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_bytes(b"half a file")
    return beside


def start(*arguments: object) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(writing.__file__).parents[2])}
    return subprocess.Popen([*RUN, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("a minute has passed")


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, step, full)
        with pytest.raises(WriteError, match=r"a\.json cannot be written \(No space left on device\): make room"):
            write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_grows_too_large_for_the_system(tmp_path):
    """No injected error: the system's own."""
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "a", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**22, limits[1]))
    try:
        with pytest.raises(WriteError, match="File too large"):
            write_whole(path, bytes(2**23))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_is_replaced_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "a"
    stale(path)
    write_whole(path, b"new")
    assert os.listdir(tmp_path) == ["a"]
    with open(stale(path), "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(WriteError, match="another process is writing it"):
            write_whole(path, b"newer")
        assert path.read_bytes() == b"new"


def test_a_link_in_the_place_of_a_file_under_way_is_not_followed(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / f".a{UNDER_WAY}").symlink_to(tmp_path / "mine")
    with pytest.raises(WriteError):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_files_and_folders_are_put_on_the_disk_in_their_order(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, os.replace

    def fsync(file):
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{file}") else "file")
        sync(file)

    monkeypatch.setattr(writing.os, "fsync", fsync)
    monkeypatch.setattr(writing.os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    write_whole(tmp_path / "a", b"new")
    assert steps == ["file", "rename", "folder"]


def test_space_is_checked(tmp_path):
    check_space(tmp_path / "no" / "such" / "folder", 1)
    with pytest.raises(WriteError, match="a takes 1099511627776.0 MiB, and its disk has"):
        check_space(tmp_path / "a", 2**60)


def test_the_size_of_a_checkpoint_is_known_before(tmp_path):
    good(*TRAIN, "--out", tmp_path)
    spec = preset("vit-tiny")
    expected = checkpoint_bytes(spec, training.default_optim(spec, 8), "float32")
    assert 0 < expected - (tmp_path / "model.safetensors").stat().st_size <= 2**20


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_held_once(tmp_path):
    out = tmp_path / "a" / "b"
    with hold(out), hold(out):
        assert (out / locks.LOCK).read_text() == f"{os.getpid()}\n"
    assert not os.listdir(tmp_path)  # nothing was written


@pytest.mark.parametrize("command", ["train", "study", "finetune", "ptq", "analyze", "cost"])
def test_a_second_command_says_who_holds_the_folder(tmp_path, command):
    """Before it looks at its other arguments."""
    lock = tmp_path / locks.LOCK
    lock.write_text("4711\n")
    given = {
        "finetune": ["nowhere", "--data", "digits"],
        "ptq": ["nowhere"],
        "analyze": ["nowhere"],
        "cost": ["nowhere"],
    }
    with open(lock, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = call(command, *given.get(command, []), "--out", tmp_path)
    assert result.exit_code == 1
    assert result.output == (
        f"Error: {tmp_path} is in use by another qtx, process 4711: wait for its end, or choose another --out\n"
    )


def test_two_processes_and_one_folder(tmp_path):
    """The first goes on, until SIGTERM ends it and its lock with it."""
    out = tmp_path / "out"
    first = start(*TRAIN[:-1], 100000, "--out", out)
    try:
        wait_for(lambda: (out / locks.LOCK).exists() and (out / locks.LOCK).read_text())
        second = call(*TRAIN, "--out", out)
        assert second.exit_code == 1 and f"process {first.pid}:" in second.output
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 143 and "Traceback" not in said
    assert not out.exists() or {*os.listdir(out)} <= {"log.jsonl", "model.safetensors", "run.toml"}  # it may have begun


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path):
    stale(tmp_path / "model.safetensors")
    (tmp_path / locks.LOCK).write_text("4711\n")
    good(*TRAIN[:-1], 1, "--out", tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "model.safetensors", "run.toml"]


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_of_an_earlier_version_left_is_removed(tmp_path, gone):
    """Up to version 0.1 files under way were named after their process, `.model.safetensors.4711`."""
    good(*TRAIN[:-1], 1, "--out", tmp_path)
    begun = (tmp_path / "model.safetensors").read_bytes()[:1000]
    removed = {f".model.safetensors.{gone}": begun, f".study.json.{gone}": b""}
    kept = {
        f".model.safetensors.{os.getpid()}": begun,  # its process lives
        f".notes.{gone}": b"no file of ours",
        f"model.safetensors.{gone}": begun,
        ".model.safetensors.x1": begun,
    }
    for name, content in (removed | kept).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / f".link.json.{gone}").symlink_to(tmp_path / "model.safetensors")
    with hold(tmp_path):
        pass
    assert {*os.listdir(tmp_path)} == {"log.jsonl", "model.safetensors", "run.toml", f".link.json.{gone}", *kept}


def test_old_temporary_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.tempfile, "tempdir", str(tmp_path))
    old, mine = tmp_path / f"{locks.SCRATCH}old", tmp_path / "mine"
    for folder in (old, mine):
        folder.mkdir()
        (folder / "large").touch()
    with make_scratch() as first, make_scratch() as second:
        assert first.is_dir() and second.is_dir() and not old.exists()
    assert os.listdir(tmp_path) == ["mine"]


# --- training ---------------------------------------------------------------------------------------------------------


def break_saving(monkeypatch, fails) -> None:
    """The nth save raises WriteError where `fails(n)`."""
    save, count = saving.save_checkpoint, iter(range(1000))

    def broken(path, checkpoint):
        if fails(next(count)):
            raise WriteError(f"{path} cannot be written (No space left on device): make room")
        save(path, checkpoint)

    monkeypatch.setattr(saving, "save_checkpoint", broken)
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.01)


def test_a_save_that_fails_on_the_way_warns_and_training_goes_on(tmp_path, monkeypatch):
    good(*TRAIN, "--out", tmp_path / "whole")
    monkeypatch.setattr(saving.Saving, "is_due", lambda *_: True)
    break_saving(monkeypatch, lambda n: n < 8)
    said = good(*TRAIN, "--out", tmp_path / "full").stderr
    assert said.count("training goes on") == 8 and "step 3 is not saved" in said
    whole, full = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "full"))
    assert whole.keys() == full.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(full[name], value, err_msg=name)


def test_the_last_save_is_tried_again(tmp_path, monkeypatch):
    break_saving(monkeypatch, lambda n: n < 3)
    said = good(*TRAIN, "--out", tmp_path / "a").stderr
    assert said.count("trying for 60 s") == 1
    assert load_file(tmp_path / "a" / "model.safetensors")["history.loss"].size == 8


def test_the_last_save_that_never_works_is_an_error(tmp_path, monkeypatch):
    break_saving(monkeypatch, lambda n: True)
    monkeypatch.setattr(saving, "LAST_SECONDS", 0.1)
    result = call(*TRAIN, "--out", tmp_path)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}/model.safetensors cannot be written")


@pytest.mark.parametrize("command", ["train", "study"])
def test_space_is_checked_before_data_are_read(tmp_path, monkeypatch, command):
    (tmp_path / "text.txt").write_text("no text to train on")
    for module in (resume, training):
        monkeypatch.setattr(module, "check_space", lambda path, size: check_space(path, 2**60))
    monkeypatch.setattr("qtx.jobs.study.check_space", lambda path, size: check_space(path, 2**60))
    result = call(command, "--backend", "ref", "--data", tmp_path / "text.txt", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "MiB, and its disk has" in result.output
    assert os.listdir(tmp_path) == ["text.txt"]
