"""Codes of a linear's operands on a GPU, along either axis, of one reading and one drawing.

Not in the reference: its values are those of fake quantization. Codes are those of `quant.int8`, to the bit.

What is coded along the other axis is written transposed, through shared memory. A row of codes is padded to 16 bytes by
zeros. Floors are in `int8_training`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from .fake_quantize import WIDEST
from .host import on_device

LINE = 16  # bytes to which a row of codes is padded, as a tensor's descriptor asks
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SIDES = (64, 64)  # rows and columns of a tile that is coded, by 4 warps: measured best on an H200
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)  # it takes PTX


@triton.jit
def narrow(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, float32, rounded to a dtype's numbers; by bits where the interpreter would cut."""
    if KIND == 1:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        y = tl.where(x == x, rounded, x)
    elif KIND == 2:
        y = x.to(tl.float16).to(tl.float32)
    else:
        y = x
    return y


@triton.jit
def find_scale(top, last):  # type: ignore[no-untyped-def]
    """`gradients.find_scale` of the largest magnitude."""
    scale = tl.where(top == 0.0, 1.0, tl.maximum(tl.div_rn(top, last), 1.1754943508222875e-38))
    return scale + (top - top)


@triton.jit
def lift_scale(scale):  # type: ignore[no-untyped-def]
    """What numbers and scale are multiplied by before they are divided, so that no remainder is below the normal
    numbers: a power of two."""
    return tl.where(scale < 9.094947017729282e-13, 18446744073709551616.0, 1.0)


@triton.jit
def divide(x, scale, inverse, FAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """x / scale, rounded once. FAST: x has 11 bits at most, and inverse is 1 / scale, rounded: then the remainder of
    x inverse, taken once, gives it (Markstein 1990), for each of the 2^23 mantissas of a scale."""
    if FAST:
        near = x * inverse
        ratio = tl.fma(tl.fma(near, -scale, x), inverse, near)
    else:
        ratio = tl.div_rn(x, scale)
    return ratio


@triton.jit
def split_ratio(ratio):  # type: ignore[no-untyped-def]
    """Of |ratio| < 2^20 its floor, as the integer that the bits of 1.5 2^23 plus it are, for between 2^23 and 2^24
    float32 has whole numbers only; and floor(2^32 (ratio - floor)), of which what rounds to 2^32 is 2^32 - 1."""
    if NATIVE:
        whole, limit = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            add.rm.f32 t, $2, 0f4B400000;
            mov.b32 $0, t;
            sub.rn.f32 t, t, 0f4B400000;
            sub.rn.f32 t, $2, t;
            mul.rn.f32 t, t, 0f4F800000;
            cvt.rzi.u32.f32 $1, t;
            }""",
            "=&r,=r,f", [ratio], dtype=(tl.int32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        below = tl.floor(ratio)
        part = ratio - below
        whole = (below + 12582912.0).to(tl.int32, bitcast=True)
        rest = tl.where(part < 1.0, part, 0.0) * 4294967296.0  # NaN is not
        limit = tl.where(part >= 1.0, 4294967295, rest.to(tl.uint32))
    return whole, limit


@triton.jit
def round_code(ratio, words, least, last, DRAWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """`rounding.round_integer` of |ratio| < 2^20, clamped; of NaN any code. To the nearest, half to even, or DRAWN, up
    where a word is below 2^32 (ratio - floor(ratio)); words are 2^32 - 2 at most: of thresholds but the last, which is
    above all words, none is above 2^32 - 256."""
    if DRAWN:
        whole, limit = split_ratio(ratio)
        whole += (words < limit).to(tl.int32)
    else:
        whole = (ratio + 12582912.0).to(tl.int32, bitcast=True)
    return tl.minimum(tl.maximum(whole - 1262485504, least), last)


# without a specialization a number that is 1 would be a constant, and each would be compiled
@triton.jit(do_not_specialize=("least", "last"))
def _encode_rows(  # type: ignore[no-untyped-def]
    x_in, codes, scales, columns, padded, least, last, FAST: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr
):
    """Codes of a row along it, by its own scale, to the nearest. WHOLE: it is held at once."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    if WHOLE:
        x = tl.load(x_in + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
        scale = find_scale(top, last.to(tl.float32))
        lift = lift_scale(scale)
        ratio = divide(x * lift, scale * lift, tl.div_rn(1.0, scale * lift), FAST)
        code = round_code(ratio, 0, least, last, False)
        tl.store(codes + row * padded + at, code.to(tl.int8), mask=at < padded)
    else:
        tops = tl.zeros((WIDTH,), tl.int32)
        for start in range(0, columns, WIDTH):
            x = tl.load(x_in + row * columns + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
            tops = tl.maximum(tops, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        scale = find_scale(tl.max(tops, 0).to(tl.float32, bitcast=True), last.to(tl.float32))
        lift = lift_scale(scale)
        step, inverse = scale * lift, tl.div_rn(1.0, scale * lift)
        for start in range(0, padded, WIDTH):
            x = tl.load(x_in + row * columns + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
            code = round_code(divide(x * lift, step, inverse, FAST), 0, least, last, False)
            tl.store(codes + row * padded + start + at, code.to(tl.int8), mask=start + at < padded)
    tl.store(scales + row, scale)


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    x_in, scales, where, row, column, rows, columns, line, CODED: tl.constexpr, WHERE: tl.constexpr
):
    """A tile of numbers, float32, 0 outside and in rows that do not count: what is stored, or code times scale."""
    there = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_in + row.to(tl.int64)[:, None] * line + column[None, :], mask=there, other=0).to(tl.float32)
    if CODED:
        x = x * tl.load(scales + row, mask=row < rows, other=1.0)[:, None]
    if WHERE:
        x = tl.where((tl.load(where + row, mask=row < rows, other=0) != 0)[:, None], x, 0.0)
    return x


@triton.jit
def _find_tops(  # type: ignore[no-untyped-def]
    x_in, scales, where, tops, rows, columns, line,
    CODED: tl.constexpr, WHERE: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    TM: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Largest magnitudes by row and by column, as the bits of float32, whose order is that of the numbers: integers,
    so that no order of programs changes them, and NaN is above infinity: rows' at `tops`, which starts as 0, then
    columns'."""
    tiles = tl.cdiv(columns, TN)
    row = tl.program_id(0) // tiles * TM + tl.arange(0, TM)
    column = tl.program_id(0) % tiles * TN + tl.arange(0, TN)
    x = load_tile(x_in, scales, where, row, column, rows, columns, line, CODED, WHERE)
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if BY_ROW:
        tl.atomic_max(tops + row, tl.max(size, 1), mask=row < rows, sem="relaxed")
    if BY_COLUMN:
        tl.atomic_max(tops + rows + column, tl.max(size, 0), mask=column < columns, sem="relaxed")


@triton.jit
def draw_tile(  # type: ignore[no-untyped-def]
    row, start, columns, seed, step, place, first, FOURS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr
):
    """`random.bits` of a tile of a matrix whose first element has word `first`, but at most 2^32 - 2. FOURS: that, and
    a row's length, are multiples of 4, so that the four words of each Philox stand side by side."""
    number, site = step.to(tl.uint32), place.to(tl.uint32)
    line = row.to(tl.int64) * columns + first
    if FOURS:
        counter = (line >> 2)[:, None] + (start // 4 + tl.arange(0, TN // 4))[None, :]
        zero = tl.zeros((TM, TN // 4), tl.uint32)
    else:
        element = line[:, None] + (start + tl.arange(0, TN))[None, :]
        counter = element >> 2
        zero = tl.zeros((TM, TN), tl.uint32)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, zero + number, zero + site)
    if FOURS:
        words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        lane = element & 3
        words = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    return tl.minimum(words, 4294967294)


@triton.jit(do_not_specialize=("last", "column_last"))
def _find_scales(  # type: ignore[no-untyped-def]
    tops, scales, inverses, count, kept, last, column_last, KIND: tl.constexpr, WIDTH: tl.constexpr
):
    """Scales of largest magnitudes, as their bits, the first `kept` with the first of two largest codes, and the
    inverses that `divide` takes."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    top = tl.load(tops + at, mask=at < count, other=0).to(tl.float32, bitcast=True)
    scale = find_scale(narrow(top, KIND), tl.where(at < kept, last, column_last).to(tl.float32))
    tl.store(scales + at, scale, mask=at < count)
    tl.store(inverses + at, tl.div_rn(1.0, scale * lift_scale(scale)), mask=at < count)


@triton.jit(do_not_specialize=("first", "seed", "step", "place"))
def _encode(  # type: ignore[no-untyped-def]
    x_in, scales, where, row_codes, column_codes, own_scales, inverses, address,
    rows, columns, line, row_line, column_line, row_least, row_last, column_least, column_last,
    seed, step, place, first,
    KIND: tl.constexpr, CODED: tl.constexpr, WHERE: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    STORED: tl.constexpr, FOURS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Codes of a tile along rows, and along columns transposed, each by its own scales, those of rows first: not at
    all, to the nearest (1), or by its elements' words (2), drawn once. STORED: step and first lie at `address`."""
    FAST: tl.constexpr = KIND != 0
    tiles = tl.cdiv(row_line, TN)
    row = tl.program_id(0) // tiles * TM + tl.arange(0, TM)
    start = tl.program_id(0) % tiles * TN
    column = start + tl.arange(0, TN)
    x = load_tile(x_in, scales, where, row, column, rows, columns, line, CODED, WHERE)
    if CODED:
        x = narrow(x, KIND)
    words = 0
    if BY_ROW == 2 or BY_COLUMN == 2:
        if STORED:
            step, first = tl.load(address), tl.load(address + 1)
        words = draw_tile(row, start, columns, seed, step, place, first, FOURS, TM, TN)
    if BY_ROW:
        scale = tl.load(own_scales + row, mask=row < rows, other=1.0)
        inverse = tl.load(inverses + row, mask=row < rows, other=1.0)
        lift = lift_scale(scale)
        ratio = divide(x * lift[:, None], (scale * lift)[:, None], inverse[:, None], FAST)
        code = round_code(ratio, words, row_least, row_last, BY_ROW == 2).to(tl.int8)
        at = row_codes + row.to(tl.int64)[:, None] * row_line + column[None, :]
        tl.store(at, code, mask=(row < rows)[:, None] & (column < row_line)[None, :])
    if BY_COLUMN:
        scale = tl.load(own_scales + rows + column, mask=column < columns, other=1.0)
        inverse = tl.load(inverses + rows + column, mask=column < columns, other=1.0)
        lift = lift_scale(scale)
        ratio = divide(x * lift[None, :], (scale * lift)[None, :], inverse[None, :], FAST)
        code = round_code(ratio, words, column_least, column_last, BY_COLUMN == 2).to(tl.int8)
        at = column_codes + column.to(tl.int64)[:, None] * column_line + row[None, :]
        tl.store(at, tl.trans(code), mask=(column < columns)[:, None] & (row < column_line)[None, :])


def pad_line(n: int) -> int:
    """Bytes of a row of n codes."""
    return n + -n % LINE


def encode_rows(x: Tensor, least: int, last: int) -> tuple[Tensor, Tensor]:
    """Codes of x (M, K), contiguous, by the scales of its rows, (M, K padded) int8, and these, (M, 1)."""
    (rows, columns), padded = x.shape, pad_line(x.shape[1])
    codes = torch.empty(rows, padded, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    width = min(triton.next_power_of_2(padded), WIDEST)
    given = (x, codes, scales, columns, padded, least, last)
    constants = {"FAST": x.dtype != torch.float32, "WHOLE": padded <= width, "WIDTH": width}
    warps = min(16, max(1, width // 512))
    with on_device(x.device):
        _encode_rows[(rows,)](*given, **constants, num_warps=warps, enable_fp_fusion=False)
    return codes, scales


def encode(
    x: Tensor,
    scales: Tensor | None,
    where: Tensor | None,
    kind: torch.dtype,
    columns: int,
    ways: list[int],
    limits: list[int],
    words: list[int],
    address: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of numbers (M, N), N `columns`, along rows, (M, N padded), and along columns, (N, M padded), and scales
    (M, 1) and (N, 1); of what is not wanted, codes (0, 0).

    x, contiguous: numbers of `kind`, or with scales (M, 1) codes (M, N padded) whose numbers are code times scale,
    rounded to it. where (M,), contiguous: rows that count, others are 0. ways: along rows and columns, 0: none, 1: to
    the nearest, 2 by words. limits: least and last code of each. words: seed, step, the site's number and the first
    word; step and first from `address`, int64 (2,), if there is one."""
    rows, line = x.shape
    by_row, by_column = ways
    row_line, column_line = pad_line(columns), pad_line(rows)
    row_codes, column_codes = (
        torch.empty(shape if wanted else (0, 0), dtype=torch.int8, device=x.device)
        for shape, wanted in (((rows, row_line), by_row), ((columns, column_line), by_column))
    )
    tops = torch.zeros(rows + columns, dtype=torch.int32, device=x.device)
    own, inverses = (torch.empty(rows + columns, dtype=torch.float32, device=x.device) for _ in range(2))
    fours = columns % 4 == 0 and (address is not None or words[3] % 4 == 0)
    given, ends = (x, scales, where), (rows, columns, line)
    flags = {"CODED": scales is not None, "WHERE": where is not None, "enable_fp_fusion": False}
    with on_device(x.device):
        tiles = triton.cdiv(rows, 128) * triton.cdiv(columns, 128)
        by = {"BY_ROW": by_row > 0, "BY_COLUMN": by_column > 0}
        _find_tops[(tiles,)](*given, tops, *ends, **by, TM=128, TN=128, num_warps=8, **flags)
        made = (tops, own, inverses, rows + columns, rows, limits[1], limits[3])
        blocks = triton.cdiv(rows + columns, 256)
        _find_scales[(blocks,)](*made, KIND=KINDS[kind], WIDTH=256, enable_fp_fusion=False)
        down, across = SIDES
        tiles = triton.cdiv(column_line, down) * triton.cdiv(row_line, across)
        made = (row_codes, column_codes, own, inverses, address)
        by = {"BY_ROW": by_row, "BY_COLUMN": by_column, "STORED": address is not None, "FOURS": fours}
        flags |= {"KIND": KINDS[kind], **by, "TM": down, "TN": across, "num_warps": 4}
        _encode[(tiles,)](*given, *made, *ends, row_line, column_line, *limits, *words, **flags)
    return row_codes, own[:rows, None], column_codes, own[rows:, None]
