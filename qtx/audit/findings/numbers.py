"""Of numbers and codes: quantizing (QUA), NaN, dequantizing (DEQ), scales (SCA), casts (CAS).

A new one goes to the end.
"""

from __future__ import annotations

from .finding import Finding

__all__ = ["LIST"]

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
