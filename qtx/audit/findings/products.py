"""Of products: requantization (REQ), accumulation (ACC), biases (BIA). A new one goes to the end."""

from __future__ import annotations

from .finding import Finding

__all__ = ["LIST"]

LIST = (
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
)
