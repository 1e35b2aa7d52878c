"""What the attention kernels do with one tile: M queries times N keys, or the same transposed.

Not in the reference: it has rows whole.

Scores are in units of log2: a probability is 2^(s - l), l the log2 of its row's sum, which a GPU has an instruction
for. What is said of a query or a key broadcasts to the tile, so that one function serves either orientation. Triton
compiles what follows a return too, so each has one, at its end.
"""

import triton
from triton import language as tl

# that are not looked at: a number that is 1 would be a constant, for which a kernel would be compiled again
NUMBERS = ("heads", "queries", "keys", "seed", "step", "place", "most", "first")


@triton.jit
def find_place(lines, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's block of lines, and its head, counted over the batch: all along the axis of a grid that is long."""
    blocks = tl.cdiv(lines, BLOCK)
    return tl.program_id(0) % blocks, tl.program_id(0) // blocks


@triton.jit
def load_lines(at, line, lines, column, K: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of heads of K columns in BK, 0 where there is none; WHOLE: all its lines are there."""
    if WHOLE and K == BK:
        tile = tl.load(at)
    elif WHOLE:
        tile = tl.load(at, mask=column < K, other=0.0)
    elif K == BK:
        tile = tl.load(at, mask=line < lines, other=0.0)
    else:
        tile = tl.load(at, mask=(line < lines) & (column < K), other=0.0)
    return tile


@triton.jit
def find_seen(i, j, later, keys, rows, CAUSAL: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which keys j queries i may attend to. The first query stands at position `later`; rows points at the sequence's
    mask of real keys."""
    seen = j < keys
    if CAUSAL:
        seen = seen & (j <= i + later)
    if PADDED:
        seen = seen & (tl.load(rows + j, mask=j < keys, other=0) != 0)
    return seen


@triton.jit
def keep_tile(  # type: ignore[no-untyped-def]
    line, start, seed, step, place, most, FOURS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """`random.keep_mask` of M queries and the N keys from `start`, (M, N): a word above `most` keeps its element.

    line (M,) int64: the word of each query and key 0. FOURS: those, and `start`, are multiples of 4, so that the four
    words of each Philox stand side by side; else each element takes one of its four.
    """
    number, site, limit = step.to(tl.uint32), place.to(tl.uint32), most.to(tl.uint32)
    if FOURS:
        counter = (line >> 2)[:, None] + (start // 4 + tl.arange(0, N // 4))[None, :]
        zero = tl.zeros((M, N // 4), tl.uint32)
    else:
        element = line[:, None] + (start + tl.arange(0, N))[None, :]
        counter = element >> 2
        zero = tl.zeros((M, N), tl.uint32)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, zero + number, zero + site)
    if FOURS:
        even = tl.interleave((a > limit).to(tl.int8), (c > limit).to(tl.int8))
        odd = tl.interleave((b > limit).to(tl.int8), (d > limit).to(tl.int8))
        keep = tl.interleave(even, odd) != 0
    else:
        lane = element & 3
        keep = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)) > limit
    return keep


@triton.jit
def find_level(x, scale, zero):  # type: ignore[no-untyped-def]
    """`rounding.round_level` under QTX, levels to 2^20: IEEE division, half to even, plus the zero point.

    In float32 between 2^23 and 2^24 the last bit is 1, so that adding 1.5 2^23 rounds to whole numbers, half to even.
    """
    ratio = tl.minimum(tl.maximum(tl.div_rn(x, scale), -1048576.0), 1048576.0)
    return ((ratio + 12582912.0) - 12582912.0) + zero


@triton.jit
def make_scores(product, factor, quantizer, low, high, CODED: tl.constexpr):  # type: ignore[no-untyped-def]
    """What times `unit` is scores in units of log2, and where a gradient passes. CODED, by the first scale and zero
    point at `quantizer`: scores, factor times the product, quantized; else the product itself."""
    s, passes = product, product == product
    if CODED:
        scale, zero = tl.load(quantizer), tl.load(quantizer + 1)
        level = find_level(product * factor, scale, zero)
        code = tl.minimum(tl.maximum(level, low), high)
        s, passes = (code - zero) * scale, level == code
    return s, passes


@triton.jit
def shape_probability(  # type: ignore[no-untyped-def]
    p, gamma, span, quantizer, low, high, CLIP: tl.constexpr, TOP: tl.constexpr, CODED: tl.constexpr
):
    """What multiplies values, clip(span p + gamma, 0, 1) where CLIP, and where a gradient passes to p.

    Without TOP zeta is 1, and 1 is passed by rounding only, as in rows of one key: there forward and backward, whose p
    may differ in the last bit, have to agree that the gradient passes.

    CODED, by the second scale and zero point at `quantizer`: its code less the zero point, which 16 bits hold exactly;
    who sums it up multiplies by the scale.
    """
    y, passes = p, p == p
    if CLIP:
        t = p * span + gamma
        y = tl.minimum(tl.maximum(t, 0.0), 1.0)
        passes = (y == t) if TOP else t >= 0.0
    if CODED:
        scale, zero = tl.load(quantizer + 2), tl.load(quantizer + 3)
        level = find_level(y, scale, zero)
        code = tl.minimum(tl.maximum(level, low), high)
        y, passes = code - zero, passes & (level == code)
    return y, passes
