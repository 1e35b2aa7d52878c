"""Certificates of files: an artifact and ONNX files, planted faults, what the command prints, and what engines say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from parity_tests.tests.audit.certificate_onnx import make_onnx
from parity_tests.tests.shell import call
from qtx.audit.certificate import certify, confirm, list_engines, open_products
from qtx.audit.certificate_artifact import read_artifact_products, run_artifact
from qtx.audit.certificate_bounds import TARGETS, Operand, Product, check_sums
from qtx.engines import paths
from qtx.files.artifact import load_artifact, save_artifact
from qtx_ref.integer.products import matmul_pairs16
from qtx_ref.model import IntegerModel

FIXTURE = Path(__file__).parents[2] / "fixtures" / "v0.1"
TOKENS = {"tokens": np.arange(12).reshape(2, 6) % 7, "types": np.zeros((2, 6), np.int64), "mask": np.ones((2, 6), bool)}


def test_an_artifact_has_a_line_for_every_product() -> None:
    artifact = load_artifact(FIXTURE / "bert.qtx")
    products = read_artifact_products(artifact)
    layer = [f"layer.0.{site}" for site in ("attn.query", "attn.key", "attn.value", "attn.scores", "attn.context")]
    assert [one.name for one in products[:5]] == layer
    for one in products:
        if one.right.codes is not None:
            tied = artifact.constants["embed.token.weight"]  # the decoder's
            weight = artifact.constants.get(f"{one.name}.weight", tied)
            columns = weight.reshape(-1, weight.shape[-1]).T  # of all heads, where each has its own
            assert np.array_equal(one.right.codes, columns) and one.depth == weight.shape[-1]
    scores = next(one for one in products if one.name.endswith("scores"))
    assert scores.depth == artifact.spec.head_width and scores.right.codes is None
    assert next(one for one in products if one.name.endswith("context")).depth == artifact.spec.length


def test_the_operands_that_are_shown_give_the_accumulators() -> None:
    artifact = load_artifact(FIXTURE / "bert.qtx")
    shown: dict[str, list[np.ndarray]] = {}
    run_artifact(artifact, TOKENS, lambda name, *operands: shown.setdefault(name, list(operands)))
    recorded: dict[str, np.ndarray] = {}
    model = IntegerModel(artifact.spec, artifact.constants, artifact.quants, artifact.profile)
    model.run(TOKENS, lambda name, value: recorded.setdefault(name, value))
    for one in read_artifact_products(artifact):
        a, za, b, zb = (x.astype(np.int64) for x in shown[one.name])
        acc = (a - za) @ (b - zb) + (0 if one.bias is None else one.bias.reshape(len(b), 1, -1))
        want = recorded[f"{one.name}.accumulator"].astype(np.int64)
        assert np.array_equal(np.sort(acc.ravel()), np.sort(want.ravel())), one.name


@pytest.mark.parametrize("name", ["bert-int4", "opt", "opt-int4", "vit", "vit-int4"])
def test_every_family_and_width(name: str) -> None:
    certificate = certify(FIXTURE / f"{name}.qtx")
    artifact = load_artifact(FIXTURE / f"{name}.qtx")
    assert {"layer.0.attn.scores", "layer.0.ffn.output"} <= {line.name for line in certificate.lines}
    weights = [one for one in read_artifact_products(artifact) if one.right.codes is not None]
    for one in weights:
        if abs(one.right.codes).max() <= 8:  # 255 * 8 * 2: four bits never saturate a pair
            line = next(line for line in certificate.lines if line.name == one.name)
            assert line.targets["avx2"].holds and line.cures == []


def plant(path: Path, **changes: np.ndarray) -> Path:
    """The fixture with other constants."""
    artifact = load_artifact(FIXTURE / "bert.qtx")
    artifact.constants.update(changes)
    save_artifact(path, artifact)
    return path


def test_a_planted_pair_is_found_where_it_is(tmp_path: Path) -> None:
    name = "layer.1.attn.output"
    weight = np.clip(load_artifact(FIXTURE / "bert.qtx").constants[f"{name}.weight"] // 2, -64, 63).astype(np.int8)
    before = certify(plant(tmp_path / "a.qtx", **{f"{name}.weight": weight}), ["avx2"])
    assert next(one for one in before.lines if one.name == name).holds
    weight[3, 4:6] = 65, 64  # one neighbour
    after = certify(plant(tmp_path / "b.qtx", **{f"{name}.weight": weight}), ["avx2"])
    line = next(one for one in after.lines if one.name == name)
    witness = line.targets["avx2"].witness
    assert line.targets["avx2"].worst == 255 * 129 and witness is not None
    assert witness.column == 3 and witness.left[4:6].tolist() == [255, 255]
    x = witness.left.astype(np.uint8)
    assert matmul_pairs16(x[None], weight[[3]].T)[0, 0] == witness.computed != x.astype(int) @ weight[3].astype(int)
    weight[3, 4:7] = 65, 1, 64  # no neighbours any more
    again = certify(plant(tmp_path / "c.qtx", **{f"{name}.weight": weight}), ["avx2"])
    assert next(one for one in again.lines if one.name == name).holds


def test_a_planted_bias_and_a_planted_shift(tmp_path: Path) -> None:
    artifact = load_artifact(FIXTURE / "bert.qtx")
    name = "layer.0.attn.query"
    bias = artifact.constants[f"{name}.bias"].copy()
    bias[2] = 2**31 - 1
    certificate = certify(plant(tmp_path / "a.qtx", **{f"{name}.bias": bias}), ["vnni"])
    (line,) = [one for one in certificate.lines if not one.holds]
    assert line.name == name and line.overflow.witness is not None and line.overflow.witness.column == 2
    assert [cure.name for cure in line.cures if cure.name == "64-bit accumulators"]
    shift = np.full_like(artifact.constants[f"{name}.shift"], 30)
    certificate = certify(plant(tmp_path / "b.qtx", **{f"{name}.shift": shift}), ["vnni"])
    (line,) = [one for one in certificate.lines if not one.holds]
    assert line.name == name and line.overflow.holds and line.shift is not None and not line.shift.holds


# --- engines and the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    yield
    paths.end_workers()


@pytest.mark.parametrize("engine", ["fbgemm", "onednn", "onnxruntime"])
def test_an_engine_does_what_the_emulator_does(engine: str, workers: None) -> None:
    if engine not in list_engines():
        pytest.skip(f"{engine} is not installed, or its CPU cannot be had here")
    products, _, _ = open_products(FIXTURE / "bert.qtx")
    one = next(product for product in products if not check_sums(product, TARGETS["avx2"]).holds)
    witness = confirm(one, check_sums(one, TARGETS["avx2"]), [engine]).witness
    assert witness is not None and witness.computed is not None
    seen = witness.engines[engine]
    assert isinstance(seen, int)
    assert abs(seen - witness.computed) <= abs(witness.exact) / 240 < abs(seen - witness.exact)  # half a step of codes


def test_onnxruntime_widens_unsigned_weights(workers: None) -> None:
    """uint8 x uint8 is exact there on the same CPU."""
    if "onnxruntime" not in list_engines():
        pytest.skip("onnxruntime is not installed, or its CPU cannot be had here")
    codes = np.full((4, 1), 255, np.int32)
    one = Product("p", Operand(0, 255, np.int64(0)), Operand(0, 255, np.int64(128), codes), 4)
    witness = confirm(one, check_sums(one, TARGETS["avx2"]), ["onnxruntime"]).witness
    assert witness is not None and witness.engines == {"onnxruntime": witness.exact} and witness.exact == 64770


def test_the_command_says_it_in_text_and_json(tmp_path: Path) -> None:
    weight = np.zeros((8, 3), np.int8)
    good = make_onnx(tmp_path / "good.onnx", "qdq", weight)
    done = call("audit", "certificate", good, "--engine", "none")
    assert done.exit_code == 0 and "proved avx2 1 of 1" in done.stdout
    weight[2:4, 1] = 127
    bad = make_onnx(tmp_path / "bad.onnx", "qdq", weight)
    done = call("audit", "certificate", bad, "--engine", "none", "--json", tmp_path / "c.json")
    assert done.exit_code == 1 and "64,770" in done.stdout and "QTX-ACC-001" in done.stdout
    (line,) = json.loads((tmp_path / "c.json").read_text())["certificate"]["products"]
    assert line["findings"] == ["QTX-ACC-001", "QTX-ACC-005"]
    assert line["verdicts"]["avx2"]["witness"]["right"] == [0, 0, 127, 127, 0, 0, 0, 0]
    assert line["verdicts"]["avx2"]["witness"]["left"] == [0, 0, 255, 255, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.onnx", None, "no such"),
        ("text.onnx", b"hello, this is no protobuf", "text.onnx"),
        ("empty.onnx", b"", "empty.onnx"),
        ("profile.json", b'{"format": "qtx-profile"}', "profile.json"),
        ("graph.onnxtxt", b"hello", "graph.onnxtxt"),
    ],
)
def test_what_is_no_model_is_refused(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = call("audit", "certificate", tmp_path / name, "--engine", "none")
    assert done.exit_code != 0 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = make_onnx(tmp_path / "m.onnx", "qdq", np.zeros((8, 3), np.int8))
    np.savez(tmp_path / "x.npz", z=np.zeros((4, 8), np.float32))
    np.savez(tmp_path / "o.npz", x=np.array([{}], object))
    for options, said in (
        (("--batches", "2"), "belong to --data"),
        (("--data", "books"), ".npz"),
        (("--data", tmp_path / "x.npz"), "input x of"),
        (("--data", tmp_path / "o.npz"), "o.npz"),
        (("--data", tmp_path / "none.npz"), "none.npz"),
        (("--engine", "none", "--engine", "fbgemm"), "leave out fbgemm"),
    ):
        done = call("audit", "certificate", model, "--engine", "none", *options)
        assert done.exit_code == 2 and said in done.stderr, done.stderr


def test_a_graph_out_of_order_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(make_onnx(tmp_path / "m.onnx", "qdq", np.zeros((8, 3), np.int8))))
    first = model.graph.node[0]
    model.graph.node.append(first)
    del model.graph.node[0]
    onnx.save(model, str(tmp_path / "o.onnx"))
    done = call("audit", "certificate", tmp_path / "o.onnx", "--engine", "none")
    assert done.exit_code == 2 and "takes xq, which nothing before it makes" in done.stderr


def test_external_data_that_are_gone_are_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(make_onnx(tmp_path / "m.onnx", "qdq", np.zeros((8, 3), np.int8))))
    onnx.save(model, str(tmp_path / "e.onnx"), save_as_external_data=True, location="e.bin", size_threshold=0)
    assert certify(tmp_path / "e.onnx", ["avx2"]).holds
    (tmp_path / "e.bin").unlink()
    done = call("audit", "certificate", tmp_path / "e.onnx", "--engine", "none")
    assert done.exit_code == 2 and "e.onnx" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    h, t = onnx.helper, onnx.TensorProto
    value = h.make_tensor_value_info
    graph = h.make_graph(
        [h.make_node("MatMul", ["x", "x"], ["y"])], "g", [value("x", t.FLOAT, [2, 2])], [value("y", t.FLOAT, [2, 2])]
    )
    onnx.save(h.make_model(graph, ir_version=10), tmp_path / "f.onnx")
    done = call("audit", "certificate", tmp_path / "f.onnx")
    assert done.exit_code == 2 and "no product of integer codes" in done.stderr
