"""Attention's kernels with their tiles, grids and what lies in memory between forward and backward.

Not in the reference: it has rows whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .attention_backward import find_key_slopes, find_query_slopes, weigh_rows
from .attention_forward import attend_forward
from .host import on_device

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    CAUSAL: bool
    PADDED: bool
    CLIP: bool
    TOP: bool  # zeta is above 1
    BY_ROW: bool
    SINK: int  # 1: a learned one by head, 2: a logit of 0
    DROP: bool
    FOURS: bool
    STORED: bool
    GATED: bool
    SCORES: bool
    PROBS: bool

    @property
    def split(self) -> bool:
        """Whether D needs E, which is not the result before the gate."""
        return self.CLIP or self.PROBS


@dataclass(frozen=True)
class Numbers:
    """What a kernel is called with, in this order."""

    factor: float  # 1 / sqrt(K)
    unit: float  # log2(e), times the factor that is not yet in scores
    gamma: float  # BY_ROW: times the keys of the row
    zeta: float
    share: float  # 1 / (1 - rate)
    s_low: float
    s_high: float
    p_low: float
    p_high: float
    seed: int
    step: int
    place: int
    most: int  # the largest word that drops
    first: int


@dataclass(frozen=True)
class Tile:
    """M queries by N keys of heads in BK columns; warps, and loads in flight."""

    M: int
    N: int
    BK: int
    num_warps: int
    num_stages: int


# by columns, then M, N, warps, stages: up to 128 the fastest of ten, with dropout of five, on an H200 (clipped,
# bfloat16, 4096 tokens); for 256 the largest of which ptxas spills next to nothing for sm_90
TILES = {
    "forward": {64: (64, 128, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)},
    "forward, dropout": {64: (64, 64, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)},
    "rows": {64: (64, 16, 4, 1), 128: (64, 16, 4, 1), 256: (32, 16, 4, 1)},
    "queries": {64: (64, 32, 4, 4), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
    "keys": {64: (128, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 64, 8, 2)},
    "keys, dropout": {64: (32, 64, 4, 3), 128: (32, 64, 4, 2), 256: (32, 32, 8, 2)},
}


@cache
def choose_tile(kernel: str, width: int, dtype: torch.dtype, queries: int, keys: int) -> Tile:
    """By a table and not by trying out, so that the first step begins at once. Four bytes, whose products the tensor
    cores do not take and which take twice the registers, have half of a tile's sides, 32 at most, and 8 warps."""
    columns = max(16, triton.next_power_of_2(width))
    m, n, warps, stages = TILES[kernel][max(64, columns)]
    if dtype == torch.float32:
        m, n, warps, stages = min(m // 2, 32), min(n // 2, 32), 8, 1
    m, n = (max(16, min(x, triton.next_power_of_2(count))) for x, count in ((m, queries), (n, keys)))
    return Tile(m, n, columns, warps, stages)


def launch(kernel: Any, programs: int, device: torch.device, *given: Any, **constants: Any) -> None:
    with on_device(device):
        kernel[(programs,)](*given, **constants)


def empty_heads(x: Tensor) -> Tensor:
    """An empty tensor like x (B, H, T, K) in the memory of (B, T, H, K), whose heads are merged by a view."""
    b, h, t, k = x.shape
    return torch.empty((b, t, h, k), dtype=x.dtype, device=x.device).transpose(1, 2)


def strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in (0, 1, 2)]


def row_strides(rows: Tensor | None, gate: Tensor | None) -> list[int]:
    return [0 if rows is None else rows.stride(0), *((0, 0) if gate is None else gate.stride()[:2])]


def make_results(q: Tensor, shape: Shape, train: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `run_forward` fills."""

    def rows(wanted: bool) -> Tensor:
        return q.new_empty(q.shape[:3] if train and wanted else (0,), dtype=torch.float32)

    context, passed = (empty_heads(q) if train and kept else q.new_empty(0) for kept in (shape.GATED, shape.split))
    return empty_heads(q), context, passed, rows(True), rows(shape.BY_ROW)


def make_slopes(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `run_backward` fills."""
    d_sink = q.new_empty(0) if sink is None else torch.empty_like(sink)  # (H,)
    d_gate = q.new_empty(0) if gate is None else gate.new_empty(gate.shape)  # (B, Tq, H)
    return empty_heads(q), empty_heads(k), empty_heads(v), d_sink, d_gate


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    gate: Tensor | None,
    rows: Tensor | None,
    coder: Tensor | None,
    address: Tensor | None,
    flags: list[int],
    numbers: list[float],
    words: list[int],
    train: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output (B, H, Tq, K), and where `train` what the gradient needs: the rows before the gate, E, l, and gamma
    by row; empty tensors in place of what it does not. flags: a `Shape`; numbers and words: `Numbers`."""
    shape, (b, h, t, width), keys = Shape(*flags), q.shape, k.shape[2]
    out, context, passed, logs, gammas = make_results(q, shape, train)
    tile = choose_tile("forward, dropout" if shape.DROP else "forward", width, q.dtype, t, keys)
    given = (q, k, v, out, context, passed, logs, gammas, rows, sink, gate, coder, address)
    steps = (*strides(q, k, v), *row_strides(rows, gate), h, t, keys)
    constants = {**vars(shape), "K": width, "TRAIN": train, **vars(tile)}
    launch(attend_forward, triton.cdiv(t, tile.M) * b * h, q.device, *given, *steps, *numbers, *words, **constants)
    return out, context, passed, logs, gammas


def run_backward(
    slope: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    gate: Tensor | None,
    rows: Tensor | None,
    coder: Tensor | None,
    address: Tensor | None,
    context: Tensor,
    passed: Tensor,
    logs: Tensor,
    gammas: Tensor,
    flags: list[int],
    numbers: list[float],
    words: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, sink and gate, of the last two an empty tensor where there is none; slope (B, H, Tq, K) is
    the output's."""
    shape, (b, h, t, width), keys = Shape(*flags), q.shape, k.shape[2]
    delta = torch.empty_like(logs)
    dq, dk, dv, d_sink, d_gate = make_slopes(q, k, v, sink, gate)
    tile = choose_tile("rows", width, q.dtype, t, keys)
    given = (slope, passed, context, gate, delta, d_gate, *strides(slope), *row_strides(rows, gate)[1:], h, t)
    own = {"GATED": shape.GATED, "K": width, "BK": tile.BK, "M": tile.M, "num_warps": tile.num_warps}
    launch(weigh_rows, triton.cdiv(t, tile.M) * b * h, q.device, *given, **own)
    constants = {name: flag for name, flag in vars(shape).items() if name != "SINK"}
    steps = (*strides(q, k, v, slope), *row_strides(rows, gate), h, t, keys)
    given = (logs, delta, gammas, rows, gate, coder, address, *steps, *numbers, *words)
    tile = choose_tile("queries", width, q.dtype, t, keys)
    programs = triton.cdiv(t, tile.M) * b * h
    launch(find_query_slopes, programs, q.device, q, k, v, slope, dq, *given, **constants, K=width, **vars(tile))
    tile = choose_tile("keys, dropout" if shape.DROP else "keys", width, q.dtype, t, keys)
    programs = triton.cdiv(keys, tile.N) * b * h
    launch(find_key_slopes, programs, q.device, q, k, v, slope, dk, dv, *given, **constants, K=width, **vars(tile))
    if sink is not None:  # of a row without keys D is 0
        taken = torch.exp2(sink.float()[:, None] * LOG2E - logs)
        d_sink.copy_(-(taken * delta).sum(dim=(0, 2), dtype=torch.float64))
    return dq, dk, dv, d_sink, d_gate


# as the compiler knows them: by the shapes of what they return
forward_op = torch.library.custom_op("qtx::attend_forward", run_forward, mutates_args=())
backward_op = torch.library.custom_op("qtx::attend_backward", run_backward, mutates_args=())


@forward_op.register_fake
def _(q, k, v, sink, gate, rows, coder, address, flags, numbers, words, train):  # type: ignore[no-untyped-def]
    return make_results(q, Shape(*flags), train)


@backward_op.register_fake
def _(slope, q, k, v, sink, gate, *rest):  # type: ignore[no-untyped-def]
    return make_slopes(q, k, v, sink, gate)
