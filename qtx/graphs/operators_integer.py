"""ONNX operators of codes and accumulators in `qtx_ref`'s arithmetic: quantizers, products, what comes after a product.

Each gives the outputs, or None for a form of its operator that qtx_ref does not have.
"""

from __future__ import annotations

import numpy as np

from qtx_ref.integer import fixed_point, float_product, ops
from qtx_ref.integer.lowering import common_shift
from qtx_ref.quant import affine
from qtx_ref.spec import Bias, Fixed, FloatProduct, Order, QuantSpec

from .operators_plain import elementwise, turn
from .reading import Node, name_dtype, spec_of
from .state import Codes, Outputs, State, Sum, take, zero_of


def along(value: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """One number without axes; one per position of `axis` shaped to broadcast."""
    value = np.asarray(value)
    if value.size == 1:
        return value.reshape(())
    return value.reshape([-1 if axis % ndim == i else 1 for i in range(ndim)])


def spread(state: State, node: Node, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Scale and zero point of (De)QuantizeLinear as they broadcast against the tensor; the axis along which they vary,
    None where there is one, or blocks."""
    scale, zero = np.asarray(take(state, node, 1)), zero_of(state, node, 2)
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    if block:
        parts = [np.repeat(part, block, axis) if part.ndim else part for part in (scale, zero)]
        cut = tuple(slice(0, n) for n in shape)  # the last block may be shorter
        return (*(part[cut] if part.ndim else part for part in parts), None)  # type: ignore[return-value]
    if scale.size == 1:
        return scale.reshape(()), zero.reshape(()), None
    return along(scale, axis, len(shape)), along(zero, axis, len(shape)), axis % len(shape)


# --- quantizers -------------------------------------------------------------------------------------------------------


def quantize_linear(state: State, node: Node) -> Outputs:
    """QuantizeLinear: of a product's result the requantization of its accumulators."""
    x = take(state, node, 0)
    kind, given = node.attributes.get("output_dtype", 0), node.inputs[2] if len(node.inputs) > 2 else ""
    dtype = name_dtype(kind) if kind else state.graph.types[given][0] if given else "uint8"
    spec = spec_of(dtype)
    if spec is None or node.attributes.get("precision", 0):
        return None
    scale, zero, axis = spread(state, node, x.shape)
    total = state.sums.get(node.inputs[0])
    if total is not None and scale.size == 1:
        rule = state.profile.requantize
        real = fixed_point.real_multiplier(total.x_scale, total.w_scale, scale, rule)
        bias, place = total.bias, state.profile.bias
        if bias is not None and isinstance(rule, FloatProduct):
            bias = float_product.scale_bias(bias, total.unit(), scale, rule, place)
        code = fixed_point.requantize(total.value, real, zero, spec, rule, bias, place)
    else:
        code = affine.quantize(x, scale, zero, spec, state.profile.quantize)
    return (code.astype(bytes_of(spec)),)


def bytes_of(spec: QuantSpec) -> type:
    """The narrowest dtype of NumPy that holds a spec's codes."""
    kinds = (np.int8, np.int16) if spec.code_min < 0 else (np.uint8, np.uint16)
    return kinds[spec.bits > 8]


def dequantize_linear(state: State, node: Node) -> Outputs:
    """DequantizeLinear, of codes or of a bias in int32."""
    code, scale = take(state, node, 0), np.asarray(take(state, node, 1))
    spec = state.spec(node.inputs[0])
    if (spec is None and code.dtype != np.int32) or scale.dtype not in (np.float32, np.float16):
        return None
    scale, zero, axis = spread(state, node, code.shape)
    if spec is not None and (scale.size == 1 or axis is not None):
        state.codes[node.outputs[0]] = Codes(code, scale.reshape(-1), zero.reshape(-1), spec, axis)
    if spec is None and not zero.any():
        state.biases[node.outputs[0]] = code
    return (affine.dequantize(code, scale, zero, state.profile.dequantize).astype(scale.dtype),)


def dynamic_quantize_linear(state: State, node: Node) -> Outputs:
    """DynamicQuantizeLinear: uint8 codes of the tensor's own range."""
    code, scale, zero = quantize_dynamically(state, take(state, node, 0))
    return code, scale, zero


def quantize_dynamically(state: State, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale and zero point of a tensor's own range."""
    spec = QuantSpec(8)
    low, high = affine.ranges(x, spec)
    scale, zero = (part.reshape(()) for part in affine.scale_zero(low, high, spec, state.profile.scale))
    code = affine.quantize(x, scale, zero, spec, state.profile.quantize)
    return code.astype(np.uint8), scale.astype(np.float32), zero.astype(np.uint8)


# --- products ---------------------------------------------------------------------------------------------------------


def operand(state: State, node: Node, code: int, scale: int | None, zero: int) -> Codes | None:
    """An operand of an integer product: codes, scale and zero point by the places of their inputs."""
    value, spec = take(state, node, code), state.spec(node.inputs[code])
    if spec is None or value.ndim < 2:
        return None
    unit = np.ones(1, np.float32) if scale is None else np.asarray(take(state, node, scale))
    point = zero_of(state, node, zero)
    if max(unit.ndim, point.ndim) > 1 and max(unit.size, point.size) > 1:
        return None
    return Codes(value, unit.reshape(-1), point.reshape(-1), spec)


def matmul_integer(state: State, node: Node) -> Outputs:
    """MatMulInteger."""
    a, b = operand(state, node, 0, None, 2), operand(state, node, 1, None, 3)
    return None if a is None or b is None else (state.multiply(node, a, b),)


def qlinear_matmul(state: State, node: Node) -> Outputs:
    """QLinearMatMul."""
    a, b = operand(state, node, 0, 1, 2), operand(state, node, 3, 4, 5)
    if a is None or b is None or np.size(take(state, node, 6)) > 1:
        return None
    return (requantize(state, node, a, b, state.multiply(node, a, b), 6, 7),)


def requantize(state: State, node: Node, a: Codes, b: Codes, acc: np.ndarray, scale: int, zero: int) -> np.ndarray:
    """Accumulators as codes of the result, whose scale and zero point have these places."""
    spec, rule = state.spec(node.inputs[zero]), state.profile.requantize
    assert spec is not None  # a zero point has the dtype of codes
    rows = a.scale if a.scale.size == 1 else a.scale.reshape(-1, 1)
    real = fixed_point.real_multiplier(rows, b.scale, np.asarray(take(state, node, scale)), rule)
    code = fixed_point.requantize(acc, real, zero_of(state, node, zero).reshape(()), spec, rule)
    return code.astype(bytes_of(spec))


def qgemm(state: State, node: Node) -> Outputs:
    """onnxruntime's QGemm: codes, or float where there is no scale of the result."""
    a, b = operand(state, node, 0, 1, 2), operand(state, node, 3, 4, 5)
    if a is None or b is None or node.attributes.get("alpha", 1.0) != 1:
        return None
    a = a._replace(value=a.value.T if node.attributes.get("transA", 0) else a.value)
    b = b._replace(value=b.value.T if node.attributes.get("transB", 0) else b.value)
    acc, bias = state.multiply(node, a, b), take(state, node, 6)
    acc = acc if bias is None else acc + bias
    if take(state, node, 7) is None:
        return (real_of(acc, a.scale, b.scale),)
    return (requantize(state, node, a, b, acc, 7, 8),)


def real_of(acc: np.ndarray, a_scale: np.ndarray, b_scale: np.ndarray) -> np.ndarray:
    """Accumulators times the product of their scales, float32 at each step."""
    rows = a_scale.reshape(()) if a_scale.size == 1 else a_scale.reshape(-1, 1)
    return acc.astype(np.float32) * (rows * (b_scale.reshape(()) if b_scale.size == 1 else b_scale)).astype(np.float32)


def dynamic_quantize_matmul(state: State, node: Node) -> Outputs:
    """onnxruntime's DynamicQuantizeMatMul: a float tensor quantized as it comes, times codes, plus a float bias."""
    b = operand(state, node, 1, 2, 3)
    if b is None:
        return None
    code, scale, zero = quantize_dynamically(state, take(state, node, 0))
    a = Codes(code, scale.reshape(-1), zero.reshape(-1), QuantSpec(8))
    return (add_float(real_of(state.multiply(node, a, b), a.scale, b.scale), take(state, node, 4)),)


def add_float(y: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """A float bias, where there is one."""
    return y if bias is None else y + bias


def matmul_integer_to_float(state: State, node: Node) -> Outputs:
    """onnxruntime's MatMulIntegerToFloat."""
    a, b = operand(state, node, 0, 2, 4), operand(state, node, 1, 3, 5)
    if a is None or b is None:
        return None
    return (add_float(real_of(state.multiply(node, a, b), a.scale, b.scale), take(state, node, 6)),)


def matmul(state: State, node: Node) -> Outputs:
    """MatMul of two dequantized tensors."""
    a, b = (state.codes.get(name) for name in node.inputs)
    return multiply_codes(state, node, a, b)


def multiply_codes(state: State, node: Node, a: Codes | None, b: Codes | None) -> Outputs:
    """The product of two tensors of codes as floats, its accumulators remembered. None where a scale varies along the
    sum, or along the rows."""
    if a is None or b is None or a.axis is not None or min(a.value.ndim, b.value.ndim) < 2:
        return None
    if b.axis is not None and b.axis != b.value.ndim - 1:
        return None
    total = Sum(state.multiply(node, a, b), a.scale[0], b.scale if b.axis is not None else b.scale[0])
    state.sums[node.outputs[0]] = total
    return (total.real(),)


def gemm(state: State, node: Node) -> Outputs:
    """Gemm of two dequantized tensors, with a bias of one number per column."""
    a, b = (state.codes.get(name) for name in node.inputs[:2])
    if node.attributes.get("alpha", 1.0) != 1 or node.attributes.get("beta", 1.0) != 1:
        return None
    a, b = (
        turn(x, (1, 0)) if x is not None and node.attributes.get(key, 0) else x
        for x, key in ((a, "transA"), (b, "transB"))
    )
    made = multiply_codes(state, node, a, b)
    if made is None or len(node.inputs) < 3 or not node.inputs[2]:
        return made
    return add_bias(state, node, state.sums.pop(node.outputs[0]), node.inputs[2])


def add_bias(state: State, node: Node, total: Sum, name: str) -> Outputs:
    """Accumulators with a bias of one number per column, by the profile: as an integer of their unit, or a float, which
    leaves a float. None for a bias of another shape."""
    bias = state.values[name]
    if bias.size not in (1, total.value.shape[-1]) or bias.shape[-1:] not in ((), (bias.size,)):
        return None
    if total.bias is not None:
        return None
    if state.profile.bias is not Bias.INT32 and isinstance(state.profile.requantize, FloatProduct):
        total = total._replace(bias=bias.reshape(-1).astype(np.float32))
        state.sums[node.outputs[0]] = total
        return (total.real(),)
    steps = bias.reshape(-1).astype(np.float64) / total.unit()
    code, own = np.rint(steps).astype(np.int64), state.biases.get(name)
    if own is not None and np.allclose(steps, own.reshape(-1), rtol=1e-6, atol=0.5):  # float32 holds 24 bits of it
        code = own.reshape(-1).astype(np.int64)
    summed = total.value + code
    if total.value.dtype == np.int32 and summed.size and not -(2**31) <= summed.min() <= summed.max() < 2**31:
        raise ValueError(f"its bias takes accumulators from {summed.min()} to {summed.max()}, beyond int32")
    total = total._replace(value=summed.astype(total.value.dtype))
    state.sums[node.outputs[0]] = total
    return (total.real(),)


# --- after a product --------------------------------------------------------------------------------------------------


def add(state: State, node: Node) -> Outputs:
    """Add: a bias of accumulators, or floats."""
    for name, other in (node.inputs, node.inputs[::-1]):
        total = state.sums.get(name)
        if total is not None and (other in state.graph.constants or state.values[other].ndim == 1):
            made = add_bias(state, node, total, other)
            if made is not None:
                return made
    return elementwise(state, node)


def scale(state: State, node: Node) -> Outputs:
    """Mul or Div: by one number, of accumulators, a change of their unit; else of floats."""
    first, second = node.inputs if node.op == "Div" or node.inputs[0] in state.sums else node.inputs[::-1]
    total, factor = state.sums.get(first), state.values[second]
    if total is not None and factor.size == 1 and factor.ndim <= total.value.ndim and np.all(factor > 0):
        by = float(factor.reshape(())) if node.op == "Mul" else 1 / float(factor.reshape(()))
        bias = None if total.bias is None else total.bias * np.float32(by)
        state.sums[node.outputs[0]] = total._replace(x_scale=np.float64(total.x_scale) * by, bias=bias)
    return elementwise(state, node)


def relu(state: State, node: Node) -> Outputs:
    """max(x, 0), of accumulators too."""
    total = state.sums.get(node.inputs[0])
    if total is not None and total.bias is None:
        state.sums[node.outputs[0]] = total._replace(value=np.maximum(total.value, 0))
    return (np.maximum(take(state, node, 0), 0),)


def qlinear_add(state: State, node: Node) -> Outputs:
    """onnxruntime's QLinearAdd, by the profile's rule of a sum."""
    spec, rule = state.spec(node.inputs[0]), state.profile.requantize
    if spec is None or any(np.size(take(state, node, i)) > 1 for i in (1, 4, 6)):
        return None
    y, zero = np.asarray(take(state, node, 6)).reshape(()), zero_of(state, node, 7)
    order = Order.RATIO if isinstance(rule, Fixed) else rule.order.single
    parts, reals = [], []
    for code, unit, point in ((0, 1, 2), (3, 4, 5)):
        parts.append(take(state, node, code).astype(np.int32) - zero_of(state, node, point))
        x = np.asarray(take(state, node, unit)).reshape(())
        reals.append(float_product.make_factors(x, np.float32(1), y, order, rule.dtype))
    if isinstance(rule, FloatProduct):
        level = float_product.add(parts, reals, rule, zero)
    else:
        multipliers, shift = common_shift(reals)
        level = ops.weighted_sum(parts, multipliers, shift, state.profile.add) + zero
    code = np.clip(level, spec.code_min, spec.code_max)
    return (code.astype(bytes_of(spec)),)
