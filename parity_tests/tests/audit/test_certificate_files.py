"""Certificates of files: an artifact and ONNX files, planted faults, what the command prints, and what engines say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects.integer_models import lower_model, make_recipe
from parity_tests.subjects.small_models import build
from parity_tests.tests.shell import call
from qtx.audit.certificate import certify, confirm, list_engines, open_products
from qtx.audit.certificate_artifact import read_artifact_products, run_artifact
from qtx.audit.certificate_bounds import TARGETS, Operand, Product, check_sums
from qtx.engines import paths
from qtx.files.artifact import Artifact, load_artifact, save_artifact
from qtx_ref.integer.products import matmul_pairs16
from qtx_ref.model import IntegerModel
from qtx_ref.spec import Nonlinear, SpecError

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


# --- ONNX -------------------------------------------------------------------------------------------------------------


def make_onnx(path: Path, form: str, weight: np.ndarray, shape: tuple[int, int] = (4, 8)) -> Path:
    """A product of uint8 activations with int8 weights (K, N), in one of the forms that tools write."""
    onnx = pytest.importorskip("onnx")
    h, t = onnx.helper, onnx.TensorProto

    def constant(name: str, value: np.ndarray) -> object:
        return onnx.numpy_helper.from_array(np.asarray(value), name)

    scale = np.float32(0.02)
    constants = [constant("xs", scale), constant("xz", np.uint8(7)), constant("w", weight), constant("wz", np.int8(0))]
    constants += [constant("ws", np.float32(0.01)), constant("ys", np.float32(0.5)), constant("yz", np.uint8(9))]
    quantize = h.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="xq")
    domain = ""
    if form == "qdq":
        turned = constant("w", weight.T)  # as torch keeps them
        constants[2] = turned
        nodes = [
            h.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
            h.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
            h.make_node("MatMul", ["xd", "wt"], ["m"], name="product"),
            h.make_node("QuantizeLinear", ["m", "ys", "yz"], ["y"]),
        ]
    elif form == "qlinear":
        nodes = [h.make_node("QLinearMatMul", ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"], name="product")]
    elif form == "qgemm":
        domain, inputs = "com.microsoft", ["xq", "xs", "xz", "w", "ws", "wz", "", "ys", "yz"]
        nodes = [h.make_node("QGemm", inputs, ["y"], name="product", domain=domain)]
    else:
        nodes = [h.make_node("MatMulInteger", ["xq", "w", "xz", "wz"], ["y"], name="product")]
    kind = t.INT32 if form == "integer" else t.UINT8
    graph = h.make_graph(
        [quantize, *nodes],
        "g",
        [h.make_tensor_value_info("x", t.FLOAT, shape)],
        [h.make_tensor_value_info("y", kind, None)],
        constants,
    )
    opsets = [h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)]
    onnx.save(h.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


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
