"""What was found in engines and files: each with its cause, lines that reproduce it and a remedy, under a stable name.

A new one goes to the end. Names are by area: QUA quantize, DEQ dequantize, REQ requantize, ACC accumulation, BIA bias,
CAS cast, SCA scale, GRA graph, NAN. Behind each `print` of a reproduction stands what it printed; the tests run it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from qtx_ref.spec import SpecError

__all__ = ["FINDINGS", "Finding", "find", "format_finding", "format_page", "list_printed"]

PAGE = """# Findings

What the audits found, each under a name that stays. This page is what `qtx audit findings` prints;
`qtx audit findings QTX-QUA-001` prints one. Behind each `print` of a reproduction stands what it printed with onnx
1.23.2, onnxruntime 1.32.0, torch 2.13, torchao 0.18, ai-edge-litert 2.3.0 and ml_dtypes 0.6 on x86-64 with AVX-512.
"""


@dataclass(frozen=True)
class Finding:
    """A difference that somebody will meet."""

    id: str  # "QTX-REQ-001": stable
    title: str
    cause: str
    consequence: str
    reproduce: str  # a few lines of Python that run, and print
    remedy: str


def find(name: str) -> Finding:
    """The finding of that name. Raises SpecError for an unknown one."""
    if name not in FINDINGS:
        raise SpecError(f"finding is {name!r}: known findings are {', '.join(FINDINGS)}")
    return FINDINGS[name]


def list_printed(finding: Finding) -> list[str]:
    """What the reproduction prints, line by line: the comments behind its `print`s."""
    return re.findall(r"^ *print\(.*\)  # (.+)$", finding.reproduce, re.MULTILINE)


def format_finding(finding: Finding) -> str:
    """One finding as Markdown."""
    said = [f"{word.capitalize()}: {getattr(finding, word)}" for word in ("cause", "consequence", "remedy")]
    parts = [f"## {finding.id}", *(textwrap.fill(text, 118) for text in (f"**{finding.title}**", *said))]
    return "\n\n".join([*parts, f"```python\n{finding.reproduce.strip()}\n```"])


def format_page(findings: Iterable[Finding]) -> str:
    """All of them as one page of Markdown."""
    return "\n\n".join([PAGE.strip(), *map(format_finding, findings)])


LIST = (
    Finding(
        id="QTX-QUA-001",
        title="torch.quantize_per_tensor adds the zero point in a fused multiply-add, before rounding",
        cause="The vectorised kernel computes fma(x, 1 / scale, zero_point) in one rounding and rounds that half to "
        "even. With an odd zero point every tie goes the other way than by round(x / scale) + zero_point.",
        consequence="One code of difference to onnxruntime, to fake_quantize_* of the same torch, and to a model "
        "trained with that, on ties and within an ulp of them.",
        reproduce="""
import numpy as np, torch
x, scale, zero = np.float32([-0.75, 2.55]), np.float32(0.3), 3
codes = torch.quantize_per_tensor(torch.from_numpy(x), float(scale), zero, torch.quint8).int_repr().numpy()
fused = np.rint((x.astype(np.float64) * (1 / scale) + zero).astype(np.float32))
print(codes.tolist(), fused.tolist())  # [1, 12] [1.0, 12.0]
print((np.rint(x / scale) + zero).tolist())  # [1.0, 11.0]
""",
        remedy="Compare under the profile of this path (zero_point fused, reciprocal), or quantize with "
        "fake_quantize_per_tensor_affine's rule throughout.",
    ),
    Finding(
        id="QTX-QUA-002",
        title="torch.quantize_per_channel adds the zero point before rounding, but without per-tensor's fusion",
        cause="quantize_per_channel computes x * (1 / scale) in float32, adds the zero point in float32, and rounds.",
        consequence="The same numbers with the same scale get other codes per channel than per tensor.",
        reproduce="""
import torch
x, scale, zero = torch.tensor([[-0.75]]), 0.3, 3
tensor = torch.quantize_per_tensor(x, scale, zero, torch.quint8).int_repr()
scales, zeros = torch.tensor([scale]), torch.tensor([zero])
print(tensor.item(), torch.quantize_per_channel(x, scales, zeros, 0, torch.quint8).int_repr().item())  # 1 0
""",
        remedy="State the granularity when two results are compared: the two paths have a profile each.",
    ),
    Finding(
        id="QTX-QUA-003",
        title="torch's fake quantizers multiply by the reciprocal of the scale where ONNX divides",
        cause="fake_quantize_* computes rint(x * (1 / scale)) + zero_point; QuantizeLinear computes x / scale. "
        "1 / scale is rounded once more.",
        consequence="Near ties a model trained with torch's fake quantizers meets other codes in onnxruntime: one code "
        "at about one in ten of exact ties, none elsewhere.",
        reproduce="""
import numpy as np, torch
x, scale = np.float32([8.25]), np.float32(0.3)
y = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x), float(scale), 3, 0, 255).numpy()
print((np.rint(y / scale) + 3).tolist(), (np.rint(x / scale) + 3).tolist())  # [31.0] [30.0]
""",
        remedy="Train with FakeQuant under the profile of the engine that will run the model.",
    ),
    Finding(
        id="QTX-NAN-001",
        title="NaN becomes a different code in each engine, and none reports it",
        cause="Each clamps or converts in its own order: torch's per-tensor kernel gives the highest code, its "
        "per-channel kernel the raw 0, fake_quantize and onnxruntime the lowest.",
        consequence="A NaN upstream turns into the largest activation in one engine and the smallest in another, and "
        "nothing says that it was there.",
        reproduce="""
import torch
x, scale, zero = torch.tensor([float("nan")]), 1.0, 7
print(torch.quantize_per_tensor(x, scale, zero, torch.qint8).int_repr().item())  # 127
scales, zeros = torch.tensor([scale]), torch.tensor([zero])
print(torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8).int_repr().item())  # 0
print(torch.fake_quantize_per_tensor_affine(x, scale, zero, -128, 127).item() + zero)  # -128.0
""",
        remedy="Look for NaN before quantizing; the default profile refuses it.",
    ),
    Finding(
        id="QTX-QUA-004",
        title="Levels beyond 2^31 wrap in the ONNX reference: 3e9 and infinity become the lowest code",
        cause="The ReferenceEvaluator converts the rounded level to int32 before it adds the zero point and clamps; "
        "what an int32 does not hold becomes INT_MIN.",
        consequence="Large positive values are quantized to the lowest code in the reference and to the highest in "
        "onnxruntime, which saturates.",
        reproduce="""
import numpy as np
from onnx import parser
from onnx.reference import ReferenceEvaluator
model = parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
    g (float[N] x, float s, uint8 z) => (uint8[N] y) { y = QuantizeLinear(x, s, z) }''')
inputs = {"x": np.float32([300, 3e9, np.inf]), "s": np.array(np.float32(1)), "z": np.array(np.uint8(7))}
print(ReferenceEvaluator(model).run(None, inputs)[0].tolist())  # [255, 0, 0]
""",
        remedy="Clip to the range before QuantizeLinear, or compare with onnxruntime, which saturates.",
    ),
    Finding(
        id="QTX-REQ-001",
        title="QLinearMatMul of the ONNX reference rounds after adding the zero point; onnxruntime before",
        cause="The ReferenceEvaluator computes rint(float64(accumulator) * M + zero_point).",
        consequence="With an odd zero point every tie differs by one code from onnxruntime.",
        reproduce="""
import numpy as np, onnxruntime
from onnx import parser
from onnx.reference import ReferenceEvaluator
model = parser.parse_model('''<ir_version: 10, opset_import: ["": 21]>
    g (uint8[1, 1] a, float sa, uint8 za, uint8[1, 1] b, float sb, uint8 zb, float sy, uint8 zy) => (uint8[1, 1] y)
    { y = QLinearMatMul(a, sa, za, b, sb, zb, sy, zy) }''')
scales = {name: np.array(np.float32(value)) for name, value in {"sa": 0.5, "sb": 1, "sy": 1}.items()}
zeros = {name: np.array(np.uint8(value)) for name, value in {"za": 0, "zb": 0, "zy": 1}.items()}
inputs = {"a": np.uint8([[1]]), "b": np.uint8([[1]]), **scales, **zeros}
print(ReferenceEvaluator(model).run(None, inputs)[0].item())  # 2
print(onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0].item())  # 1
""",
        remedy="Hold a port to onnxruntime's profile; the reference has one of its own.",
    ),
    Finding(
        id="QTX-ACC-001",
        title="fbgemm and onednn saturate pairs of products in int16 on x86 without VNNI",
        cause="vpmaddubsw adds two neighbouring products of uint8 and int8 into a saturating int16: 255 * 127 + 255 * "
        "127 = 64770 becomes 32767.",
        consequence="The same model gives other codes on an AVX2 machine than on one with VNNI: here half the value.",
        reproduce="""
import os, subprocess, sys
lines = '''import torch
x = torch.quantize_per_tensor(torch.full((1, 2), 255.0), 1.0, 0, torch.quint8)
w = torch.quantize_per_tensor(torch.full((1, 2), 127.0), 1.0, 0, torch.qint8)
torch.backends.quantized.engine = "fbgemm"
print(torch.ops.quantized.linear(x, torch.ops.quantized.linear_prepack(w, None), 400.0, 0).int_repr().item())'''
avx2 = dict(os.environ, FBGEMM_ENABLE_INSTRUCTIONS="AVX2", PYTHONWARNINGS="ignore")
print(round(255 * 127 * 2 / 400), round(32767 / 400))  # 162 82
print(subprocess.run([sys.executable, "-c", lines], env=avx2, capture_output=True, text=True).stdout.strip())  # 82
""",
        remedy="Weights of 7 bits (torch's reduce_range), or a machine with VNNI; `matmul_pairs16` of the reference "
        "reproduces it.",
    ),
    Finding(
        id="QTX-CAS-001",
        title="Beyond 448 torch saturates to E4M3 and ml_dtypes gives NaN",
        cause="E4M3 has no infinity. torch 2.13 clamps to the largest value, 448; ml_dtypes, and ONNX with saturate=0, "
        "round and give NaN above 464.",
        consequence="A weight cast by one package and read by another holds NaN where the first had 448.",
        reproduce="""
import ml_dtypes, numpy as np, torch
x = np.float32([464, 465, 1e9])
print(torch.from_numpy(x).to(torch.float8_e4m3fn).float().tolist())  # [448.0, 448.0, 448.0]
print(x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist())  # [448.0, nan, nan]
""",
        remedy="Scale so that nothing lies beyond 448, or say `saturate` on both sides.",
    ),
    Finding(
        id="QTX-CAS-002",
        title="The NaN of E5M2 is 0x7F in torch and 0x7E in ml_dtypes and ONNX",
        cause="E5M2 has three codes of NaN on each side of 0, and each library writes one of its own.",
        consequence="Files with NaN differ in their bytes though not in their values.",
        reproduce="""
import ml_dtypes, numpy as np, torch
x = np.float32([np.nan])
print(hex(torch.from_numpy(x).to(torch.float8_e5m2).view(torch.uint8).item()))  # 0x7f
print(hex(x.astype(ml_dtypes.float8_e5m2).view(np.uint8).item()))  # 0x7e
""",
        remedy="Compare values, with NaN equal to NaN, or cast under the profile of the side that wrote the file.",
    ),
    Finding(
        id="QTX-CAS-003",
        title="FP4 has no NaN, and ml_dtypes and ONNX make -0 of it",
        cause="E2M1 has neither NaN nor infinity; the conversion keeps a sign and loses the rest.",
        consequence="NaN disappears silently.",
        reproduce="""
import ml_dtypes, numpy as np
print(np.float32([np.nan, np.inf]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).tolist())  # [8, 7]
""",
        remedy="Look for NaN before the cast; `qtx_ref` refuses it unless the profile says 8.",
    ),
    Finding(
        id="QTX-REQ-002",
        title="LiteRT requantizes an int8 layer in three ways: reference kernels, optimised ones, XNNPACK",
        cause="The reference kernels round the 64-bit product once, half away from zero; the optimised ones take a "
        "rounding doubling high product and then a rounding shift, both half up; XNNPACK multiplies in float32 and "
        "rounds half to even.",
        consequence="The same .tflite file gives other codes with and without the delegate, and in the interpreter "
        "that checks a device's results.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.ones((1, 8), np.int8), "w": np.full((8, 1), -1, np.int8), "bias": None}  # accumulator -8
values |= {"x_scale": np.float32(2**-5), "w_scale": np.float32(2**-6), "y_scale": np.float32(2**-7)}  # M = 1/16
values |= {"x_zero": np.int8(0), "w_zero": np.int8(0), "y_zero": np.int8(19)}
codes = [run(f"litert-{kernels}", "linear", values)["y"].item() for kernels in ("reference", "optimized", "xnnpack")]
print(codes)  # [18, 19, 19]
""",
        remedy="Say which kernels a result comes from; there is a profile of each, litert-2.3-reference and so on.",
    ),
    Finding(
        id="QTX-REQ-003",
        title="torch's fbgemm, onednn and qnnpack multiply an accumulator by different factors",
        cause="fbgemm multiplies once, by (x w) / y. qnnpack by (x w) (1 / y). onednn scales by x and by w, each the "
        "reciprocal of its reciprocal, and then by 1 / y, rounding to float32 each time.",
        consequence="One code of difference near ties between torch.backends.quantized.engine settings, and so between "
        "x86 and ARM.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.uint8([[243]]), "w": np.int8([[119]]), "bias": None}
values |= {"x_zero": np.uint8(0), "w_zero": np.int8(0), "y_zero": np.uint8(0)}
scales = {"x_scale": 0.031114893, "w_scale": 0.08803668, "y_scale": 0.65194196}
values |= {name: np.float32(scale) for name, scale in scales.items()}
print([run(f"torch-{engine}", "linear", values)["y"].item() for engine in ("fbgemm", "onednn")])  # [121, 122]
""",
        remedy="Compare under the profile of the engine that runs, torch-fbgemm, torch-onednn or torch-qnnpack.",
    ),
    Finding(
        id="QTX-BIA-001",
        title="torch adds a float bias where ONNX and LiteRT add an integer",
        cause="fbgemm and onednn keep the bias in float32 and add it to the scaled accumulator; QGemm and LiteRT take "
        "it rounded to whole units of the accumulator, x w.",
        consequence="Where x w is coarse the rounded bias moves codes; at ties the order of rounding does.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.uint8([[1]]), "w": np.int8([[1]]), "x_zero": np.uint8(0), "w_zero": np.int8(0), "y_zero": np.uint8(0)}
values |= {"x_scale": np.float32(1), "w_scale": np.float32(0.5), "y_scale": np.float32(0.25)}
bias = np.float32([0.25])  # half a unit of the accumulator: 0 as an integer
print(run("torch-fbgemm", "linear", {**values, "bias": bias})["y"].item())  # 3
print(run("onnxruntime-all", "linear", {**values, "bias": np.rint(bias / 0.5).astype(np.int32)})["y"].item())  # 2
""",
        remedy="Export with the bias rounded as the target has it, and compare under its profile.",
    ),
    Finding(
        id="QTX-DEQ-001",
        title="LiteRT's optimised dequantization is expanded, and its last elements are not",
        cause="Vectors are computed as s q + (-z s), each product rounded; what does not fill a vector, as s (q - z).",
        consequence="Equal codes in one tensor become different numbers, by their place in it.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"code": np.full(17, -18, np.int8), "scale": np.float32(3.1255352951120585e-05), "zero_point": np.int32(-20)}
y = run("litert-optimized", "dequantize", {**values, "dtype": "int8"})["y"]
print(y[15] == y[16], y[16] == values["scale"] * 2)  # False True
""",
        remedy="Expect an ulp of the larger product; compare codes, not dequantized numbers.",
    ),
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
        id="QTX-SCA-001",
        title="DynamicQuantizeLinear gives a short range the scale 0",
        cause="A range below 2^-141 divided by 255 rounds to 0, and neither onnxruntime nor the reference has a floor.",
        consequence="Codes are x / 0: 0 becomes the code of NaN, everything else an end, and dequantized it is all 0.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"low": np.float32([0]), "high": np.float32([1e-44]), "dtype": "uint8"}
print(run("onnxruntime-all", "scale", values)["scale"].item())  # 0.0
""",
        remedy="A floor for scales: the smallest normal number, as the default profile has it.",
    ),
    Finding(
        id="QTX-SCA-002",
        title="torchao divides a block by 2^-126 where its scale says 2^-127",
        cause="The scale code 0 stands for 2^-127, which is subnormal in float32; the elements are divided by the "
        "smallest normal number instead.",
        consequence="Blocks whose largest element is that small are read back at half their value.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
from qtx_ref.quant.formats import mx_quantize
from qtx_ref.spec import FloatFormat
x = np.zeros((1, 32), np.float32)
x[0, 0] = 2.0**-126
made = run("torchao-mx-floor", "mx", {"x": x, "format": "e5m2"})
print(made["scale"].item(), made["code"][0, 0], mx_quantize(x, FloatFormat.E5M2)[1][0, 0])  # 0 60 64
""",
        remedy="Scale such a tensor up before it is cast; it is below anything that is trained.",
    ),
    Finding(
        id="QTX-SCA-003",
        title="torchao's RCEIL takes a logarithm in float32 and misses powers of two by an ulp",
        cause="ceil(log2(absmax / largest)): for large |k| the logarithm of what is just above 2^k is rounded to k.",
        consequence="The block's scale is half of what hardware gives, and its largest element saturates.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
from qtx_ref.quant.formats import mx_quantize
from qtx_ref.spec import FloatFormat, SharedScale
x = np.zeros((1, 32), np.float32)
x[0, 0] = np.nextafter(np.float32(448 * 2.0**-30), np.float32(1))
made = run("torchao-mx-rceil", "mx", {"x": x, "format": "e4m3"})
print(made["scale"].item() - 127, int(mx_quantize(x, FloatFormat.E4M3, SharedScale.RCEIL)[0].item()) - 127)  # -30 -29
""",
        remedy="Take the exponent from the bits of the quotient, as qtx_ref does.",
    ),
    Finding(
        id="QTX-NAN-002",
        title="MX blocks with infinity get a finite scale in torchao, and those with NaN elements of NaN",
        cause="The exponent of infinity is taken as 128, and the infinity saturates. With NaN the scale is NaN, and "
        "so is every quotient with it.",
        consequence="An infinity upstream turns into the largest finite element of a block whose others are lost. "
        "The codes of a block of NaN differ between engines, its values do not.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
from qtx_ref.quant.formats import mx_quantize
from qtx_ref.spec import FloatFormat
x = np.ones((1, 32), np.float32)
x[0, 0] = np.inf
made = run("torchao-mx-floor", "mx", {"x": x, "format": "e4m3"})
print(made["scale"].item(), made["code"][0, :2].tolist())  # 247 [126, 0]
print(mx_quantize(x, FloatFormat.E4M3)[0].item())  # 255
""",
        remedy="Look for infinity before the cast; qtx_ref gives the block the scale NaN.",
    ),
    Finding(
        id="QTX-QUA-005",
        title="LiteRT's optimised quantizer rounds the last elements of a tensor by another rule",
        cause="Full vectors are x (1 / s) in float32, half to even; what does not fill a vector is x / s in "
        "float64, half away from zero. With a scale per channel it is x / s in float32, half away, throughout.",
        consequence="Equal numbers in one tensor get different codes, by their place in it.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.full(33, 2.5, np.float32), "scale": np.float32(1), "zero_point": np.int32(0), "dtype": "int8"}
print(run("litert-optimized", "quantize", values)["code"][30:].tolist())  # [2, 2, 3]
""",
        remedy="Compare tensors whose length is a multiple of 16, or each part under its own profile: "
        "litert-2.3-optimized and litert-2.3-optimized-tail.",
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
        id="QTX-ACC-002",
        title="onnxruntime saturates pairs of uint8 x int8 on x86 without VNNI, not of uint8 x uint8",
        cause="Its kernel of uint8 x int8 there is vpmaddubsw, which adds two neighbouring products in saturating "
        "int16; its kernel of uint8 x uint8 widens both factors first. quantize_dynamic writes uint8 x int8.",
        consequence="A file gives other integers on such a machine wherever two neighbours are large at once: `qtx "
        "audit certificate` says whether they can be, and how often they are on data.",
        reproduce="""
import numpy as np
from qtx_ref.integer.products import matmul_pairs16
x, w = np.uint8([[255, 255]]), np.int8([[127], [127]])
print((x.astype(int) @ w).item(), matmul_pairs16(x, w).item())  # 64770 32767
""",
        remedy="Weights of type QUInt8, or reduce_range (7 bits). `qtx audit certificate FILE --engine onnxruntime` "
        "gives the operands to onnxruntime on an emulated CPU, where qemu-user is installed.",
    ),
    Finding(
        id="QTX-BIA-002",
        title="A float bias behind a QDQ product is added as a float, by integer kernels as a multiple of their unit",
        cause="torch's exporter leaves the bias of a layer in float beside two DequantizeLinear. Read as it stands it "
        "is added to the real result; fused into an integer product it is rounded to x_scale * w_scale first.",
        consequence="One code of difference where the rounding reaches a tie.",
        reproduce="""
accumulator, unit, bias, scale = 21, 0.02 * 0.002, 0.31415, 0.01
print(round((accumulator * unit + bias) / scale))  # 31
print(round((accumulator + round(bias / unit)) * unit / scale))  # 32
""",
        remedy="Walk the file under the profile that its runtime has: `bias` float_after as it stands, int32 as fused.",
    ),
    Finding(
        id="QTX-REQ-004",
        title="Levels beyond int32 become the lowest code in fbgemm, qnnpack and LiteRT's reference kernels",
        cause="They convert the scaled accumulator to int32 before they clamp; what an int32 does not hold becomes "
        "INT_MIN. onnxruntime, onednn and XNNPACK clamp first.",
        consequence="A result far above the range is the lowest code instead of the highest. It takes scales that "
        "do not fit the layer.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.uint8([[100], [1]]), "w": np.int8([[127]]), "bias": None, "x_zero": np.uint8(0), "w_zero": np.int8(0)}
values |= {"x_scale": np.float32(1), "w_scale": np.float32(1), "y_scale": np.float32(2**-20), "y_zero": np.uint8(5)}
print(run("torch-fbgemm", "linear", values)["y"].ravel().tolist())  # [0, 255]
print(run("onnxruntime-all", "linear", values)["y"].ravel().tolist())  # [255, 255]
""",
        remedy="Calibrate: with a y_scale that belongs to the layer no level is near 2^31. `requantize.beyond` of a "
        "profile says which engine does what.",
    ),
    Finding(
        id="QTX-REQ-005",
        title="Integer layers of torch with a subnormal scale are their own",
        cause="1 / s of a subnormal scale is near the end of float32 or beyond it; qnnpack's product of scales "
        "vanishes. The reference refuses a factor beyond 2^64, with which an accumulator may overflow.",
        consequence="qnnpack gives ends of the range where onednn gives the zero point.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.uint8([[251]]), "w": np.int8([[100]]), "bias": None, "x_zero": np.uint8(0), "w_zero": np.int8(0)}
scales = {"x_scale": 6.092734e-39, "w_scale": 1.6641461e-06, "y_scale": 1.1754944e-38}
values |= {"y_zero": np.uint8(247)} | {name: np.float32(scale) for name, scale in scales.items()}
print([run(f"torch-{engine}", "linear", values)["y"].item() for engine in ("qnnpack", "onednn")])  # [0, 247]
""",
        remedy="Keep scales at 2^-126 or above, as qtx does.",
    ),
    Finding(
        id="QTX-REQ-006",
        title="onednn multiplies by other factors on a CPU without AVX-512",
        cause="With AVX-512 the accumulator is multiplied by x, by w and by 1 / y in turn; the kernels for AVX2 "
        "multiply by the product of x and w first.",
        consequence="One code of difference near ties between two machines with the same torch.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.uint8([[71]]), "w": np.int8([[93]]), "bias": None, "x_zero": np.uint8(0), "w_zero": np.int8(0)}
scales = {"x_scale": 0.06028441, "w_scale": 0.021628225, "y_scale": 0.048503026}
values |= {"y_zero": np.uint8(8)} | {name: np.float32(scale) for name, scale in scales.items()}
print(run("torch-onednn", "linear", values, "avx2")["y"].item())  # 186
unit, product = np.float32(0.06028441) * np.float32(0.021628225), np.float32(71 * 93)
print(np.rint((product * unit) * (1 / np.float32(0.048503026)) + np.float32(8)))  # 186.0
""",
        remedy="Compare results of machines of one kind: torch-onednn states the one, torch-onednn-avx2 the other.",
    ),
    Finding(
        id="QTX-ACC-003",
        title="onednn moves int8 activations to uint8, and their pairs saturate on x86 without VNNI",
        cause="The kernels for AVX2 add 128 to int8 codes, multiply uint8 by int8 with vpmaddubsw, whose pairs "
        "saturate in int16, and take 128 times the sums of the columns away again.",
        consequence="Small int8 activations saturate too: 0 is 128 there.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
from qtx_ref.integer.products import matmul_pairs16
values = {"x": np.int8([[127, 127]]), "w": np.int8([[127], [127]]), "bias": None}
values |= {"x_zero": np.int8(0), "w_zero": np.int8(0)}
values |= {"x_scale": np.float32(1), "w_scale": np.float32(1), "y_scale": np.float32(256), "y_zero": np.int8(0)}
moved = (values["x"].astype(np.int16) + 128).astype(np.uint8)
print((matmul_pairs16(moved, values["w"]).item() - 128 * 254) / 256)  # 0.99609375
print(run("torch-onednn-s8", "linear", values, "avx2")["y"].item())  # 1
""",
        remedy="uint8 activations with weights of 7 bits, or a machine with VNNI.",
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
    Finding(
        id="QTX-ACC-005",
        title="A kernel of 16-bit accumulators saturates on ordinary sums",
        cause="It adds the pairs of vpmaddubsw in saturating int16 (vpaddsw) for a run, of up to 128 pairs, before it "
        "widens them: codes of 20 and weights of 100 fill int16 after 8 pairs.",
        consequence="Sums are cut at 32767 where int32 would hold them many times over.",
        reproduce="""
import numpy as np
from qtx_ref.integer.products import matmul_pairs16
x, w = np.full((1, 64), 20, np.uint8), np.full((64, 1), 100, np.int8)
print([matmul_pairs16(x, w, pairs).item() for pairs in (1, 8, 32)])  # [128000, 128000, 32767]
""",
        remedy="`qtx audit certificate` says which run is proved; else a kernel that adds in int32.",
    ),
    Finding(
        id="QTX-ACC-004",
        title="An int32 accumulator that overflows wraps, and no engine says so",
        cause="255 * 255 * 33030 is beyond 2^31; so is a bias of a scale far above its product's.",
        consequence="A large positive sum comes out negative.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
x, w = np.full((1, 33030), 255, np.uint8), np.full((33030, 1), 255, np.uint8)
values = {"x": x, "x_zero": np.uint8(0), "w": w, "w_zero": np.uint8(0)}
print(255 * 255 * 33030, run("onnxruntime-all", "matmul", values)["accumulator"].item())  # 2147775750 -2147191546
""",
        remedy="`qtx audit certificate` proves from codes that it cannot, or gives operands; a sum in parts, or larger "
        "scales.",
    ),
    Finding(
        id="QTX-REQ-007",
        title="Where M is 1 or more, two roundings shift an accumulator left in int32",
        cause="M = 40 is 0.625 * 2^6: the accumulator is shifted by 6 before the high product, and beyond 2^25 leaves "
        "int32, though the result would fit.",
        consequence="What engines then have is undefined in C: it wraps, or saturates.",
        reproduce="""
from dataclasses import replace
import numpy as np
from qtx_ref.integer.fixed_point import multiply, quantize_multiplier
from qtx_ref.spec import QTX, HighProduct, LeftShift
a, M = np.int32([50_000_000]), quantize_multiplier(np.float64(40))
high = replace(QTX.requantize, product=HighProduct.HALF_UP)
ways = [replace(high, left=left) for left in (LeftShift.SATURATE, LeftShift.WRAP)]
print([multiply(a, *M, rule).item() for rule in ways])  # [1342177279, -684354560]
print(50_000_000 * 40)  # 2000000000
""",
        remedy="A larger scale of the result, so that M is below 1; `qtx audit certificate` says where it matters.",
    ),
    Finding(
        id="QTX-QUA-007",
        title="XNNPACK takes subnormal numbers for 0",
        cause="It computes with subnormals flushed to zero. Where a product of scales is one, a layer's multiplier "
        "loses bits as well.",
        consequence="Codes of tensors whose numbers are near 1e-38 are the zero point. Nothing ordinary is that small.",
        reproduce="""
import numpy as np
from qtx.engines.paths import run
values = {"x": np.float32([1.1097027e-38]), "scale": np.float32(1.5017549e-38), "zero_point": np.int32(90)}
values["dtype"] = "int8"
print([run(f"litert-{kernels}", "quantize", values)["code"].item() for kernels in ("reference", "xnnpack")])  # [91, 90]
""",
        remedy="Scale such a tensor up before it is quantized.",
    ),
)
FINDINGS = {finding.id: finding for finding in LIST}
