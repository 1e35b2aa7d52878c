"""Linears by int8 products: forward and both gradient products of codes, and their scales afterwards, where fake
quantization multiplies the codes' values in float.

Not in the reference: its values are those of fake quantization, from which these differ by float's rounding; codes are
the same.

y = x W^T, dX = dY W and dW = dY^T X are each a sum over one axis, along which no scale varies: so each operand is
quantized anew with that axis last, symmetrically, to the nearest code or by Philox's words, and a product is
s_a s_b^T (codes_a codes_b^T). Of x and W their codes are kept, a quarter of the bytes. On a GPU all of it is
`kernels.int8_training`, whose values are the same; there what is not finite comes out as NaN, where here it raises.

Floors of one product (M, K) (K, N): 2 M K N operations at the rate of int8, 2 to 4 times that of bfloat16, and 4 bytes
in and 1 out for each operand's element, 4 in and 4 out for each of the result's.
"""

from __future__ import annotations

import math
from importlib import import_module

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtx_ref.spec import QTX, Gradients, Granularity, Quant, QuantSpec

from .. import ops, random
from ..kernels.host import sign_seed
from . import quantizer, rounding
from .gradients import Backward, find_scale, flatten, multiply_values

NAMES = ("dgrad_gradient", "dgrad_weight", "wgrad_gradient", "wgrad_input")
LONGEST = 2**16  # terms of magnitude 2^14 whose sum int32 holds, and half of it to spare


def has_codes(quant: Quant | None) -> bool:
    """Whether a dynamic quantizer has signed codes of 8 bits at most, zero point 0, and a scale per row."""
    if not isinstance(quant, QuantSpec) or quant.granularity not in (Granularity.TOKEN, Granularity.CHANNEL):
        return False
    return quant.symmetric and quant.bits <= 8 and quant.dynamic and quant.axis is None and quant.outliers is None


def has_products(gradients: Gradients | None) -> bool:
    """Whether both gradient products are of such codes, or neither is quantized."""
    if gradients is None:
        return True
    operands = (getattr(gradients, name) for name in NAMES)
    return all(one is not None and has_codes(one.quant) for one in operands)


def encode(x: Tensor, scale: Tensor, spec: QuantSpec, words: Tensor | None = None) -> Tensor:
    """Codes (M, K), int8, contiguous, of x (M, K) with scales (M, 1); of a scale that is NaN any, for what they are
    multiplied by is NaN."""
    rule = QTX.quantize if words is None else quantizer.STOCHASTIC.quantize
    level = rounding.round_level(x, scale, torch.zeros_like(scale, dtype=torch.int32), rule, words)
    return level.clamp(spec.code_min, spec.code_max).nan_to_num(0).to(torch.int8).contiguous()


def sum_products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, codes (M, K) and (N, K) -> (M, N), float32. CUDA multiplies more than 16 rows, and 8 columns at a time; of
    sums of one term a CPU's product writes nothing."""
    if a.shape[1] > LONGEST:
        parts = zip(a.split(LONGEST, 1), b.split(LONGEST, 1), strict=True)
        return torch.stack([sum_products(x.contiguous(), y.contiguous()) for x, y in parts]).sum(0)
    m, n = a.shape[0], b.shape[0]
    if not (m and n and a.shape[1]):
        return a.new_zeros(m, n, dtype=torch.float32)
    if a.device.type == "cuda":
        inner = -a.shape[1] % 8
        a = torch.nn.functional.pad(a, (0, inner, 0, max(0, 17 - m)))
        b = torch.nn.functional.pad(b, (0, inner, 0, -n % 8))
    elif a.shape[1] == 1:
        a, b = (torch.nn.functional.pad(codes, (0, 1)) for codes in (a, b))
    return torch._int_mm(a, b.t())[:m, :n].float()


def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """s_a s_b^T (a b^T): codes (M, K) and (N, K), scales (M, 1) and (N, 1) -> (M, N), float32."""
    return sum_products(a, b) * a_scale * b_scale.t()


def has_kernels(device: torch.device) -> bool:
    """Whether a linear is Triton's three products, `torch.ops.qtx.int8_forward` and `int8_backward`: on a GPU where
    Triton compiles. `step.compile_forward` tells the compiler that it is a constant."""
    if not random.has_kernels(device):
        return False
    import_module("qtx_torch.kernels.int8_training")
    return True


class Int8Linear(torch.autograd.Function):
    """`gradients.Linear` of fake-quantized operands, by codes. The straight-through gradient passes whole: no code is
    clamped (`quantizer.holds_all`)."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        specs: tuple[QuantSpec, QuantSpec],
        how: Backward | None,
        where: Tensor | None,
        *place: int | Tensor | None,
    ) -> Tensor:
        rows = flatten(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        taken = torch.float64 not in (x.dtype, weight.dtype) and x.numel() > 0 and weight.numel() > 0
        ctx.kernels = taken and has_kernels(x.device)
        if ctx.kernels:
            limits = [end for spec in specs for end in (spec.code_min, spec.code_max)]
            y, codes, x_scale, w_codes, w_scale = torch.ops.qtx.int8_forward(rows, weight, bias, limits, dtype)
        else:
            x_scale, _ = quantizer.dynamic_scale(rows, specs[0], None, False)
            w_scale, _ = quantizer.dynamic_scale(weight, specs[1], None, True)
            codes, w_codes = encode(rows, x_scale, specs[0]), encode(weight, w_scale, specs[1])
            y = multiply(codes, x_scale, w_codes, w_scale)
            y = (y if bias is None else y + bias.float()).to(dtype)
        ctx.save_for_backward(codes, x_scale, w_codes, w_scale, where)
        ctx.how = None if how is None else how.place(*place)
        ctx.bias, ctx.given = None if bias is None else bias.shape, (x.shape, x.dtype, weight.dtype)
        return ops.own(y.reshape(*x.shape[:-1], len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        codes, x_scale, w_codes, w_scale, where = ctx.saved_tensors
        how, (shape, x_dtype, w_dtype) = ctx.how, ctx.given
        dy, columns = flatten(g), shape[-1]
        if where is not None:
            where = flatten(where.expand(*shape[:-1], 1))[:, 0]
        dx = dw = db = None
        if how is not None and ctx.kernels:
            wanted = list(ctx.needs_input_grad[:2])
            dx, dw = torch.ops.qtx.int8_backward(
                dy, codes, x_scale, w_codes, w_scale, where, *describe(how, g.shape, shape, wanted), x_dtype, w_dtype
            )
            dx, dw = dx if wanted[0] else None, dw if wanted[1] else None
        else:
            x, w = (codes[:, :columns] * x_scale).to(x_dtype), (w_codes[:, :columns] * w_scale).to(w_dtype)
            if how is None:
                dx = multiply_values(dy, w, g.dtype) if ctx.needs_input_grad[0] else None
                dw = multiply_values(dy.t(), x, g.dtype) if ctx.needs_input_grad[1] else None
            else:
                dx, dw = multiply_gradients(how, g, x.reshape(shape), w, where, *ctx.needs_input_grad[:2])
        if ctx.needs_input_grad[2]:
            db = dy.sum(dim=0).reshape(ctx.bias)
        dx = None if dx is None else dx.reshape(shape).to(x_dtype)
        return dx, None if dw is None else dw.to(w_dtype), db, *[None] * 5


def multiply_gradients(
    how: Backward, g: Tensor, x: Tensor, w: Tensor, where: Tensor | None, for_x: bool, for_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dX (N, I) and dW of dY (..., O), x (..., I) and W, by codes of all four operands; float32. where (N,): rows of x
    that count."""
    dy, rows = flatten(g), flatten(x)
    first, second = (None if words is None else words.reshape(dy.shape) for words in how.draw_gradient(g))
    dx = dw = None
    if for_x:
        words = how.draw("dgrad_weight", "weight", w.shape, w.device)
        dx = product(how, "dgrad_gradient", dy, first, "dgrad_weight", turn(w), turn(words))
    if for_w:
        words = how.draw("wgrad_input", "input", x.shape, x.device)
        words = None if words is None else words.reshape(rows.shape)
        rows = rows if where is None else torch.where(where[:, None], rows, 0)
        dw = product(how, "wgrad_gradient", turn(dy), turn(second), "wgrad_input", turn(rows), turn(words))
    return dx, dw


def describe(
    how: Backward, g_shape: torch.Size, x_shape: torch.Size, wanted: list[bool]
) -> tuple[Tensor | None, int, list[bool], list[int], list[int], list[int]]:
    """What `kernels.int8_training.run_backward` takes between `where` and the dtypes."""
    operands = [getattr(how.gradients, name) for name in NAMES]
    firsts = [how.first_row * math.prod(g_shape[1:]), 0, how.first_row * math.prod(x_shape[1:])]
    sites = [random.number_site(f"{how.site}.{part}") for part in ("grad", "weight", "input")]
    step, address = how.step, None
    if isinstance(step, Tensor) or isinstance(firsts[0], Tensor):
        device = next(one.device for one in (step, firsts[0]) if isinstance(one, Tensor))
        numbers = [torch.as_tensor(one, device=device) for first in firsts for one in (step, first)]
        address, step, firsts = torch.stack(numbers).reshape(3, 2), 0, [0, 0, 0]
    return (
        address,
        x_shape[-1],
        wanted,
        [1 + one.stochastic for one in operands],
        [end for one in operands for end in (one.quant.code_min, one.quant.code_max)],
        [sign_seed(how.seed), step, *(number for pair in zip(sites, firsts, strict=True) for number in pair)],
    )


def turn(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.t()


def product(
    how: Backward, left: str, a: Tensor, a_words: Tensor | None, right: str, b: Tensor, b_words: Tensor | None
) -> Tensor:
    """a b^T of (M, K) and (N, K), operands `left` and `right` of the gradients, by their codes."""
    made = []
    for name, x, words in ((left, a, a_words), (right, b, b_words)):
        quant = getattr(how.gradients, name).quant
        scale = find_scale(x, quant)
        made += [encode(x, scale, quant, words), scale]
    return multiply(*made)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    specs: tuple[QuantSpec, QuantSpec],
    how: Backward | None,
    where: Tensor | None = None,
) -> Tensor:
    """x W^T + b of x (..., I) and W (O, I) as their dynamic quantizers `specs` have them, and its gradients as `how`
    says. where (..., 1): rows of x that count for the gradient of W."""
    place = (None, None) if how is None else (how.step, how.first_row)
    return Int8Linear.apply(x, weight, bias, specs, how, where, *place)
