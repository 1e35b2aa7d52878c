"""An ONNX graph as it is written: nodes, constants, and values that know which codes they hold.

A value is a tensor of the graph. Its shape names the free axes, "batch" and "length"; a model's arrangements of heads,
which are functions of NumPy arrays, become nodes when they are called with a value. Array constants given to `node` are
stored once per content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qtx_ref.spec import Family, ModelSpec, QuantSpec, SpecError
from qtx_ref.tape import Var

from ..engines.backend import need

OPSET = 21  # int16 codes in QuantizeLinear, GELU, LayerNormalization
IR_VERSION = 10
BATCH, LENGTH = "batch", "length"
Shape = tuple[Any, ...]  # of whole numbers and of the names of free axes


def need_onnx() -> Any:
    """The package onnx. Raises MissingExtra."""
    return need("onnx", "engines", "--format onnx")


class Value(Var):
    """A tensor of the graph. Codes: `spec`, `unit` and `zero_point` as in `qtx_ref.integer.model.Code`, and `bound`, no
    magnitude of code less zero point above it; accumulators have no spec. `measured`: the float32 value that stands for
    it, where its unit is known only as the graph runs. `offset`: a bias of floats beside an accumulator."""

    __slots__ = ("graph", "name", "axes", "dtype", "unit", "zero_point", "spec", "bound", "measured", "offset")

    def __init__(
        self,
        graph: Graph,
        name: str,
        axes: Shape,
        dtype: str,
        unit: Any = None,
        zero_point: Any = 0,
        spec: QuantSpec | None = None,
        bound: int = 0,
    ) -> None:
        super().__init__(np.empty(0))
        self.graph, self.name, self.axes, self.dtype = graph, name, axes, dtype
        self.unit, self.zero_point, self.bound = unit, zero_point, bound
        self.spec: QuantSpec | Any = spec
        self.measured: str | Any = None
        self.offset: np.ndarray | None = None

    @property
    def shape(self) -> Shape:
        return self.axes

    @property
    def ndim(self) -> int:
        return len(self.axes)

    def arrange(self, move: Callable[..., Any], *others: Value, edges: Sequence[Any] = ()) -> Value:
        """The same in another arrangement, scales and zero points along with it."""
        if others:
            raise SpecError(f"{self.name}: a graph has no tokens before its own")
        moved = move(self)
        for key in ("unit", "zero_point"):
            part = getattr(self, key)
            setattr(moved, key, part if part is None or np.ndim(part) == 0 else move(np.asarray(part)))
        return moved

    def like(self, name: str, axes: Shape) -> Value:
        """The same codes, arranged."""
        return Value(self.graph, name, axes, self.dtype, self.unit, self.zero_point, self.spec, self.bound)

    def reshape(self, *sizes: Any) -> Value:
        """As NumPy's; a free axis stays where it is."""
        known = [size if isinstance(size, int) else 0 for size in sizes]
        if any(not isinstance(size, int) and self.axes[i] != size for i, size in enumerate(sizes)):
            raise SpecError(f"{self.name} of shape {self.axes} as {sizes}: a free axis would move")
        fixed = math.prod(size for size in self.axes if isinstance(size, int))
        rest = fixed // math.prod(size for size in sizes if isinstance(size, int) and size > 0)
        axes = tuple(rest if size == -1 else size for size in sizes)
        return self.like(self.graph.node("Reshape", self.name, np.array(known, np.int64)), axes)

    def transpose(self, *order: int) -> Value:
        return self.like(self.graph.node("Transpose", self.name, perm=list(order)), tuple(self.axes[i] for i in order))

    def __getitem__(self, place: tuple[slice, int]) -> Value:
        axes = (self.axes[0], *self.axes[2:])
        return self.like(self.graph.node("Gather", self.name, np.array(place[1], np.int64), axis=1), axes)

    def __array_function__(self, function: Callable, types: Any, arguments: Any, keywords: Any) -> Any:
        if function is not np.repeat:
            return NotImplemented
        width = arguments[1]
        apart = self.graph.node("Unsqueeze", self.name, np.array([-1], np.int64))
        wide = self.graph.node("Expand", apart, np.array([1] * self.ndim + [width], np.int64))
        shape = [0] * (self.ndim - 1) + [self.axes[-1] * width]
        return self.like(self.graph.node("Reshape", wide, np.array(shape, np.int64)), (*self.axes[:-1], shape[-1]))


class Graph:
    """Nodes and constants, in the order in which they are made. `place`: the site that new nodes are named after."""

    def __init__(self) -> None:
        self.onnx = need_onnx()
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.inputs: list[tuple[str, str, Shape]] = []
        self.place = "input"

    def constant(self, value: np.ndarray | np.generic, name: str | None = None) -> str:
        """The name of a constant. Small ones are stored once per content."""
        value = np.asarray(value)
        if name is None:
            key = (str(value.dtype), value.shape, value.tobytes())
            if key in self.by_content:
                return self.by_content[key]
            name = self.by_content[key] = f"constant.{len(self.by_content)}"
        self.constants[name] = value
        return name

    def node(self, op: str, *inputs: Any, name: str | None = None, **attributes: Any) -> str:
        """The name of a node's one result. Inputs: names, arrays, or None where an optional one is left out."""
        given = ["" if x is None else x if isinstance(x, str) else self.constant(x) for x in inputs]
        result = name or f"{self.place}/{op}.{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, given, [result], name=result, **attributes))
        return result

    def cast(self, x: str, dtype: str, name: str | None = None) -> str:
        """x in another dtype."""
        return self.node("Cast", x, name=name, to=self.kind(dtype))

    def kind(self, dtype: str) -> int:
        """ONNX's number of a dtype."""
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def take(self, name: str, dtype: str, axes: Shape) -> Value:
        """An input of the graph."""
        self.inputs.append((name, dtype, axes))
        return Value(self, name, axes, dtype)

    def shift_right(self, x: str, shift: np.ndarray, added: np.ndarray | int, bound: int, after: Any = 0) -> str:
        """floor((x + added) / 2^shift) + after of int64, no |x| above `bound`.

        BitShift takes unsigned numbers alone: a multiple of 2^shift that makes the sum positive goes in with `added`,
        and comes out with `after`. Raises ValueError where int64 does not hold the sum.
        """
        shift = np.asarray(shift, np.int64)
        added = np.asarray(added, np.int64)
        reach = bound + int(np.abs(added).max())
        lift = np.maximum(shift, max(reach - 1, 1).bit_length())
        if int(lift.max()) > 62 or (1 << int(lift.max())) + reach >= 2**63:
            raise ValueError(f"values up to {bound} before a shift by {shift.max()} bits would leave int64")
        x = self.node("Add", x, added + (np.int64(1) << lift))
        x = self.node("BitShift", self.cast(x, "uint64"), shift.astype(np.uint64), direction="RIGHT")
        x = self.cast(x, "int64")
        return self.node("Add", x, np.asarray(after, np.int64) - (np.int64(1) << (lift - shift)))

    def half_up(self, numerator: str, denominator: str, bound: int) -> str:
        """floor(numerator / denominator + 1/2) of int64, denominator > 0, no |quotient| above `bound`; neither above
        2^61 / bound. Division in ONNX truncates: twice the numerator is made positive first."""
        lift = 1 << max(bound, 1).bit_length()
        twice = self.node("Add", denominator, denominator)
        raised = self.node("Mul", denominator, np.int64(2 * lift + 1))
        total = self.node("Add", self.node("Add", numerator, numerator), raised)
        return self.node("Add", self.node("Div", total, twice), np.int64(-lift))


def take_inputs(graph: Graph, spec: ModelSpec) -> dict[str, Value]:
    """The graph's inputs, as a batch has them."""
    if spec.family is Family.VIT:
        size = (BATCH, spec.channels, spec.image_size, spec.image_size)
        return {"images": graph.take("images", "float32", size)}
    inputs = {
        "tokens": graph.take("tokens", "int64", (BATCH, LENGTH)),
        "mask": graph.take("mask", "bool", (BATCH, LENGTH)),
    }
    if spec.family is Family.BERT:
        inputs["types"] = graph.take("types", "int64", (BATCH, LENGTH))
    return inputs
