"""Each script of `examples/` runs as a program of its own and prints what it says; warnings are errors there too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtx_ref

ROOT = Path(qtx_ref.__file__).parent.parent
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
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(EXAMPLES[name], done.stdout)
    assert list(tmp_path.iterdir()) == []
