"""Each script of `examples/` runs as a program of its own and prints what it says; warnings are errors there too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtx_ref
from parity_tests.tests.shell import good

ROOT = Path(qtx_ref.__file__).parent.parent
KEPT = ROOT / "parity_tests" / "fixtures" / "v0.1"
EXAMPLES = {  # what each prints at least
    "audit_one_layer": r"3072 of 3072 codes are equal",
    "train_with_clipped_softmax": r"(?s)vanilla +\d+\.\d\d .*clipped:gamma=-0.03 +\d+\.\d\d ",
    "own_attention": r"SigmoidAttention: loss 7\.\d+ to 6\.\d+ in 15 steps",
    "calibrate_and_quantize": r"(?s)fake quantization: perplexity \d.*integers: perplexity \d",
    "parity_of_a_checkpoint": r"the backends agree",
}
NEEDS = {"audit_one_layer": "onnxruntime", "parity_of_a_checkpoint": "torch"}


def test_each_script_is_tried() -> None:
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(EXAMPLES[name], done.stdout)
    assert list(tmp_path.iterdir()) == []


def run_parity(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "parity_of_a_checkpoint.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["rotated.safetensors", "opt.qtx"])
def test_parity_of_a_file_has_the_rows_of_the_command(name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    path, text = KEPT / name, KEPT / "words.txt"
    done = run_parity(path, text)
    assert done.returncode == 0, done.stderr
    rows = json.loads(good("parity", path, "--data", text, "--json", "-").stdout)["rows"]
    assert [line.split()[:2] for line in done.stdout.splitlines()[:-1]] == [
        ["ok", f"{row['group']}/{row['name'].split()[0]}"] for row in rows
    ]
    worst = {f"{v['error']:.4g}" for row in rows for v in row["verdicts"]}
    assert {line.rpartition(" of ")[0].split()[-1] for line in done.stdout.splitlines()[:-1]} <= worst


def test_parity_of_a_missing_file_is_one_line() -> None:
    pytest.importorskip("torch")
    done = run_parity("missing.safetensors")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "missing.safetensors" in done.stderr
