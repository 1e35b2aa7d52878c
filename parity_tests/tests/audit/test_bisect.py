"""Two executions of one model: the first tensor in which they differ, and the rule that does it, against what was
planted and against real engines."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects import integer_models
from parity_tests.subjects.tflite_files import write_layers
from parity_tests.tests.shell import call
from qtx.audit.bisect.executions import parse_execution
from qtx.audit.bisect.inputs import make_inputs
from qtx.audit.bisect.search import Bisection, bisect
from qtx.files.artifact import Artifact, load_artifact, save_artifact
from qtx.graphs.tflite import read_graph
from qtx.recipes.named import recipe
from qtx_ref.profiles import to_tree
from qtx_ref.random import stream
from qtx_ref.spec import OPERATIONS, QTX, Dtype, HighProduct, Nonlinear, Products, Profile, Rounding


def write_artifact(path: Path, name: str, recipe_name: str = "w8a8") -> Path:
    """A small model as a .qtx file."""
    low = integer_models.small(name, recipe_name, "qtx", Nonlinear.TABLE)
    made = Artifact(low.spec, recipe(recipe_name, low.spec), low.profile, Nonlinear.TABLE, dict(low.constants))
    save_artifact(path, made)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("bisect") / "m.qtx", "vit_plain")


def write_profile(path: Path, made: Profile) -> Path:
    sources = dict.fromkeys((*OPERATIONS, "unseen"), "planted")
    path.write_text(json.dumps(to_tree(made, sources)), encoding="utf-8")
    return path


def compare(a: str, b: str, seed: int = 0) -> Bisection:
    executions = parse_execution(a), parse_execution(b)
    return bisect(*executions, make_inputs(executions, seed))


PLANTED = {  # a rule, and the first tensor that it reaches
    "quantize.rounding": (replace(QTX, quantize=replace(QTX.quantize, rounding=Rounding.FLOOR)), "embed.image"),
    "quantize.arithmetic": (replace(QTX, quantize=replace(QTX.quantize, arithmetic=Dtype.BFLOAT16)), "embed.image"),
    "matmul.products": (replace(QTX, matmul=replace(QTX.matmul, products=Products.PAIRS16)), ".accumulator"),
    "requantize.product": (
        replace(QTX, requantize=replace(QTX.requantize, product=HighProduct.HALF_UP)),
        "embed.patch",
    ),
    "requantize.rounding": (replace(QTX, requantize=replace(QTX.requantize, rounding=Rounding.FLOOR)), "embed.patch"),
    "add.rounding": (replace(QTX, add=replace(QTX.add, rounding=Rounding.TOWARD_ZERO)), "embed.sum"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_rule_is_found(artifact, name, tmp_path) -> None:
    made, first = PLANTED[name]
    found = compare(f"{artifact}", f"{artifact}@profile={write_profile(tmp_path / 'p.json', made)}")
    assert found.first is not None and found.first.name.endswith(first)
    assert [axis.field for axis in found.axes] == [name] and not found.rivals
    assert all(equal == count for equal, count in found.fits.values())


def test_two_fields_of_one_rule_are_both_named(tmp_path) -> None:
    """gemmlowp's two roundings beside one: neither field alone makes these codes."""
    file = write_artifact(tmp_path / "m.qtx", "bert_gate_mlp")
    both = replace(QTX.requantize, product=HighProduct.HALF_UP, rounding=Rounding.FLOOR)
    name = write_profile(tmp_path / "p.json", replace(QTX, requantize=both))
    found = compare(f"{file}", f"{file}@profile={name}")
    fields = {axis.field for axes in (found.axes, *found.rivals) for axis in axes}
    assert "requantize.rounding" in fields and found.first is not None


def test_the_backends_part_nowhere(artifact) -> None:
    found = compare(f"{artifact}", f"{artifact}@torch")
    assert found.first is None and found.compared > 50


def test_a_changed_constant_is_named(artifact, tmp_path) -> None:
    """A weight that is off by one code: the same rules on other constants."""
    made = load_artifact(artifact)
    weight = made.constants["layer.1.ffn.hidden.weight"].copy()
    weight[0, 0] += 1 if weight[0, 0] < 0 else -1
    save_artifact(tmp_path / "n.qtx", replace(made, constants=made.constants | {"layer.1.ffn.hidden.weight": weight}))
    found = compare(f"{artifact}", f"{tmp_path / 'n.qtx'}")
    assert found.first is not None and found.first.name == "layer.1.ffn.hidden.accumulator"
    assert found.constants == ["layer.1.ffn.hidden.weight"] and not found.axes
    # whose rules differ besides: none of them makes one execution's accumulator of the other's codes
    found = compare(f"{artifact}", f"{tmp_path / 'n.qtx'}@profile=litert-2.3-xnnpack")
    assert found.first is not None and found.first.name == "layer.1.ffn.hidden.accumulator"
    assert found.constants == ["layer.1.ffn.hidden.weight"] and not found.axes and not found.unexplained


def test_another_kind_of_requantization_is_one_cause(artifact) -> None:
    found = compare(f"{artifact}@profile=float32", f"{artifact}@profile=litert-2.3-optimized")
    assert [axis.field for axis in found.axes] == ["requantize"] and not found.rivals
    assert found.axes[0].a == "FloatProduct (dtype float32, order ratio, zero_point after, rounding half_even)"


def test_integers_beside_their_simulation(artifact) -> None:
    found = compare(f"{artifact}", f"{artifact}@fake", seed=3)
    assert found.compared > 20
    if found.first is not None:
        assert found.first.largest == 1 and "float result" in found.unexplained
    simulated = compare(f"{artifact}@fake", f"{artifact}@fake,torch", seed=3)
    assert not [part for part in simulated.growth if part.name != "output" and part.largest > 1]


def test_litert_reference_beside_xnnpack(tmp_path) -> None:
    """Scales that are powers of two make ties: half away from zero there, half to even here."""
    pytest.importorskip("ai_edge_litert")
    file = write_layers(tmp_path / "t.tflite", rows=64, ties=True)
    found = compare(f"{file}@reference", f"{file}@xnnpack")
    assert found.first is not None and found.first.name == "y0" and found.operation == "FULLY_CONNECTED"
    # half up fits as well: of positive ties alone, behind a ReLU, what LiteRT is known to do is the cause
    assert [(axis.field, axis.a, axis.b) for axis in found.axes] == [("requantize.rounding", "half_away", "half_even")]
    assert all(equal == count for equal, count in found.fits.values())
    ours = compare(f"{file}@qtx_ref,profile=litert-2.3-xnnpack", f"{file}@xnnpack")
    assert ours.first is None and ours.compared == 5


@pytest.mark.parametrize("engine", ["reference", "qtx_ref"])
def test_a_changed_constant_of_a_tflite_file_is_named(engine, tmp_path) -> None:
    pytest.importorskip("ai_edge_litert")
    file, other = write_layers(tmp_path / "t.tflite", rows=16), tmp_path / "u.tflite"
    weight = read_graph(file).tensors["w1"].data.tobytes()
    changed = weight[:-1] + bytes([weight[-1] ^ 64])
    other.write_bytes(file.read_bytes().replace(weight, changed))
    found = compare(f"{file}@{engine}", f"{other}@{engine}")
    assert found.first is not None and found.first.name == "y1"
    assert found.constants == ["w1"] and not found.axes and not found.unexplained


def test_changed_constants_of_an_onnx_file_are_named(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    file, other = write_product(tmp_path / "p.onnx"), tmp_path / "o.onnx"
    model = onnx.load(str(file))
    for one in model.graph.initializer:
        if one.name == "ys":
            one.CopyFrom(onnx.numpy_helper.from_array(np.float32(2.75), "ys"))
    onnx.save(model, str(other))
    found = compare(f"{file}@reference", f"{other}@qtx_ref,profile=onnx-reference")
    assert found.first is not None and found.first.name == "y"
    assert found.constants == ["ys"] and not found.axes and not found.unexplained


def test_onnxruntime_on_a_cpu_without_vnni(tmp_path) -> None:
    """Pairs of u8 x s8 saturate in int16 there; runs where qemu-user is installed."""
    pytest.importorskip("onnxruntime")
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64, of qemu-user, is not installed")
    file = write_product(tmp_path / "p.onnx")
    found = compare(f"{file}@all", f"{file}@all,cpu=Haswell")
    assert found.first is not None and found.first.name == "y"
    assert [axis.field for axis in found.axes] == ["matmul.products"]


def write_product(path: Path) -> Path:
    """One QLinearMatMul whose pairs leave int16."""
    onnx = pytest.importorskip("onnx")
    helper, kinds, rng = onnx.helper, onnx.TensorProto, stream(0, "pairs")
    constants = {
        "xs": np.float32(0.01),
        "xz": np.uint8(3),
        "w": rng.integers(90, 128, (64, 8)).astype(np.int8),
        "ws": np.float32(0.02),
        "wz": np.int8(0),
        "ys": np.float32(2.5),
        "yz": np.uint8(0),
    }
    node = helper.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"], name="product")
    graph = helper.make_graph(
        [node],
        "pairs",
        [helper.make_tensor_value_info("x", kinds.UINT8, [4, 64])],
        [helper.make_tensor_value_info("y", kinds.UINT8, [4, 8])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


def test_rules_of_an_engine_are_found_in_its_own_arithmetic(tmp_path) -> None:
    """The ONNX reference adds the zero point before it rounds: with an odd one, ties go the other way."""
    pytest.importorskip("onnxruntime")
    file = write_product(tmp_path / "p.onnx")
    found = compare(f"{file}@reference", f"{file}@qtx_ref,profile=onnx-reference")
    assert found.first is None and found.compared == 1


def test_the_command(artifact, tmp_path) -> None:
    profile = write_profile(tmp_path / "p.json", PLANTED["add.rounding"][0])
    result = call("audit", "bisect", artifact, f"{artifact}@profile={profile}", "--json", tmp_path / "b.json")
    assert result.exit_code == 1 and "cause: add.rounding: half_up in A, toward_zero in B" in result.output
    made = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["bisection"]
    assert made["axes"] == [{"field": "add.rounding", "a": "half_up", "b": "toward_zero"}]
    assert call("audit", "bisect", artifact, artifact).exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("m.qtx@nosuch", "'nosuch' says nothing"),
        ("m.onnx@all,profile=qtx", "no such file"),
        ("m.bin", "is none of"),
        ("m.qtx@profile=nosuch", "known profiles are"),
        ("m.qtx@torch,ref", "'ref' after 'torch'"),
    ],
)
def test_what_cannot_be_run_is_refused(artifact, words, said, tmp_path) -> None:
    name = words.replace("m.qtx", str(artifact)).replace("m.onnx", str(tmp_path / "m.onnx"))
    result = call("audit", "bisect", artifact, name)
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


def test_inputs_that_do_not_fit_are_refused_in_a_line(tmp_path) -> None:
    """Of another dtype they are converted, as an ONNX file's are."""
    pytest.importorskip("ai_edge_litert")
    file, data = write_layers(tmp_path / "t.tflite", rows=3), tmp_path / "x.npz"
    for x, status, said in (
        (np.zeros((3, 32)), 0, "5 tensors, all equal"),
        (np.zeros((3, 31), np.float32), 2, "operator FULLY_CONNECTED that makes y0"),
        (np.array(["a"]), 2, "input x is <U1: the file takes float32"),
    ):
        np.savez(data, x=x)
        profile = "qtx_ref,profile=litert-2.3-reference"
        result = call("audit", "bisect", f"{file}@{profile}", f"{file}@reference", "--data", data)
        assert result.exit_code == status and said in result.output, result.output


def test_an_onnx_engine_has_no_switches_of_torch(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    file = write_product(tmp_path / "p.onnx")
    result = call("audit", "bisect", f"{file}@all", f"{file}@all,cpu=avx2")
    assert result.exit_code == 2 and "CPU avx2 is a switch of torch, torchao" in result.output
