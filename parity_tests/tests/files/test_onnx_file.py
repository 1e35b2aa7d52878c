"""An exported ONNX file as a file: what it says of itself, constants beside it, what is refused, the command."""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from parity_tests.subjects.integer_models import lower_model, make_recipe
from parity_tests.tests.files.test_onnx_export import FEW, STEPS, make, make_under
from parity_tests.tests.shell import call
from qtx.files.artifact import Artifact, save_artifact
from qtx.files.container import FileError, sha_of
from qtx.graphs.export import export_artifact, make_model
from qtx.graphs.export_check import check_export
from qtx.graphs.export_graph import OPSET
from qtx.graphs.export_run import list_engines
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import (
    QTX,
    Bias,
    Nonlinear,
    Products,
    SpecError,
    ZeroPoint,
)

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def save(path, name="bert_clipped", *choice):
    artifact, batch = make(name, *choice)
    save_artifact(path, artifact)
    return artifact, batch


def test_the_file_says_what_it_is(tmp_path):
    source = tmp_path / "m.qtx"
    artifact, batch = save(source)
    for form, profile in (("integer", "qtx"), ("qdq", "onnx")):
        out = tmp_path / f"{form}.onnx"
        written = export_artifact(source, out, form, expose=True)
        model = onnx.load(out)
        about = json.loads({entry.key: entry.value for entry in model.metadata_props}["qtx"])
        assert (about["form"], about["artifact"]) == (form, sha_of(source))
        assert about["profile"]["name"] == profile == written.profile
        assert [(one.domain, one.version) for one in model.opset_import] == [("", OPSET)]
        names = {name for node in model.graph.node for name in node.output} | {x.name for x in model.graph.initializer}
        assert {site["value"] for site in about["sites"].values()} <= names
        assert set(artifact.quants) - {s for s in artifact.quants if s.endswith(".weight")} <= set(about["sites"])
        scores = about["sites"]["layer.0.attn.scores"]
        assert (scores["value"], scores["dtype"], scores["codes"]) == ("layer.0.attn.scores", "uint8", [0, 255])
        assert scores["scale"] == float(artifact.constants["layer.0.attn.scores.scale"])
        assert "layer.1.ffn.hidden" in {output.name for output in model.graph.output}
        assert list(check_export(source, out, batch, FEW[:1]))[0].equal
    other = tmp_path / "other.qtx"
    save(other, "bert_plain")
    with pytest.raises(FileError, match="was not exported from"):
        list(check_export(other, out))


def test_constants_above_a_megabyte_stand_beside_the_graph(tmp_path):
    spec = preset("opt-tiny")
    token = np.random.default_rng(0).integers(0, spec.vocab, (1, 12))
    batch = {"tokens": token, "mask": token >= 0, "types": token * 0}
    low = lower_model(spec, init_params(spec, 0), [batch], batch)
    source = tmp_path / "m.qtx"
    recipe = make_recipe("w8a8", spec)
    save_artifact(source, Artifact(spec, recipe, low.profile, Nonlinear.TABLE, dict(low.constants), {}))
    for form in ("integer", "qdq"):
        whole, split = tmp_path / f"{form}.onnx", tmp_path / f"{form}-split.onnx"
        assert list(export_artifact(source, whole, form).files) == [str(whole)]
        written = export_artifact(source, split, form, external_above=2**20)
        assert list(written.files) == [str(split), f"{split}.data"]
        assert written.files[str(split)] < 2**20 < written.files[f"{split}.data"]
        assert list(check_export(source, split, batch, FEW[1:]))[0].equal
        inputs = {key: batch[key] for key in ("tokens", "mask")}
        sessions = [runtime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (whole, split)]
        assert np.array_equal(*(session.run(None, inputs)[0] for session in sessions))


def test_what_cannot_be_exported_is_refused_by_its_site(tmp_path):
    for form in ("integer", "qdq"):
        with pytest.raises(SpecError, match=r"site layer.0.attn.scores.rhs cannot be exported to ONNX: its scale"):
            make_model(make("bert_plain", "operands")[0], form)
    with pytest.raises(
        SpecError, match=r"site layer.0.attn.value cannot be exported to ONNX: it has a scale per channel"
    ):
        make_model(make("bert_plain", "values")[0], "qdq")
    artifact, _ = make("bert_plain")
    pairs = replace(artifact.profile, matmul=replace(QTX.matmul, products=Products.PAIRS16))
    with pytest.raises(SpecError, match=r"site layer.0.attn.query cannot be exported to ONNX: its products are pairs"):
        make_model(replace(artifact, profile=pairs), "integer")
    fused = replace(QTX.quantize, zero_point=ZeroPoint.FUSED, reciprocal=True)
    with pytest.raises(SpecError, match=r"site embed.image cannot be exported to ONNX: a zero point that is fused"):
        make_model(make_under("vit_plain", quantize=fused)[0], "integer")
    fused = {"requantize": STEPS, "bias": Bias.FLOAT_BEFORE_FUSED}
    with pytest.raises(SpecError, match=r"site embed.patch cannot be exported to ONNX: a bias in a fused multiply-add"):
        make_model(make_under("vit_plain", **fused)[0], "integer")
    bias = {"layer.0.ffn.hidden.bias": np.full(24, 2**31 - 1, np.int32)}
    wide = replace(artifact, constants=artifact.constants | bias)
    with pytest.raises(SpecError, match=r"site layer.0.ffn.hidden cannot be exported to ONNX: accumulators up to"):
        make_model(wide, "integer")
    with pytest.raises(SpecError, match="--form float: choose one of integer, qdq"):
        make_model(artifact, "float")
    source = tmp_path / "m.qtx"
    save(source)
    with pytest.raises(SpecError, match="name ending in .onnx"):
        export_artifact(source, tmp_path / "m.bin")
    (tmp_path / "there.onnx").write_text("mine")
    with pytest.raises(FileError, match="exists"):
        export_artifact(source, tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_text() == "mine"


def test_the_command(tmp_path):
    run = partial(call, "export")
    source, out = tmp_path / "m.qtx", tmp_path / "m.onnx"
    save(source, "vit_gate_elementwise")
    got = run(source, "--format", "onnx", "--out", out, "--check", "--json", tmp_path / "said.json")
    assert got.exit_code == 0, got.output
    said = json.loads((tmp_path / "said.json").read_text())
    assert [one["engine"] for one in said["checks"]] == list(list_engines()) and said["form"] == "integer"
    assert all(one["equal"] for one in said["checks"]) and "MatMulInteger" in said["operators"]
    assert "| onnx-reference" in got.output and "MatMulInteger" in got.output
    again = run(source, "--format", "onnx", "--out", out)
    assert (again.exit_code, f"{out} exists" in again.output) == (1, True)
    qdq = run(source, "--format", "onnx", "--form", "qdq", "--out", tmp_path / "q.onnx", "--external-data-above", 0)
    assert qdq.exit_code == 0 and "q.onnx" in qdq.output and "Gemm" in qdq.output
    refused = run(source, "--form", "qdq", "--out", tmp_path / "hf")
    assert (refused.exit_code, "--form is of --format onnx" in refused.output) == (1, True)


def test_without_onnx_the_command_says_what_to_install(tmp_path, monkeypatch):
    save(tmp_path / "m.qtx", "vit_plain")
    monkeypatch.setitem(sys.modules, "onnx", None)
    got = call("export", tmp_path / "m.qtx", "--format", "onnx", "--out", tmp_path / "m.onnx")
    assert got.exit_code != 0 and 'pip install "qtx[engines]"' in got.output and not (tmp_path / "m.onnx").exists()


def test_a_graph_that_cannot_be_written_leaves_no_constants_behind(tmp_path, monkeypatch):
    save(tmp_path / "m.qtx")

    def fill(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("qtx.graphs.export.write_beside", fill)
        with pytest.raises(OSError, match="No space"):
            export_artifact(tmp_path / "m.qtx", tmp_path / "m.onnx", external_above=0)
    assert [path.name for path in tmp_path.iterdir()] == ["m.qtx"]
    assert len(export_artifact(tmp_path / "m.qtx", tmp_path / "m.onnx", external_above=0).files) == 2
