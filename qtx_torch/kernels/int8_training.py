"""A linear's three products in int8 on a GPU: codes of its operands along either axis, and products of codes with their
scales.

Not in the reference: its values are those of fake quantization. Codes and products are those of `quant.int8`, to the
bit, where sums have at most `quant.int8.LONGEST` terms.

    forward   x codes along I, W codes along I; y = s_x s_W (x W^T) + b
    backward  dY codes along O and along M, of one reading and one drawing; W codes along O; x codes along M;
              dX = s s^T (dY W), dW = s s^T (dY^T x)

Whatever a product sums over is the last axis of both its operands, as the tensor cores take int8: what is coded along
the other axis is written transposed, through shared memory. A row of codes is padded to 16 bytes by zeros.

Floors, for 4096 x 2048 -> 8192 in bfloat16 at 4.3 TB/s, 29e12 instructions a second (132 x 128 lanes at 1.75 GHz) and
1.58e15 operations (twice the bfloat16 that was measured), instructions as compiled for sm_90:
    products             3 x 2 x 4096 x 2048 x 8192 operations                0.26 ms
    x, W to codes        25 M elements, 3 bytes, 24 instructions              0.021 ms
    dY's maxima          34 M elements, 2 bytes, 8 instructions               0.016 ms
    dY to both codes     34 M elements, 4 bytes, 60 instructions              0.070 ms (Philox 15 of them, each code 20)
    x, W to other codes  25 M elements, 1 byte, then 1 and 1, 9 and 26        0.030 ms
    results              y, dX, dW: 59 M elements of 2 bytes, behind the products but for each tile's own
On an H200 all kernels together, captured as a CUDA graph, take as long as bfloat16's (benchmarks/int8_linear.py): the
products two thirds of them, what makes codes the rest. Launched one by one the host takes three times that.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .host import on_device
from .int8_codes import encode, encode_rows, pad_line

LONGEST = 2**16  # as in `quant.int8`
# rows, columns, terms, warps, loads in flight of a product's tile, measured best of eight on an H200; with a second sum
TILE, LONG_TILE = (128, 128, 128, 4, 3), (128, 128, 128, 8, 4)


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    a, b, a_scale, b_scale, bias, out, M, N, K,
    BIAS: tl.constexpr, LONG: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles of s_a s_b^T (a b^T) + bias, of descriptors of codes (M, K) and (N, K), which give 0 outside. LONG: sums of
    PART terms each, added as floats."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    tile = tl.program_id(0)
    band = tile // (GROUP * across) * GROUP  # neighbours share rows of a and b, which stay in L2
    height = tl.minimum(down - band, GROUP)
    top = (band + tile % (GROUP * across) % height) * BM
    left = tile % (GROUP * across) // height * BN
    if LONG:
        total = tl.zeros((BM, BN), tl.float32)
        for part in range(0, K, PART):
            sums = tl.zeros((BM, BN), tl.int32)
            for k in range(part, tl.minimum(part + PART, K), BK):
                sums = tl.dot(a.load([top, k]), b.load([left, k]).T, sums, out_dtype=tl.int32)
            total += sums.to(tl.float32)
    else:
        sums = tl.zeros((BM, BN), tl.int32)
        for k in range(0, K, BK):
            sums = tl.dot(a.load([top, k]), b.load([left, k]).T, sums, out_dtype=tl.int32)
        total = sums.to(tl.float32)
    row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
    y = total * tl.load(a_scale + row, mask=row < M, other=0.0)[:, None]
    y = y * tl.load(b_scale + column, mask=column < N, other=0.0)[None, :]
    if BIAS:
        y = y + tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, kind: torch.dtype) -> Tensor:
    """s_a s_b^T (a b^T) + bias: codes (M, K padded) and (N, K padded), scales (M, 1) and (N, 1), bias (N,) -> (M, N) of
    `kind`, computed in float32. All are contiguous."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=kind, device=a.device)
    long = k > LONGEST
    bm, bn, bk, warps, stages = LONG_TILE if long else TILE
    operands = TensorDescriptor.from_tensor(a, [bm, bk]), TensorDescriptor.from_tensor(b, [bn, bk])
    given = (*operands, a_scale, b_scale, bias, out, m, n, k)
    constants = {"BIAS": bias is not None, "LONG": long, "PART": LONGEST, "BM": bm, "BN": bn, "BK": bk, "GROUP": 8}
    how = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    with on_device(a.device):
        _multiply[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](*given, **constants, **how)
    return out


def run_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, limits: list[int], kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x W^T + b of (M, K) and (N, K), of `kind`, by codes along K, and those: x codes (M, K padded), scales (M, 1), W
    codes (N, K padded), scales (N, 1). limits: least and last code of x and of W."""
    codes, x_scale = encode_rows(x.contiguous(), *limits[:2])
    w_codes, w_scale = encode_rows(weight.contiguous(), *limits[2:])
    bias = None if bias is None else bias.contiguous()
    return multiply(codes, x_scale, w_codes, w_scale, bias, kind), codes, x_scale, w_codes, w_scale


def run_backward(
    dy: Tensor,
    codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    where: Tensor | None,
    address: Tensor | None,
    columns: int,
    wanted: list[bool],
    ways: list[int],
    limits: list[int],
    words: list[int],
    x_kind: torch.dtype,
    w_kind: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dX (M, K) and dW (N, K), K `columns`, of dY (M, N) and what `run_forward` made of x and W, numbers of x_kind and
    w_kind; without rows where not wanted. where (M,): rows of x that count.

    ways, and least and last codes: of dY along N, W along N, dY along M and x along M, as `encode` has them. words:
    seed and step, then the site's number and the first word of dY, W and x; address (3, 2): step and first word of
    each, in their place."""
    dx, dw = (dy.new_empty(0, columns, dtype=kind) for kind in (x_kind, w_kind))
    where = None if where is None else where.contiguous()
    seeds = [[*words[:2], *words[at : at + 2]] for at in (2, 4, 6)]
    stored = [None] * 3 if address is None else address.unbind(0)
    along = [way * want for way, want in zip(ways[::2], wanted, strict=True)]
    rows, row_scale, turned, turned_scale = encode(
        dy.contiguous(), None, None, dy.dtype, dy.shape[1], along, [*limits[:2], *limits[4:6]], seeds[0], stored[0]
    )
    if wanted[0]:
        ends = [*limits[2:4], *limits[2:4]]
        *_, other, scale = encode(w_codes, w_scale, None, w_kind, columns, [0, ways[1]], ends, seeds[1], stored[1])
        dx = multiply(rows, row_scale, other, scale, None, x_kind)
    if wanted[1]:
        ends = [*limits[6:], *limits[6:]]
        *_, other, scale = encode(codes, x_scale, where, x_kind, columns, [0, ways[3]], ends, seeds[2], stored[2])
        dw = multiply(turned, turned_scale, other, scale, None, w_kind)
    return dx, dw


# as the compiler knows them: by the shapes of what they return
forward_op = torch.library.custom_op("qtx::int8_forward", run_forward, mutates_args=())
backward_op = torch.library.custom_op("qtx::int8_backward", run_backward, mutates_args=())


@forward_op.register_fake
def _(x, weight, bias, limits, kind):  # type: ignore[no-untyped-def]
    (m, k), n = x.shape, weight.shape[0]
    codes, w_codes = (x.new_empty(rows, pad_line(k), dtype=torch.int8) for rows in (m, n))
    x_scale, w_scale = (x.new_empty(rows, 1, dtype=torch.float32) for rows in (m, n))
    return x.new_empty(m, n, dtype=kind), codes, x_scale, w_codes, w_scale


@backward_op.register_fake
def _(dy, codes, x_scale, w_codes, w_scale, where, address, columns, wanted, *rest):  # type: ignore[no-untyped-def]
    lines = (len(one) * want for one, want in zip((codes, w_codes), wanted, strict=True))
    return tuple(dy.new_empty(n, columns, dtype=kind) for n, kind in zip(lines, rest[-2:], strict=True))
