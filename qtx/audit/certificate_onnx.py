"""The integer products of an ONNX file, found by its nodes, and their operands on real data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qtx_ref.integer.fixed_point import quantize_multiplier
from qtx_ref.quant.affine import check_scale
from qtx_ref.spec import QTX, Dtype, QuantSpec, SpecError

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
FARTHEST = 2.0**61  # of a bias: sums with it fit int64
UNREAD = (
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "MatMulNBits",
    "QAttention",
    "QEmbedLayerNormalization",
    "QLinearConcat",
    "QLinearConv",
)


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
        unread += list_inside(node)
        try:
            if (node.domain, node.op) in INTEGER:
                product = read_integer(constants, node)
            elif node.domain == "" and node.op in FLOATS:
                product = read_float(constants, node)
                if product is None and "int" not in constants.graph.types.get(node.inputs[0], ("", None))[0]:
                    continue  # not of two dequantized tensors, nor of integers
            elif node.op not in UNREAD and not is_quantized_conv(constants, node):
                continue
        except ValueError as error:
            raise SpecError(f"node {node.name} ({node.op}): {error}") from None
        if product is None:
            unread.append(f"{node.name} ({node.op})")
        else:
            products.append(product)
    return products, unread


def is_quantized_conv(constants: Constants, node: Node) -> bool:
    """Whether a node is a convolution of two dequantized tensors."""
    made = (constants.graph.producers.get(name) for name in node.inputs[:2])
    return node.op in ("Conv", "ConvTranspose") and all(
        one is not None and one.op == "DequantizeLinear" for one in made
    )


def list_inside(node: Node) -> list[str]:
    """Nodes of integers in a node's own graphs, as If and Loop have; none of them is read."""
    found = []
    for proto in list_nested(node.proto):
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        if (domain, proto.op_type) in INTEGER or proto.op_type in (*UNREAD, "DequantizeLinear"):
            name = proto.name or next(iter(proto.output), "")
            found.append(f"{node.name}/{name} ({proto.op_type})")
    return found


def list_nested(proto: Any) -> Iterator[Any]:
    """The nodes of a node's own graphs, at any depth."""
    for attribute in proto.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inside in graph.node:
                yield inside
                yield from list_nested(inside)


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
    if place(node, bias_at) and bias is None:  # any int32
        return None
    if node.op == "MatMulInteger":
        bias = follow_integers(constants, node, right)
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
    if codes is not None and not codes.size:  # nothing is multiplied
        return None
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
    for scale in (x, w, y):
        check_scale(scale, Dtype.FLOAT64)
    real = np.ravel(x).astype(np.float64)[0] * flat(w).astype(np.float64) / np.ravel(y).astype(np.float64)[0]
    return flat(quantize_multiplier(np.minimum(real, 2.0**29))[1])


def follow_integers(constants: Constants, node: Node, right: Operand) -> np.ndarray | None:
    """The int32 bias that is added to a product's accumulators, through moves."""
    name, consumers = node.outputs[0], constants.graph.consumers
    while len(consumers.get(name, ())) == 1 and (step := consumers[name][0]).op in MOVES:
        name = step.outputs[0]
    if len(consumers.get(name, ())) != 1 or consumers[name][0].op != "Add":
        return None
    bias = constants.value(next((one for one in consumers[name][0].inputs if one != name), ""))
    if bias is None or bias.dtype != np.int32 or not is_per_column(bias, right):
        return None
    return np.ravel(bias).astype(np.int64)


def is_per_column(bias: np.ndarray, right: Operand) -> bool:
    """Whether a bias is one number, or one for each column; others are no kernel's."""
    columns = bias.shape[-1] if bias.ndim else 1
    return bias.size == 1 or bias.size == columns and (right.codes is None or columns == right.codes.shape[1])


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
    turned = left.codes is not None and right.codes is None
    if (codes := left.codes) is not None:
        if turned:
            left, right = right, replace(left, codes=codes.T)
            bias = shift = scale = None  # they belong to the columns of what was on the right
        left = replace(left, codes=None)
    bits = 32 if left.is_byte and right.is_byte else 64
    return Product(name, left, right, depth, bias, shift, bits, scale, turned)


# --- products of dequantized tensors ----------------------------------------------------------------------------------


def read_float(constants: Constants, node: Node) -> Product | None:
    """A MatMul or Gemm of two dequantized tensors; None for others."""
    turns = [node.attributes.get(key, 0) for key in ("transA", "transB")]
    left, right = (trace(constants, node.inputs[i], turns[i], i == 0) for i in (0, 1))
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
    bias, shift = follow(constants, node, unit, right.operand)
    return arrange(node.name, left.operand, right.operand, depth, bias, shift, right.scale)


def trace(constants: Constants, name: str, turned: int, row: bool) -> Found | None:
    """The codes behind a float operand: from a DequantizeLinear, through moves."""
    known = constants.state.codes.get(name)
    if known is not None:
        return found_constant(known, turned, row)
    node = find_dequantizer(constants, name)
    if node is None:
        return None
    spec = constants.spec(place(node, 0), place(node, 2))
    scale = constants.value(place(node, 1))
    if spec is None or (scale is not None and scale.size > 1):  # a scale along the sum is no integer product
        return None
    point = np.zeros((), np.int64) if not place(node, 2) else constants.value(place(node, 2))
    zero = None if point is None else flat(np.asarray(point, np.int64))
    return Found(Operand(spec.code_min, spec.code_max, zero), None if scale is None else flat(scale), None)


def find_dequantizer(constants: Constants, name: str) -> Node | None:
    """The DequantizeLinear behind a tensor, through moves."""
    node = constants.graph.producers.get(name)
    while node is not None and node.op in MOVES and node.domain == "":
        node = constants.graph.producers.get(node.inputs[0])
    return node if node is not None and node.op == "DequantizeLinear" else None


def found_constant(known: Codes, turned: int, row: bool) -> Found | None:
    """A constant factor: a matrix with one scale, or one per column. Of a batch of matrices the limits alone. row:
    whether a vector is a row, on the left."""
    codes, axis = known.value, known.axis
    if codes.ndim == 0 or not codes.size or (codes.ndim == 1 and axis is not None):
        return None
    if codes.ndim == 1:
        codes = codes[None] if row else codes[:, None]
    if turned:
        codes, axis = codes.swapaxes(-1, -2), None if axis is None else (2 * codes.ndim - 3 - axis)
    if axis is not None and axis != codes.ndim - 1:
        return None
    one = Operand(known.spec.code_min, known.spec.code_max, flat(known.zero_point.astype(np.int64)))
    if codes.ndim > 2:
        return Found(one, flat(known.scale), codes.shape[-2])
    whole = Operand(one.low, one.high, one.zero_point, codes.astype(np.int32))
    return Found(whole, flat(known.scale), len(codes))


def follow(
    constants: Constants, node: Node, unit: np.ndarray | None, right: Operand
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The bias of a product, and the shift of its requantization: through a bias, factors, a ReLU and moves to a
    QuantizeLinear. `unit`: what an accumulator of 1 stands for, where that is constant."""
    if unit is None:
        return None, None
    bias, graph = None, constants.graph
    if node.op == "Gemm" and (given := constants.value(place(node, 2))) is not None:
        if not is_per_column(given, right):
            return None, None
        bias = to_steps(given, unit)
    name = node.outputs[0]
    while len(graph.consumers.get(name, ())) == 1:
        step = graph.consumers[name][0]
        if step.op == "QuantizeLinear" and step.inputs[0] == name:
            return bias, find_shift(np.ones(()), unit, constants.value(step.inputs[1]))
        other = constants.value(next((one for one in step.inputs if one != name), ""))
        if step.op == "Add" and other is not None and is_per_column(other, right) and bias is None:
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


def to_steps(bias: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """A float bias in units of the accumulator, as far as 62 bits. Raises ValueError where it is not finite."""
    check_scale(unit, Dtype.FLOAT64)
    if not np.isfinite(bias).all():
        raise ValueError(f"its bias holds {bias[~np.isfinite(bias)][0]}, which is no finite number")
    with np.errstate(over="ignore"):
        steps = np.rint(np.ravel(bias).astype(np.float64) / unit)
    return np.clip(steps, -FARTHEST, FARTHEST).astype(np.int64)


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
