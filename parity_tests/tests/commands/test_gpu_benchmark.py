"""What a GPU is asked to show is one script; here it runs on the CPU, small, so that it is known to work."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
SMALL = {"device": "cpu", "model": "bert-tiny", "batch": 2, "length": 16, "rounds": 1, "only": "random"}


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "found.json"
    pairs = ("no dropout", "dropout 0.1", "w8a8")
    options = [*SMALL.items(), ("out", out), *(("pair", pair) for pair in pairs)]
    done = run(*(word for name, value in options for word in (f"--{name}", value)))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert tuple(found["steps"]) == pairs
    for name, pair in found["steps"].items():
        assert pair["ratio"] > 0 and pair["notes"].startswith("logits within") and name in done.stdout
    assert found["parity"]["ok"] and "parity on cpu: 2 cases, 0 failed" in done.stdout
    assert found["missing"] == found["failed"] == [] and found["machine"]["packages"]["torch"] in done.stdout
    assert done.stdout.index("parity on") < done.stdout.index("no dropout")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu")


def test_a_part_that_fails_or_does_not_fit_is_noted_and_the_others_are_done(gpu: ModuleType, tmp_path: Path) -> None:
    out, begun = tmp_path / "found.json", []

    def fail() -> bool:
        assert json.loads(out.read_text())["missing"] == ["good", "bad", "wrong", "late"][len(begun) :]
        begun.append(1)
        raise SystemExit("logits differ")

    def wait() -> bool:
        begun.append(1)
        parts.end = time.monotonic() + 0.5 * parts.longest  # half the time of the one that took longest is left
        return False

    parts = gpu.Parts(out, {"steps": {}}, 60)
    parts.take({"good": lambda: not begun.append(1), "bad": fail, "wrong": wait, "late": lambda: 1 / 0})
    found = json.loads(out.read_text())
    assert found["failed"] == ["bad", "wrong"] and found["missing"] == ["late"]
    assert found["errors"] == {"bad": "SystemExit: logits differ"}


def test_what_hangs_is_cut_off(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, over = tmp_path / "found.json", threading.Event()
    monkeypatch.setattr(gpu.os, "_exit", lambda status: over.set())
    gpu.Parts(out, {}, 0.2).take({"done": lambda: True, "hangs": lambda: over.wait(60), "later": lambda: True})
    assert over.is_set()


def test_the_gpu_script_without_a_gpu_is_one_line(gpu: ModuleType, tmp_path: Path) -> None:
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="^device is 'cuda' but torch finds no CUDA device; use --device cpu$"):
        gpu.main(["--out", str(tmp_path / "found.json")], standalone_mode=False)
    assert not (tmp_path / "found.json").exists()
