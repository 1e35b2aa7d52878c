"""ONNX files of other tools, node by node: every code is the engine's, supported operators are qtx_ref's own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtx.audit.certificate import certify
from qtx.engines.process import EngineRefusal
from qtx.graphs.operators import OPERATORS
from qtx.graphs.reading import read_graph
from qtx.graphs.running import run_engine, run_file
from qtx.graphs.walking import walk
from qtx_ref.profiles import profile
from qtx_ref.spec import (
    QTX,
    Bias,
    MatmulRule,
    Overflow,
    Products,
    Profile,
    SpecError,
)

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
H, T = onnx.helper, onnx.TensorProto
FLOATS = replace(profile("float32"), bias=Bias.FLOAT_AFTER)  # as a QDQ file says


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemm with a bias, ReLU, MatMul, an Add of a bias, a residual Add, Softmax, MatMul, in float."""
    rng = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> Any:
        return onnx.numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)

    nodes = [
        H.make_node("Gemm", ["x", "w1", "b1"], ["h1"], transB=1),
        H.make_node("Relu", ["h1"], ["r"]),
        H.make_node("MatMul", ["r", "w2"], ["m"]),
        H.make_node("Add", ["m", "b2"], ["h2"]),
        H.make_node("Add", ["h2", "x"], ["s"]),
        H.make_node("Softmax", ["s"], ["p"]),
        H.make_node("MatMul", ["p", "w3"], ["y"]),
    ]
    ends = [H.make_tensor_value_info(name, T.FLOAT, ["N", n]) for name, n in (("x", 16), ("y", 8))]
    shapes = {"w1": (32, 16), "b1": (32,), "w2": (32, 16), "b2": (16,), "w3": (16, 8)}
    constants = [constant(name, *shape) for name, shape in shapes.items()]
    graph = H.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    path = tmp_path_factory.mktemp("walk") / "float.onnx"
    onnx.save(H.make_model(graph, opset_imports=[H.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def draw(seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(0, 1, (8, 16)).astype(np.float32)}


def quantize(source: Path, form: str) -> Path:
    """What onnxruntime's tools make of it."""
    tools = pytest.importorskip("onnxruntime.quantization")
    path = source.with_name(f"{form}.onnx")

    class Reader(tools.CalibrationDataReader):
        batches = iter([draw(2), draw(3)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    kinds = tools.QuantType
    options: dict[str, dict[str, Any]] = {
        "qdq": {},
        "channels": {"per_channel": True},
        "unsigned": {"activation_type": kinds.QUInt8},
        "wide": {"activation_type": kinds.QUInt16},
        "operators": {"quant_format": tools.QuantFormat.QOperator},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # of the tools, about preprocessing
        if form == "dynamic":
            tools.quantize_dynamic(str(source), str(path))
        else:
            tools.quantize_static(str(source), str(path), Reader(), **options[form])
        logging.disable(logging.NOTSET)
    return path


def list_codes(
    path: Path, rules: Profile, engine: dict[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Each tensor of integers that both have: its node's operator and who computed it, and the two values."""
    for result in walk(path, draw(), rules):
        for name, value in result.outputs.items():
            if name in engine and value.dtype.kind in "iu":
                yield result.op, result.by, value, engine[name]


@pytest.mark.parametrize("form", ["qdq", "channels", "unsigned", "operators", "dynamic"])
def test_every_code_of_a_quantized_file_is_onnxruntimes(model: Path, form: str) -> None:
    """Products and requantizations are integers here and floats there: codes are equal on these inputs, which a float32
    sum of 32 products moves by less than they are from a tie."""
    path = quantize(model, form)
    engine = run_file(path, draw(), "disable", True)
    codes = list(list_codes(path, profile("float32"), engine.values))
    assert engine.changed == () and len(codes) >= 6
    for op, by, ours, theirs in codes:
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), op
        assert by == "qtx_ref" or op in ("QLinearSoftmax", "Softmax")


def test_a_file_that_onnxruntime_has_fused(model: Path, tmp_path: Path) -> None:
    """DynamicQuantizeMatMul and what else its optimiser writes, QGemm and QLinearAdd from its operator form."""
    for form, wanted in (("dynamic", "DynamicQuantizeMatMul"), ("operators", "QGemm"), ("qdq", "QLinearMatMul")):
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / f"{form}.onnx")
        runtime.InferenceSession(str(quantize(model, form)), options, providers=["CPUExecutionProvider"])
        engine = run_file(tmp_path / f"{form}.onnx", draw(), "disable", True).values
        results = list(walk(tmp_path / f"{form}.onnx", draw(), profile("float32")))
        assert wanted in {one.op for one in results}
        assert {one.op for one in results if one.by == "engine"} <= {"Softmax", "QLinearSoftmax", "Gather"}
        for one in results:
            for name, value in one.outputs.items():
                if name in engine and value.dtype.kind in "iu":
                    assert np.array_equal(value, engine[name]), (form, one.op)
        last = results[-1].outputs["y"]
        assert np.abs(last - engine["y"]).max() <= 1e-6 * np.abs(last).max()  # the order of three float32 factors


def test_16_bit_codes_are_within_one_of_the_engines_floats(model: Path) -> None:
    """Each node given the engine's codes. Its float32 products have 24 bits, the exact ones up to 37: codes of 16 bits
    differ where that reaches a tie, and by one."""
    path = quantize(model, "wide")
    engine = run_file(path, draw(), "disable", True).values
    given = {name: value for name, value in engine.items() if value.dtype == np.uint16}
    differ = []
    for result in walk(path, draw(), QTX, given=given):
        for name, value in result.outputs.items():
            if name in given:
                differ += np.abs(value.astype(int) - given[name].astype(int)).ravel().tolist()
    assert max(differ) <= 1 and np.mean(differ) < 0.02


def test_what_the_engine_computes_is_listed(model: Path) -> None:
    by = {result.op: result.by for result in walk(quantize(model, "qdq"), draw())}
    assert by.pop("Softmax") == "engine" and set(by.values()) == {"qtx_ref"}
    assert {op for _, op in OPERATORS} >= set(by)


def test_pairs_saturate_under_a_profile_that_says_so(tmp_path: Path) -> None:
    """The rule reaches the product; by hand: 255 * 127 + 255 * 127 becomes 32767."""
    constants = [
        onnx.numpy_helper.from_array(value, name)
        for name, value in {
            "s": np.float32(1),
            "z": np.uint8(0),
            "w": np.array([[127], [127]], np.int8),
            "v": np.int8(0),
            "one": np.float32(1),
        }.items()
    ]
    nodes = [
        H.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        H.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        H.make_node("DequantizeLinear", ["w", "one", "v"], ["e"]),
        H.make_node("MatMul", ["d", "e"], ["y"]),
    ]
    ends = [H.make_tensor_value_info(name, T.FLOAT, shape) for name, shape in (("x", [1, 2]), ("y", [1, 1]))]
    path = tmp_path / "pair.onnx"
    onnx.save(H.make_model(H.make_graph(nodes, "g", ends[:1], ends[1:], constants), ir_version=10), str(path))
    pairs = replace(QTX, matmul=MatmulRule(products=Products.PAIRS16, run=1, overflow=Overflow.REPORT))
    x = {"x": np.full((1, 2), 300, np.float32)}
    assert [list(walk(path, x, rules))[-1].outputs["y"].item() for rules in (QTX, pairs)] == [64770, 32767]


def test_a_factor_and_a_mask_free_path_to_the_scores(tmp_path: Path) -> None:
    """Q K^T / sqrt(K) and its requantization, K transposed after it was dequantized: integers all the way."""
    rng = np.random.default_rng(5)
    constants = [
        onnx.numpy_helper.from_array(value, name)
        for name, value in {
            "s": np.float32(0.02),
            "z": np.int8(3),
            "root": np.float32(np.sqrt(16)),
            "t": np.float32(0.05),
            "u": np.int8(-5),
        }.items()
    ]
    nodes = []
    for name in ("a", "b"):
        nodes += [
            H.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}q"]),
            H.make_node("DequantizeLinear", [f"{name}q", "s", "z"], [f"{name}d"]),
        ]
    nodes += [
        H.make_node("Transpose", ["bd"], ["bt"], perm=[0, 1, 3, 2]),
        H.make_node("MatMul", ["ad", "bt"], ["m"]),
        H.make_node("Div", ["m", "root"], ["scaled"]),
        H.make_node("QuantizeLinear", ["scaled", "t", "u"], ["y"]),
    ]
    shape = [2, 3, 5, 16]
    ends = [H.make_tensor_value_info(name, T.FLOAT, shape) for name in ("a", "b")]
    result = H.make_tensor_value_info("y", T.INT8, [2, 3, 5, 5])
    path = tmp_path / "scores.onnx"
    onnx.save(H.make_model(H.make_graph(nodes, "g", ends, [result], constants), ir_version=10), str(path))
    x = {name: rng.normal(0, 1, shape).astype(np.float32) for name in ("a", "b")}
    results = list(walk(path, x))
    assert all(one.by == "qtx_ref" for one in results)
    codes = {
        name: value.astype(np.int64) - 3 for one in results[:4] for name, value in one.outputs.items() if name[1] == "q"
    }
    acc = codes["aq"] @ codes["bq"].swapaxes(-1, -2)
    M = np.float64(np.float32(0.02)) ** 2 / 4 / np.float64(np.float32(0.05))
    want = np.clip(np.floor(acc * M + 0.5) - 5, -128, 127)
    assert np.array_equal(results[-1].outputs["y"], want)


def test_each_node_sees_what_was_given(model: Path) -> None:
    """With another execution's tensors given, a difference does not grow: each node is judged alone."""
    path = quantize(model, "qdq")
    engine = run_file(path, draw(), "disable", True).values
    free = [r.outputs for r in walk(path, {"x": draw()["x"] + 1})]
    codes = {name: value for name, value in engine.items() if value.dtype.kind in "iu"}
    forced = [r.outputs for r in walk(path, {"x": draw()["x"] + 1}, profile("float32"), given=codes)]
    first = next(iter(codes))
    differ = [
        name
        for made in forced
        for name, value in made.items()
        if name in codes and not np.array_equal(value, codes[name])
    ]
    assert differ == [first]  # the input's, which are other values
    assert len([n for made in free for n, v in made.items() if n in codes and not np.array_equal(v, codes[n])]) > 3


def test_blocks_and_four_bits(tmp_path: Path) -> None:
    """A weight of int4 in blocks of 4 along the sum is dequantized as the engine does; its product is in floats."""
    rng = np.random.default_rng(3)
    code = onnx.helper.make_tensor("w", T.INT4, [8, 3], rng.integers(-8, 8, 24).tolist())
    scale = onnx.numpy_helper.from_array(rng.uniform(0.1, 1, (2, 3)).astype(np.float32), "s")
    nodes = [
        H.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=4),
        H.make_node("MatMul", ["x", "d"], ["y"]),
    ]
    ends = [H.make_tensor_value_info(name, T.FLOAT, shape) for name, shape in (("x", [2, 8]), ("y", [2, 3]))]
    graph = H.make_graph(nodes, "g", ends[:1], ends[1:], [code, scale])
    path = tmp_path / "int4.onnx"
    onnx.save(H.make_model(graph, opset_imports=[H.make_opsetid("", 21)], ir_version=10), str(path))
    x = {"x": rng.normal(0, 1, (2, 8)).astype(np.float32)}
    first, second = walk(path, x)
    assert (first.by, second.by) == ("qtx_ref", "engine")
    engine = run_file(path, x, "disable", True).values
    assert np.array_equal(first.outputs["d"], engine["d"]) and np.array_equal(second.outputs["y"], engine["y"])


def test_torch_writes_what_is_walked(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    fake = torch.fake_quantize_per_tensor_affine

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(16, 8), torch.nn.Linear(8, 4)
            self.register_buffer("scale", torch.full((8,), 0.002))
            self.register_buffer("zero", torch.zeros(8, dtype=torch.int32))

        def forward(self, x: Any) -> Any:
            weight = torch.fake_quantize_per_channel_affine(self.first.weight, self.scale, self.zero, 0, -128, 127)
            y = torch.nn.functional.linear(fake(x, 0.02, 3, -128, 127), weight, self.first.bias)
            y = fake(torch.relu(y), 0.01, 0, 0, 255)
            weight = fake(self.second.weight, 0.003, 0, -128, 127)
            return fake(torch.nn.functional.linear(y, weight, self.second.bias), 0.01, 5, -128, 127)

    torch.manual_seed(0)
    path = tmp_path / "torch.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.onnx.export(
            Small().eval(),
            (torch.zeros(8, 16),),
            path,
            dynamo=True,
            input_names=["x"],
            external_data=False,
            verbose=False,
        )
        logging.disable(logging.NOTSET)
    engine = run_file(path, draw(), "disable", True).values
    results = list(walk(path, draw(), FLOATS))
    assert {one.by for one in results} == {"qtx_ref"}
    codes = [(v, engine[n]) for one in results for n, v in one.outputs.items() if n in engine and v.dtype.kind in "iu"]
    assert len(codes) == 5 and all(np.array_equal(ours, theirs) for ours, theirs in codes)
    assert [(line.depth, line.columns) for line in certify(path).lines] == [(16, 8), (8, 4)]  # quantized in the file


# --- a whole file in an engine ----------------------------------------------------------------------------------------


def test_a_fused_tensor_is_absent_and_the_output_unchanged(model: Path) -> None:
    path = quantize(model, "qdq")
    plain = run_file(path, draw(), "all", False).values
    shown = run_engine(path, draw(), "all")  # in a worker
    assert shown.changed == () and np.array_equal(shown.values["y"], plain["y"])
    whole = run_file(path, draw(), "disable", True).values
    assert "m" in whole and "m" not in shown.values and len(shown.values) > 3


def test_a_change_by_showing_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an engine that gives another output once intermediates are shown."""
    from qtx.graphs import running

    opened = running.open_session

    class Other:
        def __init__(self, session: Any) -> None:
            self.session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run(self, names: list[str] | None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            made = self.session.run(names, feeds)
            return made if names is None else [made[0] + np.float32(1e-7), *made[1:]]

    monkeypatch.setattr(running, "open_session", lambda *given: Other(opened(*given)))
    assert run_file(model, draw(), "disable", True).changed == ("y",)


def test_the_onnx_reference_shows_all(model: Path) -> None:
    path = quantize(model, "qdq")
    shown = run_file(path, draw(), "reference", True)
    assert shown.changed == () and {"m", "p", "y"} <= set(shown.values)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused(model: Path) -> None:
    for inputs, said in (
        ({}, "input x of .* is missing"),
        ({"x": np.zeros((1, 16))}, "input x is float64"),
        ({**draw(), "z": np.zeros(1)}, "input z is unknown"),
    ):
        with pytest.raises(SpecError, match=said):
            list(walk(model, inputs))
    with pytest.raises(SpecError, match="level is 'fastest'"):
        list(walk(model, draw(), level="fastest"))
    with pytest.raises(SpecError, match="level is 'fastest'"):
        run_engine(model, draw(), "fastest")


def test_a_node_that_no_engine_takes_is_named(model: Path, tmp_path: Path) -> None:
    graph = read_graph(model)
    graph.model.graph.node[5].op_type = "Softmaxx"
    onnx.save(graph.model, str(tmp_path / "odd.onnx"))
    with pytest.raises(EngineRefusal, match=r"node p \(Softmaxx\)"):
        list(walk(tmp_path / "odd.onnx", draw()))


def test_a_node_that_lacks_an_input_is_named(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(quantize(model, "qdq")))
    node = next(one for one in proto.graph.node if one.op_type == "QuantizeLinear")
    del node.input[:]
    onnx.save(proto, str(tmp_path / "short.onnx"))
    with pytest.raises(SpecError, match=rf"node {node.name} \(QuantizeLinear\) is not as ONNX has it"):
        list(walk(tmp_path / "short.onnx", draw()))


def test_a_scale_of_zero_is_refused_with_its_node(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(quantize(model, "qdq")))
    named = proto.graph.node[0]
    for one in proto.graph.initializer:
        if one.name == named.input[1]:
            one.CopyFrom(onnx.numpy_helper.from_array(np.float32(0), one.name))
    onnx.save(proto, str(tmp_path / "zero.onnx"))
    with pytest.raises(SpecError, match=rf"node {named.name} \({named.op_type}\): scale"):
        list(walk(tmp_path / "zero.onnx", draw()))
