"""Small floating-point formats: FP8 (E4M3, E5M2), FP4 (E2M1) and MX blocks of them.

A finite format with m bits of mantissa and exponents from emin has, on one side of 0, the values n 2^(e - m) with
e >= emin and n a whole number below 2^(m + 1). Near |x| they lie 2^(e - m) apart, e = max(floor(log2 |x|), emin), so
n = round(|x| / 2^(e - m)), half to even, and the code is n + 2^m (e - emin): a mantissa that overflows carries into the
exponent by itself, and e = emin with n < 2^m are the subnormals. The sign is the top bit.

    >>> encode(torch.tensor([0.0, 1.0, -1.0, 0.001953125, 448, 465, torch.inf]), FloatFormat.E4M3).tolist()
    [0, 56, 184, 1, 126, 126, 126]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtx_ref.spec import QTX, CastRule, FloatFormat, FloatQuantSpec, Rounding, SharedScale

from ..tracing import is_traced
from .affine import check_order, check_scale
from .checks import check_range, check_shape
from .compiled import hide
from .rounding import round_integer


@dataclass(frozen=True)
class Layout:
    """Bits and limits of a format. `overflow` and `nan` are codes without sign; a format may have neither."""

    mantissa: int  # m
    emin: int  # exponent of the smallest normal number
    emax: int  # exponent of the largest
    largest: int  # code of the largest finite value
    sign: int  # the sign bit
    overflow: int  # what a value beyond the largest becomes unless it saturates
    nan: int

    @property
    def maximum(self) -> float:
        """The largest finite value."""
        fraction = (self.largest & (2**self.mantissa - 1)) + 2**self.mantissa
        return fraction * 2.0 ** (self.emax - self.mantissa)

    @property
    def limit(self) -> float:
        """The largest float32 that is rounded to `maximum`: the tie with what would come next, or, odd, just below
        it."""
        tie = self.maximum + 2.0 ** (self.emax - self.mantissa - 1)
        return tie - 2.0 ** (self.emax - 23) * (self.largest % 2)


LAYOUTS = {
    FloatFormat.E4M3: Layout(3, -6, 8, 0x7E, 0x80, 0x7F, 0x7F),  # NaN takes the place of 480
    FloatFormat.E5M2: Layout(2, -14, 15, 0x7B, 0x80, 0x7C, 0x7F),
    FloatFormat.E2M1: Layout(1, 0, 2, 0x7, 0x8, 0x7, 0x7),
}
TINY = 2.0**-126  # the smallest normal float32; no scale is below it, but for those of MX blocks
SCALE_BIAS, SCALE_NAN = 127, 0xFF  # E8M0: 2^(code - 127), and one NaN


def floor_log2(x: Tensor) -> Tensor:
    """floor(log2 |x|) of float32 from its bits: int32, -127 for 0 and subnormals, 128 for infinity and NaN."""
    return ((x.view(torch.int32) >> 23) & 0xFF) - 127


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, from bits; exponent in [-1022, 1023]."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def encode(
    x: Tensor,
    kind: FloatFormat,
    saturate: bool | None = None,
    words: Tensor | None = None,
    rule: CastRule = QTX.cast,
) -> Tensor:
    """Codes (uint8) of x (float32), nearest, ties to even; with `words`, as in `round_integer`, away from 0 by the
    remainder's probability.

    Beyond the largest value: that value if `saturate` (None: as `rule` says), infinity too; else infinity, or NaN for
    E4M3. NaN stays NaN. E2M1, which has neither, always saturates; there NaN raises ValueError, unless `rule` has a
    code for it.
    """
    x = x.float().contiguous()
    nan = torch.isnan(x)
    if kind is FloatFormat.E2M1 and rule.e2m1_nan is None and not is_traced() and nan.any():
        raise ValueError("e2m1 has no NaN; look upstream for the first tensor that holds one")
    f = LAYOUTS[kind]
    e = floor_log2(x).clamp(min=f.emin)
    n = x.masked_fill(nan, 0).abs().double() / power_of_two(e - f.mantissa)
    n = round_integer(n, Rounding.HALF_EVEN if words is None else Rounding.STOCHASTIC, words)
    code = n.clamp(max=2.0 ** (f.mantissa + 1)).int() + ((e - f.emin) << f.mantissa)
    saturate = saturates(kind, rule) if saturate is None else saturate
    code = code.masked_fill(code > f.largest, f.largest if saturate else f.overflow)
    code = code.masked_fill(nan, nan_code(kind, rule))
    keeps = rule.negative_zero or kind is not FloatFormat.E2M1
    minus = torch.signbit(x) if keeps else torch.signbit(x) & (x != 0)
    return torch.where(minus, code ^ f.sign, code).to(torch.uint8)


def nan_code(kind: FloatFormat, rule: CastRule) -> int:
    """The code of a NaN without sign."""
    if kind is FloatFormat.E2M1 and rule.e2m1_nan is not None:
        return rule.e2m1_nan
    return rule.e5m2_nan if kind is FloatFormat.E5M2 else LAYOUTS[kind].nan


def saturates(kind: FloatFormat, rule: CastRule) -> bool:
    """Whether a rule's cast gives the largest value beyond it."""
    return {FloatFormat.E4M3: rule.e4m3_saturates, FloatFormat.E5M2: rule.e5m2_saturates}.get(kind, True)


def values(kind: FloatFormat) -> Tensor:
    """The value of every code, float32 (codes,): 256 of them, 16 for E2M1."""
    f = LAYOUTS[kind]
    code = torch.arange(f.sign)
    field, mantissa = code >> f.mantissa, code & (2**f.mantissa - 1)
    value = torch.where(field > 0, mantissa + 2**f.mantissa, mantissa) * power_of_two(
        field.clamp(min=1) - 1 + f.emin - f.mantissa
    )
    if f.overflow > f.largest:
        value[f.largest + 1 :] = torch.nan
        value[f.overflow] = torch.inf if f.overflow != f.nan else torch.nan
    return torch.cat([value, -value]).float()


def decode(code: Tensor, kind: FloatFormat) -> Tensor:
    """The values (float32) of codes. Raises ValueError for what is no code of the format."""
    check_range("code", code, 0, 2 * LAYOUTS[kind].sign - 1, f"it is no code of {kind}")
    return look_up(code, kind)


def look_up(code: Tensor, kind: FloatFormat) -> Tensor:
    """`decode` of codes that `encode` made."""
    return values(kind).to(code.device)[code.long()]


def scale_zero(low: Tensor, high: Tensor, spec: FloatQuantSpec) -> tuple[Tensor, Tensor]:
    """Scale (float32) of a range, absmax / largest finite value, and zero point 0. An empty range has scale 1.

    Raises ValueError where low is above high, or the range is not finite.
    """
    span = torch.maximum(-low.float().clamp(max=0), high.float().clamp(min=0))
    # both at once: asking waits for the device; a compiled graph asks nothing, and NaN comes out as NaN
    if not is_traced() and not (torch.isfinite(span) & (low <= high)).all():
        check_order(low, high)
        raise ValueError(
            f"range {low.min().item()} to {high.max().item()} is not finite; look for NaN or infinity upstream"
        )
    largest = torch.full_like(span, LAYOUTS[spec.format].maximum)
    step = (span / hide(largest, span)).clamp(min=TINY)
    return step.masked_fill(span == 0, 1), torch.zeros_like(span, dtype=torch.int32)


def fake_quantize(
    x: Tensor,
    kind: FloatFormat,
    saturate: bool | None = None,
    scale: Tensor | None = None,
    rule: CastRule = QTX.cast,
) -> tuple[Tensor, Tensor]:
    """scale * decode(encode(x / scale)) in x's dtype, computed in float32, and where the straight-through gradient
    passes: numbers that are not rounded beyond the largest value. NaN in x stays NaN, or is what E2M1's code of it
    stands for. Raises ValueError for a scale that is no finite number above 0, or does not fit the shape of x."""
    if scale is not None:
        check_scale(scale)
        check_shape("scale", scale, x.shape, "give one, or one for each that has its own")
    return simulate(x, kind, saturate, scale, None, rule)


def simulate(
    x: Tensor,
    kind: FloatFormat,
    saturate: bool | None = None,
    scale: Tensor | None = None,
    words: Tensor | None = None,
    rule: CastRule = QTX.cast,
) -> tuple[Tensor, Tensor]:
    """`fake_quantize` without looking at the scale: for one that `scale_zero` or `mx_scale` made. Its NaN, which is
    that of a block with NaN or infinity, stays NaN. `words` and `rule` as in `encode`."""
    ratio = x.float() if scale is None else x.float() / scale
    nan = torch.isnan(ratio)
    lost = kind is FloatFormat.E2M1 and rule.e2m1_nan is not None  # NaN becomes a number
    y = look_up(encode(ratio if lost else ratio.masked_fill(nan, 0), kind, saturate, words, rule), kind)
    y = y if scale is None else y * scale
    y = y if lost else y.masked_fill(nan, torch.nan)
    return y.to(x.dtype), ratio.abs() <= LAYOUTS[kind].limit


def mx_exponent(x: Tensor, kind: FloatFormat, rule: SharedScale, block: int) -> tuple[Tensor, Tensor]:
    """The exponent (int32) of each block's scale, (..., D / block), kept in [-127, 127], and which blocks hold NaN or
    infinity. A block of zeros has exponent -127. Raises ValueError where blocks do not divide the last axis."""
    if x.shape[-1] % block:
        raise ValueError(f"block {block} does not divide the last axis, {x.shape[-1]}; choose one that does")
    f = LAYOUTS[kind]
    largest = x.float().unflatten(-1, (x.shape[-1] // block, block)).abs().amax(-1)  # NaN if the block has one
    bits = largest.view(torch.int32)
    if rule is SharedScale.CEIL:
        bits = bits + 0x7FFFFF  # carries into the exponent unless the mantissa is 0
    elif rule is SharedScale.RCEIL:
        bits = (largest / hide(torch.full_like(largest, f.maximum), largest)).view(torch.int32)
        exponent = (((bits + 0x7FFFFF) >> 23) & 0xFF) - 127
        return exponent.masked_fill(bits <= 0x400000, -127).clamp(-127, 127), ~torch.isfinite(largest)  # subnormal
    elif rule is SharedScale.EVEN:
        bits = bits + (1 << (22 - f.mantissa))  # half a unit of the element's last place
    elif rule is not SharedScale.FLOOR:  # a string passes for no member
        raise ValueError(f"rule is {rule!r}: give a SharedScale")
    return (((bits >> 23) & 0xFF) - 127 - f.emax).clamp(-127, 127), ~torch.isfinite(largest)


def mx_quantize(
    x: Tensor,
    kind: FloatFormat,
    rule: SharedScale = SharedScale.FLOOR,
    block: int = 32,
    cast: CastRule = QTX.cast,
) -> tuple[Tensor, Tensor]:
    """Blocks of neighbours along the last axis that share a power of two: x (..., D) -> scale codes (..., D / block) in
    E8M0 and element codes (..., D), both uint8 (OCP microscaling formats, 2023). `cast` as in `encode`.

    Elements are x / 2^exponent, saturated. A block with NaN or infinity has the scale NaN and elements 0. Raises
    ValueError where blocks do not divide the last axis.
    """
    exponent, broken = mx_exponent(x, kind, rule, block)
    parts = x.float().reshape(*exponent.shape, block)
    ratio = parts.masked_fill(broken[..., None], 0).double() / power_of_two(exponent)[..., None]
    elements = encode(ratio.float(), kind, True, None, cast)
    return (exponent + SCALE_BIAS).masked_fill(broken, SCALE_NAN).to(torch.uint8), elements.reshape(x.shape)


def mx_dequantize(scale: Tensor, code: Tensor, kind: FloatFormat) -> Tensor:
    """2^(scale - 127) times the elements' values, float32; NaN where the scale is NaN. Raises ValueError for scales or
    elements that are no codes, and where each scale is not that of as many elements."""
    check_range("scale code", scale, 0, 255, "it is a byte, 127 for 1")
    blocks = scale.shape[-1] if scale.ndim else 0
    if scale.ndim != code.ndim or scale.shape[:-1] != code.shape[:-1] or blocks == 0 or code.shape[-1] % blocks:
        raise ValueError(f"scales of shape {tuple(scale.shape)} do not fit codes of shape {tuple(code.shape)}")
    parts = decode(code, kind).reshape(*scale.shape, code.shape[-1] // blocks)
    power = power_of_two(scale.int() - SCALE_BIAS).masked_fill(scale == SCALE_NAN, torch.nan)
    return (parts * power[..., None]).float().reshape(code.shape)


def mx_scale(x: Tensor, kind: FloatFormat, rule: SharedScale, block: int) -> Tensor:
    """The scale of each element's block, float32 in the shape of x; NaN in a block with NaN or infinity."""
    exponent, broken = mx_exponent(x, kind, rule, block)
    return power_of_two(exponent).float().masked_fill(broken, torch.nan).repeat_interleave(block, -1)


def check_shared(scale: Tensor) -> None:
    """Raises ValueError naming the first scale that no MX block has: a power of two from 2^-127 to 2^127, or NaN."""
    good = torch.isnan(scale) | ((torch.frexp(scale.float())[0] == 0.5) & (scale >= 2.0**-127))
    if not good.all():
        raise ValueError(
            f"scale {scale[~good][0].item()} of a block: it is a power of two from 2^-127 to 2^127, or NaN"
        )


def mx_fake_quantize(
    x: Tensor,
    kind: FloatFormat,
    rule: SharedScale = SharedScale.FLOOR,
    block: int = 32,
    cast: CastRule = QTX.cast,
) -> tuple[Tensor, Tensor]:
    """mx_dequantize(mx_quantize(x)) in x's dtype, and where the gradient passes: elements that did not saturate."""
    return simulate(x, kind, True, mx_scale(x, kind, rule, block), None, cast)
