"""`qtx cost` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.tests.shell import call
from qtx.cost import compare as cost
from qtx.cost import inputs as cost_inputs
from qtx.engines.machine import Machine
from qtx.files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qtx.jobs.cost import Given, make_variants
from qtx.prepare.prepare import prepare
from qtx.recipes.named import recipe, resolve
from qtx.report import costs
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset

ROOT = Path(cost.__file__).parents[2]


def ran(*arguments: object) -> str:
    """What a command prints, or the line in which it fails."""
    done = call(*arguments)
    assert done.exit_code == 0 or done.output.count("Error: ") == 1, done.output
    return done.output


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("cost") / "model.safetensors"
    spec = replace(preset("opt-tiny"), layers=1, width=16, heads=2, hidden=16, length=16)
    save_checkpoint(path, Checkpoint(spec, init_params(spec, 0)))
    return path


def test_whole_command(checkpoint, tmp_path):
    """On the reference: every variant compared, timed and written, and never over what is there."""
    out = tmp_path / "out"
    command = (
        "cost",
        checkpoint,
        "--backend",
        "ref",
        "--batch",
        "1,2",
        "--length",
        "8",
        "--rounds",
        "3",
        "--threads",
        "1",
    )
    text = ran(*command, "--out", out)
    got = json.loads((out / "cost.json").read_text())
    assert [v["name"] for v in got["variants"]] == ["float32", "fake quantization", "integers"]
    assert "random inputs and calibration" in text and got["threads"] == 1 and got["recipe"] == "w8a8"
    for variant in got["variants"]:
        assert variant["finding"] is None and variant["bytes"] > 0
        for cell in ("1x8", "2x8"):
            measured = variant["cells"][cell]
            assert len(measured["seconds"]) == 3 and measured["median"] == np.median(measured["seconds"])
            assert (measured["error"] == 0) == (variant["name"] == "float32") and measured["error"] < 0.2
            assert isinstance(measured["memory"], int)
        assert "agreement" not in variant["cells"]["1x8"]  # a share of one sequence says little
        last = variant["cells"]["2x8"]
        assert last["compared"] == 256 and 0 <= last["agreement"] <= 1
        assert f"{100 * last['agreement']:.1f}% of 256 seq" in text
    fake, integers = got["variants"][1:]
    quants = resolve(recipe("w8a8", preset("opt-tiny")), replace(preset("opt-tiny"), layers=1))
    assert fake["profile"]["quantizers"] == len(quants)
    assert integers["profile"]["kernels"] == {"float32 blocks (NumPy)": 4 + 2 + 2 + 1}
    assert integers["bytes"] < fake["bytes"] and costs.describe_costs(got) in text
    assert (out / "cost.txt").read_text().strip() in text
    assert "exists: choose another --out" in ran(*command, "--out", out)


def test_compiled_integers_are_measured_beside_the_others(checkpoint, tmp_path):
    """What is measured of one variant is no other's: `probe` and `measure` write into each one's own."""
    given = Given(None, load_checkpoint(checkpoint), None, None, "no data", "w8a8", None, compiled=True)
    variants, _ = make_variants(cost.Workers("torch", "cpu", 1), tmp_path, given, cost_inputs.Random(8))
    assert [v.kind for v in variants] == ["float32", "bfloat16", "fake", "integer", "integer-compiled"]
    assert variants[3].file == variants[4].file
    for i, variant in enumerate(variants):
        variant.cells["1x8"] = {"median": i}
        variant.profile["matmuls"] = i
    assert [(v.cells["1x8"]["median"], v.profile["matmuls"]) for v in variants] == [(i, i) for i in range(5)]


def test_what_could_not_be_compiled_is_not_timed_as_compiled(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = ("--batch", 1, "--length", 8, "--rounds", 1, "--engines", "none")
    said = ran("cost", checkpoint, "--compiled", *options)
    assert "integers, compiled: not timed: SpecError: integers run without the compiled form: " in said
    assert sum(line.startswith("| integers ") for line in said.splitlines()) == 2  # times, and kernels
    assert "| integers, compiled" not in said


def test_transforms_are_part_of_what_runs(checkpoint, tmp_path):
    """Weights made for a rotation and run without it would be another model; integers have none, and say so."""
    command = (
        "cost",
        checkpoint,
        "--backend",
        "ref",
        "--batch",
        "1",
        "--length",
        "8",
        "--rounds",
        "1",
        "--threads",
        "1",
    )
    text = ran(*command, "--recipe", "w8a8-hadamard", "--json", tmp_path / "cost.json")
    fake = json.loads((tmp_path / "cost.json").read_text())["variants"][1]
    assert fake["name"] == "fake quantization" and 0 < fake["cells"]["1x8"]["error"] < 0.2, text
    assert "integers: not timed: site" in text and "a transform of its input is left" in text
    got = load_checkpoint(checkpoint)
    chosen = recipe("w8a8-hadamard", got.spec)
    random = cost_inputs.Random(8)
    made = prepare(Machine("ref"), got.spec, got.params, lambda n: random.split_batches("", got.spec, 2, 0), chosen)
    own = tmp_path / "own.safetensors"
    save_checkpoint(own, Checkpoint(got.spec, made.params, {}, chosen, made.ranges, transforms=made.transforms))
    text = ran("cost", own, *command[2:])
    assert "is made for the transforms of w8a8-hadamard" in text and "--recipe w8a8-hadamard" in text


def test_attentions(tmp_path):
    text = ran(
        "cost",
        "--model",
        "vit-tiny",
        "--backend",
        "ref",
        "--attention",
        "clipped,mlp",
        "--training",
        "--batch",
        "1",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--json",
        tmp_path / "a.json",
    )
    rows = json.loads((tmp_path / "a.json").read_text())["attentions"]
    assert [row["attention"] for row in rows] == ["vanilla", "clipped", "mlp"]
    assert [row["parameters"] for row in rows] == [0, 0, 4 * 4 * (4 * 17 + 5)]  # 4 layers, 4 heads of 16, 4 hidden
    assert rows[0]["forward_ratio"] == rows[0]["step_ratio"] == 1 and all(row["step"] > 0 for row in rows)
    assert f"+{4 * 4 * (4 * 17 + 5)}" in text and not rows[0]["fused"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a checkpoint or --model"),
        (["--model", "bert-tiny", "--length", "500"], "--length 500"),
        (["--model", "bert-tiny", "--data", "books"], "random inputs; leave it out"),
        (["--model", "bert-tiny", "--training"], "--training belongs to --attention"),
        (["--model", "bert-tiny", "--attention", "vanilla", "--recipe", "w8a8"], "does not belong to --attention"),
        (["--model", "bert-tiny", "--attention", "nosuch"], "nosuch"),
        (["--model", "opt-tiny", "--attention", "head_conditional"], "causal"),
        (["--model", "bert-tiny", "--backend", "ref", "--engines", "onnxruntime"], "beside --backend torch"),
        (["--model", "bert-tiny", "--batch", "0"], "'0' is no comma list"),
        (["--model", "bert-tiny", "--backend", "ref", "--profile", "nosuch", "--engines", "none"], "nosuch"),
        (["missing.safetensors"], "no such checkpoint"),
    ],
)
def test_refusals(arguments, said):
    text = ran("cost", *arguments)
    assert said in text and "Error: " in text


def test_ctrl_c_ends_all_processes(checkpoint):
    """Also those that were started."""
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's & turns it off
    command = [
        sys.executable,
        "-c",
        f"{listening}; from qtx.cli import main; main()",
        "cost",
        str(checkpoint),
        "--backend",
        "ref",
        "--rounds",
        "1000000",
        "--batch",
        "1",
        "--length",
        "8",
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's list of a process's children")
    for _ in range(600):
        if got := children.read_text().split():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    try:
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped" in text and "Traceback" not in text
    assert got and not any(Path(f"/proc/{child}").exists() for child in got)


def test_the_worker_loads_no_torch_for_the_reference_and_onnx():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, qtx.cost.worker; print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
