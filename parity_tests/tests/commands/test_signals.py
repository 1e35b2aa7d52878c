"""SIGTERM is to every command what Ctrl-C is, also while it is imported; and a worker dies with who started it."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import qtx.cost.worker
from parity_tests.tests.files.test_writing import RUN, wait_for
from parity_tests.tests.shell import STUDY, TRAIN, call, good
from qtx import signals
from qtx.files.locks import SCRATCH, make_scratch
from qtx.jobs import analyze, cost, finetune, ptq
from qtx_ref.backend import Trainer

ROOT = Path(qtx.cost.worker.__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("command", [TRAIN, STUDY], ids=["train", "study"])
def test_training_saves_and_ends(tmp_path, monkeypatch, command, number):
    step = Trainer.step

    def stopped(self, batch, **rows):
        if self.adam.count == 2:
            os.kill(os.getpid(), number)
        return step(self, batch, **rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        result = call(*command, "--out", tmp_path)
    assert result.exit_code == STATUS[number] and "stopped at step 3" in result.stderr
    (path,) = tmp_path.rglob("model.safetensors")
    assert load_file(path)["history.loss"].shape == (3,)
    assert {*os.listdir(path.parent)} - {"run.toml"} == {"log.jsonl", "model.safetensors"}
    assert [json.loads(line)["step"] for line in (path.parent / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        (finetune, "open_origin", ["finetune", "nowhere", "--data", "digits"]),
        (ptq, "open_checkpoint", ["ptq", "nowhere"]),
        (analyze, "open_checkpoint", ["analyze", "nowhere"]),
        (cost, "open_given", ["cost", "nowhere", "--backend", "ref", "--engines", "none"]),
    ],
    ids=["finetune", "ptq", "analyze", "cost"],
)
def test_long_commands_end(tmp_path, monkeypatch, module, name, arguments, number):
    if module is analyze:
        pytest.importorskip("matplotlib", reason="the extra report is not installed")

    def work(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(module, name, work)
    result = call(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == STATUS[number] and "stopped" in result.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("name", ["numpy", "qtx.jobs.study"])
def test_a_signal_during_imports(tmp_path, number, name):
    """No traceback, wherever in the imports it comes."""
    code = f"""
import builtins, os, sys
sys.argv = ["qtx", "train", "--backend", "ref", "--out", {str(tmp_path / "out")!r}]
load = builtins.__import__
def stopped(name, *rest, **more):
    module = load(name, *rest, **more)
    if {name!r} in sys.modules and "sent" not in globals():
        globals()["sent"] = True
        os.kill(os.getpid(), {int(number)})
    return module
from qtx.__main__ import main
builtins.__import__ = stopped
main()
"""
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = subprocess.run(
        [sys.executable, "-c", listening + code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == STATUS[number] and done.stderr == "\nstopped\n"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_waits_for_what_a_command_imports(tmp_path, monkeypatch, number):
    """A module that is compiled may abort where Python raises in the midst of it."""
    (tmp_path / "sends.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    imported = []

    def work(*_):
        imported.append(importlib.import_module("sends").whole)
        time.sleep(60)

    monkeypatch.setattr(ptq, "open_checkpoint", work)
    monkeypatch.delitem(sys.modules, "sends", raising=False)
    result = call("ptq", "nowhere", "--out", tmp_path / "out")
    assert result.exit_code == STATUS[number] and "stopped" in result.stderr
    assert imported == [True]


def test_a_second_signal_during_an_import_is_told_once(tmp_path, monkeypatch, capsys):
    """It comes again until the import has ended, and is the first no less for that."""
    twice = "for number in (signal.SIGINT, signal.SIGTERM):\n    os.kill(os.getpid(), number)\n"
    (tmp_path / "sends_two.py").write_text(f"import os, signal, time\n{twice}time.sleep({3 * signals.AGAIN})\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sends_two", raising=False)
    with pytest.raises(signals.Terminated), signals.postpone() as stop:
        importlib.import_module("sends_two")
        time.sleep(60)
    assert "sends_two" in sys.modules and stop.number == signal.SIGINT
    assert capsys.readouterr().err == "\nstopping after this step\n"


def test_python_m_qtx():
    done = subprocess.run([*RUN, "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qtx, version ")


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("cost")
    good(*TRAIN[:-1], 1, "--out", out)
    return out / "model.safetensors"


def test_the_worker_of_a_killed_cost_dies_and_its_files_go(checkpoint, tmp_path, monkeypatch):
    command = [*RUN, "cost", str(checkpoint), "--backend", "ref", "--rounds", "1000000", "--batch", "1"]
    process = subprocess.Popen(command, env=ENVIRONMENT | {"TMPDIR": str(tmp_path)}, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's list of a process's children")
    wait_for(lambda: children.read_text().split())
    (child,) = children.read_text().split()
    process.kill()
    process.wait()
    wait_for(lambda: not is_alive(child))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(SCRATCH)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with make_scratch():
        assert not left.exists()
    assert not os.listdir(tmp_path)


def is_alive(process: str) -> bool:
    """Not where it has ended and nobody has asked how."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_worker_ends_with_its_input(checkpoint):
    """Where the system does not end it with its parent."""
    code = "from qtx.cost import worker; worker.TASKS['wait'] = lambda task, tell: __import__('time').sleep(60); "
    code += "import ctypes; ctypes.CDLL = None; worker.sys.platform = 'other'; worker.main()"
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, stdin=subprocess.PIPE, text=True)
    process.stdin.write('{"task": "wait"}\n')
    process.stdin.close()
    assert process.wait(timeout=30) == 1
