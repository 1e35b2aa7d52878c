"""Exact products as compiled models run them: weights laid out once, no branch on data.

Not in the reference: which instruction multiplies is a matter of the machine; what comes out is `products.matmul`'s.

`prepare` proves from the weights, the zero points and the bias what `products.matmul` looks at in every call, and picks
the carrier; `multiply` then only computes. With X = x - c and W = w - c recentred codes (c: see
`products`), and the zero points moved likewise,

    acc = X W - zw rowsum(X) + [bias - zx (colsum(W) - K zw)]

whose bracket is made once. A scale per token that is not symmetric brings its zx with the data.

**Ways.** Those of `machine`, of which `prepare` takes the fastest that is exact for these weights. Codes of 9 to 16
bits are two bytes: X = 256 high + low + 128 with low recentred, so that 256 (high W) + (low W) + 128 colsum(W) is
exact; the last term joins the bracket. Floats go in blocks of K short enough that their sums are exact, as in
`products`; the whole of K is one block where the weights' own magnitudes prove it.

Floors of a product (M, K) by (K, N), bytes: 2 M K N operations at the rate of the int8 unit (four times float32's with
AVX512-VNNI); K N + M K + 4 M N bytes at the memory's. Without VNNI: float32's own rate, and 4 (K N + M K + M N) bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtx_ref.spec import ONE_ROUNDING, QTX, Fixed, FloatProduct, MatmulRule, Overflow, QuantSpec

from . import machine
from .machine import Way, recentre_bytes
from .products import FLOAT_BITS, byte_product, centre, check_bias, check_codes, plain_float32, saturates

CARRIERS = {Way.FLOAT32: torch.float32, Way.FLOAT64: torch.float64}  # int8 else


class Prepared(NamedTuple):
    """The right operand of a product. Tensors differ between layers; the rest is alike in layers of one recipe."""

    weight: Tensor  # (K, N) codes less their centre: int8, float32 or float64; (K, 2 N) in halves; padded for cuBLAS
    bias: Tensor  # (N,), the bracket, in the dtype of the sum
    w_zero: Tensor | None  # () or (N,), moved; None where all are 0
    columns: Tensor | None  # (N,) colsum(W) - K zw, for zero points that come with the data
    centre: int  # taken from x
    pieces: int  # of x: 1, or 2 bytes
    length: int  # of an exact block of K
    way: Way
    accumulator: torch.dtype  # of the result
    saturate: bool


def prepare(
    w: Tensor,
    w_spec: QuantSpec,
    x_spec: QuantSpec,
    w_zero: Tensor | None = None,
    x_zero: Tensor | None = None,
    bias: Tensor | None = None,
    accumulator: int = 32,
    rule: MatmulRule = QTX.matmul,
    *,
    device: torch.device | str | None = None,
) -> Prepared:
    """Codes w (K, N) as the right operand of `multiply`, on `device` (w's own where None).

    Args:
        w_zero: zero point of w: one, or (N,); None is 0.
        x_zero: zero point of x, one for all rows; None is 0, or comes with each call where ranges are dynamic.
        bias: integers, (N,).
        accumulator: 32 or 64 bits.

    Raises:
        ValueError: codes, zero points or a bias as `products.matmul` refuses them; accumulators that these weights do
            not prove to fit where the rule reports; pairs that these weights do not prove never to saturate.
    """
    check_codes("right operand", w, w_spec)
    if accumulator not in (32, 64):
        raise ValueError(f"accumulator is {accumulator}: give 32 or 64 bits")
    device = w.device if device is None else torch.device(device)
    depth, width = w.shape
    low, high = x_spec.code_min - centre(x_spec), x_spec.code_max - centre(x_spec)
    most = w_spec.code_max - w_spec.code_min
    codes = (w.int() if most < 2**16 else w.long()) - centre(w_spec)
    sizes = codes.abs()
    zw = moved_zero(w_zero, w_spec, width)
    given = x_zero is None and x_spec.dynamic and not x_spec.symmetric  # with each call
    zx = None if given else moved_zero(x_zero, x_spec, 1)
    offset = torch.zeros(width, dtype=torch.int64, device=w.device)
    if bias is not None:
        check_bias(bias, width)
        offset = bias.reshape(-1).long()
    total = add_up(codes, most)
    columns = total - depth * zw
    if saturates(x_spec, w_spec, rule) and not pairs_fit(w, x_spec, rule.run):
        raise ValueError("pairs of these weights may saturate: the compiled form is exact; leave compiled out")
    absolute = add_up(sizes, most)
    away = add_up((codes - zw.to(codes.dtype)).abs(), most) if zw.any() else absolute
    check_accumulators((columns, away), offset, (low, high), (x_spec, zx), accumulator, rule)
    reach = (absolute + depth * zw.abs()).double() * max(-low, high)  # of X W and zw rowsum(X)
    if zx is not None:
        offset = offset - zx * columns
    way, pieces = choose(sizes, w_spec, x_spec, device)
    if pieces == 2:
        offset = offset + 128 * total
    ends = reach + offset.double().abs() + (columns.double().abs() * (high - low) if given else 0)
    narrow = accumulator == 32 and pieces == 1 and bool((ends < 2**31).all())
    wide = torch.int32 if narrow else torch.int64
    weight = codes.to(CARRIERS.get(way, torch.int8))
    weight = machine.split_halves(weight) if way is Way.HALVES else weight
    if way is Way.BYTES and device.type == "cuda":
        weight = torch.nn.functional.pad(weight, (0, -width % 8, 0, -depth % 8))
    return Prepared(
        # rows of outputs, seen from the side: as good as (K, N), and four times as fast for a single row of x
        weight.mT.contiguous().to(device).mT,
        offset.to(wide).to(device),
        zw.to(wide).to(device) if zw.any() else None,
        columns.to(wide).to(device) if given else None,
        centre(x_spec),
        pieces,
        exact_length(sizes, absolute, way, pieces, x_spec),
        way,
        torch.int32 if accumulator == 32 else torch.int64,
        accumulator == 32 and rule.overflow is Overflow.SATURATE,
    )


def add_up(x: Tensor, most: int) -> Tensor:
    """Sums over K of x (K, ...), no magnitude above `most`: (...), int64. In int32 where that holds them, which takes
    an eighth of the time."""
    return x.sum(0, dtype=torch.int32 if x.shape[0] * most < 2**31 else torch.int64).long()


def moved_zero(zero: Tensor | None, spec: QuantSpec, width: int) -> Tensor:
    """A zero point moved with its codes, int64: (), or (N,). Raises ValueError where it is no code, or has another
    shape."""
    if zero is None:
        return torch.tensor(-centre(spec))
    check_codes("zero point", zero, spec)
    if zero.numel() not in (1, width) or (zero.ndim > 1 and zero.shape[-1] != width):
        raise ValueError(f"zero points of shape {tuple(zero.shape)}: give one, or ({width},)")
    return (zero.long() - centre(spec)).reshape(() if zero.numel() == 1 else (-1,))


def check_accumulators(
    factors: tuple[Tensor, Tensor],
    bias: Tensor,
    ends: tuple[int, int],
    zero: tuple[QuantSpec, Tensor | None],
    accumulator: int,
    rule: MatmulRule,
) -> None:
    """Raises ValueError where sum_k (x - zx) (W - zw) + bias may leave the accumulator for some codes x and the rule
    reports it; beyond 2^62 whatever the rule.

    factors: of W - zw (K, N) the sums over K, and those of its magnitudes, int64 (N,). ends: of x, recentred. zero: of
    x, its spec and its zero point, recentred; None is any."""
    spec, zx = zero
    zeros = (spec.code_min - centre(spec), spec.code_max - centre(spec)) if zx is None else (int(zx), int(zx))
    low, high = ends[0] - zeros[1], ends[1] - zeros[0]
    sums, sizes = factors
    positive, negative = ((sums + sizes) // 2).double(), ((sums - sizes) // 2).double()  # of those above 0, and below
    largest = float((high * positive + low * negative + bias.double()).amax()) if bias.numel() else 0.0
    smallest = float((low * positive + high * negative + bias.double()).amin()) if bias.numel() else 0.0
    if largest >= 2.0**62 or smallest < -(2.0**62):
        raise ValueError("accumulators may reach 2^62: the compiled form proves its sums, use a smaller bias")
    if accumulator == 32 and rule.overflow is Overflow.REPORT and (largest >= 2**31 or smallest < -(2**31)):
        raise ValueError(
            f"accumulators may run from {smallest:.0f} to {largest:.0f}, beyond int32, and the profile reports: "
            "use 64 bits, smaller scales, or the eager form"
        )


def pairs_fit(w: Tensor, x_spec: QuantSpec, run: int) -> bool:
    """Whether no sum of `run` pairs in int16 saturates, whatever the uint8 codes: int8 w (K, N), in order of k."""
    largest = x_spec.code_max + (128 if x_spec.has_sign else 0)
    depth = -(-w.shape[0] // (2 * run)) * 2 * run
    runs = torch.nn.functional.pad(w.long(), (0, 0, 0, depth - w.shape[0])).unflatten(0, (-1, 2 * run))
    positive, negative = runs.clamp(min=0).sum(1), runs.clamp(max=0).sum(1)
    return bool((largest * positive < 2**15).all() and (largest * negative >= -(2**15)).all())


def choose(sizes: Tensor, w_spec: QuantSpec, x_spec: QuantSpec, device: torch.device) -> tuple[Way, int]:
    """The way to multiply by recentred weights of these magnitudes (K, N), and the pieces of x."""
    depth, width = sizes.shape
    if w_spec.bits > 8 or depth >= 2**17 or depth < 2 or width == 0:  # one column's transpose is misread too
        return Way.FLOAT64, 1
    largest = int(sizes.amax())  # `max` of integers takes ten times as long
    way = machine.choose_way(largest, device.type, plain=plain_float32(device.type))
    return way, 2 if x_spec.bits > 8 and way is not Way.FLOAT64 else 1


def exact_length(sizes: Tensor, absolute: Tensor, way: Way, pieces: int, x_spec: QuantSpec) -> int:
    """How many products by weights of these magnitudes (K, N), (N,) their sums, are summed exactly: all K, or as many
    as any weights allow."""
    kind, depth = CARRIERS.get(way), max(sizes.shape[0], 1)
    if kind is None:
        return depth
    largest = 2 ** (7 if pieces == 2 else x_spec.bits - 1)
    reach = largest * int(absolute.max()) if sizes.numel() else 0
    return depth if reach <= 2 ** FLOAT_BITS[kind] else 2 ** FLOAT_BITS[kind] // (largest * int(sizes.amax()))


def multiply(x: Tensor, prepared: Prepared, x_zero: Tensor | None = None) -> Tensor:
    """Codes x (..., K) by a prepared operand -> accumulators (..., N), int32 or int64.

    `x_zero`: zero points that come with the data, (..., 1): of dynamic ranges that are not symmetric."""
    rows, wide = x.reshape(-1, x.shape[-1]), prepared.bias.dtype
    if prepared.way is Way.TRITON:
        kernel = torch.ops.qtx.multiply_rows
        total = kernel(rows, prepared.weight, prepared.bias, prepared.centre, prepared.pieces, wide)
    elif prepared.pieces == 2:
        code = rows.int() - prepared.centre
        total = 256 * sums(code >> 8, prepared, wide) + sums((code & 255) - 128, prepared, wide)
    elif prepared.weight.dtype is torch.int8:
        total = sums(recentre_bytes(rows, prepared.centre), prepared, wide)
    else:
        total = sums(rows.int() - prepared.centre, prepared, wide)
    total = total.reshape(*x.shape[:-1], prepared.bias.shape[0])
    if prepared.w_zero is not None:
        total = total - prepared.w_zero * (x.int() - prepared.centre).sum(-1, keepdim=True, dtype=wide)
    if x_zero is not None:
        total = total - (x_zero.to(wide) - prepared.centre) * prepared.columns
    if prepared.way is not Way.TRITON:
        total = total + prepared.bias
    if prepared.saturate and wide is torch.int64:
        total = total.clamp(-(2**31), 2**31 - 1)
    return total.to(prepared.accumulator)


def multiply_to_codes(
    x: Tensor, prepared: Prepared, multiplier: Tensor, shift: Tensor, zero: Tensor, spec: QuantSpec, kind: torch.dtype
) -> Tensor:
    """`multiply`, then `fixed_point.multiply` by `ONE_ROUNDING`, `zero` added, clamped to codes of `spec`, as `kind`,
    in one pass, where `takes_codes`."""
    rows, ends = x.reshape(-1, x.shape[-1]), (spec.code_min, spec.code_max)
    kernel, given = torch.ops.qtx.multiply_rows, (prepared.weight, prepared.bias, prepared.centre, prepared.pieces)
    code = kernel(rows, *given, kind, multiplier, shift, zero, *ends)
    return code.reshape(*x.shape[:-1], prepared.bias.shape[0])


def takes_codes(prepared: Prepared, rule: Fixed | FloatProduct) -> bool:
    """Whether codes may come out of the product itself: accumulators of 32 bits, rounded once, with nothing between."""
    alone = prepared.way is Way.TRITON and prepared.w_zero is None and prepared.columns is None
    return alone and prepared.bias.dtype is torch.int32 and rule == ONE_ROUNDING


def sums(rows: Tensor, prepared: Prepared, wide: torch.dtype) -> Tensor:
    """Integers (M, K), recentred, by the prepared weights -> (M, N) in `wide`."""
    weight, depth, length = prepared.weight, rows.shape[1], prepared.length
    rows = rows.to(weight.dtype)
    if weight.dtype is torch.int8:
        total, width = byte_sums(rows, weight), prepared.bias.shape[0]
        if prepared.way is Way.HALVES:
            total = total[:, :width] + total[:, width:]
        return total[: rows.shape[0], :width].to(wide)
    total = (rows[:, :length] @ weight[:length]).to(wide)
    for at in range(length, depth, length):
        total = total + (rows[:, at : at + length] @ weight[at : at + length]).to(wide)
    return total


def byte_sums(rows: Tensor, weight: Tensor) -> Tensor:
    """int8 (M, K) by (K, N) -> int32; with more rows and columns where the weights are padded for cuBLAS."""
    if rows.device.type == "cuda":
        few = 32 - rows.shape[0] if rows.shape[0] <= 16 else 0
        rows = torch.nn.functional.pad(rows, (0, weight.shape[0] - rows.shape[1], 0, few))
    return byte_product(rows, weight, torch.int32)
