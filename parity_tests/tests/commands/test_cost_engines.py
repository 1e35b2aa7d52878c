"""`qtx cost`: the kernels that run, the exported model, and other engines beside them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects.small_models import build
from qtx.cost import compare as cost
from qtx.cost import inputs as cost_inputs
from qtx.engines.backend import MissingExtra, backend
from qtx.files.artifact import make_artifact
from qtx.files.checkpoint import Checkpoint
from qtx.recipes.named import recipe, resolve
from qtx_ref.spec import QTX, Nonlinear, SpecError

EXPORTED = ("bert_gate_head_conditional", "opt_clipped_row", "vit_plain", "opt_plain")  # the last without a mask


# --- where the time goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ref", "torch"])
def test_products_and_quantizers_are_all_that_run(name):
    """Counted by hand: BERT of 2 layers with a linear gate and an MLM head."""
    model, module = build("bert_gate_linear"), backend(name)
    profiling = importlib.import_module(f"qtx_{name}.timing")
    chosen = recipe("w8a8", model.spec)
    quants = resolve(chosen, model.spec)
    float_model = module.Model(model.spec, model.params)
    ranges = float_model.calibrate([model.batch], quants)
    float_model.bind(quants, ranges)
    timed, seconds = profiling.quantizers(float_model, model.batch)
    assert sorted(site for site, _ in timed) == sorted(quants) and 0 < sum(taken for _, taken in timed) <= seconds
    got = Checkpoint(model.spec, model.params)
    made = make_artifact(Path(__file__), got, chosen, ranges, QTX, Nonlinear.TABLE, [])
    integers = module.IntegerModel(model.spec, made.constants, made.quants, made.profile)
    products, seconds = profiling.products(integers, model.batch)
    assert len(products) == 2 * (6 + 1 + 2) + 2  # query to output, FFN; gate; scores and context; head
    assert 0 < sum(taken for *_, taken in products) <= seconds
    kernels = {kernel for _, kernel, _ in products}
    if name == "ref":
        assert kernels == {"float32 blocks (NumPy)"}
    else:
        byte = importlib.import_module("qtx_torch.integer.products").byte_instructions("cpu")
        assert kernels == ({"torch._int_mm", "float32 blocks (torch)"} if byte else {"float32 blocks (torch)"})


def test_the_kernel_named_is_the_one_that_runs(monkeypatch):
    torch = pytest.importorskip("torch", reason="the torch backend needs the extra torch")
    integer = importlib.import_module("qtx_torch.integer.products")
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
    importlib.import_module("qtx_torch.runners.onnx_export").export_onnx(model.spec, model.params, path, masked=masked)
    return model, path


def test_onnx_export_is_our_model(exported):
    """At the size it was traced and at others, with padding before, behind and none; the tolerance is the issue's."""
    model, path = exported
    runner = importlib.import_module("qtx.engines.ort").OnnxRunner(path, 1)
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
    engine = importlib.import_module("qtx.engines.ort")
    truth = backend("torch").Model(model.spec, model.params).forward(model.batch)
    batch = {name: model.batch[name] for name in cost_inputs.INPUTS if name in model.batch}
    for static in (False, True):
        engine.quantize(path, tmp_path / "int8.onnx", static, iter([batch]))
        runner = engine.OnnxRunner(tmp_path / "int8.onnx", 1)
        error = cost.compare(runner(runner.inputs(batch)), truth, batch.get("mask"))
        assert 1e-5 < error < 0.3, static
        ops, matmuls = engine.shares(tmp_path / "int8.onnx", 1, batch)
        assert 0 < matmuls < 1 and all(0 < share < 1 for share in ops.values())
        assert {p.name for p in tmp_path.iterdir()} == {"int8.onnx"}


def test_torch_dynamic_int8_is_torchs_own():
    """`quantize_dynamic` of nn.Linear with the same weights gives the same bits, and the float weights are gone."""
    torch = pytest.importorskip("torch", reason="the torch backend needs the extra torch")
    passes, int8 = (importlib.import_module(f"qtx_torch.runners.{name}") for name in ("passes", "dynamic_int8"))
    model = build("bert_gate_linear")
    ours = backend("torch").Model(model.spec, model.params)
    nx = int8.DynamicInt8(ours)
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
    runner, truth = passes.FloatRunner(ours, nx), backend("torch").Model(model.spec, model.params)
    output = runner.output(runner(runner.inputs(model.batch)))
    assert 1e-5 < cost.compare(output, truth.forward(model.batch), model.batch["mask"]) < 0.3


def test_missing_engines(monkeypatch):
    notes: list[str] = []
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    with pytest.raises(MissingExtra, match=r"engine onnxruntime needs onnxruntime.*qtx\[engines\]"):
        cost.choose_engines("onnxruntime", "torch", "cpu", notes.append)
    assert notes == []
    assert cost.choose_engines("auto", "torch", "cpu", notes.append) == ("torch-dynamic",)
    assert len(notes) == 1 and "qtx[engines]" in notes[0]
    assert cost.choose_engines("none", "torch", "cpu", notes.append) == ()
    assert cost.choose_engines("auto", "ref", "cpu", notes.append) == ()
    for text, where, match in (("tvm", "torch", "--engines tvm"), ("torch-dynamic", "ref", "beside --backend torch")):
        with pytest.raises(SpecError, match=match):
            cost.choose_engines(text, where, "cpu", notes.append)
