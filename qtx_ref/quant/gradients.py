"""Matmuls whose backward pass is quantized: each operand of each gradient product anew.

For y = x W^T the gradient products are dX = dY W and dW = dY^T X, for y = A B of activations dA = dY B^T and
dB = A^T dY. An operand gets a scale for each row across the axis that its product sums over (`spec.Operand`), so that
each product could be one of integers, and is computed here from the values of its codes. Operands are those that the
forward product took in, quantized there or not; elements that do not count (padding) are 0 in them. The bias keeps its
own gradient.

Stochastic rounding takes word e of the stream (seed, step, `<site>.<part>`) for element e, in row-major order, of the
operand as it is in the global batch: part `grad` for dY, `input` and `weight` of a linear, `lhs` and `rhs` of a product
of activations. Both products share the words of dY.

Arrays: float32 or float64, gradients in the dtype of what they are of.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .. import ops, random
from ..spec import FloatQuantSpec, Gradients, Granularity, Operand, Quant
from ..tape import Var, node
from . import affine, formats, quantizer

__all__ = ["Backward", "find_scale", "linear", "matmul", "quantize_operand"]


class Backward:
    """How the backward pass of the matmul behind one site computes its two products."""

    def __init__(self, gradients: Gradients, site: str, seed: int, step: int, first_row: int = 0) -> None:
        """first_row: of the batch at hand in the global batch."""
        self.gradients = gradients
        self.site = site
        self.seed, self.step, self.first_row = seed, step, first_row

    def draw(self, name: str, part: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The random words of an operand, a field of `Gradients`, in `shape`, uint64 below 2^32; None where it is
        rounded to nearest."""
        operand: Operand | None = getattr(self.gradients, name)
        if operand is None or not operand.stochastic:
            return None
        first = 0 if part == "weight" else self.first_row * int(np.prod(shape[1:]))
        words = random.bits(self.seed, self.step, f"{self.site}.{part}", int(np.prod(shape)), first)
        return words.reshape(shape)

    def quantize(
        self, name: str, x: np.ndarray, axis: int, words: np.ndarray | None = None, where: np.ndarray | None = None
    ) -> np.ndarray:
        """The values of the codes of operand `name`, x of any shape, whose product sums over `axis`; x where it is
        not quantized. words, in x's shape: as `draw` gave them. where, boolean, broadcasts: elements that count."""
        operand: Operand | None = getattr(self.gradients, name)
        return x if operand is None else quantize_operand(x, axis, operand.quant, words, where)[0]


def find_scale(x: np.ndarray, quant: Quant) -> np.ndarray:
    """The scales of x (..., N), whose last axis is summed over, float32: max |x| / largest code or value, 1 where all
    is 0, of MX blocks their power of two. NaN where x is not finite: a gradient that overflows has to come out so."""
    if isinstance(quant, FloatQuantSpec) and quant.granularity is Granularity.BLOCK:
        assert quant.block is not None and quant.shared is not None  # the spec has filled them in
        rest = -x.shape[-1] % quant.block  # zeros make the last block whole, and no block's maximum larger
        padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)])
        return formats.mx_scale(padded, quant.format, quant.shared, quant.block)[..., : x.shape[-1]]
    axes = tuple(range(x.ndim)) if quant.granularity is Granularity.TENSOR else (x.ndim - 1,)
    low, high = affine.min_max(x, axes)
    top = np.maximum(-low, high)
    largest = formats.LAYOUTS[quant.format].maximum if isinstance(quant, FloatQuantSpec) else quant.code_max
    scale = np.where(top == 0, np.float32(1), np.maximum(top / np.float32(largest), affine.TINY))
    return np.where(np.isfinite(top), scale, np.float32(np.nan))


def quantize_operand(
    x: np.ndarray, axis: int, quant: Quant, words: np.ndarray | None = None, where: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """x, of any shape, as the values of its codes, in its dtype, and its scales, float32, with `axis`, the summed one,
    moved to the end. words, in x's shape: of stochastic rounding. where, boolean, broadcasts: what counts; the rest is
    0."""
    if where is not None:
        x = np.where(where, x, x.dtype.type(0))
    turned = x.swapaxes(axis, -1)
    scale = find_scale(turned, quant)
    turned_words = None if words is None else words.swapaxes(axis, -1)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN scales; the largest float may come out infinite
        y, _ = quantizer.simulate(turned, scale, np.zeros(scale.shape, np.int32), quant, turned_words)
    return y.swapaxes(axis, -1), scale


def linear(x: Var, weight: Var, bias: Var | None, how: Backward, where: np.ndarray | None = None) -> Var:
    """`ops.linear`, x (..., I) and W (O, I), or per head (H, O, I), whose gradient products are quantized as `how`
    says. where (..., 1), boolean: rows of x that count."""
    w = weight.value
    heads = w.shape[0] if w.ndim == 3 else 1
    w3 = w.reshape(heads, *w.shape[-2:])  # (H, O, I)
    rows = None if where is None else np.broadcast_to(where, (*x.shape[:-1], 1)).reshape(-1, 1)  # (N, 1)

    def split(v: np.ndarray) -> np.ndarray:  # (..., H n) -> (H, N, n)
        return v.reshape(math.prod(v.shape[:-1]), heads, v.shape[-1] // heads).swapaxes(0, 1)

    def merge(v: np.ndarray) -> np.ndarray:  # (H, N, n) -> (..., H n)
        return v.swapaxes(0, 1).reshape(*x.shape[:-1], heads * v.shape[-1])

    def draw(name: str, part: str, v: np.ndarray, arrange: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
        words = how.draw(name, part, v.shape)
        return None if words is None else arrange(words)

    def dx(g: np.ndarray) -> np.ndarray:
        dy = how.quantize("dgrad_gradient", split(g), -1, draw("dgrad_gradient", "grad", g, split))
        return merge(dy @ how.quantize("dgrad_weight", w3, -2, draw("dgrad_weight", "weight", w3, np.asarray)))

    def dw(g: np.ndarray) -> np.ndarray:
        dy = how.quantize("wgrad_gradient", split(g), -2, draw("wgrad_gradient", "grad", g, split))
        words = draw("wgrad_input", "input", x.value, split)
        return (dy.swapaxes(1, 2) @ how.quantize("wgrad_input", split(x.value), -2, words, rows)).reshape(w.shape)

    plain = ops.linear(Var(x.value), Var(w), None if bias is None else Var(bias.value))
    edges = [(x, dx), (weight, dw)]
    if bias is not None:
        edges.append((bias, lambda g: split(g).sum(axis=1, dtype=np.float64).reshape(bias.shape)))
    return node(plain.value, *edges)


def matmul(a: Var, b: Var, how: Backward, where_a: np.ndarray | None = None, where_b: np.ndarray | None = None) -> Var:
    """`ops.matmul`, a (..., M, I) and b (..., I, N), whose gradient products are quantized as `how` says. where_a and
    where_b, boolean, broadcast: elements that count."""

    def da(g: np.ndarray) -> np.ndarray:
        dy = how.quantize("dgrad_gradient", g, -1, how.draw("dgrad_gradient", "grad", g.shape))
        words = how.draw("dgrad_weight", "rhs", b.shape)
        return dy @ how.quantize("dgrad_weight", b.value, -1, words, where_b).swapaxes(-1, -2)

    def db(g: np.ndarray) -> np.ndarray:
        dy = how.quantize("wgrad_gradient", g, -2, how.draw("wgrad_gradient", "grad", g.shape))
        words = how.draw("wgrad_input", "lhs", a.shape)
        return how.quantize("wgrad_input", a.value, -2, words, where_a).swapaxes(-1, -2) @ dy

    return node(ops.matmul(Var(a.value), Var(b.value)).value, (a, da), (b, db))
