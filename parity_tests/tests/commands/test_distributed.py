"""Several processes: a slice of `python -m parity_tests.long.distributed`, one that is killed, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from click.testing import CliRunner

from parity_tests.long import distributed as proof
from parity_tests.long.kill_test import LOST, SECONDS, find_port
from qtx.cli import main
from qtx.engines.machine import Machine
from qtx.jobs.run import TrainSpec
from qtx.jobs.training import train
from qtx_ref import presets
from qtx_ref.spec import OptimSpec, SpecError, StepSpec, read_processes
from qtx_torch import distributed

ROOT = Path(__file__).parents[3]
TRAIN = ("train", "--model", "vit-tiny", "--batch", "8", "--set", "saving.seconds=0")


def start(rank: int, port: int, *command: str) -> subprocess.Popen:
    """One of two processes of qtx."""
    own = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "qtx", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_are_one():
    """DDP and FSDP2, with dropout, a batch in parts and unequal numbers of targets; and a range per tensor."""
    for name, verdicts, _ in proof.check((2,), 3, (0, 8)):
        assert not [verdict for verdict in verdicts if not verdict.ok], name
        assert len(verdicts) >= 6, name


def test_a_process_with_other_gradients_is_seen(monkeypatch):
    """Planted: one more percent of a gradient, and a process that differs."""
    subject = proof.SUBJECTS[0]
    trainer = subject.build()
    results = proof.train(subject, proof.Sharding.NONE, 0, 1, 2)
    results["losses"] = results["losses"].copy()
    assert not [verdict for verdict in proof.compare(subject, 2, {"it": results}) if not verdict.ok]
    name = next(iter(trainer.model.weights))
    wrong = results | {f"grad.{name}": results[f"grad.{name}"] * 1.01, "differ": results["differ"] + 1}
    faults = [verdict.what for verdict in proof.compare(subject, 2, {"it": wrong}) if not verdict.ok]
    assert faults == [f"it: gradient of {name}", "it: all processes have the same"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_where_one_is_killed_the_other_says_so_and_ends_and_the_run_goes_on(tmp_path):
    """With shares of the state. The other says one line; then one process goes on with what two left."""
    port, out = find_port(), tmp_path / "run"
    command = (*TRAIN, "--steps", "400", "--set", "step.sharding=full", "--out", str(out))
    first, second = (start(rank, port, *command) for rank in range(2))
    log = out / "log.jsonl"
    try:
        until = time.monotonic() + 400
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert first.poll() is None and second.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        _, said = first.communicate(timeout=SECONDS)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 1 and said.splitlines()[-1].startswith("Error: process 0 of 2") and LOST in said
    assert second.communicate()[0] == ""  # only the first one speaks
    (folder,) = out.glob("*.shares")
    step = int(folder.name.partition("-")[2].partition(".")[0])
    stop = ("--set", f"stop={step + 1}", "--resume", "--move")
    done = CliRunner().invoke(main, [*command, *stop], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "log.jsonl", "run.toml"}
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [*range(1, len(steps) + 1)] and step <= len(steps) <= step + 1


def test_a_process_that_falls_silent_is_missed(monkeypatch):
    """As where its machine is gone, or it hangs: nothing closes a connection."""
    port, lines = find_port(), []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    pulses = [distributed.Pulse(rank, 2, beat=0.05, lost=0.5, end=lines.append) for rank in range(2)]
    time.sleep(1)
    assert lines == []
    pulses[1].stop()
    pulses[0].thread.join(30)
    assert lines == [distributed.say_lost(0, 2)] and LOST in lines[0]
    del store


@pytest.mark.parametrize(("rank", "count"), [("2", "2"), ("x", "2"), ("-1", "1")])
def test_no_such_process(monkeypatch, rank, count):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    with pytest.raises(SpecError, match=f"RANK of WORLD_SIZE is '{rank} of {count}'"):
        read_processes()


def test_parts_are_refused_before_a_step_and_by_all_processes(tmp_path, monkeypatch):
    """9 rows in 2 processes are 4 and 5: both say the same of 4, and nothing is left behind."""
    monkeypatch.setattr(Machine, "join", lambda self: pytest.fail("the processes have met"))
    run = TrainSpec(presets.preset("vit-tiny"), OptimSpec(), 9, 0, step=StepSpec(accumulate=3))
    for rank in range(2):
        monkeypatch.setattr(Machine, "processes", (rank, 2))
        with pytest.raises(SpecError, match="step accumulate is 3: a batch of 4 rows"):
            train(run, None, tmp_path / "run" / "model.safetensors", Machine())
    assert not [*tmp_path.iterdir()]


def test_one_process_of_several_computes_nothing_that_is_not_shared(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("qtx.cli.give_way", lambda seconds: None)
    with pytest.raises(SpecError, match="torchrun started 2 processes: the reference trains in one"):
        Machine("ref").check()
    done = CliRunner().invoke(main, ["study"])
    assert done.exit_code == 1 and "torchrun started 2 processes, and only qtx train divides its work" in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("wrong", [("--stepz", "3"), ("--steps", "0")], ids=" ".join)
def test_an_error_that_all_have_is_said_once(monkeypatch, wrong):
    """A process gives way to the first one, and goes without a word where that one, which says it, has ended."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    waited = []
    monkeypatch.setattr("qtx.cli.give_way", waited.append)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        done = CliRunner().invoke(main, ["train", *wrong])
        assert done.exit_code in (1, 2) and "Error: " in done.output and len(waited) == rank
    code = "import os, threading; from qtx.signals import give_way; pid = os.getpid();"
    code += "threading.Timer(0.2, os.kill, (pid, 15)).start(); give_way(30)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 143 and done.stderr == b""
