"""Codes by int8 weights on a GPU, with what follows in the same pass: zero points' and bias's bracket, requantization.

Not in the reference: it gives what `integer.carriers.multiply` and `integer.fixed_point.multiply` give.

    acc[m, n] = sum_k (x[m, k] - c) w[k, n] + bias[n]        int8 products, int32 sums (`tl.dot`)
    code[m, n] = clamp(floor(acc multiplier[n] 2^(shift[n] - 31) + 1/2) + zero)    in int64, one rounding, half up

A program holds a tile of results; x comes in as it is stored, unsigned or of 16 bits, and is recentred in registers: 16
bits are two bytes, 256 high + low + 128, whose last term `prepare` has put into the bias. Rows beyond M are masked, so
that few rows cost a tile of 16 at least.

Floors on a GPU: 2 M K N operations at the int8 rate of the tensor cores, twice bfloat16's; bytes M K + K N + M N where
codes come out, 4 M N for accumulators. With few rows the weights' bytes decide, half of bfloat16's.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from .host import on_device

FEW = 32  # rows, up to which a narrow tile wastes least


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, w, bias, multiplier, shift, zero, out, M, N, K, x_row, w_k, w_n, each, low, high,
    CENTRE: tl.constexpr, PIECES: tl.constexpr, CODES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < M)[:, None] & (column < N)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    upper = tl.zeros((ROWS, COLUMNS), tl.int32)
    for begin in range(0, K, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        a_there, b_there = (row < M)[:, None] & (k < K)[None, :], (k < K)[:, None] & (column < N)[None, :]
        a = tl.load(x + row[:, None] * x_row + k[None, :], mask=a_there, other=CENTRE)
        b = tl.load(w + k[:, None] * w_k + column[None, :] * w_n, mask=b_there, other=0)
        a = a.to(tl.int32) - CENTRE
        if PIECES == 2:  # beyond K the lower byte is -128, and the weight 0
            upper = tl.dot((a >> 8).to(tl.int8), b, upper, out_dtype=tl.int32)
            a = (a & 255) - 128
        total = tl.dot(a.to(tl.int8), b, total, out_dtype=tl.int32)
    wide = total.to(tl.int64) + tl.load(bias + column, mask=column < N, other=0).to(tl.int64)[None, :]
    if PIECES == 2:
        wide += 256 * upper.to(tl.int64)
    if CODES:
        factor = tl.load(multiplier + column * each, mask=column < N, other=0).to(tl.int64)[None, :]
        right = 31 - tl.load(shift + column * each, mask=column < N, other=0).to(tl.int64)[None, :]
        level = (wide * factor + (tl.full((1, 1), 1, tl.int64) << (right - 1))) >> right
        wide = tl.minimum(tl.maximum(level + tl.load(zero).to(tl.int64), low), high)
    tl.store(out + row[:, None] * N + column[None, :], wide.to(out.dtype.element_ty), mask=there)


@torch.library.custom_op("qtx::multiply_rows", mutates_args=())
def multiply_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    centre: int,
    pieces: int,
    kind: torch.dtype,
    multiplier: Tensor | None = None,
    shift: Tensor | None = None,
    zero: Tensor | None = None,
    low: int = 0,
    high: int = 0,
) -> Tensor:
    """Codes x (M, K) by int8 weights (K, N) -> (M, N) of `kind`: accumulators, or with a multiplier codes from `low` to
    `high`.

    centre: taken from x, whose codes fit `pieces` bytes then. bias: (N,), int32 or int64; int32 with a multiplier, and
    accumulators that fit it. multiplier, shift: one each or (N,), of `fixed_point.quantize_multiplier`. zero: one."""
    (m, k), n = x.shape, weight.shape[1]
    x = x if x.stride(1) == 1 or k == 1 else x.contiguous()
    out = torch.empty(m, n, dtype=kind, device=x.device)
    if m == 0 or n == 0:
        return out
    several = multiplier is not None and multiplier.numel() > 1
    if multiplier is not None and shift is not None and several != (shift.numel() > 1):
        multiplier, shift = (t.expand(n).contiguous() for t in (multiplier.reshape(-1), shift.reshape(-1)))
        several = True
    rows, columns, depth, warps = (16, 64, 128, 4) if m <= FEW else (128, 128, 64, 8)
    grid = (triton.cdiv(m, rows), triton.cdiv(n, columns))
    given = (x, weight, bias, multiplier, shift, zero, out, m, n, k)
    steps = (x.stride(0), *weight.stride(), int(several), low, high)
    constants = {"CENTRE": centre, "PIECES": pieces, "CODES": multiplier is not None}
    tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "num_warps": warps}
    with on_device(x.device):
        _multiply[grid](*given, *steps, **constants, **tile)
    return out


@multiply_rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, centre: int, pieces: int, kind: torch.dtype, *scaling: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1], dtype=kind)
