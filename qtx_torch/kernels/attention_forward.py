"""Attention's forward kernel: no tensor of queries times keys, whatever is done to probabilities.

Not in the reference: it has rows whole.

Two passes over the keys, for what is clipped or quantized is a probability, which needs its row's sum first:

    l_i = log2 sum_j 2^s_ij                          (online: Milakov and Gimelshein 2018), the sink's term in it
    O_i = sum_j d_ij clip(span p_ij + gamma) V_j     p_ij = 2^(s_ij - l_i), d_ij dropout's 0 or 1 / (1 - rate)
    E_i = span sum_j [not clipped] d_ij p_ij V_j     kept for the gradient (see `attention_backward`)

Floors, of T x T pairs of a head of K: 4 products, 8 T^2 K operations over the tensor cores' rate (3 and 6 where no
gradient is wanted); bytes 2 (3 + 2) T K once and 4 T K for each block of queries from the L2 cache; 2 T^2 powers of 2
over the special function units' rate (16 a cycle and multiprocessor: above K = 64 the products' is larger).
"""

import triton
from triton import language as tl

from .attention_tiles import NUMBERS, find_place, find_seen, keep_tile, load_lines, make_scores, shape_probability


@triton.jit
def _sum_up(  # type: ignore[no-untyped-def]
    top, total, count, q, k, k_line, i, column, later, keys, rows, factor, unit, coder, s_low, s_high, begin, end,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, BY_ROW: tl.constexpr, SCORES: tl.constexpr, WHOLE: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Rows' largest score (times unit), sum of 2^(s - largest) and number of keys, with the keys begin to end."""
    for start in range(begin, end, N):
        j = start + tl.arange(0, N)
        at = k + j[None, :] * k_line + column[:, None]
        kt = load_lines(at, j[None, :], keys, column[:, None], K, BK, WHOLE)  # (K, N)
        s, _ = make_scores(tl.dot(q, kt, input_precision="ieee"), factor, coder, s_low, s_high, SCORES)
        if not WHOLE:
            seen = find_seen(i[:, None], j[None, :], later, keys, rows, CAUSAL, PADDED)
            s = tl.where(seen, s, float("-inf"))
            if BY_ROW:
                count += tl.sum(seen.to(tl.int32), 1)
        elif BY_ROW:
            count += N
        higher = tl.maximum(top, tl.max(s, 1) * unit)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key yet
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s * unit - base[:, None]), 1)
        top = higher
    return top, total, count


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    context, passed, q, k, v, k_line, v_line, i, column, later, keys, rows, factor, unit, logs, gamma, zeta,
    coder, s_low, s_high, p_low, p_high, line, seed, step, place, most, begin, end,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CLIP: tl.constexpr, TOP: tl.constexpr, BY_ROW: tl.constexpr,
    DROP: tl.constexpr, FOURS: tl.constexpr, SCORES: tl.constexpr, PROBS: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """O and, where SPLIT, E / span, with the keys begin to end."""
    for start in range(begin, end, N):
        j = start + tl.arange(0, N)
        at = k + j[None, :] * k_line + column[:, None]
        kt = load_lines(at, j[None, :], keys, column[:, None], K, BK, WHOLE)  # (K, N)
        s, _ = make_scores(tl.dot(q, kt, input_precision="ieee"), factor, coder, s_low, s_high, SCORES)
        if not WHOLE:
            s = tl.where(find_seen(i[:, None], j[None, :], later, keys, rows, CAUSAL, PADDED), s, float("-inf"))
        p = tl.exp2(s * unit - logs[:, None])
        lower = gamma[:, None] if BY_ROW else gamma  # not before the loop: see where E is stored
        y, passes = shape_probability(p, lower, zeta - lower, coder, p_low, p_high, CLIP, TOP, PROBS)
        if DROP:
            keep = keep_tile(line, start, seed, step, place, most, FOURS, M, N)
            y, passes = tl.where(keep, y, 0.0), passes & keep
        lines = load_lines(v + j[:, None] * v_line + column[None, :], j[:, None], keys, column[None, :], K, BK, WHOLE)
        context = tl.dot(y.to(lines.dtype), lines, context, input_precision="ieee")
        if SPLIT:
            passed = tl.dot(tl.where(passes, p, 0.0).to(lines.dtype), lines, passed, input_precision="ieee")
    return context, passed


@triton.jit(do_not_specialize=NUMBERS)
def attend_forward(  # type: ignore[no-untyped-def]
    q, k, v, out, context_out, passed_out, logs_out, gammas_out, rows, sink, gate, coder, address,
    q_batch, q_head, q_line, k_batch, k_head, k_line, v_batch, v_head, v_line, rows_batch, gate_batch, gate_line,
    heads, queries, keys, factor, unit, gamma, zeta, share, s_low, s_high, p_low, p_high,
    seed, step, place, most, first,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CLIP: tl.constexpr, TOP: tl.constexpr, BY_ROW: tl.constexpr,
    SINK: tl.constexpr, DROP: tl.constexpr, FOURS: tl.constexpr, STORED: tl.constexpr, GATED: tl.constexpr,
    SCORES: tl.constexpr, PROBS: tl.constexpr, TRAIN: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One block of M queries of a head. out, context_out, passed_out (B, Tq, H, K); logs_out, gammas_out (B, H, Tq)."""
    SPLIT: tl.constexpr = TRAIN and (CLIP or PROBS)
    block, pair = find_place(queries, M)
    block = tl.cdiv(queries, M) - 1 - block  # where causal, those with most keys begin first
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    i, column = block * M + tl.arange(0, M), tl.arange(0, BK)
    later = keys - queries
    q += b * q_batch + h * q_head
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    if PADDED:
        rows += b * rows_batch
    q_tile = load_lines(
        q + i.to(tl.int64)[:, None] * q_line + column[None, :], i[:, None], queries, column[None, :], K, BK, False
    )

    end, whole = keys, keys // N * N  # before `whole`, tiles of keys that all the queries see
    if CAUSAL:
        end = tl.minimum(keys, tl.maximum((block + 1) * M + later, 0))
        whole = tl.maximum(tl.minimum(keys, block * M + later + 1), 0) // N * N
    if PADDED:
        whole = 0

    top, total, count = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32), tl.zeros((M,), tl.int32)
    top, total, count = _sum_up(
        top, total, count, q_tile, k, k_line, i, column, later, keys, rows, factor, unit, coder, s_low, s_high,
        0, whole, CAUSAL, PADDED, BY_ROW, SCORES, True, K, BK, M, N,
    )  # fmt: skip
    top, total, count = _sum_up(
        top, total, count, q_tile, k, k_line, i, column, later, keys, rows, factor, unit, coder, s_low, s_high,
        whole, end, CAUSAL, PADDED, BY_ROW, SCORES, False, K, BK, M, N,
    )  # fmt: skip
    if SINK != 0:  # one more logit: the learned one of this head, or 0
        logit = 0.0
        if SINK == 1:
            logit = tl.load(sink + h).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(top, logit)
        total = total * tl.exp2(top - higher) + tl.exp2(logit - higher)
        top = higher
    none = total == 0.0
    logs = tl.where(none, float("inf"), top + tl.log2(tl.where(none, 1.0, total)))  # no key: no probability
    lower = gamma / tl.maximum(count, 1).to(tl.float32) if BY_ROW else gamma

    row = pair.to(tl.int64) * queries + i
    if DROP and STORED:
        step, first = tl.load(address), tl.load(address + 1)
    line = row * keys + first
    context, passed = tl.zeros((M, BK), tl.float32), tl.zeros((M, BK), tl.float32)
    context, passed = _gather(
        context, passed, q_tile, k, v, k_line, v_line, i, column, later, keys, rows, factor, unit, logs, lower, zeta,
        coder, s_low, s_high, p_low, p_high, line, seed, step, place, most, 0, whole,
        CAUSAL, PADDED, CLIP, TOP, BY_ROW, DROP, FOURS, SCORES, PROBS, SPLIT, True, K, BK, M, N,
    )  # fmt: skip
    context, passed = _gather(
        context, passed, q_tile, k, v, k_line, v_line, i, column, later, keys, rows, factor, unit, logs, lower, zeta,
        coder, s_low, s_high, p_low, p_high, line, seed, step, place, most, whole, end,
        CAUSAL, PADDED, CLIP, TOP, BY_ROW, DROP, FOURS, SCORES, PROBS, SPLIT, False, K, BK, M, N,
    )  # fmt: skip

    there = i < queries
    context = tl.where((logs == logs)[:, None], context * share, float("nan"))  # a clip makes a number of NaN
    if PROBS:
        context *= tl.load(coder + 2)
    place_out = (b * queries * heads + h) * K + i.to(tl.int64)[:, None] * (heads * K) + column[None, :]
    inside = there[:, None] & (column < K)[None, :]
    if GATED:
        if TRAIN:
            tl.store(context_out + place_out, context.to(out.dtype.element_ty), mask=inside)
        opening = tl.load(gate + b * gate_batch + i.to(tl.int64) * gate_line + h, mask=there, other=0.0)
        context *= opening.to(tl.float32)[:, None]
    tl.store(out + place_out, context.to(out.dtype.element_ty), mask=inside)
    if TRAIN:
        tl.store(logs_out + row, logs, mask=there)
        if SPLIT:
            # by row, one tensor (M, 1) here and in the loop is more than Triton 3.6 sorts out where N is BK
            span = (zeta - lower)[:, None] if BY_ROW else zeta - lower
            tl.store(passed_out + place_out, (passed * (span * share)).to(out.dtype.element_ty), mask=inside)
        if BY_ROW:
            tl.store(gammas_out + row, lower, mask=there)
