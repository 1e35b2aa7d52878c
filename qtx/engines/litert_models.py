""".tflite files of one operation, by the schema that ai-edge-litert brings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import need

VERSION = 3  # of the schema
VERSIONS = {"FULLY_CONNECTED": 7, "QUANTIZE": 2, "DEQUANTIZE": 6}  # of the operators: with int16


@dataclass(frozen=True)
class Tensor:
    """A tensor of a graph. scales: none for floats, one, or one per index of `axis`; data: bytes of a constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis: int = 0
    data: bytes | None = None


def schema() -> Any:
    """The module of the schema's tables."""
    return need("ai_edge_litert.schema_py_generated", "engines", "engine litert")


@functools.lru_cache(maxsize=64)
def make_model(operator: str, inputs: tuple[Tensor, ...], output: Tensor) -> bytes:
    """A model of one operator; its inputs without data are the model's."""
    s, flatbuffers = schema(), need("flatbuffers", "engines", "engine litert")
    model, graph, code, node = s.ModelT(), s.SubGraphT(), s.OperatorCodeT(), s.OperatorT()
    tensors = [*inputs, output]
    buffers = [s.BufferT()]  # the first is empty, by convention
    graph.tensors = [make_tensor(one, buffers) for one in tensors]
    code.builtinCode = getattr(s.BuiltinOperator, operator)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = VERSIONS[operator]
    node.inputs, node.outputs = np.arange(len(inputs), dtype=np.int32), np.array([len(inputs)], np.int32)
    if operator == "FULLY_CONNECTED":
        node.builtinOptionsType, node.builtinOptions = (
            s.BuiltinOptions.FullyConnectedOptions,
            s.FullyConnectedOptionsT(),
        )
    graph.inputs = np.array([i for i, one in enumerate(inputs) if one.data is None], np.int32)
    graph.outputs, graph.operators = node.outputs, [node]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = VERSION, [code], [graph], buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def make_tensor(given: Tensor, buffers: list[Any]) -> Any:
    """A tensor's table; the buffer of a constant joins `buffers`."""
    s = schema()
    tensor = s.TensorT()
    tensor.name, tensor.shape, tensor.type = (
        given.name,
        np.array(given.shape, np.int32),
        getattr(s.TensorType, given.dtype.upper()),
    )
    if given.data is not None:
        buffer = s.BufferT()
        buffer.data = np.frombuffer(given.data, np.uint8)
        buffers.append(buffer)
        tensor.buffer = len(buffers) - 1
    if given.scales:
        quantization = s.QuantizationParametersT()
        quantization.scale = np.array(given.scales, np.float32)
        quantization.zeroPoint = np.array(given.zero_points, np.int64)
        quantization.quantizedDimension = given.axis
        tensor.quantization = quantization
    return tensor


def settle(scale: Any, zero_point: Any) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Scales and zero points as a `Tensor` has them."""
    scales: Sequence[float] = np.asarray(scale, np.float32).reshape(-1).tolist()
    zeros = np.broadcast_to(np.asarray(zero_point, np.int64).reshape(-1), (len(scales),))
    return tuple(scales), tuple(zeros.tolist())
