"""An ONNX file as nodes, constants and the tensors that they are named by.

Whatever wrote it: functions are put in place, external data are read, opset and shapes are taken as the file has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.spec import QuantSpec

from ..engines.backend import need
from ..files.formats import FileError, check_file

__all__ = ["CODES", "Graph", "Node", "list_captured", "name_dtype", "read_graph", "spec_of", "to_array"]

WHAT = "an ONNX file"
CODES = {  # quantizers that have these codes; a zero point is given beside them
    "int2": QuantSpec(2, symmetric=True),
    "int4": QuantSpec(4, symmetric=True),
    "int8": QuantSpec(8, symmetric=True),
    "int16": QuantSpec(16, symmetric=True),
    "uint2": QuantSpec(2),
    "uint4": QuantSpec(4),
    "uint8": QuantSpec(8),
    "uint16": QuantSpec(16),
}


@dataclass(frozen=True)
class Node:
    """One operator. A domain of onnx's own is ''; a name that the file lacks is the first output's."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]  # "" for one that is left out
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    proto: Any = field(repr=False)  # onnx.NodeProto


@dataclass
class Graph:
    """Nodes in an order in which they can run. `inputs`: dtype and shape by name, None where the file does not say;
    `types`: the same of every tensor that onnx can tell."""

    path: Path
    model: Any = field(repr=False)  # onnx.ModelProto
    nodes: list[Node]
    constants: dict[str, np.ndarray]
    inputs: dict[str, tuple[str, tuple[int | None, ...] | None]]
    outputs: list[str]
    types: dict[str, tuple[str, tuple[int | None, ...] | None]]

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The constants as the file has them, onnx.TensorProto."""
        return {one.name: one for one in self.model.graph.initializer}

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that makes each tensor."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    @cached_property
    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that take each tensor."""
        taken: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys((*node.inputs, *list_captured(node.proto))):
                taken.setdefault(name, []).append(node)
        return taken


def name_dtype(element: int) -> str:
    """NumPy's name of an ONNX element type; ONNX's own, in small letters, of those that NumPy lacks."""
    types = need("onnx", "engines", WHAT).TensorProto
    name = types.DataType.Name(element).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def spec_of(dtype: str | np.dtype) -> QuantSpec | None:
    """The quantizer whose codes have that dtype; None for what holds no codes."""
    return CODES.get(str(dtype))


def read_graph(path: Path) -> Graph:
    """The graph of a file. Raises FileError where it is none, or its tensors are missing; MissingExtra without onnx."""
    onnx = need("onnx", "engines", WHAT)
    decode = need("google.protobuf.message", "engines", WHAT).DecodeError
    check_file(path, "no such file: give an .onnx file")
    try:
        model = onnx.load(str(path), format="protobuf")  # whatever its name ends in
        if model.functions:
            model = need("onnx.inliner", "engines", WHAT).inline_local_functions(model)
        if not model.HasField("graph") or not model.graph.node:
            raise FileError(f"{path} holds no ONNX graph")
        try:
            known = onnx.shape_inference.infer_shapes(model).graph
        except ValueError:  # beyond 2 GB; types are then what the file says
            known = model.graph
    except (decode, OSError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise FileError(f"{path} cannot be read as ONNX: {' '.join(str(error).split())[:200]}") from None
    graph = model.graph
    if graph.sparse_initializer:
        raise FileError(f"{path}: sparse initializer {graph.sparse_initializer[0].values.name} is not supported")
    constants = {one.name: to_array(one) for one in graph.initializer}
    nodes = [make_node(proto, position) for position, proto in enumerate(graph.node)]
    types = {one.name: describe(one) for one in (*known.value_info, *known.input, *known.output)}
    types |= {one.name: (name_dtype(one.data_type), tuple(one.dims)) for one in graph.initializer}
    inputs = {one.name: describe(one) for one in graph.input if one.name not in constants}
    check_order(path, nodes, {*constants, *inputs})
    return Graph(path, model, nodes, constants, inputs, [one.name for one in graph.output], types)


def check_order(path: Path, nodes: Iterable[Node], known: set[str]) -> None:
    """Raises FileError naming the first node that takes what nothing before it makes."""
    for node in nodes:
        for name in (*node.inputs, *list_captured(node.proto)):
            if name and name not in known:
                raise FileError(f"{path}: node {node.name} ({node.op}) takes {name}, which nothing before it makes")
        known.update(node.outputs)


def to_array(tensor: Any) -> np.ndarray:
    """A TensorProto as an array; codes of fewer than 8 bits in bytes."""
    value = need("onnx.numpy_helper", "engines", WHAT).to_array(tensor)
    return narrow_to_bytes(value)


def narrow_to_bytes(value: np.ndarray) -> np.ndarray:
    """Codes of a dtype that NumPy lacks as int8 or uint8; others as they are."""
    name = str(value.dtype)
    return value.astype(name.rstrip("24") + "8") if name in ("int2", "int4", "uint2", "uint4") else value


def make_node(proto: Any, position: int) -> Node:
    """A NodeProto in plain values."""
    helper = need("onnx.helper", "engines", WHAT)
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    attributes = {one.name: helper.get_attribute_value(one) for one in proto.attribute if not is_graph(one)}
    attributes = {name: v.decode() if isinstance(v, bytes) else v for name, v in attributes.items()}
    name = proto.name or next(filter(None, proto.output), f"{proto.op_type}.{position}")
    return Node(name, proto.op_type, domain, tuple(proto.input), tuple(proto.output), attributes, proto)


def is_graph(attribute: Any) -> bool:
    """Whether an attribute is a graph of its own, as If and Loop have."""
    return bool(attribute.HasField("g") or attribute.graphs)


def list_captured(proto: Any) -> Iterator[str]:
    """What a node's own graphs take from around them."""
    for attribute in proto.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            inside = {one.name for one in (*graph.input, *graph.initializer)}
            for node in graph.node:
                for name in (*node.input, *list_captured(node)):
                    if name and name not in inside:
                        yield name
                inside |= set(node.output)


def describe(value: Any) -> tuple[str, tuple[int | None, ...] | None]:
    """Dtype and shape of a ValueInfoProto; "" and None where it does not say."""
    kind = value.type.tensor_type
    dtype = name_dtype(kind.elem_type) if kind.elem_type else ""
    if not kind.HasField("shape"):
        return dtype, None
    return dtype, tuple(one.dim_value if one.HasField("dim_value") else None for one in kind.shape.dim)
