"""Exported ONNX graphs: integers to the bit in every engine, QDQ node by node."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects.integer_models import lower_model, make_recipe
from parity_tests.subjects.small_models import build
from qtx.files.artifact import Artifact, load_artifact
from qtx.graphs.export import make_model
from qtx.graphs.export_check import check_model, random_batch, run_reference
from qtx.graphs.export_graph import OPSET, Graph, Value
from qtx.graphs.export_requantize import round_float, shift_rounded
from qtx.graphs.export_run import expose, list_engines, run_engine
from qtx.graphs.walking import walk
from qtx_ref.integer.lowering import lower
from qtx_ref.quant.rounding import round_integer
from qtx_ref.spec import (
    QTX,
    AddRule,
    Beyond,
    Bias,
    Dtype,
    FloatProduct,
    HighProduct,
    LeftShift,
    Nonlinear,
    Order,
    Rounding,
    ZeroPoint,
)

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[3]
PAGE, FIXTURES = ROOT / "docs/onnx.md", ROOT / "parity_tests/fixtures/v0.1"
EXTENDED, REFERENCE = "onnxruntime-extended", "onnx-reference"
FEW = ("onnxruntime-disable", EXTENDED)


def make(name, *choice):
    """A small artifact and a batch with padding."""
    model = build(name, batch_size=4)
    low = lower_model(model.spec, model.params, [model.batch], model.batch, *choice)
    nonlinear = choice[2] if len(choice) > 2 else Nonlinear.TABLE
    recipe = make_recipe(choice[0] if choice else "w8a8", model.spec, nonlinear)
    return Artifact(model.spec, recipe, low.profile, nonlinear, dict(low.constants), {}), model.batch


def make_under(name, **rules):
    """The same under a profile of its own."""
    model = build(name, batch_size=4)
    low = lower_model(model.spec, model.params, [model.batch], model.batch)
    own = replace(QTX, **rules)
    constants = lower(low.spec, low.params, low.quants, low.ranges, own)
    return Artifact(low.spec, make_recipe("w8a8", low.spec), own, Nonlinear.TABLE, constants, {}), model.batch


CHOICES = (  # the first three in every engine; all small models: python -m parity_tests.long.onnx_export --small
    ("bert_clipped_alpha",),
    ("opt_gate_linear", "w8a8", "tflite"),
    ("vit_clipped_row", "w4a6"),
    ("bert_gate_head_conditional",),
    ("bert_sink_and_mlp", "w8a8", "qtx", Nonlinear.POLYNOMIAL),
    ("bert_classify", "channels"),
    ("opt_post_norm_projected", "w8a8", "float32"),
    ("opt_sink", "w8a16"),
    ("opt_gate_head", "values"),
    ("vit_gate_all_features", "w8a8", "gemmlowp"),
    ("vit_headless", "w8a16", "tflite"),
)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(choice))
def test_integer_form_gives_every_code_and_accumulator_in_every_engine(choice):
    artifact, batch = make(*choice)
    model, wiring = make_model(artifact, "integer")
    onnx.checker.check_model(model, full_check=True)
    engines = list_engines() if choice in CHOICES[:3] else (EXTENDED,)
    results = list(check_model(artifact, model, "integer", batch, engines))
    assert [one.engine for one in results] == list(engines)
    for one in results:
        assert one.exposing and {site.free for site in one.sites} == {0}
        assert {site.site for site in one.sites} == set(wiring.sites) and all(site.exact for site in one.sites)
    scale, zero = (artifact.constants[f"output.{key}"] for key in ("scale", "zero_point"))
    last = next(reversed(wiring.sites.values()))
    assert np.array_equal(np.squeeze(last.unit), np.squeeze(scale)) and np.array_equal(last.zero_point, zero)


FIXED = QTX.requantize
STEPS = FloatProduct(Dtype.FLOAT32, Order.STEPS, ZeroPoint.BEFORE, Rounding.HALF_EVEN, Beyond.SATURATE)
RULES = {
    "even": {"requantize": replace(FIXED, rounding=Rounding.HALF_EVEN), "add": AddRule(Rounding.TOWARD_ZERO)},
    "high": {"requantize": replace(FIXED, product=HighProduct.HALF_UP, rounding=Rounding.HALF_UP)},
    "truncated": {
        "requantize": replace(
            FIXED, product=HighProduct.TRUNCATED, rounding=Rounding.HALF_AWAY, left=LeftShift.SATURATE
        ),
        "add": AddRule(Rounding.HALF_EVEN),
    },
    "steps": {"requantize": STEPS, "bias": Bias.FLOAT_AFTER},
    "divided": {"requantize": replace(STEPS, order=Order.SCALES_DIVIDED), "bias": Bias.FLOAT_AFTER},
    "before": {"requantize": replace(STEPS, dtype=Dtype.FLOAT64, order=Order.RATIO32), "bias": Bias.FLOAT_BEFORE},
    "away": {
        "requantize": replace(STEPS, order=Order.RECIPROCAL, zero_point=ZeroPoint.AFTER, rounding=Rounding.HALF_UP),
        "quantize": replace(QTX.quantize, rounding=Rounding.HALF_AWAY, reciprocal=True, zero_point=ZeroPoint.BEFORE),
    },
}


@pytest.mark.parametrize("rule", RULES)
def test_integer_form_follows_the_rules_of_its_profile(rule):
    artifact, batch = make_under("vit_gate_mlp", **RULES[rule])
    model, _ = make_model(artifact, "integer")
    for one in check_model(artifact, model, "integer", batch, (EXTENDED, REFERENCE)):
        assert one.equal and {site.free for site in one.sites} == {0}


@pytest.mark.parametrize("name", ["bert_clipped_row", "opt_gate_elementwise"])
def test_integer_form_of_tokens_has_no_float(name):
    model, _ = make_model(make(name)[0], "integer")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    kinds = {value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output, *inferred.input]}
    kinds |= {tensor.data_type for tensor in inferred.initializer}
    names = {onnx.TensorProto.DataType.Name(kind) for kind in kinds}
    assert names <= {"INT8", "UINT8", "INT32", "INT64", "UINT64", "BOOL"}


QDQ = (  # the first in every engine
    ("bert_sink_and_mlp",),
    ("opt_clipped_alpha",),
    ("opt_gate_head", "w6a6"),
    ("vit_gate_head_conditional",),
    ("bert_clipped_row", "channels"),
    ("bert_plain", "w8a16"),
)


@pytest.mark.parametrize("choice", QDQ, ids=lambda choice: " ".join(choice))
def test_qdq_form_gives_every_code_of_products_fed_the_references(choice):
    artifact, batch = make(*choice)
    model, wiring = make_model(artifact, "qdq")
    onnx.checker.check_model(model, full_check=True)
    engines = list_engines() if choice == QDQ[0] else (EXTENDED, REFERENCE)
    for one in check_model(artifact, model, "qdq", batch, engines):
        assert one.equal
        exact = {site.site: site for site in one.sites if site.exact}
        assert set(wiring.multipliers) | set(wiring.pairs) <= set(exact)
        if one.engine == EXTENDED and choice[-1] != "w8a16":  # integer kernels: not even near a tie
            assert {site.forced for site in exact.values()} == {0}


@pytest.mark.parametrize("name", ["bert", "opt-int4", "vit"])
def test_artifacts_of_before_in_both_forms(name):
    artifact = load_artifact(FIXTURES / f"{name}.qtx")
    for form in ("integer", "qdq"):
        for one in check_model(artifact, make_model(artifact, form)[0], form, None, (EXTENDED,)):
            assert one.equal and one.count()[5] <= 1  # a float kernel that differs is next to a tie


@pytest.mark.parametrize("form", ["integer", "qdq"])
@pytest.mark.parametrize(
    "mask", [[[1], [1]], [[0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]], ids=["one token", "gaps"]
)
def test_any_length_and_mask(mask, form):
    artifact = load_artifact(FIXTURES / "opt.qtx")
    mask = np.array(mask, bool)
    batch = {"tokens": np.arange(mask.size).reshape(mask.shape), "mask": mask}
    for one in check_model(artifact, make_model(artifact, form)[0], form, batch, FEW):
        assert one.equal and one.count()[5] <= 1


@pytest.mark.parametrize("form", ["integer", "qdq"])
def test_a_walk_in_the_references_arithmetic_gives_the_same_codes(form, tmp_path):
    """The walker reads a file as anyone's, node by node: products and requantization in qtx_ref's functions."""
    artifact = load_artifact(FIXTURES / "vit.qtx")
    model, wiring = make_model(artifact, form)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    inputs = random_batch(artifact.spec)
    want = run_reference(artifact, wiring, inputs)
    values = {}
    for result in walk(tmp_path / "m.onnx", inputs, wiring.profile, "disable"):
        values |= result.outputs
    for site, value in wiring.sites.items():
        if value.name in values:  # a constant is no result
            assert np.array_equal(values[value.name], want[site]), site


def test_onnxruntime_makes_one_integer_kernel_of_each_product(tmp_path):
    model, _ = make_model(make("bert_gate_linear")[0], "qdq")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    written = [node.op_type for node in model.graph.node]
    assert (fused.count("QGemm"), fused.count("QLinearMatMul")) == (written.count("Gemm"), written.count("MatMul"))
    assert not {"Gemm", "MatMul"} & set(fused)


def test_a_planted_fault_is_found_at_its_site():
    artifact, batch = make("bert_plain")
    for form, key in (("integer", "layer.1.ffn.activation.table"), ("qdq", "layer.1.attn.key.bias")):
        model, _ = make_model(artifact, form)
        tensor = next(one for one in model.graph.initializer if one.name == key)
        value = onnx.numpy_helper.to_array(tensor).copy()
        value += np.asarray(2 if form == "integer" else 1000, value.dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, key))
        for one in check_model(artifact, model, form, batch, FEW):
            assert not one.equal
            wrong = [site.site for site in one.sites if (site.free if form == "integer" else site.forced)]
            assert wrong[0] == key.rpartition(".")[0]
            if form == "qdq":  # the others are fed what they should have
                assert wrong == ["layer.1.attn.key"] or {"embed.sum"} >= set(wrong[1:])


@pytest.mark.parametrize("rounding", list(Rounding)[:5])
def test_shifts_are_those_of_fractions(rounding):
    rng = np.random.default_rng(0)
    shift = np.array([0, 1, 2, 13, 31, 45, 60])
    x = np.concatenate([rng.integers(-(2**60), 2**60, (40, 7)), rng.integers(-9, 9, (40, 7))])
    x = np.concatenate([x, (rng.integers(-9, 9, (40, 7)) * 2 + 1) * (1 << np.maximum(shift - 1, 0))])  # ties
    x = np.clip(x, -(2**60), 2**60)
    graph = Graph()
    name = shift_rounded(graph, graph.take("x", "int64", (None, 7)).name, shift, rounding, 2**60, np.int64(5))
    got = run_graph(graph, name, "int64", {"x": x})
    exact = {  # of fractions.Fraction: Python's own round is half to even
        Rounding.HALF_EVEN: round,
        Rounding.HALF_AWAY: lambda v: math.floor(abs(v) + Fraction(1, 2)) * (1 if v > 0 else -1),
        Rounding.HALF_UP: lambda v: math.floor(v + Fraction(1, 2)),
        Rounding.TOWARD_ZERO: int,
        Rounding.FLOOR: math.floor,
    }[rounding]
    for row, result in zip(x.tolist(), got.tolist(), strict=True):
        assert result == [exact(Fraction(v, 1 << s)) + 5 for v, s in zip(row, shift.tolist(), strict=True)]


@pytest.mark.parametrize("rounding", list(Rounding)[:5])
def test_floats_are_rounded_as_the_reference_rounds_them(rounding):
    x = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997, -0.49999997, 3.2, -3.7, 0, 7e9, -7e9, 8388607.5])
    graph = Graph()
    given = graph.take("x", "float32", (None,)).name
    name = round_float(graph, given, Dtype.FLOAT32, rounding, np.int64(3), ZeroPoint.AFTER)
    want = np.clip(round_integer(x, rounding).astype(np.float64), -(2**24), 2**24) + 3
    assert run_graph(graph, name, "int64", {"x": x}).tolist() == want.tolist()


def test_division_rounds_half_up_below_zero_too():
    n, d = np.array([-7, -6, -5, -3, -2, -1, 0, 1, 5, 6, 7, 9]), np.array([2, 4, 10, 2, 4, 2, 3, 2, 10, 4, 2, 6])
    graph = Graph()
    name = graph.half_up(graph.take("n", "int64", (None,)).name, graph.take("d", "int64", (None,)).name, 8)
    got = run_graph(graph, name, "int64", {"n": n, "d": d})
    assert got.tolist() == [-3, -1, 0, -1, 0, 0, 0, 1, 1, 2, 4, 2]


def run_graph(graph, name, dtype, inputs):
    """One value of a graph, the same in onnxruntime and in ONNX's evaluator."""
    from qtx.graphs.export import build_model

    model = build_model(graph, [Value(graph, name, (None,) * inputs[next(iter(inputs))].ndim, dtype)], {})
    results = [run_engine(engine, model, inputs)[name] for engine in (*FEW, REFERENCE)]
    assert all(np.array_equal(results[0], result) for result in results)
    return results[0]


def test_operators_are_those_of_the_page():
    part = PAGE.read_text(encoding="utf-8").partition("## Operators")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    listed = {word for row in rows for word in row.split("`")[1::2]}
    used = set()
    for form in ("integer", "qdq"):
        for name in ("bert_sink_and_mlp", "opt_clipped_row", "opt_plain", "vit_gate_head_conditional", "bert_classify"):
            used |= {node.op_type for node in make_model(make(name)[0], form)[0].graph.node}
        choices = [("bert_plain", "w8a16"), ("vit_plain", "w4a6"), ("bert_plain", "channels")]
        choices += [("bert_gate_linear", "w8a8", "qtx", Nonlinear.POLYNOMIAL), ("vit_plain", "w8a8", "gemmlowp")]
        for choice in choices:
            used |= {node.op_type for node in make_model(make(*choice)[0], form)[0].graph.node}
    assert used <= listed and listed - used <= {"Mod"}
    assert f"opset {OPSET}" in PAGE.read_text()


def test_exposing_adds_outputs_alone():
    artifact, batch = make("vit_plain")
    model, wiring = make_model(artifact, "qdq")
    shown = expose(wiring.graph, model, wiring.sites.values())
    assert model.graph.node == shown.graph.node and len(model.graph.output) == 1
    inputs = {"images": batch["images"]}
    for engine in FEW:
        assert np.array_equal(run_engine(engine, model, inputs)["output"], run_engine(engine, shown, inputs)["output"])
