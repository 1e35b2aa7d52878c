"""Requantization: an accumulator a times a positive real M, as an integer.

Fixed point writes M = 2^shift * multiplier / 2^31 with multiplier in [2^30, 2^31): a 32-bit mantissa, a Q31 number in
[1/2, 1). The product of two 32-bit integers is then exact in 64 bits, and engines differ in how they bring it back:

    product EXACT      floor((a multiplier + 2^(30 - shift)) / 2^(31 - shift))            one rounding, half up
    product HALF_UP    round(round(2^left a multiplier / 2^31) / 2^right)                 two: half up, then half away
    product TRUNCATED  round(floor(2^left a multiplier / 2^31) / 2^right)                 truncated, then half up

where left = max(shift, 0), right = max(-shift, 0); TRUNCATED shifts right by at least 1 so that it always
rounds. Of 64-bit accumulators a rule with 15 bits rounds the multiplier to that many.
Sources: gemmlowp's fixedpoint.h, TFLite's MultiplyByQuantizedMultiplier, XNNPACK's rndnu kernels.

    >>> a, M = torch.tensor([-6, -2, 2, 6, 10], dtype=torch.int32), torch.tensor(0.25, dtype=torch.float64)
    >>> round_by(a, M, QTX.requantize).tolist()
    [-1, 0, 1, 2, 3]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtx_ref.spec import QTX, Dtype, Fixed, FloatProduct, HighProduct, QuantSpec

from ..quant.checks import check_integers, check_range, check_shape
from ..quant.rounding import round_integer

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def check_real(real: Tensor) -> None:
    """Raises ValueError where M (float64 or float32) is not a number in [0, 2^30)."""
    if not ((real >= 0) & (real < 2**30)).all():
        raise ValueError(
            f"multiplier {real.min().item()} to {real.max().item()} is outside 0 to 2^30: look at the scales"
        )


def quantize_multiplier(real: Tensor) -> tuple[Tensor, Tensor]:
    """M (float64, in [0, 2^30)) -> multiplier and shift, int32. M below 2^-32, which moves no int32, becomes 0, 0.

    The mantissa is rounded half away from zero; where it reaches 2^31 it is halved and the shift raised. Raises
    ValueError as `check_real`.
    """
    check_real(real)
    bits = real.double().view(torch.int64)  # torch.frexp of float64 does not compile on AVX-512 (torch 2.13)
    shift = (bits >> 52) - 1022
    multiplier = ((bits & (2**52 - 1) | 2**52) + 2**21) >> 22  # from 53 bits of mantissa to 31
    carried = multiplier == 2**31
    multiplier, shift = torch.where(carried, 2**30, multiplier), shift + carried
    tiny = shift < -31  # 0 too: its exponent bits are 0
    return multiplier.masked_fill(tiny, 0).int(), shift.masked_fill(tiny, 0).int()


def rounding_doubling_high_multiply(a: Tensor, b: Tensor) -> Tensor:
    """round(2 a b / 2^32) of int32, half up; the one overflow, -2^31 squared, saturates: ARM's SQRDMULH.

    gemmlowp's nudge of 1 - 2^30 for a negative product, before a division that truncates, comes to the same. Raises
    ValueError beyond int32.
    """
    check_range("factor", a, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("factor", b, INT32_MIN, INT32_MAX, "give int32 values")
    product = a.long() * b.long()
    return ((product + 2**30) >> 31).clamp(max=INT32_MAX).int()


def doubling_high_multiply(a: Tensor, b: Tensor) -> Tensor:
    """floor(2 a b / 2^32) of int32, saturating: ARM's SQDMULH. Raises ValueError beyond int32."""
    check_range("factor", a, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("factor", b, INT32_MIN, INT32_MAX, "give int32 values")
    product = a.long() * b.long()
    return (product >> 31).clamp(max=INT32_MAX).int()


def rounding_divide_by_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """round(x / 2^exponent) of int32, half away from zero. exponent in [0, 31]. Raises ValueError beyond these."""
    check_range("value", x, INT32_MIN, INT32_MAX, "give int32 values")
    check_range("exponent", exponent, 0, 31, "an int32 has no more bits to shift out")
    x, exponent = x.long(), exponent.long()
    half = (torch.ones_like(exponent) << exponent) >> 1
    magnitude = (x.abs() + half) >> exponent
    return torch.where(x < 0, -magnitude, magnitude).int()


def rounding_shift_right(x: Tensor, exponent: Tensor | int) -> Tensor:
    """floor(x / 2^exponent + 1/2): half up. int64, |x| < 2^62; exponent in [0, 62]. Raises ValueError beyond these."""
    check_range("value", x, -(2**62), 2**62, "the rounding would leave int64")
    check_range("exponent", exponent, 0, 62, "an int64 has no more bits to shift out")
    x, exponent = x.long(), torch.as_tensor(exponent, device=x.device).long()
    return (x + ((torch.ones_like(exponent) << exponent) >> 1)) >> exponent


def multiply_one_rounding(a: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """FIXED_ONE -> int64. An int64 accumulator (16-bit codes) must stay within 48 bits, its shift in [-31, 7]; the
    product of 79 bits is then taken in two halves. Raises ValueError beyond these, and for a multiplier outside [0,
    2^31)."""
    check_range("multiplier", multiplier, 0, INT32_MAX, "use quantize_multiplier")
    multiplier, shift = multiplier.long(), shift.long()
    if a.dtype != torch.int64:
        check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
        check_range("shift", shift, -31, 30, "use quantize_multiplier")
        return rounding_shift_right(a.long() * multiplier, 31 - shift)
    check_wide(a, shift)
    low = (a & 0xFFFF) * multiplier + (torch.ones_like(shift) << (30 - shift))  # with the half
    return ((a >> 16) * multiplier + (low >> 16)) >> (15 - shift)


def multiply_one_rounding_narrow(a: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """FIXED_ONE_NARROW -> int64: as FIXED_ONE, but with an int64 accumulator the multiplier is rounded to 15 bits, as
    in TFLite's 16x8 kernels. Raises ValueError as `multiply_one_rounding`."""
    if a.dtype != torch.int64:
        return multiply_one_rounding(a, multiplier, shift)
    check_range("multiplier", multiplier, 0, INT32_MAX, "use quantize_multiplier")
    multiplier, shift = multiplier.long(), shift.long()
    check_wide(a, shift)
    reduced = torch.where(multiplier < 0x7FFF0000, (multiplier + 2**15) >> 16, 0x7FFF)
    return rounding_shift_right(a * reduced, 15 - shift)


def check_wide(a: Tensor, shift: Tensor) -> None:
    """Raises ValueError where an int64 accumulator has more than 48 bits, or its shift is not in [-31, 7]."""
    check_range("accumulator", a, -(2**47), 2**47 - 1, "a 64-bit accumulator is requantized from 48 bits")
    check_range("shift", shift, -31, 7, "a 64-bit accumulator is scaled by less than 128")


def multiply_two_roundings(a: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """FIXED_TWO -> int32. a * 2^left must fit int32, else ValueError; engines leave it undefined."""
    shift = shift.long()
    check_range("shift", shift, -31, 30, "use quantize_multiplier")
    check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
    raised = a.long() << shift.clamp(min=0)
    check_range("shifted accumulator", raised, INT32_MIN, INT32_MAX, "two roundings need a * 2^shift in int32")
    return rounding_divide_by_power_of_two(rounding_doubling_high_multiply(raised, multiplier), (-shift).clamp(min=0))


def multiply_high_half_up(a: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """HIGH_HALF_UP -> int64 holding int32 values. The left shift saturates. Raises ValueError where a is beyond int32
    or the shift is not in [-31, 30]."""
    shift = shift.long()
    check_range("shift", shift, -31, 30, "use quantize_multiplier")
    check_range("accumulator", a, INT32_MIN, INT32_MAX, "give int32 values")
    right = (-shift).clamp(min=1)
    raised = (a.long() << (shift + right)).clamp(INT32_MIN, INT32_MAX)
    return rounding_shift_right(doubling_high_multiply(raised, multiplier), right)


def real_multiplier(
    x_scale: Tensor, w_scale: Tensor | int, y_scale: Tensor, rule: Fixed | FloatProduct = QTX.requantize
) -> Tensor:
    """M = x_scale * w_scale / y_scale: in the dtype of the rule, rounded at each step.

    x_scale: one, or one per row of the accumulator, (..., N, 1). y_scale: one, or (O,). w_scale: one, (O,), or (O, 1)
    as `affine.ranges` gives them for a weight (O, I): they belong to the accumulator's columns, so M has their shape
    (O,). Raises ValueError for scales of another shape.
    """
    kind = torch.float64 if rule.dtype is Dtype.FLOAT64 else torch.float32
    x_scale, w_scale, y_scale = (torch.as_tensor(scale).to(kind) for scale in (x_scale, w_scale, y_scale))
    if y_scale.ndim > 1 and y_scale.numel() > 1 and y_scale.shape[-1] == 1:
        raise ValueError(f"result scales of shape {tuple(y_scale.shape)}: give one, or (O,)")
    return one_or_all(x_scale) * per_column(w_scale) / one_or_all(y_scale)


def one_or_all(scale: Tensor) -> Tensor:
    """A single scale without axes; several as they are."""
    return scale.reshape(()) if scale.numel() == 1 else scale


def per_column(scale: Tensor) -> Tensor:
    """Scales of a weight, one, (O,) or (O, 1), as they belong to the accumulator's columns: one without axes, or
    (O,). Raises ValueError for another shape."""
    if scale.ndim > 1 and scale.numel() > 1 and (scale.ndim > 2 or scale.shape[1] != 1):
        raise ValueError(
            f"weight scales of shape {tuple(scale.shape)}: give one, (O,), or (O, 1) as of a weight (O, I)"
        )
    return one_or_all(scale.reshape(-1))


def multiply(a: Tensor, multiplier: Tensor, shift: Tensor, rule: Fixed) -> Tensor:
    """round(2^shift multiplier / 2^31 * a) in the engine's way, in integers; int64, saturated to int32.

    a: int32, or int64 where one rounding; multiplier and shift broadcast against it. Raises ValueError where they do
    not, or values are beyond their width.
    """
    check_shape("multiplier", multiplier, a.shape, "give one, or one per column or row")
    check_shape("shift", shift, a.shape, "give one, or one per column or row")
    if a.dtype == torch.int64 and rule.product is not HighProduct.EXACT:
        raise ValueError(f"a high product, {rule.product}, is not defined for 64-bit accumulators: keep the exact one")
    if rule.product is HighProduct.HALF_UP:
        level = multiply_two_roundings(a, multiplier, shift)
    elif rule.product is HighProduct.TRUNCATED:
        level = multiply_high_half_up(a, multiplier, shift)
    elif rule.bits == 15:
        level = multiply_one_rounding_narrow(a, multiplier, shift)
    else:
        level = multiply_one_rounding(a, multiplier, shift)
    return level.clamp(INT32_MIN, INT32_MAX).long()


def round_float(x: Tensor, rule: FloatProduct) -> Tensor:
    """float32 -> int64, saturated to int32, ties as a float requantization has them. It may round x in place."""
    level = round_integer(x, rule.rounding).double()  # float32 has no 2^31 - 1
    return level.clamp(INT32_MIN, INT32_MAX).long()


def round_by(a: Tensor, real: Tensor, rule: Fixed | FloatProduct) -> Tensor:
    """round(real * a) in the engine's way; int64, saturated to int32. a: int32, or int64 where one rounding or a float.

    Raises ValueError as `check_real` and `multiply`, and for an accumulator that is no integer.
    """
    if isinstance(rule, Fixed):
        return multiply(a, *quantize_multiplier(real), rule)
    check_real(real)
    check_integers("accumulator", a.dtype)
    check_shape("multiplier", real, a.shape, "give one, or one per column or row")
    return round_float(a.float() * real.float(), rule)


def requantize(
    a: Tensor, real: Tensor, zero_point: Tensor, spec: QuantSpec, rule: Fixed | FloatProduct = QTX.requantize
) -> Tensor:
    """Accumulators a (..., N, O) -> codes (int32), shaped alike: round(real * a) + zero_point, clamped.

    real: from `real_multiplier`; it and `zero_point` (a code of `spec`) are one, or broadcast against a.

    Raises:
        ValueError: a multiplier or zero point that does not fit the shape of a or is outside its range, or accumulators
            beyond the width that the rule requantizes.
    """
    check_range("zero point", zero_point, spec.code_min, spec.code_max, "it is one of the codes")
    check_shape("zero point", zero_point, a.shape, "give one, or one per column or row")
    level = round_by(a, real, rule) + zero_point
    return level.clamp(spec.code_min, spec.code_max).int()
