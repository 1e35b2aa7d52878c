"""Certificates of ONNX files: forms of other tools, planted faults, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects.integer_models import lower_model, make_recipe
from parity_tests.subjects.small_models import build
from parity_tests.tests.audit.certificate_onnx import make_onnx
from qtx.audit.certificate import certify
from qtx.audit.certificate_artifact import read_artifact_products
from qtx.files.artifact import Artifact, save_artifact
from qtx_ref.model import IntegerModel
from qtx_ref.spec import Nonlinear, SpecError


@pytest.mark.parametrize("form", ["qdq", "qlinear", "qgemm", "integer"])
def test_the_four_forms_of_onnx_files(form: str, tmp_path: Path) -> None:
    weight = np.zeros((8, 3), np.int8)
    weight[2:4, 1] = 64
    good = certify(make_onnx(tmp_path / "good.onnx", form, weight), ["avx2"])
    assert good.holds and [one.name for one in good.lines] == ["product"]
    assert (good.lines[0].depth, good.lines[0].columns) == (8, 3) and good.lines[0].targets["avx2"].worst == 32640
    assert good.lines[0].overflow.worst == (255 - 7) * 128
    weight[3, 1] = 65
    bad = certify(make_onnx(tmp_path / "bad.onnx", form, weight), ["avx2", "vnni"])
    verdict = bad.lines[0].targets["avx2"]
    assert not bad.holds and verdict.worst == 32895 and verdict.witness is not None and verdict.witness.column == 1
    assert bad.lines[0].targets["vnni"].holds
    assert (bad.lines[0].shift is None) == (form == "integer")


def test_data_reach_the_planted_pair(tmp_path: Path) -> None:
    weight = np.zeros((8, 3), np.int8)
    weight[2:4, 1] = 64, 65
    path = make_onnx(tmp_path / "m.onnx", "qdq", weight)
    x = np.zeros((4, 8), np.float32)
    x[1, 2:4] = 100  # code 255
    x[2, 3:5] = 100  # not the neighbours
    tally = certify(path, ["avx2"], [{"x": x}]).lines[0].tally
    assert tally is not None and (tally.saturated, tally.pairs, tally.wrong, tally.results) == (1, 48, 1, 12)


def test_a_node_that_is_not_read_is_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(make_onnx(tmp_path / "m.onnx", "integer", np.ones((8, 3), np.int8))))
    node = onnx.helper.make_node("ConvInteger", ["xq", "w"], ["c"], name="conv")
    model.graph.node.append(node)
    onnx.save(model, tmp_path / "n.onnx")
    certificate = certify(tmp_path / "n.onnx")
    assert certificate.unread == ["conv (ConvInteger)"] and not certificate.holds


def write_onnx(path: Path, nodes: list[object], inputs: dict[str, list[int]], **constants: np.ndarray) -> Path:
    """A file of these nodes, whose inputs are uint8 and whose output, y, is of no declared type."""
    onnx = pytest.importorskip("onnx")
    h = onnx.helper
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info(name, onnx.TensorProto.UINT8, shape) for name, shape in inputs.items()],
        [h.make_tensor_value_info("y", onnx.TensorProto.UNDEFINED, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    onnx.save(h.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def make_node(op: str, inputs: str, name: str = "product", out: str = "y", **attributes: object) -> object:
    domain = "com.microsoft" if op == "QGemm" else ""
    given = ["" if one == "-" else one for one in inputs.split()]
    return pytest.importorskip("onnx").helper.make_node(op, given, [out], name=name, domain=domain, **attributes)


def reach(left_zeros: list[int], weight: np.ndarray, right_zeros: list[int]) -> int:
    """The farthest accumulator of uint8 rows, each with its zero point, times the columns of codes."""
    ends = []
    for za in left_zeros:
        for column, zb in zip(weight.T.tolist(), right_zeros, strict=True):
            for pick in (max, min):
                ends.append(sum(pick((a - za) * (w - zb) for a in (0, 255)) for w in column))
    return max(ends, key=lambda one: (abs(one) - (one < 0), one))


@pytest.mark.parametrize("rows", [[1, 2, 250], [0, 7, 255, 3]], ids=["more columns", "as many columns"])
def test_a_zero_point_for_each_row(rows: list[int], tmp_path: Path) -> None:
    weight = np.random.default_rng(1).integers(-128, 128, (6, 4)).astype(np.int8)
    zeros = np.array([5, -128, 0, 127], np.int8)
    node = make_node("MatMulInteger", "x w xz wz")
    given = {"w": weight, "xz": np.array(rows, np.uint8), "wz": zeros}
    (line,) = certify(write_onnx(tmp_path / "a.onnx", [node], {"x": [len(rows), 6]}, **given)).lines
    assert line.overflow.worst == reach(rows, weight, zeros.tolist())
    left = make_node("MatMulInteger", "w x wz xz")  # the constant first: rows are columns
    given = {"w": weight.T, "xz": np.array(rows, np.uint8), "wz": zeros}
    (line,) = certify(write_onnx(tmp_path / "b.onnx", [left], {"x": [6, len(rows)]}, **given)).lines
    assert line.overflow.worst == reach(rows, weight, zeros.tolist())


def test_the_witness_of_activations_has_the_zero_point_that_does_it(tmp_path: Path) -> None:
    node = make_node("MatMulInteger", "x w xz wz")
    given = {"xz": np.uint8(0), "wz": np.array([0, 127, 255], np.uint8)}
    (line,) = certify(write_onnx(tmp_path / "a.onnx", [node], {"x": [2, 40000], "w": [40000, 3]}, **given)).lines
    witness = line.overflow.witness
    assert line.overflow.worst == 255 * 255 * 40000 and witness is not None and witness.exact == line.overflow.worst
    rows = (witness.left - witness.left_zero) @ (witness.right - witness.right_zero)
    assert rows == witness.exact and witness.computed == rows - 2**32


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_data_of_a_product_whose_constant_comes_first(dtype: type, tmp_path: Path) -> None:
    """Both uint8, the constant is what is moved by 128: 255 (255 - 128) 2 is beyond int16, 255 (128 - 128) is not."""
    weight = np.array([[255, 128], [255, 128], [0, 0]]).T  # (2, 3)
    weight = (weight - 128 * (dtype is np.int8)).astype(dtype)
    node = make_node("MatMulInteger", "w x wz xz")
    given = {"w": weight, "wz": np.array([1, 2], dtype), "xz": np.arange(4, dtype=np.uint8)}
    path = write_onnx(tmp_path / "m.onnx", [node], {"x": [3, 4]}, **given)
    x = np.array([[255, 255, 0, 1], [255, 0, 255, 1], [9, 9, 9, 9]], np.uint8)
    tally = certify(path, ["avx2"], [{"x": x}]).lines[0].tally
    assert tally is not None and (tally.saturated, tally.pairs, tally.wrong, tally.results) == (1, 16, 1, 8)
    empty = write_onnx(tmp_path / "e.onnx", [make_node("MatMulInteger", "x w")], {"x": [0, 2]}, w=weight)
    tally = certify(empty, ["avx2"], [{"x": np.zeros((0, 2), np.uint8)}]).lines[0].tally
    assert tally is not None and tally.results == tally.saturated == 0


def test_an_integer_bias_behind_a_product_is_in_its_accumulator(tmp_path: Path) -> None:
    nodes = [make_node("MatMulInteger", "x w", out="t"), make_node("Add", "b t", "add")]
    for bias, holds in ((2**31 - 1 - 255, True), (2**31 - 255, False)):
        given = {"w": np.ones((1, 3), np.int8), "b": np.array([0, bias, 0], np.int32)}
        (line,) = certify(write_onnx(tmp_path / f"{bias}.onnx", nodes, {"x": [2, 1]}, **given)).lines
        assert (line.overflow.holds, line.overflow.worst) == (holds, bias + 255)


def test_a_bias_that_is_no_constant_is_not_proved(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = make_onnx(tmp_path / "m.onnx", "qgemm", np.ones((8, 3), np.int8))
    model = onnx.load(str(path))
    model.graph.node[-1].input[6] = "b"
    model.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.INT32, [3]))
    onnx.save(model, str(path))
    certificate = certify(path)
    assert certificate.unread == ["product (QGemm)"] and not certificate.holds


QDQ = ("DequantizeLinear x xs xz", "DequantizeLinear w ws wz")


def make_qdq(path: Path, product: str, bias: np.ndarray, scale: float = 0.5, **weight: np.ndarray) -> Path:
    """A product of dequantized tensors, in unit 2^-7, and a bias in a Gemm or an Add."""
    onnx = pytest.importorskip("onnx")
    nodes = [make_node(*one.split(" ", 1), name=out, out=out) for one, out in zip(QDQ, "ab", strict=True)]
    if product == "Gemm":
        nodes.append(make_node("Gemm", "a b bias", out="t"))
    else:
        nodes += [make_node("MatMul", "a b", out="p"), make_node("Add", "p bias", "add", "t")]
    nodes.append(make_node("QuantizeLinear", "t ys xz", "quantize"))
    given = {"xs": np.float32(2**-3), "xz": np.uint8(0), "ws": np.float32(2**-4), "wz": np.int8(0)}
    given |= {"w": np.ones((1, 3), np.int8), "ys": np.float32(scale), "bias": bias}
    assert onnx is not None
    return write_onnx(path, nodes, {"x": [2, 1]}, **(given | weight))


@pytest.mark.parametrize("product", ["Gemm", "MatMul"])
def test_biases_of_any_size_and_shape(product: str, tmp_path: Path) -> None:
    for bias, worst in (
        (np.full((1, 3), 2.0, np.float32), 256 + 255),
        (np.float32(2), 256 + 255),
        (np.full(3, 1e30, np.float32), 2**61),
        (np.full(3, -1e30, np.float32), -(2**61)),
        (np.full((2, 3), 1e30, np.float32), 255),  # for each row: a sum of floats in every engine
    ):
        (line,) = certify(make_qdq(tmp_path / "m.onnx", product, bias)).lines
        assert line.overflow.worst == worst and line.overflow.holds == (abs(worst) < 2**31)


def test_numbers_that_no_scale_or_bias_has_are_refused_by_node(tmp_path: Path) -> None:
    one = np.zeros(3, np.float32)
    for path, said in (
        (make_qdq(tmp_path / "a.onnx", "Gemm", one, 0.0), r"node product \(Gemm\): scale 0.0"),
        (make_qdq(tmp_path / "b.onnx", "Gemm", one, np.nan), r"node product \(Gemm\): scale nan"),
        (make_qdq(tmp_path / "c.onnx", "Gemm", one, -1.0), r"node product \(Gemm\): scale -1.0"),
        (make_qdq(tmp_path / "d.onnx", "Gemm", one + np.float32(np.nan)), r"node product \(Gemm\): its bias holds nan"),
    ):
        with pytest.raises(SpecError, match=said):
            certify(path)


def test_a_vector_of_weights_is_a_column(tmp_path: Path) -> None:
    vector = np.array([-128, 127, 5], np.int8)
    path = make_qdq(tmp_path / "m.onnx", "MatMul", np.float32(0), w=vector)
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(path))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    onnx.save(model, str(path))
    (line,) = certify(path).lines
    assert (line.depth, line.columns, line.overflow.worst) == (3, 1, 255 * 132)


def test_products_without_an_element_are_named(tmp_path: Path) -> None:
    for shape in ((0, 3), (3, 0)):
        node = make_node("MatMulInteger", "x w")
        path = write_onnx(tmp_path / "m.onnx", [node], {"x": [2, shape[0]]}, w=np.zeros(shape, np.int8))
        assert certify(path).unread == ["product (MatMulInteger)"]


def test_products_of_wide_integers_are_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    nodes = [make_node("Cast", "x", "cast", "a", to=onnx.TensorProto.INT64), make_node("MatMul", "a w")]
    path = write_onnx(tmp_path / "m.onnx", nodes, {"x": [2, 3]}, w=np.ones((3, 2), np.int64))
    assert certify(path).unread == ["product (MatMul)"]


def test_data_of_an_artifact_whose_values_have_zero_points_by_channel(tmp_path: Path) -> None:
    model = build("opt_headless", batch_size=2)
    low = lower_model(model.spec, model.params, [model.batch], model.batch, "values")
    recipe = make_recipe("values", model.spec)
    artifact = Artifact(model.spec, recipe, low.profile, Nonlinear.TABLE, dict(low.constants), {})
    save_artifact(tmp_path / "m.qtx", artifact)
    lines = certify(tmp_path / "m.qtx", ["avx2"], [model.batch]).lines
    tally = next(one for one in lines if one.name == "layer.0.attn.context").tally
    recorded: dict[str, np.ndarray] = {}
    IntegerModel(artifact.spec, artifact.constants, artifact.quants, artifact.profile).run(
        model.batch, lambda name, value: recorded.setdefault(name, value)
    )
    acc = recorded["layer.0.attn.context.accumulator"].astype(np.float64)
    product = next(one for one in read_artifact_products(artifact) if one.name == "layer.0.attn.context")
    scale = 1.0 if product.right_scale is None else product.right_scale.reshape(acc.shape[-3], 1, acc.shape[-1])
    assert tally is not None and tally.size == pytest.approx(np.square(acc * scale).sum(), rel=1e-5)  # float32


def test_products_inside_a_branch_and_convolutions_by_channel_are_named(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    h, t = onnx.helper, onnx.TensorProto
    inside = [h.make_graph([make_node("MatMulInteger", "x w", name, name)], name, [], []) for name in ("p", "q")]
    for branch in inside:
        branch.output.append(h.make_tensor_value_info(branch.name, t.INT32, None))
    branches = {"then_branch": inside[0], "else_branch": inside[1]}
    path = write_onnx(
        tmp_path / "m.onnx",
        [make_node("If", "c", "if", **branches)],
        {"x": [2, 3]},
        w=np.ones((3, 2), np.int8),
        c=np.array(True),
    )
    assert sorted(certify(path).unread) == ["if/p (MatMulInteger)", "if/q (MatMulInteger)"]
    nodes = [
        make_node("DequantizeLinear", "x xs", "a", "a"),
        make_node("DequantizeLinear", "w ws", "b", "b", axis=0),
        make_node("Conv", "a b", "conv"),
    ]
    given = {"xs": np.float32(1), "ws": np.ones(5, np.float32), "w": np.ones((5, 3, 1, 1), np.int8)}
    path = write_onnx(tmp_path / "c.onnx", nodes, {"x": [1, 3, 4, 4]}, **given)
    assert certify(path).unread == ["conv (Conv)"]
