"""Attention on a GPU without a tensor of queries times keys: any softmax, dropout, a gate, quantized probabilities.

Not in the reference: it has rows whole.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtx_ref.spec import AttentionSpec, Softmax

from .. import random
from ..attention import Drop
from ..ops import own
from .attention_backward import find_key_slopes, find_query_slopes, weigh_rows
from .attention_forward import attend_forward

LOG2E = math.log2(math.e)
WIDEST = 256  # columns of a head
FARTHEST = 2**31  # elements of a head's lines, addressed in 32 bits


@dataclass(frozen=True)
class Codes:
    """A static quantizer of one range under QTX: scale (float32) and zero point of one element, and the limits of
    codes."""

    scale: Tensor
    zero_point: Tensor
    code_min: int
    code_max: int


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for."""

    CAUSAL: bool
    PADDED: bool
    CLIP: bool
    BY_ROW: bool
    SINK: int  # 1: a learned one by head, 2: a logit of 0
    DROP: bool
    FOURS: bool
    STORED: bool
    GATED: bool
    SCORES: bool
    PROBS: bool
    K: int

    @property
    def split(self) -> bool:
        """Whether the gradient needs more of the forward pass than its result."""
        return self.CLIP or self.PROBS


@dataclass(frozen=True)
class Numbers:
    """What a kernel is called with, in this order."""

    factor: float  # of scores, in units of log2 (quantized: as they are)
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


# by kernel and columns of 16 bits; four bytes take their products without tensor cores, and half of a tile
TILES = {
    "forward": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "rows": {64: (64, 1, 4, 1), 128: (64, 1, 4, 1), 256: (32, 1, 4, 1)},
    "queries": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    "keys": {64: (64, 128, 8, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
}


def choose_tile(kernel: str, width: int, dtype: torch.dtype, longest: int) -> Tile:
    """By a table and not by trying out, so that the first step begins at once; `longest`: of queries and keys."""
    columns = max(16, triton.next_power_of_2(width))
    m, n, warps, stages = TILES[kernel][max(64, columns)]
    if dtype == torch.float32:
        m, n, stages = max(16, m // 2), max(16, n // 2), 1
    most = max(16, triton.next_power_of_2(longest))
    return Tile(min(m, most), min(n, most), columns, warps, stages)


@dataclass(frozen=True)
class Plan:
    """One call: everything but its tensors."""

    shape: Shape
    numbers: Numbers


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    causal: bool,
    spec: AttentionSpec,
    sink: Tensor | None = None,
    drop: Drop | None = None,
    gate: Tensor | None = None,
    scores: Codes | None = None,
    probs: Codes | None = None,
) -> Tensor:
    """gate * dropout(probabilities(q k^T / sqrt(K))) v: q (B, H, Tq, K), k and v (B, H, Tk, K), float32, bfloat16 or
    float16 -> (B, H, Tq, K) in their dtype, in the memory of (B, Tq, H, K).

    rows (B, Tk) is true at real keys, None where all are; causal: the queries are the last of the keys' positions.
    sink (H,) belongs to `Softmax.SINK`; gate (B, Tq, H) multiplies rows of heads; scores and probs are quantized as
    `FakeQuant` does it, before mask and dropout. Queries without keys give zeros, whatever the softmax.

    Sums, scores and probabilities are float32; products of 16 bits take probabilities rounded to that. A row whose
    scores are all -infinity counts as one without keys. Raises ValueError for another dtype, or heads above 256.
    """
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ValueError(f"attention of {dtypes}: give q, k and v one of float32, bfloat16 and float16")
    if q.shape[-1] > WIDEST:
        raise ValueError(f"attention heads of {q.shape[-1]} columns: a tile holds {WIDEST}")
    plan, address = _plan(q, k, rows, causal, spec, drop, gate, scores, probs)
    if sink is not None and spec.softmax is not Softmax.SINK:
        raise ValueError(f"attention sink with {spec.softmax}: it belongs to {Softmax.SINK}")
    coder = None
    if scores is not None or probs is not None:
        ends = [(1.0, 0) if codes is None else (codes.scale, codes.zero_point) for codes in (scores, probs)]
        numbers = [torch.as_tensor(x, device=q.device).reshape(()).float() for pair in ends for x in pair]
        coder = torch.stack(numbers)  # (4,)
    return Attend.apply(q, k, v, sink, gate, rows, coder, address, plan)


def _plan(
    q: Tensor,
    k: Tensor,
    rows: Tensor | None,
    causal: bool,
    spec: AttentionSpec,
    drop: Drop | None,
    gate: Tensor | None,
    scores: Codes | None,
    probs: Codes | None,
) -> tuple[Plan, Tensor | None]:
    """The call, and where its step and first word are stored if they are tensors."""
    by_row = spec.softmax is Softmax.CLIPPED_ROW
    gamma = spec.gamma
    if by_row:
        assert spec.alpha is not None  # the spec has checked it
        gamma = -spec.alpha
    words: dict[str, int] = {"seed": 0, "step": 0, "place": 0, "most": 0, "first": 0}
    share, address, fours, drops = 1.0, None, False, False
    if drop is not None:
        share, dropped = 1 / (1 - drop.rate), round(drop.rate * 2**32)
        drops = dropped > 0
        words |= {"seed": drop.seed - (drop.seed >> 63 << 64), "place": random.number_site(drop.site)}
        words |= {"most": dropped - 1}
        if isinstance(drop.step, Tensor) or isinstance(drop.first, Tensor):
            address = torch.stack([torch.as_tensor(x, device=q.device) for x in (drop.step, drop.first)])  # (2,)
        else:
            words |= {"step": drop.step, "first": drop.first}
            fours = drop.first % 4 == 0 and k.shape[2] % 4 == 0
    shape = Shape(
        CAUSAL=causal and q.shape[2] > 1,
        PADDED=rows is not None,
        CLIP=by_row or spec.softmax is Softmax.CLIPPED,
        BY_ROW=by_row,
        SINK={Softmax.SINK: 1, Softmax.PLUS_ONE: 2}.get(spec.softmax, 0),
        DROP=drops,
        FOURS=fours,
        STORED=address is not None,
        GATED=gate is not None,
        SCORES=scores is not None,
        PROBS=probs is not None,
        K=q.shape[-1],
    )
    limits = [float(x) for codes in (scores, probs) for x in ((codes.code_min, codes.code_max) if codes else (0, 0))]
    factor = q.shape[-1] ** -0.5 * (LOG2E if scores is None else 1.0)
    return Plan(shape, Numbers(factor, float(gamma), float(spec.zeta), share, *limits, **words)), address


class Attend(torch.autograd.Function):
    """`attend` as one node, which keeps q, k, v and rows of K and of 1."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        gate: Tensor | None,
        rows: Tensor | None,
        coder: Tensor | None,
        address: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        q, k, v, rows, gate = (_align(x) for x in (q, k, v, rows, gate))
        out, *kept = launch_forward(q, k, v, sink, gate, rows, coder, address, plan, any(ctx.needs_input_grad))
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, sink, gate, rows, coder, address, *kept)
        return own(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:
        return (*launch_backward(_align(slope), *ctx.saved_tensors, ctx.plan), None, None, None, None)


def _align(x: Tensor | None) -> Tensor | None:
    """x, or a copy whose last axis is contiguous and whose heads are addressed in 32 bits."""
    near = x is None or (x.stride(-1) == 1 and (x.ndim < 4 or x.shape[2] * x.stride(2) < FARTHEST))
    return x if near else x.contiguous()


def _rows_of_heads(x: Tensor) -> Tensor:
    """An empty tensor like x (B, H, T, K) in the memory of (B, T, H, K), where to merge heads is to look otherwise."""
    b, h, t, k = x.shape
    return torch.empty((b, t, h, k), dtype=x.dtype, device=x.device).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in (0, 1, 2)]


def _row_strides(rows: Tensor | None, gate: Tensor | None) -> list[int]:
    return [0 if rows is None else rows.stride(0), *((0, 0) if gate is None else gate.stride()[:2])]


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    gate: Tensor | None,
    rows: Tensor | None,
    coder: Tensor | None,
    address: Tensor | None,
    plan: Plan,
    train: bool,
) -> tuple[Tensor | None, ...]:
    """The output and, where `train`, what the gradient needs of this pass: the rows before the gate, those of E, l, and
    gamma by row; None what it does not."""
    shape, (b, h, t, width) = plan.shape, q.shape
    out = _rows_of_heads(q)
    context = _rows_of_heads(q) if train and shape.GATED else None
    passed = _rows_of_heads(q) if train and shape.split else None
    logs = q.new_empty((b, h, t), dtype=torch.float32) if train else None
    gammas = torch.empty_like(logs) if train and shape.BY_ROW else None
    tile = choose_tile("forward", width, q.dtype, max(t, k.shape[2]))
    launch(
        attend_forward, (triton.cdiv(t, tile.M), b * h), q.device,
        q, k, v, out, context, passed, logs, gammas, rows, sink, gate, coder, address,
        *_strides(q, k, v), *_row_strides(rows, gate), h, t, k.shape[2], *astuple(plan.numbers),
        **asdict(shape), TRAIN=train, **asdict(tile),
    )  # fmt: skip
    if train and passed is None:
        passed = out if context is None else context
    return out, context, passed, logs, gammas


def launch_backward(
    slope: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    gate: Tensor | None,
    rows: Tensor | None,
    coder: Tensor | None,
    address: Tensor | None,
    context: Tensor | None,
    passed: Tensor,
    logs: Tensor,
    gammas: Tensor | None,
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, sink and gate; slope (B, H, Tq, K) is the output's."""
    shape, (b, h, t, width), keys = plan.shape, q.shape, k.shape[2]
    delta = torch.empty_like(logs)
    d_gate = None if gate is None else torch.empty((b, t, h), dtype=gate.dtype, device=q.device)
    tile = choose_tile("rows", width, q.dtype, t)
    launch(
        weigh_rows, (triton.cdiv(t, tile.M), b * h), q.device,
        slope, passed, context, gate, delta, d_gate, *_strides(slope), *_row_strides(rows, gate)[1:], h, t,
        GATED=shape.GATED, K=width, BK=tile.BK, M=tile.M, num_warps=tile.num_warps,
    )  # fmt: skip
    dq, dk, dv = (_rows_of_heads(x) for x in (q, k, v))
    constants = asdict(shape)
    del constants["SINK"]
    strides = (*_strides(q, k, v, slope), *_row_strides(rows, gate))
    factor, *rest = astuple(plan.numbers)
    numbers = (h, t, keys, factor, width**-0.5, *rest)
    beside = (logs, delta, gammas, rows, gate, coder, address)
    tile = choose_tile("queries", width, q.dtype, max(t, keys))
    grid = triton.cdiv(t, tile.M), b * h
    launch(
        find_query_slopes, grid, q.device, q, k, v, slope, dq, *beside, *strides, *numbers, **constants, **asdict(tile)
    )
    tile = choose_tile("keys", width, q.dtype, max(t, keys))
    grid = triton.cdiv(keys, tile.N), b * h
    launch(
        find_key_slopes, grid, q.device, q, k, v, slope, dk, dv, *beside, *strides, *numbers, **constants,
        **asdict(tile),
    )  # fmt: skip
    d_sink = None
    if sink is not None:  # (H,); of rows without keys D is 0
        taken = torch.exp2(sink.float()[:, None] * LOG2E - logs)
        d_sink = -(taken * delta).sum(dim=(0, 2), dtype=torch.float64).to(sink.dtype)
    return dq, dk, dv, d_sink, d_gate


def launch(kernel: Any, grid: tuple[int, int], device: torch.device, *given: Any, **constants: Any) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*given, **constants)
