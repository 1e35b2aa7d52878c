"""What a GPU is asked to show is one script; here it runs on the CPU, small, so that it is known to work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SMALL = {"device": "cpu", "model": "bert-tiny", "batch": 2, "length": 16, "rounds": 1, "only": "random"}


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


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
        assert pair["ratio"] > 0 and pair["peak_bytes"] == [None, None] and name in done.stdout
    assert found["parity"]["ok"] and "parity on cpu: 2 cases, 0 failed" in done.stdout


def test_the_gpu_script_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--out", tmp_path / "found.json")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr
    assert not (tmp_path / "found.json").exists()
