"""ONNX operators that compute one number from few, or move numbers, and take accumulators and codes along."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .reading import Node, name_dtype, to_array
from .state import Codes, Outputs, State, take

__all__ = ["ELEMENTWISE", "SHAPES", "cast", "constant", "elementwise", "move", "transpose", "turn"]

FLOATS, INTEGERS = ("float32", "float64"), ("int32", "int64")
ELEMENTWISE: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {  # and the dtypes of its operands
    "Abs": (np.abs, FLOATS),
    "Add": (np.add, (*FLOATS, *INTEGERS)),
    "Div": (np.divide, FLOATS),
    "Equal": (np.equal, (*FLOATS, *INTEGERS)),
    "Greater": (np.greater, (*FLOATS, *INTEGERS)),
    "Less": (np.less, (*FLOATS, *INTEGERS)),
    "Mul": (np.multiply, (*FLOATS, *INTEGERS)),
    "Neg": (np.negative, FLOATS),
    "Sqrt": (np.sqrt, FLOATS),
    "Sub": (np.subtract, (*FLOATS, *INTEGERS)),
    "Where": (np.where, ("bool", *FLOATS, *INTEGERS)),
}


def elementwise(state: State, node: Node) -> Outputs:
    """One IEEE operation per element, of floats; of integers what wraps as they do."""
    given = [take(state, node, i) for i in range(len(node.inputs))]
    function, dtypes = ELEMENTWISE[node.op]
    if any(str(x.dtype) not in dtypes for x in given):
        return None
    with np.errstate(all="ignore"):
        return (np.asarray(function(*given)),)


def cast(state: State, node: Node) -> Outputs:
    """Cast between integers, to floats, between floats of 16 bits and more; a float to an integer is the engine's."""
    x, dtype = take(state, node, 0), name_dtype(node.attributes["to"])
    plain = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    if dtype not in (*plain, "float16", "float32", "float64") or str(x.dtype) not in (
        *plain,
        "float16",
        "float32",
        "float64",
    ):
        return None
    if x.dtype.kind == "f" and dtype in plain:
        return None
    with np.errstate(over="ignore"):
        return (x.astype(dtype),)


def constant(state: State, node: Node) -> Outputs:
    """Constant, of a tensor or of numbers; of strings and sparse tensors the engine's."""
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in node.attributes:
            return (np.asarray(node.attributes[name], dtype),)
    return (to_array(node.attributes["value"]),) if "value" in node.attributes else None


# --- moves ------------------------------------------------------------------------------------------------------------


def turn(x: Codes, order: Sequence[int]) -> Codes:
    """Codes with their axes in another order."""
    return x._replace(value=x.value.transpose(order), axis=None if x.axis is None else list(order).index(x.axis))


def transpose(state: State, node: Node) -> Outputs:
    """Axes in another order, of codes too."""
    x = take(state, node, 0)
    order = [int(axis) for axis in node.attributes.get("perm", range(x.ndim)[::-1])]
    codes, total = state.codes.get(node.inputs[0]), state.sums.get(node.inputs[0])
    if codes is not None:
        state.codes[node.outputs[0]] = turn(codes, order)
    if total is not None and total.bias is None and np.size(total.w_scale) == 1:
        state.sums[node.outputs[0]] = total._replace(value=total.value.transpose(order))
    return (x.transpose(order),)


def move(state: State, node: Node) -> Outputs:
    """Identity, Reshape, Flatten, Squeeze, Unsqueeze: another shape, of codes too where they have one scale."""
    x = take(state, node, 0)
    shape = SHAPES[node.op](x.shape, node, take(state, node, 1) if len(node.inputs) > 1 else None)
    codes, total = state.codes.get(node.inputs[0]), state.sums.get(node.inputs[0])
    if codes is not None and (codes.axis is None or node.op == "Identity"):
        state.codes[node.outputs[0]] = codes._replace(value=codes.value.reshape(shape))
    if total is not None and (node.op == "Identity" or (total.bias is None and np.size(total.w_scale) == 1)):
        state.sums[node.outputs[0]] = total._replace(value=total.value.reshape(shape))
    return (x.reshape(shape),)


def reshaped(shape: tuple[int, ...], node: Node, wanted: np.ndarray | None) -> tuple[int, ...]:
    """Of Reshape: 0 keeps a length, unless `allowzero`."""
    assert wanted is not None  # an input that Reshape must have
    keeps = not node.attributes.get("allowzero", 0)
    return tuple(shape[i] if n == 0 and keeps else int(n) for i, n in enumerate(wanted))


def squeezed(shape: tuple[int, ...], node: Node, axes: np.ndarray | None) -> tuple[int, ...]:
    """Of Squeeze: axes of length 1 left out."""
    chosen = node.attributes.get("axes") if axes is None else axes
    gone = [i for i, n in enumerate(shape) if n == 1] if chosen is None else [int(i) % len(shape) for i in chosen]
    return tuple(n for i, n in enumerate(shape) if i not in gone)


def unsqueezed(shape: tuple[int, ...], node: Node, axes: np.ndarray | None) -> tuple[int, ...]:
    """Of Unsqueeze: axes of length 1 put in."""
    chosen = [int(i) for i in (node.attributes["axes"] if axes is None else axes)]
    ndim = len(shape) + len(chosen)
    rest = iter(shape)
    return tuple(1 if i in [axis % ndim for axis in chosen] else next(rest) for i in range(ndim))


def flattened(shape: tuple[int, ...], node: Node, _: np.ndarray | None) -> tuple[int, ...]:
    """Of Flatten: two axes."""
    axis = node.attributes.get("axis", 1)
    axis += len(shape) if axis < 0 else 0
    return int(np.prod(shape[:axis], dtype=np.int64)), int(np.prod(shape[axis:], dtype=np.int64))


SHAPES: dict[str, Callable[..., tuple[int, ...]]] = {
    "Flatten": flattened,
    "Identity": lambda shape, node, _: shape,
    "Reshape": reshaped,
    "Squeeze": squeezed,
    "Unsqueeze": unsqueezed,
}
