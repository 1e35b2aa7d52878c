"""Products of int8 codes on a GPU with wgmma, in Gluon: Triton's own loop waits for each wgmma whose sums are integers
before it begins the next.

Not in the reference: its values are those of fake quantization. It gives what `int8_training.multiply` gives.

A program holds a tile of results and takes tile after tile. Its operands come by TMA into a ring of buffers; of two
wgmma in a row the second begins before the first has ended, and the buffer of the first is filled anew while the second
runs. The next tile's first operands are under way while a tile's results are scaled and stored.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .fake_quantize import on_device

ROWS, COLUMNS, DEPTH, RING, WARPS = 128, 256, 128, 3, 8  # 144 KiB of operands and 32 of results; 128 sums a thread


@gluon.jit
def find_tile(tile, down, across, BM: gl.constexpr, BN: gl.constexpr):  # type: ignore[no-untyped-def]
    """The first row and column of a tile, 8 rows of tiles by columns: neighbours share operands, which stay in L2."""
    band = tile // (8 * across) * 8
    height = gl.minimum(down - band, 8)
    return (band + tile % (8 * across) % height) * BM, tile % (8 * across) // height * BN


@gluon.jit
def load(  # type: ignore[no-untyped-def]
    a, b, a_ring, b_ring, full, count, tile, k, top, left, tiles, down, across, depth,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Begins to load, as number `count`, part k of a tile's operands, if there is such a tile; the next number, tile,
    part, row and column."""
    slot, there = count % RING, tile < tiles
    bar = full.index(slot)
    mbarrier.expect(bar, (BM + BN) * BK, pred=there)
    tma.async_copy_global_to_shared(a, [top, k * BK], bar, a_ring.index(slot), pred=there)
    tma.async_copy_global_to_shared(b, [left, k * BK], bar, b_ring.index(slot), pred=there)
    k += 1
    if k == depth:
        k = 0
        tile += gl.num_programs(0)
        top, left = find_tile(tile, down, across, BM, BN)
    return count + 1, tile, k, top, left


@gluon.jit
def _multiply(  # type: ignore[no-untyped-def]
    a, b, a_scale, b_scale, bias, out, M, N, K,
    BIAS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, RING: gl.constexpr, SPAN: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Tiles of s_a s_b^T (a b^T) + bias, of descriptors of codes (M, K) and (N, K), which give 0 outside. SPAN: columns
    of a wgmma."""
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, SPAN, 32])
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [num_warps, 1], [1, 0])
    a_ring = gl.allocate_shared_memory(gl.int8, [RING, BM, BK], a.layout)
    b_ring = gl.allocate_shared_memory(gl.int8, [RING, BN, BK], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)

    down, across, depth = gl.cdiv(M, BM), gl.cdiv(N, BN), gl.cdiv(K, BK)
    tiles = down * across
    tile = gl.program_id(0)
    top, left = find_tile(tile, down, across, BM, BN)
    count, later, k, next_top, next_left = 0, tile, 0, top, left
    for i in gl.static_range(RING - 1):  # noqa: B007
        count, later, k, next_top, next_left = load(
            a, b, a_ring, b_ring, full, count, later, k, next_top, next_left, tiles, down, across, depth,
            BM, BN, BK, RING,
        )  # fmt: skip

    used = 0
    while tile < tiles:
        top, left = find_tile(tile, down, across, BM, BN)
        sums = gl.zeros((BM, BN), gl.int32, sums_layout)
        for _ in range(depth):
            slot = used % RING
            mbarrier.wait(full.index(slot), used // RING & 1)
            sums = warpgroup_mma(a_ring.index(slot), b_ring.index(slot).permute((1, 0)), sums, is_async=True)
            sums = warpgroup_mma_wait(num_outstanding=1, deps=(sums,))
            used += 1
            count, later, k, next_top, next_left = load(  # where the product before this one has ended
                a, b, a_ring, b_ring, full, count, later, k, next_top, next_left, tiles, down, across, depth,
                BM, BN, BK, RING,
            )  # fmt: skip
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        row = top + gl.arange(0, BM, gl.SliceLayout(1, sums_layout))
        column = left + gl.arange(0, BN, gl.SliceLayout(0, sums_layout))
        y = sums.to(gl.float32) * gl.load(a_scale + row, mask=row < M, other=0.0)[:, None]
        y = y * gl.load(b_scale + column, mask=column < N, other=0.0)[None, :]
        if BIAS:
            y = y + gl.load(bias + column, mask=column < N, other=0.0).to(gl.float32)[None, :]
        y = gl.convert_layout(y.to(out.dtype.element_ty), store_layout)
        row = top + gl.arange(0, BM, gl.SliceLayout(1, store_layout))
        column = left + gl.arange(0, BN, gl.SliceLayout(0, store_layout))
        at = out + row.to(gl.int64)[:, None] * N + column[None, :]
        gl.store(at, y, mask=(row < M)[:, None] & (column < N)[None, :])
        tile += gl.num_programs(0)


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, kind: torch.dtype, ring: int = RING
) -> Tensor:
    """s_a s_b^T (a b^T) + bias: codes (M, K) and (N, K), K a multiple of 16, scales (M, 1) and (N, 1), bias (N,) ->
    (M, N) of `kind`, computed in float32. On a GPU of capability 9."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=kind, device=a.device)
    layouts = [gl.NVMMASharedLayout.get_default_for([side, DEPTH], gl.int8) for side in (ROWS, COLUMNS)]
    tiles = triton.cdiv(m, ROWS) * triton.cdiv(n, COLUMNS)
    with on_device(a):
        _multiply[(min(tiles, torch.cuda.get_device_properties(a.device).multi_processor_count),)](
            TensorDescriptor.from_tensor(a, [ROWS, DEPTH], layouts[0]),
            TensorDescriptor.from_tensor(b, [COLUMNS, DEPTH], layouts[1]),
            a_scale, b_scale, bias, out, m, n, k,
            BIAS=bias is not None, BM=ROWS, BN=COLUMNS, BK=DEPTH, RING=ring, SPAN=128,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out
