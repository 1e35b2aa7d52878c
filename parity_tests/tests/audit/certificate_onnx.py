"""A small ONNX file of each form that tools write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


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
