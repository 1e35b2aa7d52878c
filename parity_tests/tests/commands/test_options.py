"""What can be told from a command's options alone is refused before data are read, in a line, and leaves nothing
behind."""

import os

import pytest

from parity_tests.tests.shell import TRAIN, call, good
from qtx.jobs import finetune, opening
from qtx_ref.spec import SpecError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("options")
    good(*TRAIN[:-1], 1, "--out", out)
    return out / "model.safetensors"


@pytest.fixture
def unread(monkeypatch):
    """Data that must not be read."""

    def fail(*_, **__):
        raise AssertionError("data were read")

    for module in (finetune, opening):
        monkeypatch.setattr(module, "load", fail)


def refuse(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1, result.output
    return result.output


COMMANDS = {
    "train": ["train", "--model", "vit-tiny"],
    "init": ["train", "--init", "CHECKPOINT"],
    "study": ["study", "--model", "vit-tiny"],
    "finetune": ["finetune", "CHECKPOINT", "--data", "digits"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:99"], "device is 'cuda:99' but torch finds"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--backend", "ref", "--device", "cuda"], "the reference runs on cpu"),
        (["--dtype", "float8"], "dtype is 'float8'"),
        (["--lr", "1e-400"], "--lr 1e-400: learning rate is 0: give a finite number"),
        (["--lr", "1e-40"], "--lr 1e-40: learning rate is 1e-40"),
        (["--lr", "0"], "--lr 0: learning rate is 0"),
        (["--lr", "-1"], "--lr -1: learning rate is -1"),
        (["--lr", "nan"], "--lr nan: learning rate is nan"),
        (["--lr", "inf"], "--lr inf: learning rate is inf"),
        (["--lr", "1e400"], "--lr 1e400: learning rate is inf"),
        (["--lr", "fast"], "--lr 'fast' is no number"),
        (["--out", ""], "--out is '': name a place to write"),
        (["--out", " "], "--out is '': name a place to write"),
        (["--out", "there"], "go on with --resume, or choose another --out"),
        (["--out", "file"], "file cannot be written"),
        (["--out", "file/out"], "file/out cannot be written"),
        (["--json", ""], "Error: --json"),
        (["--json", "file/a.json"], "file/a.json cannot be written"),
        (["--json", "."], "Error: --json"),
    ],
)
def test_options_are_checked_before_data_are_read(checkpoint, tmp_path, monkeypatch, unread, command, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / ("study.json" if command == "study" else "model.safetensors")).write_text("mine")
    arguments = [str(checkpoint) if part == "CHECKPOINT" else part for part in COMMANDS[command]]
    said = refuse(*arguments, "--out", "out", *options)  # of two --out, the last counts
    assert message in said
    assert sorted(os.listdir(tmp_path)) == ["file", "there"] and (tmp_path / "file").read_text() == "mine"
    assert len(os.listdir(tmp_path / "there")) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_permission(checkpoint, tmp_path, unread, command):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    arguments = [str(checkpoint) if part == "CHECKPOINT" else part for part in COMMANDS[command]]
    assert "cannot be written (Permission denied)" in refuse(*arguments, "--out", closed / "out")


@pytest.mark.parametrize("command", ["train", "study"])
def test_recipes_are_checked_before_data_are_read(tmp_path, unread, command):
    said = refuse(command, "--backend", "ref", "--train-quant", "w1a8", "--out", tmp_path / "out")
    assert "bits is 1" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float64"], "machine.dtype was 'float32' and is 'float64'"),
        (["--backend", "torch"], "machine.backend was 'ref' and is 'torch'"),
    ],
)
def test_a_run_of_another_machine_is_refused_before_data_are_read(checkpoint, unread, options, message):
    assert message in refuse(*TRAIN[:-1], 1, "--out", checkpoint.parent, "--resume", *options)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ptq", "nowhere"],
        ["analyze", "nowhere"],
        ["cost", "nowhere"],
        ["quantize", "nowhere"],
        ["vectors", "nowhere.qtx"],
        ["export", "nowhere"],
        ["import", "nowhere"],
    ],
)
def test_an_empty_name_is_no_place_to_write(arguments):
    assert "--out is '': name a place to write" in refuse(*arguments, "--out", "")


def test_a_rate_that_trains_nothing_is_refused_in_python():
    from qtx.jobs.training import default_optim
    from qtx_ref.presets import preset

    for rate in (0.0, 1e-40, -1.0, float("nan"), float("inf")):
        with pytest.raises(SpecError, match="learning rate is"):
            default_optim(preset("vit-tiny"), 10, rate)
    assert default_optim(preset("vit-tiny"), 10, 1e-30).lr == 1e-30
