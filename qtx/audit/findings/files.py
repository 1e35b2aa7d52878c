"""Of graphs and files (GRA). A new one goes to the end."""

from __future__ import annotations

from .finding import Finding

__all__ = ["LIST"]

LIST = (
    Finding(
        id="QTX-GRA-001",
        title="LiteRT's XNNPACK delegate crashes on a quantizer with a subnormal scale",
        cause="The reciprocal of a scale below 2^-128 is infinite; building the operator fails and the failure is not "
        "handled.",
        consequence="The process ends with a segmentation fault.",
        reproduce="""
import numpy as np
from qtx.engines.paths import EngineCrash, run
values = {"x": np.zeros(4, np.float32), "scale": np.float32(1e-39), "zero_point": np.int32(0), "dtype": "int8"}
try:
    run("litert-xnnpack", "quantize", values)
except EngineCrash as crash:
    print(crash)  # crashed (signal 11)
""",
        remedy="Keep scales at 2^-126 or above, as qtx does; run untrusted files in a process of their own.",
    ),
    Finding(
        id="QTX-GRA-002",
        title="onnxruntime rounds 16-bit activations to 8 bits before a product with 8-bit weights",
        cause="At the extended level DequantizeLinear of constant 8-bit weights and the MatMul or Gemm behind it "
        "become MatMulNBits, whose default accuracy level, 4, quantizes the other operand to int8 on its way.",
        consequence="Results are off by hundreds of 16-bit codes; at the basic level the file is right to float32.",
        reproduce="""
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
K = 32
x = np.arange(K, dtype=np.uint16)[None] ** 2 * 57
held = {"s": np.float32(2.0**-16), "zx": np.uint16(0), "t": np.float32(1), "zw": np.int8(0)}
held["w"] = np.ones((K, K), np.int8)
nodes = [helper.make_node("DequantizeLinear", ["x", "s", "zx"], ["a"]),
         helper.make_node("DequantizeLinear", ["w", "t", "zw"], ["b"]), helper.make_node("MatMul", ["a", "b"], ["y"])]
graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 4, [1, K])],
                          [helper.make_tensor_value_info("y", 1, [1, K])],
                          [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
errors = []
for level in ("4", "1"):  # 4 is the default
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0][0, 0]
    errors.append(abs(round(float(y) * 2**16) - int(x.sum())))
print(errors[0] > 100, errors[1])  # True 0
""",
        remedy="Set the session's entry session.qdq_matmulnbits_accuracy_level to 1; `qtx export --form qdq` says so.",
    ),
    Finding(
        id="QTX-GRA-003",
        title="onnxruntime cannot make weights unsigned where two share a zero point",
        cause="Under session.x64quantprecision, which keeps u8 x s8 products from saturating on x86 without VNNI, the "
        "optimizer replaces each weight's zero point by name, and the second time it is there already.",
        consequence="The session is not made: Attempt to replace the existing tensor.",
        reproduce="""
import numpy as np
import onnxruntime
from onnx import helper, numpy_helper
held = {"s": np.float32(1), "zx": np.uint8(0), "z": np.int8(0)}
held |= {"w": np.full((4, 4), 127, np.int8), "v": np.full((4, 4), -127, np.int8)}
nodes = []
for i, (x, w) in enumerate((("x", "w"), ("q0", "v"))):
    nodes += [helper.make_node("DequantizeLinear", [x, "s", "zx"], [f"a{i}"]),
              helper.make_node("DequantizeLinear", [w, "s", "z"], [f"b{i}"]),
              helper.make_node("MatMul", [f"a{i}", f"b{i}"], [f"y{i}"]),
              helper.make_node("QuantizeLinear", [f"y{i}", "s", "zx"], [f"q{i}"])]
graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 2, [1, 4])],
                          [helper.make_tensor_value_info("q1", 2, [1, 4])],
                          [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.add_session_config_entry("session.x64quantprecision", "1")
try:
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
except Exception as error:
    print("Attempt to replace the existing tensor" in str(error))  # True
""",
        remedy="Give each weight's DequantizeLinear a zero point of its own, as `qtx export --form qdq` does.",
    ),
    Finding(
        id="QTX-GRA-004",
        title="LiteRT crashes on an empty tensor with a scale per channel",
        cause="Not known: the kernels for one scale give an empty tensor; those for a scale per channel crash.",
        consequence="The process ends with a signal.",
        reproduce="""
import numpy as np
from qtx.engines.paths import EngineCrash, run
values = {"x": np.zeros((2, 0), np.float32), "scale": np.ones(2, np.float32), "zero_point": np.zeros(2, np.int32)}
try:
    run("litert-reference-channel", "quantize", {**values, "dtype": "int8", "axis": 0})
except EngineCrash as crash:
    print("crashed" in str(crash))  # True
""",
        remedy="Do not run a batch of nothing.",
    ),
)
