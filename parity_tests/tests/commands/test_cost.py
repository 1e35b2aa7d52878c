"""`qtx cost`: what is compared before it is timed, counts, engines, findings. No absolute time."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects.small_models import build
from qtx.cost import attention as attention_cost
from qtx.cost import compare as cost
from qtx.cost import inputs as cost_inputs
from qtx.data import load
from qtx.engines.backend import backend
from qtx.report import costs
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import SpecError

POPEN = subprocess.Popen


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
    assert cost_inputs.choose_lengths(bert, None) == (64, 128) and cost_inputs.choose_lengths(vit, None) == (17,)
    assert cost_inputs.choose_lengths(replace(bert, length=100), None) == (64,)
    assert cost_inputs.choose_lengths(replace(bert, length=20), None) == (20,)
    for spec, wanted in ((bert, (64, 129)), (vit, (16,))):
        with pytest.raises(SpecError, match=f"--length {'129' if spec is bert else '16'}"):
            cost_inputs.choose_lengths(spec, wanted)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_summary():
    seconds, base = [0.4, 0.1, 0.3, 0.2, 0.5], [0.2, 0.1, 0.1, 0.1, 0.1]
    got = cost.summarize(seconds, base, 8, 512)
    assert got["median"] == 0.3 and got["p95"] == pytest.approx(0.48, rel=1e-12)  # 0.4 + 0.8 (0.5 - 0.4)
    assert got["ratio"] == pytest.approx(2.0, rel=1e-12)  # of 2, 1, 3, 2, 5
    assert got["sequences_per_s"] == pytest.approx(8 / 0.3) and got["tokens_per_s"] == pytest.approx(512 / 0.3)


def test_compare():
    truth = np.array([[[3.0, 4.0], [9.0, 9.0]], [[0.0, 5.0], [1.0, 0.0]]])
    mask = np.array([[True, False], [True, False]])
    output = truth.copy()
    output[0, 1] = 100  # padding
    assert cost.compare(output, truth, mask) == 0.0
    output[0, 0] = [4.0, 3.0]  # off by (1, -1) of (3, 4), (0, 5)
    assert cost.compare(output, truth, mask) == pytest.approx(np.sqrt(2 / 50), rel=1e-12)


def test_agreement_is_of_real_tokens_or_of_sequences():
    samples = [{"mask": np.array([[True, False], [True, True]])}, {"mask": np.array([[True, False]])}]
    truth = np.array([[1, 2], [3, 4], [5, 6]])
    assert cost.agree(truth + [[0, 9], [0, 0], [0, 9]], truth, samples) == 1.0  # padding differs alone
    assert cost.agree(truth + [[0, 0], [0, 1], [0, 0]], truth, samples) == 0.75
    assert cost.agree(np.array([1, 2, 3]), np.array([1, 2, 0]), samples) == pytest.approx(2 / 3)


def test_answers_are_compared_on_many_sequences_whatever_the_batch():
    """At least 256, or all that the data have, in whole batches and once for each length; without a head none."""
    spec = preset("vit-tiny")
    for size, count in ((1, 256), (8, 256), (100, 300), (300, 300)):
        (cell,) = cost_inputs.make_cells(spec, None, [(size, 17)])
        assert sum(len(batch["images"]) for batch in cell.samples) == count
        assert {len(batch["images"]) for batch in cell.samples} == {size} and cell.inputs["images"].shape[0] == size
    digits = load(None, spec)
    (few,) = cost_inputs.make_cells(spec, digits, [(8, 17)])
    assert few.real and len(few.samples) == 180 // 8  # the evaluation split has 180 images
    images = np.concatenate([batch["images"] for batch in few.samples])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 170  # they are not the same ones again
    both = cost_inputs.make_cells(preset("opt-tiny"), None, [(1, 8), (1, 16), (2, 8), (2, 16)])
    assert [len(cell.samples) for cell in both] == [0, 0, 128, 128]
    assert not cost_inputs.make_cells(build("bert_headless").spec, None, [(1, 4)])[0].samples


def test_a_sample_with_padding_makes_a_padded_cell():
    """So that an engine's export takes the mask into account."""
    cell = cost_inputs.make_cell(build("bert_plain").spec, Texts(), 1, 6, sampled=True)
    assert cell.inputs["mask"].all() and len(cell.samples) == 3 and cell.padded


def test_faults():
    truth = np.ones((2, 3))
    assert cost.find_fault(truth, truth) is None
    assert "shape (2, 2)" in cost.find_fault(truth[:, :2], truth)
    assert "NaN" in cost.find_fault(np.full((2, 3), np.inf), truth)


def test_added_parameters():
    """Against the paper's formulas (Bondarenko et al. 2023, table of gates), by hand for bert-base: H 12, K 64, D
    768."""
    spec = preset("bert-base")
    by_hand = {
        "vanilla": 0,
        "clipped": 0,
        "head": 12,
        "gated": 12 * 65,
        "mlp": 12 * (16 * 65 + 17),
        "all_features": 12 * 769,
        "elementwise": 768 * 768,
        "sink": 12,
    }
    total = sum(value.size for value in backend("ref").Model(*first(preset("bert-tiny"))).params().values())
    assert attention_cost.count_parameters(preset("bert-tiny")) == total
    # 30522 + 512 + 2 rows of 768, their norm; 12 layers; the head's transform, norm and bias
    layer = 4 * (768**2 + 768) + 2 * 2 * 768 + 2 * 768 * 3072 + 3072 + 768
    whole = 31036 * 768 + 1536 + 12 * layer + 768**2 + 768 + 1536 + 30522
    for name, per_layer in by_hand.items():
        assert attention_cost.count_added_parameters(spec, name) == (12 * per_layer, 100 * 12 * per_layer / whole), name


def first(spec):
    return spec, init_params(spec, 0)


# --- processes --------------------------------------------------------------------------------------------------------


def fake_worker(monkeypatch, code: str) -> cost.Workers:
    """Workers whose process runs `code`."""
    monkeypatch.setattr(subprocess, "Popen", lambda command, **given: POPEN([sys.executable, "-c", code], **given))
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
        if fields["samples"]:
            np.save(fields["answers"], np.concatenate([outputs[fields["kind"]].argmax(-1)] * len(fields["samples"])))
        return {"peak": 150}

    workers.run = run


def test_ways_to_multiply_are_timed_in_a_process_of_their_own():
    lines = cost.Workers("torch", "cpu", 1).run("ways")["lines"]
    assert len(lines) == 3 and all("float32 " in line and "float64 " in line for line in lines)
    assert lines[-1].startswith("128 x 768 x 768: ")


def test_only_what_was_compared_is_timed(tmp_path):
    """A crash, NaN and a wrong float engine stand in the table and are not timed; a large error of 8 bits is timed."""
    spec, truth = build("bert_headless").spec, np.arange(24, dtype=np.float32).reshape(1, 4, 6)
    workers = cost.Workers("torch", "cpu", 1)
    results(
        workers,
        {
            "float32": truth,
            "integer": truth + 1,
            "fake": truth * np.nan,
            "onnx": truth * 1.01,
            "onnx-dynamic": "crashed (signal 11)",
            "onnx-static": truth,
        },
    )
    plain = tmp_path / "float.safetensors"
    plain.touch()
    variants = [cost.Variant(kind, kind, plain) for kind in ("float32", "integer", "fake")]
    variants += cost.list_engine_variants(("onnxruntime",), plain, tmp_path)
    cell = cost_inputs.make_cell(spec, None, 1, 4)
    cost.probe(workers, variants, [cell], tmp_path, False, [])
    cost.measure(workers, variants, [cell], tmp_path, 2)
    findings = {v.kind: v.finding for v in variants}
    assert {k: bool(f) for k, f in findings.items()} == {
        "float32": False,
        "integer": False,
        "fake": True,
        "onnx": True,
        "onnx-dynamic": True,
        "onnx-static": False,
    }
    assert (
        "NaN" in findings["fake"]
        and "relative error 0.01" in findings["onnx"]
        and "signal 11" in findings["onnx-dynamic"]
    )
    assert list(workers.run.timed["variants"]) == ["float32", "integer", "onnxruntime int8 static"]
    assert variants[1].cells["1x4"]["memory"] == 50 and variants[1].cells["1x4"]["median"] == 1.5
    result = {"variants": [vars(v) for v in variants], "cells": [{"name": "1x4"}]}
    text = costs.tabulate_costs(result)
    assert "onnxruntime int8 dynamic: not timed: crashed (signal 11)" in text
    results(workers, {"float32": "no memory"})
    with pytest.raises(SpecError, match="float32 does not run: no memory"):
        cost.probe(workers, variants[:1], [cell], tmp_path, False, [])


def described(fake: float, integer: float, memory: int = 100) -> str:
    """The paragraph for ratios of time and memory."""

    def variant(name: str, ratio: float, size: int, **profile) -> dict:
        cells = {"1x8": {"ratio": ratio, "memory": size, "error": 0.1}}
        return {"name": name, "bytes": size, "finding": None, "cells": cells, "profile": profile}

    return costs.describe_costs(
        {
            "variants": [
                variant("float32", 1.0, 100, matmuls=0.625),
                variant("fake quantization", fake, memory, quantizers=7, weight_quantizers=3, quantizing=0.5),
                variant("integers", integer, 25, matmuls=0.25, kernels={"torch._int_mm": 4}),
                variant("onnxruntime int8 dynamic", 0.5, 25),
            ]
        }
    )


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
    costs.draw_cost(tmp_path / "cost.png", {"cells": [{"name": "1x8"}, {"name": "2x8"}], "variants": variants})
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
