"""Attention's gradient: tiles are computed again, in one order everywhere, so that every run has the same bits.

Not in the reference: its tape has the probabilities.

With s the scores, p = softmax(s), y = clip(span p + gamma, 0, 1), a = d y (d dropout's 0 or 1 / (1 - rate)), O = a V
and r the gradient of O:

    dp_ij = span c_ij d_ij r_i . V_j     c_ij: 1 where nothing is clipped, else 0
    ds_ij = p_ij (dp_ij - D_i)           D_i = sum_j p_ij dp_ij
    dQ_i = factor sum_j ds_ij K_j        dK_j = factor sum_i ds_ij Q_i        dV_j = sum_i a_ij r_i

D_i would take a pass over the row of its own, but that span p = y - gamma wherever c is 1:

    D_i = r_i . sum_j c_ij d_ij (y_ij - gamma) V_j = r_i . (O_i - gamma U_i - W_i) = r_i . E_i
    U_i = sum_j c_ij d_ij V_j            W_i = sum of d_ij V_j over keys clipped to 1; those clipped to 0 have y = 0

The forward kernel keeps E, summed up as span sum_j c_ij d_ij p_ij V_j, in which no terms cancel. Without a clip it is
O, and D_i = r_i . O_i as in FlashAttention-2 (Dao 2023, eq. 4), with dropout too. Where probabilities are quantized, a
holds codes, c is 0 also where a code is clamped (straight through), and E is still what it was: of p, not of codes.
Scores that are quantized pass ds where their code is not clamped. A sink's probability, 2^(t - l), multiplies nothing:
dt = -sum of 2^(t - l) D over its head's queries. A gate g of the row makes g O: r = g times the output's gradient, and
dg = that gradient . O.

Floors: dQ 3 and dK, dV 4 products of T^2 K pairs, 14 T^2 K operations over the tensor cores' rate; bytes as forward's
twice; 2 T^2 powers of 2.
"""

import triton
from triton import language as tl

from .attention_tiles import NUMBERS, find_place, find_seen, keep_tile, load_lines, make_scores, shape_probability


@triton.jit
def weigh_rows(  # type: ignore[no-untyped-def]
    slope, passed, context, gate, delta, d_gate, slope_batch, slope_head, slope_line, gate_batch, gate_line,
    heads, queries, GATED: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """D (B, H, Tq) and the gate's gradient (B, Tq, H) of M rows of a head; slope is the output's gradient."""
    block, pair = find_place(queries, M)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    i, column = block * M + tl.arange(0, M), tl.arange(0, BK)
    there = i < queries
    inside = there[:, None] & (column < K)[None, :]
    at = b * slope_batch + h * slope_head + i.to(tl.int64)[:, None] * slope_line + column[None, :]
    r = tl.load(slope + at, mask=inside, other=0.0).to(tl.float32)
    at = (b * queries * heads + h) * K + i.to(tl.int64)[:, None] * (heads * K) + column[None, :]
    row = tl.sum(r * tl.load(passed + at, mask=inside, other=0.0).to(tl.float32), 1)
    if GATED:
        opening = tl.load(gate + b * gate_batch + i.to(tl.int64) * gate_line + h, mask=there, other=0.0).to(tl.float32)
        row *= opening
        found = tl.sum(r * tl.load(context + at, mask=inside, other=0.0).to(tl.float32), 1)
        tl.store(d_gate + (b * queries + i) * heads + h, found.to(d_gate.dtype.element_ty), mask=there)
    tl.store(delta + pair.to(tl.int64) * queries + i, row, mask=there)


@triton.jit
def _query_tiles(  # type: ignore[no-untyped-def]
    dq, q, r, k, v, k_line, v_line, i, column, later, keys, rows, factor, unit, logs, delta, gamma, span, weight,
    coder, s_low, s_high, p_low, p_high, line, seed, step, place, most, begin, end,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CLIP: tl.constexpr, TOP: tl.constexpr, DROP: tl.constexpr,
    FOURS: tl.constexpr, SCORES: tl.constexpr, PROBS: tl.constexpr, WHOLE: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dQ / factor with the keys begin to end."""
    for start in range(begin, end, N):
        j = start + tl.arange(0, N)
        at = k + j[None, :] * k_line + column[:, None]
        kt = load_lines(at, j[None, :], keys, column[:, None], K, BK, WHOLE)  # (K, N)
        at = v + j[None, :] * v_line + column[:, None]
        vt = load_lines(at, j[None, :], keys, column[:, None], K, BK, WHOLE)
        s, open_s = make_scores(tl.dot(q, kt, input_precision="ieee"), factor, coder, s_low, s_high, SCORES)
        if not WHOLE:
            s = tl.where(find_seen(i[:, None], j[None, :], later, keys, rows, CAUSAL, PADDED), s, float("-inf"))
        p = tl.exp2(s * unit - logs[:, None])
        _, passes = shape_probability(p, gamma, span, coder, p_low, p_high, CLIP, TOP, PROBS)
        if DROP:
            passes = passes & keep_tile(line, start, seed, step, place, most, FOURS, M, N)
        pull = tl.dot(r, vt, input_precision="ieee") * weight - delta[:, None]
        if CLIP or DROP or PROBS:
            pull = tl.where(passes, pull, -delta[:, None])
        ds = p * pull
        if SCORES:
            ds = tl.where(open_s, ds, 0.0)
        dq = tl.dot(ds.to(kt.dtype), tl.trans(kt), dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=NUMBERS)
def find_query_slopes(  # type: ignore[no-untyped-def]
    q, k, v, slope, dq, logs_in, delta_in, gammas_in, rows, gate, coder, address,
    q_batch, q_head, q_line, k_batch, k_head, k_line, v_batch, v_head, v_line,
    slope_batch, slope_head, slope_line, rows_batch, gate_batch, gate_line,
    heads, queries, keys, factor, unit, gamma, zeta, share, s_low, s_high, p_low, p_high,
    seed, step, place, most, first,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CLIP: tl.constexpr, TOP: tl.constexpr, BY_ROW: tl.constexpr,
    DROP: tl.constexpr, FOURS: tl.constexpr, STORED: tl.constexpr, GATED: tl.constexpr, SCORES: tl.constexpr,
    PROBS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dQ (B, Tq, H, K) of M queries of a head; factor is 1 / sqrt(K)."""
    block, pair = find_place(queries, M)
    block = tl.cdiv(queries, M) - 1 - block  # where causal, those with most keys begin first
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    i, column = block * M + tl.arange(0, M), tl.arange(0, BK)
    later, there = keys - queries, i < queries
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    if PADDED:
        rows += b * rows_batch
    far = i.to(tl.int64)[:, None]
    at = q + b * q_batch + h * q_head + far * q_line + column[None, :]
    q_tile = load_lines(at, i[:, None], queries, column[None, :], K, BK, False)
    at = slope + b * slope_batch + h * slope_head + far * slope_line + column[None, :]
    r = load_lines(at, i[:, None], queries, column[None, :], K, BK, False)
    row = pair.to(tl.int64) * queries + i
    logs = tl.load(logs_in + row, mask=there, other=float("inf"))
    delta = tl.load(delta_in + row, mask=there, other=0.0)
    lower = tl.load(gammas_in + row, mask=there, other=0.0)[:, None] if BY_ROW else gamma
    span = zeta - lower
    weight = span * share
    if GATED:
        opening = tl.load(gate + b * gate_batch + i.to(tl.int64) * gate_line + h, mask=there, other=0.0)
        weight *= opening.to(tl.float32)[:, None]
    if DROP and STORED:
        step, first = tl.load(address), tl.load(address + 1)
    line = row * keys + first

    end, whole = keys, keys // N * N  # before `whole`, tiles of keys that all the queries see
    if CAUSAL:
        end = tl.minimum(keys, tl.maximum((block + 1) * M + later, 0))
        whole = tl.maximum(tl.minimum(keys, block * M + later + 1), 0) // N * N
    if PADDED:
        whole = 0
    grad = tl.zeros((M, BK), tl.float32)
    grad = _query_tiles(
        grad, q_tile, r, k, v, k_line, v_line, i, column, later, keys, rows, factor, unit, logs, delta, lower, span,
        weight, coder, s_low, s_high, p_low, p_high, line, seed, step, place, most, 0, whole,
        CAUSAL, PADDED, CLIP, TOP, DROP, FOURS, SCORES, PROBS, True, K, BK, M, N,
    )  # fmt: skip
    grad = _query_tiles(
        grad, q_tile, r, k, v, k_line, v_line, i, column, later, keys, rows, factor, unit, logs, delta, lower, span,
        weight, coder, s_low, s_high, p_low, p_high, line, seed, step, place, most, whole, end,
        CAUSAL, PADDED, CLIP, TOP, DROP, FOURS, SCORES, PROBS, False, K, BK, M, N,
    )  # fmt: skip
    at = dq + (b * queries * heads + h) * K + far * (heads * K) + column[None, :]
    tl.store(at, (grad * factor).to(dq.dtype.element_ty), mask=there[:, None] & (column < K)[None, :])


@triton.jit
def _key_tiles(  # type: ignore[no-untyped-def]
    dk, dv, k, v, q, slope, q_line, slope_line, j, start, column, later, queries, keys, factor, unit, pair,
    logs_in, delta_in, gammas_in, gate, gate_line, gamma, zeta, share,
    coder, s_low, s_high, p_low, p_high, first, seed, step, place, most, begin, end,
    CAUSAL: tl.constexpr, CLIP: tl.constexpr, TOP: tl.constexpr, BY_ROW: tl.constexpr, DROP: tl.constexpr,
    FOURS: tl.constexpr, GATED: tl.constexpr, SCORES: tl.constexpr, PROBS: tl.constexpr, HIDE: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dK / factor and dV (of codes, before dropout's share) with the queries begin to end; tiles are keys times
    queries. HIDE: some keys may lie after their query."""
    for query in range(begin, end, M):
        i = query + tl.arange(0, M)
        there = i < queries
        at = q + i[:, None] * q_line + column[None, :]
        lines = load_lines(at, i[:, None], queries, column[None, :], K, BK, False)  # (M, K)
        at = slope + i[:, None] * slope_line + column[None, :]
        r = load_lines(at, i[:, None], queries, column[None, :], K, BK, False)
        row = pair.to(tl.int64) * queries + i
        logs = tl.load(logs_in + row, mask=there, other=float("inf"))
        delta = tl.load(delta_in + row, mask=there, other=0.0)
        s, open_s = make_scores(
            tl.dot(k, tl.trans(lines), input_precision="ieee"), factor, coder, s_low, s_high, SCORES
        )
        if HIDE:
            s = tl.where(j[:, None] <= i[None, :] + later, s, float("-inf"))
        p = tl.exp2(s * unit - logs[None, :])  # (N, M); 0 at queries that are not there
        lower = tl.load(gammas_in + row, mask=there, other=0.0)[None, :] if BY_ROW else gamma
        span = zeta - lower
        y, passes = shape_probability(p, lower, span, coder, p_low, p_high, CLIP, TOP, PROBS)
        if DROP:
            keep = tl.trans(keep_tile(row * keys + first, start, seed, step, place, most, FOURS, M, N))
            y, passes = tl.where(keep, y, 0.0), passes & keep
        weight = span * share
        if GATED:
            opening = tl.load(gate + i.to(tl.int64) * gate_line, mask=there, other=0.0).to(tl.float32)[None, :]
            weight, y = weight * opening, y * opening
        dv = tl.dot(y.to(r.dtype), r, dv, input_precision="ieee")
        pull = tl.dot(v, tl.trans(r), input_precision="ieee") * weight - delta[None, :]
        if CLIP or DROP or PROBS:
            pull = tl.where(passes, pull, -delta[None, :])
        ds = p * pull
        if SCORES:
            ds = tl.where(open_s, ds, 0.0)
        dk = tl.dot(ds.to(lines.dtype), lines, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=NUMBERS)
def find_key_slopes(  # type: ignore[no-untyped-def]
    q, k, v, slope, dk, dv, logs_in, delta_in, gammas_in, rows, gate, coder, address,
    q_batch, q_head, q_line, k_batch, k_head, k_line, v_batch, v_head, v_line,
    slope_batch, slope_head, slope_line, rows_batch, gate_batch, gate_line,
    heads, queries, keys, factor, unit, gamma, zeta, share, s_low, s_high, p_low, p_high,
    seed, step, place, most, first,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CLIP: tl.constexpr, TOP: tl.constexpr, BY_ROW: tl.constexpr,
    DROP: tl.constexpr, FOURS: tl.constexpr, STORED: tl.constexpr, GATED: tl.constexpr, SCORES: tl.constexpr,
    PROBS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dK and dV (B, Tk, H, K) of N keys of a head. Keys that are padding are lines of the tile, set to 0 at the end."""
    block, pair = find_place(keys, N)
    start = block * N
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    j, column = start + tl.arange(0, N), tl.arange(0, BK)
    later, far = keys - queries, (start + tl.arange(0, N)).to(tl.int64)[:, None]
    at = k + b * k_batch + h * k_head + far * k_line + column[None, :]
    k_tile = load_lines(at, j[:, None], keys, column[None, :], K, BK, False)
    at = v + b * v_batch + h * v_head + far * v_line + column[None, :]
    v_tile = load_lines(at, j[:, None], keys, column[None, :], K, BK, False)
    q += b * q_batch + h * q_head
    slope += b * slope_batch + h * slope_head
    if GATED:
        gate += b * gate_batch + h
    if DROP and STORED:
        step, first = tl.load(address), tl.load(address + 1)

    begin, whole = 0, 0  # from `whole` on, queries that see all these keys
    if CAUSAL:
        begin = tl.maximum(start - later, 0) // M * M
        whole = tl.minimum((tl.maximum(start + N - 1 - later, 0) + M - 1) // M * M, (queries + M - 1) // M * M)
    dk_tile, dv_tile = tl.zeros((N, BK), tl.float32), tl.zeros((N, BK), tl.float32)
    if CAUSAL:
        dk_tile, dv_tile = _key_tiles(
            dk_tile, dv_tile, k_tile, v_tile, q, slope, q_line, slope_line, j, start, column, later, queries, keys,
            factor, unit, pair, logs_in, delta_in, gammas_in, gate, gate_line, gamma, zeta, share,
            coder, s_low, s_high, p_low, p_high, first, seed, step, place, most, begin, whole,
            CAUSAL, CLIP, TOP, BY_ROW, DROP, FOURS, GATED, SCORES, PROBS, True, K, BK, M, N,
        )  # fmt: skip
    dk_tile, dv_tile = _key_tiles(
        dk_tile, dv_tile, k_tile, v_tile, q, slope, q_line, slope_line, j, start, column, later, queries, keys,
        factor, unit, pair, logs_in, delta_in, gammas_in, gate, gate_line, gamma, zeta, share,
        coder, s_low, s_high, p_low, p_high, first, seed, step, place, most, whole, queries,
        CAUSAL, CLIP, TOP, BY_ROW, DROP, FOURS, GATED, SCORES, PROBS, False, K, BK, M, N,
    )  # fmt: skip
    dv_tile *= share
    if PROBS:
        dv_tile *= tl.load(coder + 2)
    if PADDED:
        real = (tl.load(rows + b * rows_batch + j, mask=j < keys, other=0) != 0)[:, None]
        dk_tile, dv_tile = tl.where(real, dk_tile, 0.0), tl.where(real, dv_tile, 0.0)
    at = (b * keys * heads + h) * K + far * (heads * K) + column[None, :]
    inside = (j < keys)[:, None] & (column < K)[None, :]
    tl.store(dk + at, (dk_tile * factor).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), mask=inside)
