"""ONNX files of one operation, for the engines that run them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .backend import need

OPSET = {"": 23, "com.microsoft": 1}
IR_VERSION = 11
FORMATS = {"e4m3": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2", "e2m1": "FLOAT4E2M1", "float32": "FLOAT"}
CARRIED = {  # dtypes that NumPy lacks, and which one of its own carries them to a Cast at the edge of the graph
    "bfloat16": "float32",
    "int2": "int8",
    "int4": "int8",
    "uint2": "uint8",
    "uint4": "uint8",
}
FED = CARRIED | dict.fromkeys(("e4m3", "e5m2", "e2m1"), "float32")  # the same of inputs: +0 is a zero point of floats
Model = tuple[bytes, dict[str, np.ndarray]]  # and what is fed to it


def element(dtype: str) -> int:
    """ONNX's number of a dtype of NumPy, of bfloat16, of int4 and the like, or of one of FORMATS."""
    types = need("onnx", "engines", "engine onnx-reference").TensorProto
    return getattr(types, FORMATS.get(dtype, dtype.upper()))


@functools.lru_cache(maxsize=256)
def make_model(
    operator: str,
    inputs: tuple[tuple[str, str], ...],
    outputs: tuple[str, ...],
    attributes: tuple[tuple[str, Any], ...],
    domain: str,
) -> bytes:
    """A model of one node. inputs: (name, dtype) in turn, "" for one that is left out; outputs: their dtypes."""
    onnx = need("onnx", "engines", "engine onnx-reference")
    helper, nodes, names, given = onnx.helper, [], [], []
    for name, dtype in inputs:
        names.append(name)
        if not name:
            continue
        given.append(helper.make_tensor_value_info(name, element(FED.get(dtype, dtype)), None))
        if dtype in FED:
            names[-1] = f"{name}.narrow"
            nodes.append(helper.make_node("Cast", [name], [names[-1]], to=element(dtype)))
    made = [f"{i}.narrow" if dtype in CARRIED else f"{i}" for i, dtype in enumerate(outputs)]
    nodes.append(helper.make_node(operator, names, made, domain=domain, **dict(attributes)))
    results = []
    for i, dtype in enumerate(outputs):
        wide = element(CARRIED.get(dtype, dtype))
        if dtype in CARRIED:
            nodes.append(helper.make_node("Cast", [made[i]], [f"{i}"], to=wide))
        results.append(helper.make_tensor_value_info(f"{i}", wide, None))
    graph = helper.make_graph(nodes, operator, given, results)
    opsets = [helper.make_opsetid(name, version) for name, version in OPSET.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()


def build(
    operator: str,
    inputs: Mapping[str, tuple[Any, str]],
    outputs: str | tuple[str, ...],
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
) -> Model:
    """A model of one node and its feeds. inputs: value and dtype by name; None for one that is left out."""
    signature = tuple(("" if value is None else name, dtype) for name, (value, dtype) in inputs.items())
    feeds = {
        name: np.asarray(value).astype(FED.get(dtype, dtype), copy=False)
        for name, (value, dtype) in inputs.items()
        if value is not None
    }
    given = tuple((attributes or {}).items())
    outputs = (outputs,) if isinstance(outputs, str) else outputs
    return make_model(operator, signature, outputs, given, domain), feeds


def build_quantize(values: Mapping[str, Any]) -> Model:
    """QuantizeLinear; where the codes are floats, their zero point is +0."""
    kind, dtype = values.get("x_dtype", str(values["x"].dtype)), values["dtype"]
    inputs = {
        "x": (values["x"], kind),
        "scale": (values["scale"], kind),
        "zero_point": (values["zero_point"], dtype),
    }
    return build("QuantizeLinear", inputs, dtype, blocks(values))


def build_dequantize(values: Mapping[str, Any]) -> Model:
    """DequantizeLinear, in the type of the scale."""
    dtype = values.get("dtype", str(values["code"].dtype))
    kind = values.get("x_dtype", str(values["scale"].dtype))
    inputs = {
        "code": (values["code"], dtype),
        "scale": (values["scale"], kind),
        "zero_point": (values["zero_point"], dtype),
    }
    return build("DequantizeLinear", inputs, kind, blocks(values))


def build_matmul(values: Mapping[str, Any]) -> Model:
    """MatMulInteger."""
    inputs = {name: (values[name], str(values[name].dtype)) for name in ("x", "w")}
    for name in ("x", "w"):
        inputs[f"{name}_zero"] = (values[f"{name}_zero"], str(values[name].dtype))
    return build("MatMulInteger", inputs, "int32")


def build_linear(values: Mapping[str, Any]) -> Model:
    """QLinearMatMul, which has no bias. Raises ValueError for one."""
    if values.get("bias") is not None:
        raise ValueError("QLinearMatMul has no bias")
    return build("QLinearMatMul", operands(values) | result(values), str(values["y_zero"].dtype))


def build_gemm(values: Mapping[str, Any]) -> Model:
    """onnxruntime's QGemm, whose bias is int32."""
    inputs = operands(values) | {"bias": (values.get("bias"), "int32")} | result(values)
    return build("QGemm", inputs, str(values["y_zero"].dtype), domain="com.microsoft")


def build_scales(values: Mapping[str, Any]) -> list[Model]:
    """DynamicQuantizeLinear of the two ends of each range; its outputs are codes, scale and zero point. Raises
    ValueError for anything but asymmetric uint8."""
    if values["dtype"] != "uint8" or values.get("symmetric"):
        raise ValueError("DynamicQuantizeLinear makes asymmetric uint8 alone")
    ends = np.stack([np.float32(values[end]).reshape(-1) for end in ("low", "high")], -1)
    return [build("DynamicQuantizeLinear", {"x": (x, "float32")}, ("uint8", "float32", "uint8")) for x in ends]


def join_scales(values: Mapping[str, Any], results: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Scales and zero points of what the models of `build_scales` gave, in the shape of the ranges."""
    shape = np.shape(values["low"])
    scale, zero_point = (np.array([result[i] for result in results]).reshape(shape) for i in (1, 2))
    return {"scale": scale, "zero_point": zero_point}


def operands(values: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """x and w, each with its scale and zero point."""
    inputs: dict[str, tuple[Any, str]] = {}
    for name in ("x", "w"):
        inputs[name] = (values[name], str(values[name].dtype))
        inputs[f"{name}_scale"] = (values[f"{name}_scale"], "float32")
        inputs[f"{name}_zero"] = (values[f"{name}_zero"], str(values[name].dtype))
    return inputs


def result(values: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """The scale and the zero point of y, whose dtype is that of its codes."""
    return {"y_scale": (values["y_scale"], "float32"), "y_zero": (values["y_zero"], str(values["y_zero"].dtype))}


def blocks(values: Mapping[str, Any]) -> dict[str, Any]:
    """Along which axis scales vary, and for how many elements one holds."""
    return {name: values[name] for name in ("axis", "block_size") if name in values}
