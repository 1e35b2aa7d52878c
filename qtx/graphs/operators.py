"""Which ONNX operators have `qtx_ref`'s arithmetic: a function of the walk's state and the node for each.

It gives the outputs, or None for a form of its operator that qtx_ref does not have: an engine then runs the node.
"""

from __future__ import annotations

from . import operators_integer as integer
from .operators_plain import ELEMENTWISE, SHAPES, cast, constant, elementwise, move, transpose
from .state import Operator

__all__ = ["OPERATORS"]

OPERATORS: dict[tuple[str, str], Operator] = {
    ("", "QuantizeLinear"): integer.quantize_linear,
    ("", "DequantizeLinear"): integer.dequantize_linear,
    ("", "DynamicQuantizeLinear"): integer.dynamic_quantize_linear,
    ("", "MatMulInteger"): integer.matmul_integer,
    ("", "QLinearMatMul"): integer.qlinear_matmul,
    ("", "MatMul"): integer.matmul,
    ("", "Gemm"): integer.gemm,
    ("", "Add"): integer.add,
    ("", "Mul"): integer.scale,
    ("", "Div"): integer.scale,
    ("", "Constant"): constant,
    ("", "Relu"): integer.relu,
    ("", "Cast"): cast,
    ("", "Transpose"): transpose,
    **{("", op): elementwise for op in ELEMENTWISE if op not in ("Add", "Div", "Mul")},
    **{("", op): move for op in SHAPES},
    ("com.microsoft", "QuantizeLinear"): integer.quantize_linear,
    ("com.microsoft", "DequantizeLinear"): integer.dequantize_linear,
    ("com.microsoft", "QLinearAdd"): integer.qlinear_add,
    ("com.microsoft", "QGemm"): integer.qgemm,
    ("com.microsoft", "DynamicQuantizeMatMul"): integer.dynamic_quantize_matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): integer.matmul_integer_to_float,
}
