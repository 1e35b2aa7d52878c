"""`qtx cost`: what is compared before it is timed, counts, engines, findings. No absolute time."""

from __future__ import annotations

import importlib
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
from click.testing import CliRunner

from parity_tests.small_models import build
from qtx import attention_cost, cost, cost_inputs
from qtx.artifact import make_artifact
from qtx.backend import MissingExtra, backend
from qtx.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qtx.cli import main
from qtx.quantization import prepare
from qtx.recipes import recipe, resolve
from qtx.report import costs
from qtx.training import Machine
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import QTX, Nonlinear, SpecError

ROOT = Path(cost.__file__).parent.parent
POPEN = subprocess.Popen
EXPORTED = ("bert_gate_head_conditional", "opt_clipped_row", "vit_plain", "opt_plain")  # the last without a mask


def ran(*arguments: object) -> str:
    """What a command prints, or the line in which it fails."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0 or done.output.count("Error: ") == 1, done.output
    return done.output


# --- inputs -----------------------------------------------------------------------------------------------------------


class Texts:
    """Evaluation data of three texts, 3, 6 and 4 tokens of 6."""

    def split_batches(self, split, spec, batch_size, seed, limit=None):
        sizes = np.array([3, 6, 4])
        mask = np.arange(6) < sizes[:, None]
        tokens = np.where(mask, np.arange(1, 4)[:, None] * 10 + np.arange(6), 0)
        yield {"tokens": tokens, "mask": mask, "types": 0 * tokens, "labels": sizes}


@pytest.mark.parametrize(
    ("size", "length", "real", "first"),
    [(2, 4, True, [20, 21, 22, 23]), (3, 6, True, [20, 21, 22, 23, 24, 25]), (1, 7, False, None), (4, 4, False, None)],
)
def test_inputs_are_the_datas_or_random(size, length, real, first):
    spec = build("bert_plain").spec
    cell = cost_inputs.make_cell(spec, Texts(), size, length)
    assert (cell.real, cell.name, cell.inputs["tokens"].shape) == (real, f"{size}x{length}", (size, length))
    assert set(cell.inputs) == {"tokens", "mask", "types"}
    assert cell.padded == (real and size == 3)
    if real:
        assert cell.inputs["tokens"][0].tolist() == first
        assert cell.inputs["tokens"][1, :4].tolist() == [30, 31, 32, 33] if size == 2 else True


def test_lengths():
    bert, vit = preset("bert-tiny"), preset("vit-tiny")
    assert cost_inputs.lengths_of(bert, None) == (64, 128) and cost_inputs.lengths_of(vit, None) == (17,)
    assert cost_inputs.lengths_of(replace(bert, length=100), None) == (64,)
    assert cost_inputs.lengths_of(replace(bert, length=20), None) == (20,)
    for spec, wanted in ((bert, (64, 129)), (vit, (16,))):
        with pytest.raises(SpecError, match=f"--length {'129' if spec is bert else '16'}"):
            cost_inputs.lengths_of(spec, wanted)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_summary():
    seconds, base = [0.4, 0.1, 0.3, 0.2, 0.5], [0.2, 0.1, 0.1, 0.1, 0.1]
    found = cost.summary(seconds, base, 8, 512)
    assert found["median"] == 0.3 and found["p95"] == pytest.approx(0.48, rel=1e-12)  # 0.4 + 0.8 (0.5 - 0.4)
    assert found["ratio"] == pytest.approx(2.0, rel=1e-12)  # of 2, 1, 3, 2, 5
    assert found["sequences_per_s"] == pytest.approx(8 / 0.3) and found["tokens_per_s"] == pytest.approx(512 / 0.3)


def test_compare():
    truth = np.array([[[3.0, 4.0], [9.0, 9.0]], [[0.0, 5.0], [1.0, 0.0]]])
    mask = np.array([[True, False], [True, False]])
    output = truth.copy()
    output[0, 1] = 100  # padding
    assert cost.compare(output, truth, mask, True) == {"error": 0.0, "agreement": 1.0}
    output[0, 0] = [4.0, 3.0]  # off by (1, -1) of (3, 4), (0, 5)
    found = cost.compare(output, truth, mask, True)
    assert found["error"] == pytest.approx(np.sqrt(2 / 50), rel=1e-12) and found["agreement"] == 0.5
    assert cost.compare(output, truth, mask, False)["agreement"] is None


def test_faults():
    truth = np.ones((2, 3))
    assert cost.fault(truth, truth) is None
    assert "shape (2, 2)" in cost.fault(truth[:, :2], truth)
    assert "NaN" in cost.fault(np.full((2, 3), np.inf), truth)


def test_added_parameters():
    """Against the paper's formulas (Bondarenko et al. 2023, table of gates), by hand for bert-base: H 12, K 64, D 768."""
    spec = preset("bert-base")
    by_hand = {"vanilla": 0, "clipped": 0, "head": 12, "gated": 12 * 65, "mlp": 12 * (16 * 65 + 17),
               "all_features": 12 * 769, "elementwise": 768 * 768, "sink": 12}  # fmt: skip
    total = sum(value.size for value in backend("ref").Model(*first(preset("bert-tiny"))).params().values())
    assert attention_cost.parameters(preset("bert-tiny")) == total
    # 30522 + 512 + 2 rows of 768, their norm; 12 layers; the head's transform, norm and bias
    layer = 4 * (768**2 + 768) + 2 * 2 * 768 + 2 * 768 * 3072 + 3072 + 768
    whole = 31036 * 768 + 1536 + 12 * layer + 768**2 + 768 + 1536 + 30522
    for name, per_layer in by_hand.items():
        assert attention_cost.added_parameters(spec, name) == (12 * per_layer, 100 * 12 * per_layer / whole), name


def first(spec):
    return spec, init_params(spec, 0)


# --- where the time goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ref", "torch"])
def test_products_and_quantizers_are_all_that_run(name):
    """Counted by hand: BERT of 2 layers with a linear gate and an MLM head."""
    model, module = build("bert_gate_linear"), backend(name)
    profiling = importlib.import_module(f"qtx_{name}.profiling")
    chosen = recipe("w8a8", model.spec)
    quants = resolve(chosen, model.spec)
    float_model = module.Model(model.spec, model.params)
    ranges = float_model.calibrate([model.batch], quants)
    float_model.bind(quants, ranges)
    timed, seconds = profiling.quantizers(float_model, model.batch)
    assert sorted(site for site, _ in timed) == sorted(quants) and 0 < sum(taken for _, taken in timed) <= seconds
    found = Checkpoint(model.spec, model.params)
    made = make_artifact(Path(__file__), found, chosen, ranges, QTX, Nonlinear.TABLE, [])
    integers = module.IntegerModel(model.spec, made.constants, made.quants, made.profile)
    products, seconds = profiling.products(integers, model.batch)
    assert len(products) == 2 * (6 + 1 + 2) + 2  # query to output, FFN; gate; scores and context; head
    assert 0 < sum(taken for *_, taken in products) <= seconds
    kernels = {kernel for _, kernel, _ in products}
    if name == "ref":
        assert kernels == {"float32 blocks (NumPy)"}
    else:
        byte = importlib.import_module("qtx_torch.integer").byte_instructions("cpu")
        assert kernels == ({"torch._int_mm", "float32 blocks (torch)"} if byte else {"float32 blocks (torch)"})


def test_the_kernel_named_is_the_one_that_runs(monkeypatch):
    torch = pytest.importorskip("torch", reason="the torch backend needs the extra torch")
    integer = importlib.import_module("qtx_torch.integer")
    spec = importlib.import_module("qtx_ref.spec").QuantSpec(bits=8, symmetric=True)
    calls = []
    monkeypatch.setattr(
        integer, "byte_product", lambda a, b, wide: calls.append(a.dtype) or (a.int() @ b.int()).to(wide)
    )
    a, b = torch.ones(4, 8, dtype=torch.int8), torch.ones(8, 4, dtype=torch.int8)
    for fast in (True, False):
        monkeypatch.setattr(integer, "byte_instructions", lambda device, fast=fast: fast)
        assert integer.carrier(a, b, spec, spec) == (torch.int8 if fast else torch.float32)
        assert (integer.matmul(a, b, spec, spec) == 8).all() and len(calls) == 1


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request, tmp_path_factory):
    """A small model as an ONNX file, with a mask where there is one."""
    for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra engines")
    model = build(request.param)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    masked = "mask" in model.batch and request.param != "opt_plain"
    importlib.import_module("qtx_torch.engines").export_onnx(model.spec, model.params, path, masked=masked)
    return model, path


def test_onnx_export_is_our_model(exported):
    """At the size it was traced and at others, with padding before, behind and none; the tolerance is the issue's."""
    model, path = exported
    runner = importlib.import_module("qtx.onnx_engine").OnnxRunner(path, 1)
    ours = backend("torch").Model(model.spec, model.params)
    if "mask" not in runner.names and "mask" in model.batch:
        model.batch["mask"] = np.ones_like(model.batch["mask"])
    batches = [model.batch, {name: value[:1] for name, value in model.batch.items()}]
    if "mask" in runner.names:
        text = {name: model.batch[name] for name in ("tokens", "mask", "types") if name in model.batch}
        batches.append({name: value[:, :3] for name, value in text.items()})
        batches.append(text | {"mask": np.ones_like(text["mask"])})
        left = np.ones_like(text["mask"])
        left[1, :2] = False  # causal: the first queries of this row have no key
        batches.append(text | {"mask": left})
    for batch in batches:
        output, expected = runner(runner.inputs(batch)), ours.forward(batch)
        assert output.shape == expected.shape and np.abs(output - expected).max() < 1e-4
    moved = backend("torch").Model(model.spec, {name: value * 1.01 for name, value in model.params.items()})
    assert np.abs(runner(runner.inputs(model.batch)) - moved.forward(model.batch)).max() > 1e-4  # the planted fault


def test_onnxruntime_quantizes(exported, tmp_path):
    """Error of 8 bits, not of 32 and not of nothing."""
    model, path = exported
    if "mask" in model.batch:
        model.batch["mask"] = np.ones_like(model.batch["mask"])
    engine = importlib.import_module("qtx.onnx_engine")
    truth = backend("torch").Model(model.spec, model.params).forward(model.batch)
    batch = {name: model.batch[name] for name in cost_inputs.INPUTS if name in model.batch}
    for static in (False, True):
        engine.quantize(path, tmp_path / "int8.onnx", static, iter([batch]))
        runner = engine.OnnxRunner(tmp_path / "int8.onnx", 1)
        error = cost.compare(runner(runner.inputs(batch)), truth, batch.get("mask"), True)["error"]
        assert 1e-5 < error < 0.3, static
        ops, matmuls = engine.shares(tmp_path / "int8.onnx", 1, batch)
        assert 0 < matmuls < 1 and all(0 < share < 1 for share in ops.values())
        assert {p.name for p in tmp_path.iterdir()} == {"int8.onnx"}


def test_torch_dynamic_int8_is_torchs_own():
    """`quantize_dynamic` of nn.Linear with the same weights gives the same bits, and the float weights are gone."""
    torch = pytest.importorskip("torch", reason="the torch backend needs the extra torch")
    engines = importlib.import_module("qtx_torch.engines")
    model = build("bert_gate_linear")
    ours = backend("torch").Model(model.spec, model.params)
    nx = engines.DynamicInt8(ours)
    site, x = ours.net.layer[0].ffn.hidden, torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.Sequential(torch.nn.Linear(16, 24))
    with torch.no_grad():
        plain[0].weight.copy_(torch.tensor(model.params["layer.0.ffn.hidden.weight"]))
        plain[0].bias.copy_(torch.tensor(model.params["layer.0.ffn.hidden.bias"]))
    with pytest.warns():  # torch announces the end of its own quantization
        theirs = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, torch.qint8)
    assert torch.equal(nx.linear(site, x), theirs(x))
    assert site.weight.numel() == 0 and "layer.0.ffn.hidden.weight" not in ours.weights
    assert ours.weights["embed.token.weight"].numel() and "layer.0.attn.gate_logit" not in nx.packed
    runner, truth = engines.FloatRunner(ours, nx), backend("torch").Model(model.spec, model.params)
    output = runner.output(runner(runner.inputs(model.batch)))
    assert 1e-5 < cost.compare(output, truth.forward(model.batch), model.batch["mask"], True)["error"] < 0.3


def test_missing_engines(monkeypatch):
    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(MissingExtra, match=r"engine onnxruntime needs onnxruntime.*qtx\[engines\]"):
        cost.chosen_engines("onnxruntime", "torch", "cpu", notes.append)
    assert notes == []
    assert cost.chosen_engines("auto", "torch", "cpu", notes.append) == ("torch-dynamic",)
    assert len(notes) == 1 and "qtx[engines]" in notes[0]
    assert cost.chosen_engines("none", "torch", "cpu", notes.append) == ()
    assert cost.chosen_engines("auto", "ref", "cpu", notes.append) == ()
    for text, where, match in (("tvm", "torch", "--engines tvm"), ("torch-dynamic", "ref", "beside --backend torch")):
        with pytest.raises(SpecError, match=match):
            cost.chosen_engines(text, where, "cpu", notes.append)


# --- processes --------------------------------------------------------------------------------------------------------


def fake_worker(monkeypatch, code: str) -> cost.Workers:
    """Workers whose process runs `code`."""
    monkeypatch.setattr(cost.subprocess, "Popen", lambda command, **given: POPEN([sys.executable, "-c", code], **given))
    return cost.Workers("ref", "cpu", 1)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (signal 11)"),
        ("import sys; sys.exit('no such kernel')", "ended with status 1: no such kernel"),
        ('print(\'hello\\n{"error": "it said so"}\\n{"half\'); import sys; sys.exit(1)', "it said so"),
        ("import sys; sys.stdin.close(); import os; os._exit(3)", "ended with status 3"),
    ],
)
def test_a_crash_is_a_finding(monkeypatch, code, said):
    workers = fake_worker(monkeypatch, code)
    assert workers.run("probe") == {"error": said}
    monkeypatch.setattr(cost, "LIMIT", 0.05)
    assert fake_worker(monkeypatch, "import time; time.sleep(60)").run("probe") == {
        "error": "did not end within 0.05 s"
    }


def results(workers: cost.Workers, outputs: dict[str, np.ndarray | str]) -> None:
    """Makes `workers` give these outputs, or errors, by kind; prepared files are empty."""

    def run(task, bar=None, **fields):
        if task == "idle":
            return {"peak": 100}
        if task == "prepare":
            Path(fields["file"]).touch()
            return {}
        if task == "time":
            run.timed = fields
            return {"seconds": {c: {n: [1.0, 2.0] for n in names} for c, (_, names) in fields["cells"].items()}}
        if isinstance(outputs[fields["kind"]], str):
            return {"error": outputs[fields["kind"]]}
        np.save(fields["output"], outputs[fields["kind"]])
        return {"peak": 150}

    workers.run = run


def test_only_what_was_compared_is_timed(tmp_path):
    """A crash, NaN and a wrong float engine stand in the table and are not timed; a large error of 8 bits is timed."""
    spec, truth = build("bert_headless").spec, np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    workers = cost.Workers("torch", "cpu", 1)
    results(workers, {"float32": truth, "integer": truth + 1, "fake": truth * np.nan, "onnx": truth * 1.01,
                      "onnx-dynamic": "crashed (signal 11)", "onnx-static": truth})  # fmt: skip
    plain = tmp_path / "float.safetensors"
    plain.touch()
    variants = [cost.Variant(kind, kind, plain) for kind in ("float32", "integer", "fake")]
    variants += cost.engine_variants(("onnxruntime",), plain, tmp_path)
    cell = cost_inputs.make_cell(spec, None, 1, 4)
    cost.probe(workers, variants, [cell], tmp_path, spec, False, [])
    cost.measure(workers, variants, [cell], tmp_path, 2)
    findings = {v.kind: v.finding for v in variants}
    assert {k: bool(f) for k, f in findings.items()} == {"float32": False, "integer": False, "fake": True, "onnx": True,
                                                         "onnx-dynamic": True, "onnx-static": False}  # fmt: skip
    assert (
        "NaN" in findings["fake"]
        and "relative error 0.01" in findings["onnx"]
        and "signal 11" in findings["onnx-dynamic"]
    )
    assert list(workers.run.timed["variants"]) == ["float32", "integer", "onnxruntime int8 static"]
    assert variants[1].cells["1x4"]["memory"] == 50 and variants[1].cells["1x4"]["median"] == 1.5
    result = {"variants": [vars(v) for v in variants], "cells": [{"name": "1x4"}]}
    text = costs.cost_table(result)
    assert "onnxruntime int8 dynamic: not timed: crashed (signal 11)" in text
    results(workers, {"float32": "no memory"})
    with pytest.raises(SpecError, match="float32 does not run: no memory"):
        cost.probe(workers, variants[:1], [cell], tmp_path, spec, False, [])


def described(fake: float, integer: float, memory: int = 100) -> str:
    """The paragraph for ratios of time and memory."""

    def variant(name: str, ratio: float, size: int, **profile) -> dict:
        cells = {"1x8": {"ratio": ratio, "memory": size, "error": 0.1}}
        return {"name": name, "bytes": size, "finding": None, "cells": cells, "profile": profile}

    return costs.paragraph({
        "variants": [
            variant("float32", 1.0, 100, matmuls=0.625),
            variant("fake quantization", fake, memory, quantizers=7, weight_quantizers=3, quantizing=0.5),
            variant("integers", integer, 25, matmuls=0.25, kernels={"torch._int_mm": 4}),
            variant("onnxruntime int8 dynamic", 0.5, 25),
        ]
    })  # fmt: skip


def test_the_paragraph_says_what_was_measured():
    text = described(2.0, 0.5)
    assert "Fake quantization is slower than float32 (2.00 times" in text and "7 quantize-dequantize steps" in text
    assert "agrees with the published result" in text and "Integers are faster than float32 (0.50 times" in text
    assert "25% of a pass is integer matmuls, by torch._int_mm (4)" in text and "0.25 times the bytes on disk" in text
    assert "onnxruntime int8 dynamic 0.50 times" in text and "62% of its op time" in text
    assert "does not agree with the published" in described(0.5, 2.0)
    assert "does not agree with the published" in described(1.0, 2.0, memory=50)
    assert "Fake quantization is as fast as float32 (1.01" in described(1.01, 1.0)


def test_picture(tmp_path):
    """Also of a variant that was never timed."""
    pytest.importorskip("matplotlib", reason="pictures need the extra report")
    ran = {"1x8": {"median": 0.1, "p95": 0.2, "memory": 10}, "2x8": {"median": 0.2, "p95": 0.2, "memory": 10}}
    variants = [{"name": "float32", "cells": ran}, {"name": "wrong", "cells": {"1x8": {"memory": None}}}]
    costs.bars(tmp_path / "cost.png", {"cells": [{"name": "1x8"}, {"name": "2x8"}], "variants": variants})
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


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
    found = json.loads((out / "cost.json").read_text())
    assert [v["name"] for v in found["variants"]] == ["float32", "fake quantization", "integers"]
    assert "random inputs and calibration" in text and found["threads"] == 1 and found["recipe"] == "w8a8"
    for variant in found["variants"]:
        assert variant["finding"] is None and variant["bytes"] > 0
        for cell in ("1x8", "2x8"):
            measured = variant["cells"][cell]
            assert len(measured["seconds"]) == 3 and measured["median"] == np.median(measured["seconds"])
            assert (measured["error"] == 0) == (variant["name"] == "float32") and measured["error"] < 0.2
            assert 0 <= measured["agreement"] <= 1 and isinstance(measured["memory"], int)
    fake, integers = found["variants"][1:]
    quants = resolve(recipe("w8a8", preset("opt-tiny")), replace(preset("opt-tiny"), layers=1))
    assert fake["profile"]["quantizers"] == len(quants)
    assert integers["profile"]["kernels"] == {"float32 blocks (NumPy)": 4 + 2 + 2 + 1}
    assert integers["bytes"] < fake["bytes"] and costs.paragraph(found) in text
    assert (out / "cost.txt").read_text().strip() in text
    assert "exists: choose another --out" in ran(*command, "--out", out)


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
    found = load_checkpoint(checkpoint)
    chosen = recipe("w8a8-hadamard", found.spec)
    random = cost_inputs.Random(8)
    made = prepare(
        Machine("ref"), found.spec, found.params, lambda n: random.split_batches("", found.spec, 2, 0), chosen
    )
    own = tmp_path / "own.safetensors"
    save_checkpoint(own, Checkpoint(found.spec, made.params, {}, chosen, made.ranges, transforms=made.transforms))
    text = ran("cost", own, *command[2:])
    assert "is made for the transforms of w8a8-hadamard" in text and "--recipe w8a8-hadamard" in text


def test_attentions(tmp_path):
    text = ran("cost", "--model", "vit-tiny", "--backend", "ref", "--attention", "clipped,mlp", "--training", "--batch", "1",
               "--rounds", "2", "--threads", "1", "--json", tmp_path / "a.json")  # fmt: skip
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
    command = [sys.executable, str(ROOT / "cli.py"), "cost", str(checkpoint), "--backend", "ref", "--rounds", "1000000",
               "--batch", "1", "--length", "8"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's list of a process's children")
    for _ in range(600):
        if found := children.read_text().split():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped" in text and "Traceback" not in text
    assert found and not any(Path(f"/proc/{child}").exists() for child in found)


def test_the_worker_loads_no_torch_for_the_reference_and_onnx():
    done = subprocess.run([sys.executable, "-c", "import sys, qtx.cost_worker; print('torch' in sys.modules)"],
                          cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "False"
