"""A .tflite file of several layers, by the schema that LiteRT brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qtx.engines.backend import need
from qtx.engines.litert_models import VERSION, VERSIONS, Tensor, make_tensor, schema
from qtx_ref.random import stream

WIDTHS = (32, 48, 24, 10)


def write_layers(path: Path, rows: int = 8, *, ties: bool = False, widths: tuple[int, ...] = WIDTHS) -> Path:
    """Floats quantized to int8, fully connected layers with a ReLU behind all but the last, floats again. ties: scales
    are powers of two, so that accumulators are half-way between two codes."""
    s, flatbuffers, rng = schema(), need("flatbuffers", "dev", "a .tflite file"), stream(0, "tflite")
    scale, last = 2.0**-5 if ties else 0.03, 1
    tensors = [Tensor("x", "float32", (rows, widths[0])), Tensor("q", "int8", (rows, widths[0]), (scale,), (5,))]
    ops = [("QUANTIZE", [0], 1, 0)]
    for layer, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
        w = rng.integers(-127, 128, (outer, inner)).astype(np.int8)
        bias = rng.integers(-4000, 4000, outer).astype(np.int32)
        steps = tuple(float(step) for step in np.float32(rng.uniform(0.002, 0.006, outer)))
        steps = (2.0**-8,) * outer if ties else steps
        made = 2.0**-4 if ties else float(np.float32(0.05 + 0.013 * layer))
        first = len(tensors)
        sums = tuple(float(np.float32(scale) * np.float32(step)) for step in steps)
        tensors += [
            Tensor(f"w{layer}", "int8", w.shape, steps, (0,) * outer, 0, w.tobytes()),
            Tensor(f"b{layer}", "int32", bias.shape, sums, (0,) * outer, 0, bias.tobytes()),
            Tensor(f"y{layer}", "int8", (rows, outer), (made,), (-7 + layer,)),
        ]
        activation = s.ActivationFunctionType.RELU if layer < len(widths) - 2 else s.ActivationFunctionType.NONE
        ops.append(("FULLY_CONNECTED", [last, first, first + 1], first + 2, activation))
        scale, last = made, first + 2
    tensors.append(Tensor("y", "float32", (rows, widths[-1])))
    ops.append(("DEQUANTIZE", [last], len(tensors) - 1, 0))
    model, graph, buffers = s.ModelT(), s.SubGraphT(), [s.BufferT()]
    graph.tensors = [make_tensor(one, buffers) for one in tensors]
    kinds = list(dict.fromkeys(kind for kind, *_ in ops))
    codes = []
    for kind in kinds:
        code = s.OperatorCodeT()
        code.builtinCode = getattr(s.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), VERSIONS[kind]
        codes.append(code)
    graph.operators = []
    for kind, inputs, output, activation in ops:
        node = s.OperatorT()
        node.opcodeIndex = kinds.index(kind)
        node.inputs, node.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        if kind == "FULLY_CONNECTED":
            node.builtinOptionsType = s.BuiltinOptions.FullyConnectedOptions
            node.builtinOptions = s.FullyConnectedOptionsT()
            node.builtinOptions.fusedActivationFunction = activation
        graph.operators.append(node)
    graph.inputs, graph.outputs = np.array([0], np.int32), np.array([len(tensors) - 1], np.int32)
    model.version, model.operatorCodes, model.subgraphs, model.buffers = VERSION, codes, [graph], buffers
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path
