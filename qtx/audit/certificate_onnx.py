"""The integer products of an ONNX file, found by its nodes, and their operands on real data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from qtx_ref.integer.fixed_point import quantize_multiplier
from qtx_ref.spec import QTX, QuantSpec

from ..graphs.operators import OPERATORS
from ..graphs.reading import Graph, Node, spec_of
from ..graphs.running import choose_level
from ..graphs.state import Codes, State
from ..graphs.walking import compute
from .certificate_artifact import EXACT, Show
from .certificate_bounds import Operand, Product

__all__ = ["read_onnx_products", "run_onnx"]

MOVES = ("Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
INTEGER = {  # the places of codes and zero points of both operands, of a bias, and of scales: x, w, y
    ("", "MatMulInteger"): ((0, 2), (1, 3), None, None),
    ("", "QLinearMatMul"): ((0, 2), (3, 5), None, (1, 4, 6)),
    ("com.microsoft", "QGemm"): ((0, 2), (3, 5), 6, (1, 4, 7)),
    ("com.microsoft", "DynamicQuantizeMatMul"): (None, (1, 3), None, None),
    ("com.microsoft", "MatMulIntegerToFloat"): ((0, 4), (1, 5), None, None),
}
FLOATS = ("MatMul", "Gemm")
UNREAD = ("ConvInteger", "QLinearConv", "QAttention", "QLinearConcat", "QEmbedLayerNormalization")


@dataclass(frozen=True)
class Found:
    """A factor of a float product: its codes, their scale where it is constant, and the length of the sum."""

    operand: Operand
    scale: np.ndarray | None
    depth: int | None


class Constants:
    """What a file's constants come to: nodes all of whose inputs are constant, computed."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.state = State(graph, QTX, choose_level(None))
        for node in graph.nodes:
            known = all(not name or name in self.state.values for name in node.inputs)
            if known and (node.domain, node.op) in OPERATORS:
                compute(self.state, node)

    def value(self, name: str) -> np.ndarray | None:
        """A constant, or what constants make; None for what depends on the inputs or is left out."""
        return self.state.values.get(name) if name else None

    def spec(self, name: str, zero: str) -> QuantSpec | None:
        """The quantizer of a tensor of codes, by its own dtype or its zero point's."""
        for one in (name, zero):
            declared = self.graph.types.get(one, ("", None))[0]
            if one and (spec := spec_of(declared or str(getattr(self.value(one), "dtype", "")))) is not None:
                return spec
        return None


def read_onnx_products(graph: Graph) -> tuple[list[Product], list[str]]:
    """Every integer product of a file, in its order; and the nodes of integers that are not read."""
    constants = Constants(graph)
    products, unread = [], []
    for node in graph.nodes:
        product = None
        if (node.domain, node.op) in INTEGER:
            product = read_integer(constants, node)
        elif node.domain == "" and node.op in FLOATS:
            product = read_float(constants, node)
            if product is None:  # not of two dequantized tensors
                continue
        elif node.op not in UNREAD and not is_quantized_conv(constants, node):
            continue
        if product is None:
            unread.append(f"{node.name} ({node.op})")
        else:
            products.append(product)
    return products, unread


def is_quantized_conv(constants: Constants, node: Node) -> bool:
    """Whether a node is a Conv of two dequantized tensors."""
    return node.op == "Conv" and all(trace(constants, name, 0) is not None for name in node.inputs[:2])


def place(node: Node, index: int | None) -> str:
    """The name of an input; "" where it is left out."""
    return node.inputs[index] if index is not None and index < len(node.inputs) else ""


def read_integer(constants: Constants, node: Node) -> Product | None:
    """The product of an integer operator."""
    left_at, right_at, bias_at, scales_at = INTEGER[node.domain, node.op]
    turns = [node.attributes.get(key, 0) for key in ("transA", "transB")]
    left = Operand(0, 255, None) if left_at is None else find_operand(constants, node, left_at, turns[0])
    right = find_operand(constants, node, right_at, turns[1])
    if left is None or right is None:
        return None
    bias = constants.value(place(node, bias_at))
    shift = scale = None
    if scales_at is not None:
        x, w, y = (constants.value(place(node, i)) for i in scales_at)
        scale = None if w is None else flat(w)
        shift = find_shift(x, w, y)
    depth = find_depth(constants, node, left_at, right_at, right, turns)
    return arrange(
        node.name, left, right, depth, None if bias is None else np.ravel(bias).astype(np.int64), shift, scale
    )


def find_operand(constants: Constants, node: Node, places: tuple[int, int], turned: int) -> Operand | None:
    """Codes and zero point at these places of a node."""
    name, zero = (place(node, i) for i in places)
    spec = constants.spec(name, zero)
    if spec is None:
        return None
    point = np.zeros((), np.int64) if not zero else constants.value(zero)
    codes = constants.value(name)
    if codes is not None and codes.ndim != 2:
        codes = None  # constant, but a product of its own for each of a batch
    codes = None if codes is None else (codes.T if turned else codes).astype(np.int32)
    return Operand(spec.code_min, spec.code_max, None if point is None else flat(np.asarray(point, np.int64)), codes)


def find_depth(
    constants: Constants,
    node: Node,
    left_at: tuple[int, int] | None,
    right_at: tuple[int, int],
    right: Operand,
    turns: list[int],
) -> int | None:
    """The length of the sum, where a shape says it."""
    if right.codes is not None:
        return len(right.codes)
    for name, axis in (
        (place(node, 0 if left_at is None else left_at[0]), -2 if turns[0] else -1),
        (place(node, right_at[0]), -1 if turns[1] else -2),
    ):
        shape = constants.graph.types.get(name, ("", None))[1]
        if shape is not None and len(shape) >= 2 and shape[axis] is not None:
            return shape[axis]
    return None


def find_shift(x: np.ndarray | None, w: np.ndarray | None, y: np.ndarray | None) -> np.ndarray | None:
    """The shift of M = x w / y; None where a scale is not constant, or there is no result of codes."""
    if x is None or w is None or y is None or np.size(x) > 1 or np.size(y) > 1:
        return None
    real = np.ravel(x).astype(np.float64)[0] * flat(w).astype(np.float64) / np.ravel(y).astype(np.float64)[0]
    return flat(quantize_multiplier(np.minimum(real, 2.0**29))[1])


def flat(value: np.ndarray) -> np.ndarray:
    """One number without axes; several along one."""
    return np.reshape(value, () if np.size(value) == 1 else -1)


def arrange(
    name: str,
    left: Operand,
    right: Operand,
    depth: int | None,
    bias: np.ndarray | None,
    shift: np.ndarray | None,
    scale: np.ndarray | None,
) -> Product:
    """The product with its constant on the right: (A B)^T = B^T A^T."""
    if (codes := left.codes) is not None:
        if right.codes is None:
            left, right = right, replace(left, codes=codes.T)
            bias = shift = scale = None  # they belong to the columns of what was on the right
        left = replace(left, codes=None)
    return Product(name, left, right, depth, bias, shift, 32 if left.is_byte and right.is_byte else 64, scale)


# --- products of dequantized tensors ----------------------------------------------------------------------------------


def read_float(constants: Constants, node: Node) -> Product | None:
    """A MatMul or Gemm of two dequantized tensors; None for others."""
    turns = [node.attributes.get(key, 0) for key in ("transA", "transB")]
    left, right = (trace(constants, node.inputs[i], turns[i]) for i in (0, 1))
    if left is None or right is None:
        return None
    depth = right.depth or left.depth
    for index in (0, 1):
        shape = constants.graph.types.get(node.inputs[index], ("", None))[1]
        axis = (-2 if index else -1) if not turns[index] else (-1 if index else -2)
        if depth is None and shape is not None and len(shape) >= 2:
            depth = shape[axis]
    unit = None
    scaled = any(node.attributes.get(key, 1.0) != 1 for key in ("alpha", "beta"))
    if left.scale is not None and right.scale is not None and left.scale.size == 1 and not scaled:
        unit = left.scale.astype(np.float64) * right.scale.astype(np.float64)
    bias, shift = follow(constants, node, unit)
    return arrange(node.name, left.operand, right.operand, depth, bias, shift, right.scale)


def trace(constants: Constants, name: str, turned: int) -> Found | None:
    """The codes behind a float operand: from a DequantizeLinear, through moves."""
    known = constants.state.codes.get(name)
    if known is not None:
        return found_constant(known, turned)
    node = constants.graph.producers.get(name)
    while node is not None and node.op in MOVES and node.domain == "":
        node = constants.graph.producers.get(node.inputs[0])
    if node is None or node.op != "DequantizeLinear":
        return None
    spec = constants.spec(place(node, 0), place(node, 2))
    scale = constants.value(place(node, 1))
    if spec is None or (scale is not None and scale.size > 1):  # a scale along the sum is no integer product
        return None
    point = np.zeros((), np.int64) if not place(node, 2) else constants.value(place(node, 2))
    zero = None if point is None else flat(np.asarray(point, np.int64))
    return Found(Operand(spec.code_min, spec.code_max, zero), None if scale is None else flat(scale), None)


def found_constant(known: Codes, turned: int) -> Found | None:
    """A constant factor: a matrix with one scale, or one per column. Of a batch of matrices the limits alone."""
    codes, axis = known.value, known.axis
    if codes.ndim < 2:
        return None
    if turned:
        codes, axis = codes.swapaxes(-1, -2), None if axis is None else (2 * codes.ndim - 3 - axis)
    if axis is not None and axis != codes.ndim - 1:
        return None
    one = Operand(known.spec.code_min, known.spec.code_max, flat(known.zero_point.astype(np.int64)))
    if codes.ndim > 2:
        return Found(one, flat(known.scale), codes.shape[-2])
    whole = Operand(one.low, one.high, one.zero_point, codes.astype(np.int32))
    return Found(whole, flat(known.scale), len(codes))


def follow(constants: Constants, node: Node, unit: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The bias of a product, and the shift of its requantization: through a bias, factors, a ReLU and moves to a
    QuantizeLinear. `unit`: what an accumulator of 1 stands for, where that is constant."""
    if unit is None:
        return None, None
    bias, graph = None, constants.graph
    if node.op == "Gemm" and place(node, 2):
        bias = to_steps(constants.value(place(node, 2)), unit)
    name = node.outputs[0]
    while len(graph.consumers.get(name, ())) == 1:
        step = graph.consumers[name][0]
        if step.op == "QuantizeLinear" and step.inputs[0] == name:
            return bias, find_shift(np.ones(()), unit, constants.value(step.inputs[1]))
        other = constants.value(next((one for one in step.inputs if one != name), ""))
        if step.op == "Add" and other is not None and other.ndim <= 1 and bias is None:
            bias = to_steps(other, unit)
        elif step.op in ("Mul", "Div") and other is not None and other.size == 1 and step.inputs[0] == name:
            by = float(np.ravel(other)[0])
            if by <= 0:
                break
            unit = unit * by if step.op == "Mul" else unit / by  # a bias stays in units of the accumulator
        elif step.op not in (*MOVES, "Relu"):
            break
        name = step.outputs[0]
    return bias, None


def to_steps(bias: np.ndarray | None, unit: np.ndarray) -> np.ndarray | None:
    """A float bias in units of the accumulator."""
    return None if bias is None else np.rint(np.ravel(bias).astype(np.float64) / unit).astype(np.int64)


# --- on data ----------------------------------------------------------------------------------------------------------


class Shown(State):
    """Shows each product's operands before it is computed."""

    show: Show

    def multiply(self, node: Node, a: Codes, b: Codes) -> np.ndarray:
        self.show(node.name, a.value, a.zero_point, b.value, b.zero_point)
        return super().multiply(node, a, b)


def run_onnx(graph: Graph, inputs: Mapping[str, np.ndarray], show: Show) -> None:
    """Walks a file and shows each product's operands, with their zero points. Raises SpecError as `walk`."""
    state = Shown(graph, replace(QTX, matmul=EXACT), choose_level(None))
    state.show = show
    state.feed(inputs)
    for node in graph.nodes:
        compute(state, node)
