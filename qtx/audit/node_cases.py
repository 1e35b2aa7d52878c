"""ONNX's own test cases of the quantization and cast operators, built in process, beside `qtx_ref` under a profile.

A case is a graph, its inputs and the outputs that any backend must give. They are compared to the bit.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtx_ref.profiles import profile as load_profile
from qtx_ref.quant import formats
from qtx_ref.quant.rounding import round_dtype, round_integer
from qtx_ref.spec import Dtype, FloatFormat, Profile, Rounding

from ..engines.backend import need
from .reference import evaluate
from .tallies import compare
from .vectors_numbers import limits

__all__ = ["CaseResult", "PROFILE", "list_cases", "run_cases"]

PROFILE = "onnx-reference"
MODULES = (
    "quantizelinear",
    "dequantizelinear",
    "dynamicquantizelinear",
    "qlinearmatmul",
    "matmulinteger",
    "qlinearconv",
    "convinteger",
    "cast",
    "castlike",
)
FORMATS = {"FLOAT8E4M3FN": FloatFormat.E4M3, "FLOAT8E5M2": FloatFormat.E5M2, "FLOAT4E2M1": FloatFormat.E2M1}
WIDTHS = {"FLOAT16": np.float16, "FLOAT": np.float32, "DOUBLE": np.float64, "BFLOAT16": np.float32}
REASONS = {
    "FNUZ": "the formats FNUZ, of one zero and one NaN, are none of qtx_ref's",
    "Conv": "qtx_ref has no convolution",
}


@dataclass
class CaseResult:
    """How a case went: pass, differs, or not expressible."""

    name: str
    op: str
    verdict: str
    note: str = ""
    finding: str | None = None  # what explains a difference


@dataclass(frozen=True)
class Given:
    """An array of a type of ONNX's. Small floats are their codes, small integers int8 or uint8."""

    kind: str
    array: np.ndarray


@dataclass(frozen=True)
class Case:
    """A node (the first of an expanded function's), its inputs by position and the outputs expected."""

    name: str
    op: str
    attributes: dict[str, Any]
    inputs: list[Given | None]
    outputs: list[Given]


def list_cases() -> Iterator[Case]:
    """Every case of the operators' modules. Raises MissingExtra without onnx."""
    onnx = need("onnx", "engines", "ONNX's node cases")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of expected overflow
        for module in MODULES:
            importlib.import_module(f"onnx.backend.test.case.node.{module}")  # makes its cases, once
        made = importlib.import_module("onnx.backend.test.case.node")._NodeTestCases
    named = tuple(f"test_{module}_" for module in MODULES)
    for case in made:
        if f"{case.name}_".startswith(named):
            yield read_case(onnx, case)


def read_case(onnx: Any, case: Any) -> Case:
    """A case of ONNX's."""
    graph, (inputs, outputs) = case.model.graph, case.data_sets[0]
    node = graph.node[0]
    expanded = len(graph.node) > 1
    op = "DynamicQuantizeLinear" if expanded and "dynamicquantizelinear" in case.name else node.op_type
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    names = onnx.TensorProto.DataType.Name
    by_name = {
        value.name: read_array(onnx, names(value.type.tensor_type.elem_type), array)
        for value, array in zip(graph.input, inputs, strict=True)
    }
    wanted = [
        read_array(onnx, names(value.type.tensor_type.elem_type), array)
        for value, array in zip(graph.output, outputs, strict=True)
    ]
    given = [by_name.get(name) for name in (by_name if expanded else node.input)]
    return Case(case.name, op, attributes, given, wanted)


def read_array(onnx: Any, kind: str, value: Any) -> Given:
    """An input or output, a NumPy array or a TensorProto."""
    array = onnx.numpy_helper.to_array(value) if hasattr(value, "data_type") else np.asarray(value)
    if kind.startswith("FLOAT8") or kind == "FLOAT4E2M1":
        return Given(kind, array.view(np.uint8))
    if kind in ("INT4", "INT2", "UINT4", "UINT2"):
        return Given(kind, array.astype(np.uint8 if kind.startswith("U") else np.int8))
    return Given(kind, array.astype(np.float32) if kind == "BFLOAT16" else array)


# --- what qtx_ref makes of them ---------------------------------------------------------------------------------------


def spread(case: Case, of: Given, value: Given) -> np.ndarray:
    """A scale or zero point against the tensor: one, along an axis, or repeated for each block along it."""
    axis, size = case.attributes.get("axis", 1), case.attributes.get("block_size", 0)
    if size:
        return np.repeat(value.array, size, axis)
    if value.array.ndim == 0 or value.array.size == 1:
        return value.array.reshape(())
    shape = [1] * of.array.ndim
    shape[axis] = -1
    return value.array.reshape(shape)


def quantize(case: Case, profile: Profile) -> list[np.ndarray]:
    """QuantizeLinear."""
    x, scale, zero = [*case.inputs, None][:3]
    assert x is not None and scale is not None  # neither can be left out
    kind = case.outputs[0].kind
    zero = zero or Given(kind, np.zeros_like(scale.array, np.int32))
    dtype = str(FORMATS[kind]) if kind in FORMATS else kind.lower()
    shaped = {"scale": spread(case, x, scale), "zero_point": spread(case, x, zero).astype(np.int32)}
    return [evaluate(profile, "quantize", {"x": x.array, **shaped, "dtype": dtype})["code"]]


def dequantize(case: Case, profile: Profile) -> list[np.ndarray]:
    """DequantizeLinear."""
    code, scale, zero = [*case.inputs, None][:3]
    assert code is not None and scale is not None  # neither can be left out
    step = spread(case, code, scale)
    if code.kind in FORMATS:
        return [(formats.decode(code.array, FORMATS[code.kind]) * step).astype(scale.array.dtype)]
    zero = zero or Given(code.kind, np.zeros_like(scale.array, np.int32))
    shaped = {"scale": step, "zero_point": spread(case, code, zero).astype(np.int32)}
    return [evaluate(profile, "dequantize", {"code": code.array, **shaped})["y"]]


def quantize_dynamically(case: Case, profile: Profile) -> list[np.ndarray]:
    """DynamicQuantizeLinear: codes, scale and zero point."""
    assert case.inputs[0] is not None
    x = case.inputs[0].array
    scaled = evaluate(profile, "scale", {"low": x.min(), "high": x.max(), "dtype": "uint8"})
    return [evaluate(profile, "quantize", {"x": x, **scaled, "dtype": "uint8"})["code"], *scaled.values()]


def multiply(case: Case, profile: Profile) -> list[np.ndarray]:
    """QLinearMatMul, matrix by matrix, and MatMulInteger."""
    arrays = [given.array for given in case.inputs if given is not None]
    if case.op == "MatMulInteger":
        x, w, x_zero, w_zero = arrays
        return [evaluate(profile, "matmul", {"x": x, "w": w, "x_zero": x_zero, "w_zero": w_zero})["accumulator"]]
    names = ("x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero")
    values: dict[str, Any] = dict(zip(names, arrays, strict=True)) | {"bias": None}
    pairs = zip(arrays[0].reshape(-1, *arrays[0].shape[-2:]), arrays[3].reshape(-1, *arrays[3].shape[-2:]), strict=True)
    results = [evaluate(profile, "linear", {**values, "x": x, "w": w})["y"] for x, w in pairs]
    return [np.stack(results).reshape(*arrays[0].shape[:-1], arrays[3].shape[-1])]


def cast(case: Case, profile: Profile) -> list[np.ndarray]:
    """Cast and CastLike."""
    given, kind = case.inputs[0], case.outputs[0].kind
    assert given is not None
    x = real(given)
    if kind in FORMATS:
        saturate = bool(case.attributes.get("saturate", 1))
        return [formats.encode(x.astype(np.float32), FORMATS[kind], saturate, rule=profile.cast)]
    if kind in WIDTHS:
        narrow = round_dtype(x, Dtype.BFLOAT16) if kind == "BFLOAT16" else x.astype(WIDTHS[kind])
        return [narrow.astype(WIDTHS[kind])]
    if kind == "FLOAT8E8M0":  # rounded up, the operator's default
        exponent = formats.floor_log2(x.astype(np.float32))
        exponent += formats.power_of_two(exponent) < x
        return [np.where(np.isnan(x), formats.SCALE_NAN, np.minimum(exponent + formats.SCALE_BIAS, 254))]
    # an integer: cut off, then its lowest bits
    bits = int(kind.lstrip("UINT"))
    whole = round_integer(x.astype(np.float64), Rounding.TOWARD_ZERO).astype(np.int64) & (2**bits - 1)
    low, high = limits(kind.lower())
    return [np.where(whole > high, whole - 2**bits, whole)]


def real(given: Given) -> np.ndarray:
    """The values of an array: of a small float, those of its codes."""
    if given.kind == "FLOAT8E8M0":
        power = formats.power_of_two(given.array.astype(np.int32) - formats.SCALE_BIAS)
        return np.where(given.array == formats.SCALE_NAN, np.nan, power)
    return formats.decode(given.array, FORMATS[given.kind]) if given.kind in FORMATS else given.array


RUN: dict[str, Callable[[Case, Profile], list[np.ndarray]]] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "DynamicQuantizeLinear": quantize_dynamically,
    "QLinearMatMul": multiply,
    "MatMulInteger": multiply,
    "Cast": cast,
    "CastLike": cast,
}


def judge(case: Case, profile: Profile) -> CaseResult:
    """One case."""
    kinds = [given.kind for given in [*case.inputs, *case.outputs] if given is not None]
    for word, reason in REASONS.items():
        if word in case.op or any(word in kind for kind in kinds):
            return CaseResult(case.name, case.op, "not expressible", reason)
    try:
        results = RUN[case.op](case, profile)
    except ValueError as refusal:
        return CaseResult(case.name, case.op, "differs", f"the profile refuses: {refusal}"[:300])
    for result, wanted in zip(results, case.outputs, strict=True):
        differs, worst = compare({"": wanted.array}, {"": np.asarray(result)})
        if differs.any():
            place = tuple(int(i) for i in np.argwhere(differs)[0])
            note = f"at {place} {np.asarray(result)[place]}, expected {wanted.array[place]}"
            return CaseResult(
                case.name, case.op, "differs", f"{int(differs.sum())} of {differs.size}, by {worst}; {note}"
            )
    return CaseResult(case.name, case.op, "pass")


def run_cases(profile: Profile | None = None) -> list[CaseResult]:
    """Every case under a profile, that of the ONNX reference unless one is given. Raises MissingExtra without onnx."""
    chosen = profile or load_profile(PROFILE)
    return [judge(case, chosen) for case in list_cases()]
