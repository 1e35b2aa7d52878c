"""Fake quantization under QTX in one kernel: the range of each row, its codes and what they stand for; then where a
gradient passes, found again from x.

Not in the reference: its values are the same.

Forward reads an element once and writes it once. Floors of a bfloat16 element on a GPU of 3.35 TB/s: 1.2 ps through
memory; a division, in about 10 instructions, and as many others, 1.3 ps at 15e12 a second: so both matter, and a copy's
speed is the aim. Backward reads x and g and writes one: 1.8 ps. x is read in its dtype and computed in float32.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import language as tl

from qtx_ref.spec import QuantSpec

from .host import on_device

WIDEST = 16384  # elements of a row that a program holds at once; a wider row is read twice
WARPS = 4  # of a program: measured best, on an H200, for rows of 2048 and of 8192 elements
FLAT = 1024  # elements a program takes where rows share a scale
TINY = tl.constexpr(2.0**-70)


@triton.jit
def smaller(a, b):  # type: ignore[no-untyped-def]
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def wider(low, high, other_low, other_high):  # type: ignore[no-untyped-def]
    return smaller(low, other_low), larger(high, other_high)


@triton.jit
def round_even(x):  # type: ignore[no-untyped-def]
    """x to a whole number, half to even, |x| <= 2^20: between 2^23 and 2^24 float32 has no other. NaN stays; 0 is
    +0."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def find_level(x, scale, zero):  # type: ignore[no-untyped-def]
    """`rounding.round_level`, but for levels beyond 2^20, which no code is near."""
    ratio = smaller(larger(tl.div_rn(x, scale), -1048576.0), 1048576.0)
    return round_even(ratio) + zero


@triton.jit
def find_ends(lows, highs, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least and the largest; SYMMETRIC: of the magnitudes, which have the same scale."""
    if SYMMETRIC:
        high = tl.reduce(larger(tl.abs(lows), tl.abs(highs)), 0, larger)
        low = -high
    else:
        low, high = tl.reduce((lows, highs), 0, wider)
    return low, high


@triton.jit
def decode_range(x, scale, zero, first, last):  # type: ignore[no-untyped-def]
    """What the codes of x stand for, whose own range made the scale, so that |x / scale| is below 2^17.

    The quotient is IEEE's without a division: with i = 1 / scale rounded once, q = x i is within 2 of its last places;
    each q + i (x - q scale) of two fused operations halves the doubt, and the second, of a q within one place, is the
    quotient rounded once (Markstein 1990). Below TINY what is left over, x - q scale, would not be a float32.

    Levels are whole: so the zero point, instead of being added and taken, moves the limits.
    """
    if scale > TINY:
        inverse = tl.div_rn(1.0, scale)
        ratio = x * inverse
        ratio = tl.fma(tl.fma(-ratio, scale, x), inverse, ratio)
        ratio = tl.fma(tl.fma(-ratio, scale, x), inverse, ratio)
    else:  # or NaN
        ratio = tl.div_rn(x, scale)
    return tl.minimum(tl.maximum(round_even(ratio), first - zero), last - zero) * scale


@triton.jit
def decode(level, scale, zero, first, last):  # type: ignore[no-untyped-def]
    return (smaller(larger(level, first), last) - zero) * scale


@triton.jit
def find_scale(low, high, first, last, floor, empty, SYMMETRIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """`affine.scale_zero`, zero in float32; NaN of a range that is not finite."""
    low, high = smaller(low, 0.0), larger(high, 0.0)
    span = larger(-low, high) if SYMMETRIC else high - low
    steps = last if SYMMETRIC else last - first
    scale = tl.where(span == 0.0, empty, larger(tl.div_rn(span, steps), floor))
    zero = tl.full([], 0.0, tl.float32)
    if not SYMMETRIC:
        start = first - tl.div_rn(low, scale)
        zero = smaller(larger(round_even(smaller(larger(start, -1048576.0), 1048576.0)), first), last)
    return scale + (span - span), zero


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x_in, y_out, scale_out, zero_out, columns, first, last, floor, empty,
    SYMMETRIC: tl.constexpr, WHOLE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_in += row * columns
    y_out += row * columns
    at = tl.arange(0, WIDTH)
    if WHOLE:
        there = at < columns
        x = tl.load(x_in + at, mask=there, other=0.0).to(tl.float32)  # 0 is in every range
        low, high = find_ends(x, x, SYMMETRIC)
        scale, zero = find_scale(low, high, first, last, floor, empty, SYMMETRIC)
        y = decode_range(x, scale, zero, first, last)
        tl.store(y_out + at, y.to(y_out.dtype.element_ty), mask=there)
    else:
        lows, highs = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        for start in range(0, columns, WIDTH):
            x = tl.load(x_in + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
            lows, highs = smaller(lows, x), larger(highs, x)
        low, high = find_ends(lows, highs, SYMMETRIC)
        scale, zero = find_scale(low, high, first, last, floor, empty, SYMMETRIC)
        for start in range(0, columns, WIDTH):
            x = tl.load(x_in + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
            y = decode_range(x, scale, zero, first, last)
            tl.store(y_out + start + at, y.to(y_out.dtype.element_ty), mask=start + at < columns)
    tl.store(scale_out + row, scale)
    tl.store(zero_out + row, zero)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x_in, g_in, scale_in, zero_in, out, count, columns, row_step, column_step, first, last,
    GRADIENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = at < count
    place = (at // columns) * row_step + (at % columns) * column_step
    scale = tl.load(scale_in + place, mask=there, other=1.0)
    zero = tl.load(zero_in + place, mask=there, other=0.0)
    level = find_level(tl.load(x_in + at, mask=there, other=0.0).to(tl.float32), scale, zero)
    if GRADIENT:
        passes = (level >= first) & (level <= last)  # NaN does not
        y = tl.where(passes, tl.load(g_in + at, mask=there, other=0.0), 0.0)
    else:
        y = decode(level, scale, zero, first, last)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=there)


def quantize_rows(x: Tensor, spec: QuantSpec, floor: float, empty: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the codes of x (..., C), contiguous, stand for, in its dtype, each row by its own range; scales and zero
    points (..., 1), float32. A row whose range is not finite is NaN throughout, and so is its scale. floor, empty: of
    the scale rule."""
    y = torch.empty_like(x)
    shape, columns = (*x.shape[:-1], 1), x.shape[-1]
    scale, zero = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    width = min(triton.next_power_of_2(max(columns, 1)), WIDEST)
    if x.numel():
        given = (x, y, scale, zero, columns, float(spec.code_min), float(spec.code_max), floor, empty)
        constants = {"SYMMETRIC": spec.symmetric, "WHOLE": columns <= width, "WIDTH": width}
        warps = max(min(WARPS, max(1, width // 512)), width // 2048)
        with on_device(x.device):
            _quantize_rows[(scale.numel(),)](*given, **constants, num_warps=warps)
    return y, scale, zero


def quantize(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, g: Tensor | None = None) -> Tensor:
    """What the codes of x (N, C), contiguous, stand for, in its dtype; or, of g in the same shape, what passes where no
    code was clamped, else 0. scale and zero (float32): (N, 1), (1, C) or (1, 1), contiguous. Fewer than 2^31 - 1024
    elements."""
    out = torch.empty_like(x if g is None else g)
    steps = (scale.shape[1] if scale.shape[0] > 1 else 0, int(scale.shape[1] > 1))
    if x.numel():
        given = (x, x if g is None else g, scale, zero, out)
        numbers = (x.numel(), x.shape[1], *steps, float(spec.code_min), float(spec.code_max))
        with on_device(x.device):
            _quantize[(triton.cdiv(x.numel(), FLAT),)](*given, *numbers, GRADIENT=g is not None, WIDTH=FLAT)
    return out
