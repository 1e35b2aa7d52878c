"""Matmuls whose backward pass is quantized: each operand of each gradient product anew, as in the reference.

Operands are those that the forward product took in, which autograd keeps anyway; their codes live for the length of one
product. Products are computed in the dtype of dY.

Differs from the reference: device: where words are drawn; None: torch's default device.
Differs from the reference: Backward.draw_gradient: one draw for both products.
Differs from the reference: Backward.place: so that what is compiled may change from call to call.
Differs from the reference: multiply_values, flatten: shared with linears by int8 products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtx_ref.spec import FloatQuantSpec, Gradients, Granularity, Quant

from .. import distributed, ops, random
from ..tracing import is_traced
from . import affine, formats, quantizer
from .compiled import hide, store_rows


class Backward:
    """How the backward pass of the matmul behind one site computes its two products."""

    def __init__(
        self, gradients: Gradients, site: str, seed: int, step: int | Tensor, first_row: int | Tensor = 0
    ) -> None:
        """first_row: of the batch at hand in the global batch."""
        self.gradients = gradients
        self.site = site
        self.seed, self.step, self.first_row = seed, step, first_row

    def place(self, step: int | Tensor, first_row: int | Tensor) -> Backward:
        """The same of these tensors, which a compiled Function was given: torch 2.9 takes the size of a batch for one
        that its backward pass finds in an object."""
        if not is_traced():
            return self
        return Backward(self.gradients, self.site, self.seed, step, first_row)

    def draw(self, name: str, part: str, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor | None:
        """The random words of an operand, a field of `Gradients`, in `shape`; None where it is rounded to nearest."""
        operand = getattr(self.gradients, name)
        if operand is None or not operand.stochastic:
            return None
        first = 0 if part == "weight" else self.first_row * math.prod(shape[1:])
        words = random.bits(self.seed, self.step, f"{self.site}.{part}", math.prod(shape), first, device)
        return words.reshape(shape)

    def draw_gradient(self, g: Tensor) -> tuple[Tensor | None, ...]:
        """The words of dY in both products, drawn once; None where it is rounded to nearest."""
        words = self.draw("dgrad_gradient", "grad", g.shape, g.device)
        other = self.gradients.wgrad_gradient
        if other is None or not other.stochastic:
            return words, None
        return words, self.draw("wgrad_gradient", "grad", g.shape, g.device) if words is None else words

    def quantize(
        self, name: str, x: Tensor, axis: int, words: Tensor | None = None, where: Tensor | None = None
    ) -> Tensor:
        """The values of the codes of operand `name`, whose product sums over `axis`; x where it is not quantized.
        words as `draw` gave them; where broadcasts: elements that count."""
        operand = getattr(self.gradients, name)
        return x if operand is None else quantize_operand(x, axis, operand.quant, words, where)[0]


def find_scale(x: Tensor, quant: Quant) -> Tensor:
    """The scales of x (..., N), whose last axis is summed over: max |x| / largest code or value, 1 where all is 0, of
    MX blocks their power of two. NaN where x is not finite: a gradient that overflows has to come out so."""
    if quant.granularity is Granularity.BLOCK:
        rest = -x.shape[-1] % quant.block  # zeros make the last block whole, and no block's maximum larger
        padded = torch.nn.functional.pad(x, (0, rest))
        return formats.mx_scale(padded, quant.format, quant.shared, quant.block)[..., : x.shape[-1]]
    axes = tuple(range(x.ndim)) if quant.granularity is Granularity.TENSOR else (x.ndim - 1,)
    low, high = affine.min_max(x, axes)  # no copy of |x|
    if quant.granularity is Granularity.TENSOR:
        low, high = distributed.share_range(low, high)
    top = torch.maximum(-low, high)
    largest = formats.LAYOUTS[quant.format].maximum if isinstance(quant, FloatQuantSpec) else quant.code_max
    scale = (top / hide(torch.full_like(top, largest), top)).clamp(min=affine.TINY).masked_fill(top == 0, 1)
    return store_rows(scale.masked_fill(~torch.isfinite(top), math.nan), x)


def quantize_operand(
    x: Tensor, axis: int, quant: Quant, words: Tensor | None = None, where: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x as the values of its codes, in its dtype, and its scales, with `axis`, the summed one, moved to the end. words,
    in x's shape: of stochastic rounding. where broadcasts: what counts; the rest is 0."""
    if where is not None:
        x = torch.where(where, x, 0)
    turned = x.transpose(axis, -1)
    scale = find_scale(turned, quant)
    turned_words = None if words is None else words.transpose(axis, -1)
    y, _ = quantizer.simulate(turned, scale, torch.zeros_like(scale, dtype=torch.int32), quant, turned_words)
    return y.transpose(axis, -1), scale


def multiply_values(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, computed in `dtype`. A compiled backward pass is traced under its forward's autocast, and a plain one runs
    without any: so none counts here."""
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


def flatten(x: Tensor) -> Tensor:
    """(..., n) -> (N, n), of whatever size, 0 too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class Linear(torch.autograd.Function):
    """`ops.linear` with the reference's vector-Jacobian products."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, how: Backward, where: Tensor | None, *place: int | Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, where)
        ctx.how, ctx.bias = how.place(*place), None if bias is None else bias.shape
        return ops.own(ops.linear(x, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, where = ctx.saved_tensors
        how, heads = ctx.how, weight.shape[0] if weight.ndim == 3 else 0

        def split(v: Tensor) -> Tensor:  # (..., n) -> (N, n), or (..., H n) -> (H, N, n)
            v = flatten(v)
            return v.unflatten(-1, (heads, v.shape[-1] // heads)).transpose(0, 1) if heads else v

        def merge(v: Tensor) -> Tensor:
            return (v.transpose(0, 1).flatten(1) if heads else v).reshape(x.shape)

        first, second = (None if words is None else split(words) for words in how.draw_gradient(g))
        dx = dw = db = None
        dy = split(g)
        if ctx.needs_input_grad[0]:
            w = how.quantize(
                "dgrad_weight", weight, -2, how.draw("dgrad_weight", "weight", weight.shape, weight.device)
            )
            dx = merge(multiply_values(how.quantize("dgrad_gradient", dy, -1, first), w, g.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            words = how.draw("wgrad_input", "input", x.shape, x.device)
            rows = None if where is None else flatten(where.expand(*x.shape[:-1], 1))  # (N, 1)
            xs = how.quantize("wgrad_input", split(x), -2, None if words is None else split(words), rows)
            dy = how.quantize("wgrad_gradient", dy, -2, second)
            dw = multiply_values(dy.transpose(-1, -2), xs, g.dtype).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = flatten(g).sum(dim=0).reshape(ctx.bias)
        return dx, dw, db, *[None] * 4


class Matmul(torch.autograd.Function):
    """`ops.matmul` with the reference's vector-Jacobian products."""

    @staticmethod
    def forward(
        ctx, a: Tensor, b: Tensor, how: Backward, where_a: Tensor | None, where_b: Tensor | None, *place: int | Tensor
    ) -> Tensor:
        ctx.save_for_backward(a, b, where_a, where_b)
        ctx.how = how.place(*place)
        return ops.own(ops.matmul(a, b))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b, where_a, where_b = ctx.saved_tensors
        how = ctx.how
        first, second = how.draw_gradient(g)
        da = db = None
        if ctx.needs_input_grad[0]:
            words = how.draw("dgrad_weight", "rhs", b.shape, b.device)
            rhs = how.quantize("dgrad_weight", b, -1, words, where_b).transpose(-1, -2)
            da = multiply_values(how.quantize("dgrad_gradient", g, -1, first), rhs, g.dtype).to(a.dtype)
        if ctx.needs_input_grad[1]:
            words = how.draw("wgrad_input", "lhs", a.shape, a.device)
            lhs = how.quantize("wgrad_input", a, -2, words, where_a).transpose(-1, -2)
            db = multiply_values(lhs, how.quantize("wgrad_gradient", g, -2, second), g.dtype).to(b.dtype)
        return da, db, *[None] * 5


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, how: Backward, where: Tensor | None = None) -> Tensor:
    """`ops.linear`, x (..., I) and W (O, I), or per head (H, O, I), whose gradient products are quantized as `how`
    says. where (..., 1): rows of x that count."""
    return Linear.apply(x, weight, bias, how, where, how.step, how.first_row)


def matmul(a: Tensor, b: Tensor, how: Backward, where_a: Tensor | None = None, where_b: Tensor | None = None) -> Tensor:
    """`ops.matmul`, a (..., M, I) and b (..., I, N), whose gradient products are quantized as `how` says. where_a and
    where_b broadcast: elements that count."""
    return Matmul.apply(a, b, how, where_a, where_b, how.step, how.first_row)
