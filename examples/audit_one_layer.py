"""Audits one linear layer of another engine: onnxruntime's QLinearMatMul against the reference, code by code.

Weights have a scale per output and 7 bits: with 8, a CPU without VNNI saturates pairs of products, as
`qtx_ref.integer.products.matmul_pairs16` does. Needs the extra `engines`.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from qtx_ref.integer.fixed_point import real_multiplier, requantize
from qtx_ref.integer.products import linear
from qtx_ref.profiles import profile
from qtx_ref.quant.affine import quantize, ranges, scale_zero
from qtx_ref.spec import QuantSpec

ONNX = profile("onnx")
MODEL = """<ir_version: 8, opset_import: ["": 13]> g
    (uint8[N, I] a, float a_scale, uint8 a_zero, int8[I, O] b, float[O] b_scale, int8[O] b_zero, float y_scale,
    uint8 y_zero) => (uint8[N, O] y) {y = QLinearMatMul(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero)}"""


def run_engine(**operands: np.ndarray) -> np.ndarray:
    """The engine's codes, (N, O) uint8."""
    model = onnx.parser.parse_model(MODEL).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, operands)[0]


def main() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 96)).astype(np.float32)  # (N, I)
    weight = rng.standard_normal((48, 96)).astype(np.float32) * rng.uniform(0.1, 2, (48, 1)).astype(
        np.float32
    )  # (O, I)
    eight, seven = QuantSpec(bits=8), QuantSpec(bits=7, symmetric=True, granularity="channel")

    x_scale, x_zero = scale_zero(*ranges(x, eight), eight, ONNX.scale)
    w_scale, w_zero = scale_zero(*ranges(weight, seven, weight=True), seven, ONNX.scale)  # (O, 1)
    y_scale, y_zero = scale_zero(*ranges(x @ weight.T, eight), eight, ONNX.scale)
    x_code = quantize(x, x_scale, x_zero, eight, ONNX.quantize)
    w_code = quantize(weight, w_scale, w_zero, seven, ONNX.quantize)

    accumulator = linear(x_code, w_code, eight, seven, x_zero, w_zero, rule=ONNX.matmul)  # (N, O) int32, exact
    real = real_multiplier(x_scale, w_scale, y_scale, ONNX.requantize)
    code = requantize(accumulator, real, y_zero, eight, ONNX.requantize)

    engine = run_engine(
        a=x_code.astype(np.uint8), a_scale=x_scale.reshape(()), a_zero=x_zero.astype(np.uint8).reshape(()),
        b=w_code.T.astype(np.int8), b_scale=w_scale.ravel(), b_zero=w_zero.astype(np.int8).ravel(),
        y_scale=y_scale.reshape(()), y_zero=y_zero.astype(np.uint8).reshape(()),
    )  # fmt: skip
    print(f"{(engine == code).sum()} of {code.size} codes are equal")


if __name__ == "__main__":
    main()
