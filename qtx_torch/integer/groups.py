"""Activations with several scales along the axis that is summed over: per-embedding-group (Bondarenko et al. 2021,
section 4), channels coded wide, a scale per channel; all fixed at calibration.

Differs from the reference: channel_multiplier, joint_unit, varies: constants are made once, there.
Differs from the reference: Grouped, carry, divide, one_group, prepare, multiply: which instruction multiplies is a
matter of the machine.

The reference's module has the formulas: codes less their zero points are multiplied by m_c, float64 carries the
products with the other factor, exact in blocks, and the sum is rounded once. Compiled models take the groups apart
instead, where these are not too small: `prepare` makes each group's weights ready, `multiply` has an accumulator for
each from `carriers`, and adds them by their multipliers.

Floors of the latter, (M, K) by (K, N) in G groups: the product's own, 2 M K N operations of bytes; then G products
and sums of 64 bits for each of M N results; M K bytes read and written, where channels are not neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtx_ref.spec import QTX, WIDE_BITS, WIDE_ZERO, AddRule, MatmulRule, QuantSpec

from ..quant.affine import code_limits
from . import carriers
from .carriers import Prepared
from .fixed_point import shift_right
from .products import block_product

SMALLEST = 16  # channels of a group that has an accumulator of its own; float64 carries smaller ones
MULTIPLIER_BITS = 24  # of the largest scale's multiplier
FLOAT_BITS = 53


def bits_below(spec: QuantSpec) -> int:
    """b such that no code less its zero point is beyond 2^b, wherever the zero point is."""
    return max(spec.bits - 1 if spec.symmetric else spec.bits, 0 if spec.wide is None else WIDE_BITS - 1)


def reach(spec: QuantSpec, zero_point: Tensor) -> Tensor:
    """The largest magnitude of code less zero point, int64, in the shape of the zero points."""
    low, high = code_limits(zero_point, spec)
    return torch.maximum(high - zero_point.long(), zero_point.long() - low)


def join(x: Tensor, multiplier: Tensor, shift: Tensor, rule: AddRule = QTX.add) -> Tensor:
    """Each element in the joint unit, rounded: (..., K) -> (..., K). Raises ValueError where 62 bits do not hold it."""
    return shift_right(x * multiplier.long(), shift, rule.rounding)


def product(
    a: Tensor,
    b: Tensor,
    multiplier: Tensor,
    shift: Tensor | int,
    rule: AddRule = QTX.add,
    a_bits: int = 16,
    b_bits: int = 16,
    integers: bool = False,
) -> Tensor:
    """round(sum_k m_k a_k b_k / 2^shift): a (..., M, K), b (..., K, N), multiplier (K,) or (..., 1, K) -> (..., M, N).

    a_bits, b_bits: the magnitudes are at most 2^bits. integers: multiply in integers, without float carriers: slow, the
    same result, CPU only. Raises ValueError where 62 bits do not hold the sum.
    """
    scaled, wide = a * multiplier.long(), MULTIPLIER_BITS + a_bits
    if integers:
        total = block_product(scaled, b.long(), max(a.shape[-1], 1), torch.int64)
    elif wide + b_bits <= FLOAT_BITS:
        total = carry(scaled, b, wide + b_bits)
    else:  # 2^low times what is above, and what is below, each of which float64 carries
        low = (wide + 1) // 2
        total = carry(scaled >> low, b, wide - low + b_bits) << low
        total += carry(scaled & (2**low - 1), b, low + b_bits)
    return shift_right(total, shift, rule.rounding)


def carry(a: Tensor, b: Tensor, bits: int) -> Tensor:
    """a b, integers no product of which is beyond 2^bits, in exact blocks of float64; int64."""
    return block_product(a.double(), b.double(), 2 ** (FLOAT_BITS - bits), torch.int64)


# --- as compiled models run them --------------------------------------------------------------------------------------


class Grouped(NamedTuple):
    """The right operand of a product over groups. Tensors differ between layers; the rest is alike in layers of one
    recipe."""

    parts: tuple[Prepared, ...]  # of each group; none: float64 carries the whole product
    sizes: tuple[int, ...]  # channels of each group
    order: Tensor | None  # (K,) channels as groups have them; None where groups are neighbours
    multipliers: Tensor  # int64: (G,); without parts (K,), one for each channel
    weight: Tensor | None  # without parts: (K, N) codes less their zero points, float64
    zero: Tensor | None  # without parts: (K,) the zero points of x, int32
    shift: Tensor  # (), int64
    bias: Tensor | None  # (N,), in the dtype of the accumulators
    rule: AddRule
    bits: tuple[int, int]  # without parts: of x and of the weights, as `product` has them


def divide(spec: QuantSpec, zero: Tensor, multiplier: Tensor) -> tuple[list[int], Tensor | None]:
    """Sizes of the groups of K channels, and the channels in their order, (K,), None where it is their own. Channels
    of a group have one multiplier and one zero point, (K,) each; groups alike may be mixed, which changes no sum."""
    depth = zero.numel()
    if spec.wide is not None:
        return [depth - spec.wide, spec.wide], torch.argsort((zero == WIDE_ZERO).int(), stable=True)
    count = depth if spec.groups is None else spec.groups  # CHANNEL
    order = torch.argsort(multiplier.long() * 2**WIDE_BITS * 2 + zero + 2**WIDE_BITS, stable=True)
    return [depth // count] * count, order if spec.permute else None


def prepare(
    w: Tensor,
    w_spec: QuantSpec,
    x_spec: QuantSpec,
    w_zero: Tensor | None,
    x_zero: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    bias: Tensor | None = None,
    rule: MatmulRule = QTX.matmul,
    add: AddRule = QTX.add,
) -> Grouped:
    """Codes w (K, N) as the right operand of `multiply`; their zero point is one, or (N,).

    Args:
        x_zero: zero points of x, (K,).
        multiplier: of each channel, (K,).
        shift: of the sum over groups, as in `product`.
        bias: integers, (N,).

    Raises ValueError as `carriers.prepare`, and for channels that are not in groups as `x_spec` says.
    """
    sizes, order = divide(x_spec, x_zero, multiplier)
    channels = torch.arange(w.shape[0], device=w.device) if order is None else order
    bits = bits_below(x_spec), bits_below(w_spec)
    if min(sizes) < SMALLEST and x_spec.wide is None:
        plain = (w.int() if w_zero is None else w.int() - w_zero).double()
        return Grouped((), (), None, multiplier.long(), plain, x_zero, shift, bias, add, bits)
    parts, multipliers = [], []
    for at in channels.split(sizes):
        if (multiplier[at] != multiplier[at[0]]).any() or (x_zero[at] != x_zero[at[0]]).any():
            raise ValueError("channels of a group differ in multiplier or zero point: leave compiled out")
        own = one_group(x_spec, bool(x_zero[at[0]] == WIDE_ZERO))
        accumulator = 32 if own.bits <= 8 and w_spec.bits <= 8 else 64
        parts.append(carriers.prepare(w[at], w_spec, own, w_zero, x_zero[at[0]], None, accumulator, rule))
        multipliers.append(multiplier[at[0]])
    return Grouped(
        tuple(parts), tuple(sizes), order, torch.stack(multipliers).long(), None, None, shift, bias, add, bits
    )


def one_group(spec: QuantSpec, wide: bool) -> QuantSpec:
    """The quantizer of the channels of one group, wide ones or others."""
    if wide:
        return QuantSpec(WIDE_BITS)
    return QuantSpec(spec.bits, spec.symmetric, narrow=spec.narrow, mirrored=spec.mirrored, signed=spec.signed)


@torch.library.custom_op("qtx::take_channels", mutates_args=())
def take_channels(x: Tensor, order: Tensor | None) -> Tensor:
    """Codes (..., K) with their channels in this order, in memory: inductor would make them anew where each group is
    read, and not in vectors."""
    return x.clone(memory_format=torch.contiguous_format) if order is None else x.index_select(-1, order)


@take_channels.register_fake
def _(x: Tensor, order: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def multiply(x: Tensor, grouped: Grouped) -> Tensor:
    """Codes x (..., K) by a prepared operand -> accumulators (..., N): int32, or int64 where the bias is."""
    shift, rule = grouped.shift, grouped.rule
    if not grouped.parts:
        acc = product(x.int() - grouped.zero, grouped.weight, grouped.multipliers, shift, rule, *grouped.bits)
    else:
        x = take_channels(x, grouped.order)
        total = sum(
            carriers.multiply(part, ready).long() * m
            for part, ready, m in zip(x.split(grouped.sizes, -1), grouped.parts, grouped.multipliers, strict=True)
        )
        acc = shift_right(total, shift, rule.rounding)
    return acc.int() if grouped.bias is None else (acc.to(grouped.bias.dtype) + grouped.bias)
