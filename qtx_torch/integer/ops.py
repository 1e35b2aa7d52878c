"""Sums, softmax, LayerNorm and nonlinear functions in integers.

Values are integers in a stated unit: "Q28" counts 2^-28. Everything here is int64 unless said otherwise, so that every
product below fits; divisions are floors of exact quotients with the half added first, so they round half up.

Tables hold one entry per code and are made once, in float64, by the reference. The polynomials are those of I-BERT (Kim
et al. 2021, arXiv 2101.01321, sections 3.4 and 3.5) evaluated in integers; its published code evaluates them in floats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtx_ref.spec import ONE_ROUNDING, AddRule

from ..quant.checks import check_range, check_shape
from ..tracing import is_traced
from . import vectorized
from .fixed_point import INT32_MAX, INT32_MIN, multiply_exact, rounding_shift_right, shift_right

EXP_BITS = 24  # an exponential is at most 1
PROBABILITY_BITS = 28
SINK_BITS = 20  # the part of a sink's exponential that lies between two codes
ZETA_BITS = 24
NORM_BITS = 16  # of a normalized value, |r| <= sqrt(D)
INPUT_BITS = 16  # of a polynomial's argument
GELU_BITS = 20
ARGUMENT = 2**26  # Q16, of a polynomial: 1024, far beyond where each is flat


def half_up(numerator: Tensor, denominator: Tensor | int) -> Tensor:
    """floor(numerator / denominator + 1/2), denominator > 0. No int64 is too large: nothing is doubled."""
    quotient = numerator // denominator
    rest = numerator - quotient * denominator
    return quotient + (rest >= denominator - rest)


def half_up_shifted(numerator: Tensor, shift: Tensor | int, denominator: Tensor) -> Tensor:
    """floor(numerator 2^shift / denominator + 1/2) of one denominator > 0 per row; no more than int64 holds."""
    if is_traced():
        return vectorized.half_up_shifted(numerator, shift, denominator)
    return half_up(numerator.long() << shift, denominator)


def weighted_sum(parts: list[Tensor], multipliers: list[Tensor], shift: Tensor, rule: AddRule) -> Tensor:
    """round(sum_i parts_i multipliers_i / 2^shift), the products and their sum exact, one rounding.

    Parts are codes less their zero points or int32 accumulators, three at most; multipliers, up to 2^30, and shift are
    one, or one per column. Raises ValueError beyond these, and where a multiplier or shift does not fit the shape of
    the sum.
    """
    if len(parts) > 3:
        raise ValueError(f"{len(parts)} parts: the sum of more than 3 could leave int64")
    total, shape = parts[0].new_zeros((), dtype=torch.int64), torch.broadcast_shapes(*(part.shape for part in parts))
    for part, multiplier in zip(parts, multipliers, strict=True):
        check_range("part", part, INT32_MIN, INT32_MAX, "a sum takes codes, or accumulators of 32 bits")
        check_range("multiplier", multiplier, 0, 2**30, "use lowering.common_shift")
        check_shape("multiplier", multiplier, shape, "give one, or one per column")
        total = total + part.long() * multiplier.long()
    check_shape("shift", shift, shape, "give one, or one per column")
    return shift_right(total, shift, rule.rounding)


def mean(x: Tensor, where: Tensor | None) -> Tensor:
    """Mean over axis 1 of the rows where `where` (B, T, 1) is true, half up: (B, T, C) -> (B, 1, C); 0 without a row.

    Raises ValueError where the sum could leave int64.
    """
    limit = 2**63 // max(x.shape[1], 1) - 1
    check_range("value", x, -limit, limit, f"the sum of {x.shape[1]} rows would leave int64")
    x = x.long()
    if where is None:
        return half_up(x.sum(dim=1, keepdim=True), x.shape[1])
    count = where.long().sum(dim=1, keepdim=True).clamp(min=1)
    return half_up((x * where).sum(dim=1, keepdim=True), count)


# --- softmax ----------------------------------------------------------------------------------------------------------


def softmax(
    code: Tensor,
    mask: Tensor,
    exponential: Tensor | tuple[Tensor, Tensor],
    sink: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Probabilities, Q28, of score codes (B, H, Tq, Tk) under a mask that broadcasts against them.

    e_j = exponential[m - code_j] (Q24), m the row's largest code; p_j = e_j / sum e. `exponential` is a table, its last
    entry standing for all larger distances, or the multiplier and shift that turn a distance into Q16 for the
    polynomial. `sink` is (code, factor Q20), each (H,) or (1,): a further logit of no key, exp(sink) =
    exponential[m - code] factor. A row without keys gives zeros. Raises ValueError for codes beyond 30 bits and factors
    beyond 36.
    """
    check_range("score", code, -(2**30), 2**30 - 1, "scores are codes of 16 bits at most")
    code = code.int()
    largest = torch.where(mask, code, -(2**31)).amax(dim=-1, keepdim=True)
    if sink is not None:
        check_range("sink", sink[0], -(2**30), 2**30 - 1, "it is a code, or near one")
        check_range("sink factor", sink[1], 0, 2**36, "its product with an exponential would leave int64")
        position, factor = (part.reshape(-1, 1, 1) for part in sink)
        largest = torch.maximum(largest, position.int())

    def exp(distance: Tensor) -> Tensor:
        if isinstance(exponential, tuple):
            return exp_polynomial(multiply_exact(distance.clamp(min=0), *exponential, ONE_ROUNDING)).int()
        return exponential[distance.clamp(0, exponential.numel() - 1)]

    e = torch.where(mask, exp(largest - code), 0)  # a masked code may be the larger: its distance wraps, or is below 0
    total = e.sum(dim=-1, keepdim=True, dtype=torch.int64)
    if sink is not None:
        total = total + rounding_shift_right(exp(largest - position.int()) * factor.long(), SINK_BITS)
    return half_up_shifted(e, PROBABILITY_BITS, total.clamp(min=1))


def clip_stretch(p: Tensor, zeta: Tensor, gamma: Tensor) -> Tensor:
    """clip((zeta - gamma) p + gamma, 0, 1) as zeta p + gamma (1 - p): p and gamma <= 0 Q28, zeta Q24 -> Q28.

    Raises ValueError where p is not in [0, 1], zeta in [0, 64] or gamma in [-64, 0].
    """
    check_range("probability", p, 0, 1 << PROBABILITY_BITS, "it is at most 1, in Q28")
    check_range("zeta", zeta, 0, 64 << ZETA_BITS, "it is at most 64, in Q24")
    check_range("gamma", gamma, -(64 << PROBABILITY_BITS), 0, "it is at least -64, in Q28")
    one = 1 << PROBABILITY_BITS
    stretched = rounding_shift_right(zeta * p, ZETA_BITS) + rounding_shift_right(gamma * (one - p), PROBABILITY_BITS)
    return stretched.clamp(0, one)


def row_gamma(alpha: Tensor, mask: Tensor) -> Tensor:
    """-alpha / keys of each row, Q28: alpha Q28, mask (..., Tq, Tk) -> (..., Tq, 1). Raises ValueError where alpha is
    not in [0, 64]."""
    check_range("alpha", alpha, 0, 64 << PROBABILITY_BITS, "it is at most 64, in Q28")
    keys = mask.long().sum(dim=-1, keepdim=True).clamp(min=1)
    return -half_up(alpha, keys)


# --- LayerNorm --------------------------------------------------------------------------------------------------------


def square_root(x: Tensor) -> Tensor:
    """floor(sqrt(x)) for x in [2^60, 2^62): Newton's method from above (I-BERT, algorithm 4)."""
    if is_traced():
        return vectorized.square_root(x)
    root = torch.full_like(x, 2**31)
    for _ in range(6):  # the error, at most 1 at first, is squared and halved each time
        root = (root + x // root) >> 1
    return root - (root * root > x).long()


def bit_length(x: Tensor) -> Tensor:
    """The number of bits of x, int64 in [1, 2^62)."""
    if is_traced():
        return vectorized.bit_length(x)
    length = torch.ones_like(x)
    for step in (32, 16, 8, 4, 2, 1):
        more = (x >> step > 0).long() * step
        x, length = x >> more, length + more
    return length


def normalize(code: Tensor, eps: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last axis, Q16, from codes of at most 16 bits; their zero point cancels.

    With n = D c - sum c and W = D sum c^2 - (sum c)^2 + eps', it is n / sqrt(W): eps' = eps (D / scale)^2 as an
    integer. W is shifted up by an even number of bits into [2^60, 2^62) before its root is taken. Raises ValueError
    where W could leave them, which takes a D of more than 28,000 with 16-bit codes, or codes of more bits.
    """
    width, limits = code.shape[-1], torch.iinfo(code.dtype)
    check_range("eps", eps, 0, 2**60, "values are too small beside it")
    fits = (width * (limits.max - limits.min)) ** 2 + 2**60 < 2**62
    if not fits and not is_traced():  # the dtype alone does not say that it fits
        span = max(int(code.max()), 0) - min(int(code.min()), 0) if code.numel() else 0
        if (width * span) ** 2 + 2**60 >= 2**62:
            raise ValueError(f"{width} codes that span {span}: their variance would leave int64; use fewer bits")
    largest = max(-limits.min, limits.max)
    code = code.to(torch.int32 if width * largest**2 < 2**31 else torch.int64)  # what wraps of int64 cancels
    total, squares = (part.sum(dim=-1, keepdim=True, dtype=code.dtype) for part in (code, code * code))
    w = (width * squares.long() - total.long() ** 2 + eps).clamp(min=1)
    half = (62 - bit_length(w)) >> 1
    return half_up_shifted(width * code - total, half + NORM_BITS, square_root(w << (2 * half)))


# --- I-BERT's polynomials ---------------------------------------------------------------------------------------------

LN2 = 45426  # Q16, rounded, as all below
RECIPROCAL_LN2 = 2**48 // LN2 + 1
EXP_A, EXP_B, EXP_C = 23495, 88670, 1477468750  # 0.3585 (p + 1.353)^2 + 0.344; c is Q32
ERF_A, ERF_B, HALF_ROOT = 18927, 115933, 46341  # 1 - 0.2888 (t - 1.769)^2; 1 / sqrt(2)


def exp_polynomial(x: Tensor) -> Tensor:
    """exp(-x), x >= 0 Q16 -> Q24: 2^-z L(-r) with x = z ln 2 + r (I-BERT, eq. 12 to 14). Raises ValueError
    where x < 0."""
    check_range("argument", x, 0, 2**63 - 1, "it is a distance below the largest")
    x = x.long().clamp(max=51 * LN2)  # beyond, it is 0 as well; then z is exact: x / ln 2 is at least 1 / LN2 apart
    z = (x * RECIPROCAL_LN2) >> 48
    square = (EXP_B - (x - z * LN2)) ** 2
    value = rounding_shift_right(square * EXP_A, INPUT_BITS) + EXP_C
    return rounding_shift_right(value, z.clamp(max=50) + 32 - EXP_BITS)


def gelu_polynomial(x: Tensor) -> Tensor:
    """x / 2 (1 + sign(x) (1 - 0.2888 (min(|t|, 1.769) - 1.769)^2)), t = x / sqrt 2; Q16 -> Q20 (I-BERT, eq. 8)."""
    x = x.long().clamp(-ARGUMENT, ARGUMENT)
    t = rounding_shift_right(x.abs() * HALF_ROOT, INPUT_BITS).clamp(max=ERF_B)
    erf = (1 << 32) - rounding_shift_right((t - ERF_B) ** 2 * ERF_A, INPUT_BITS)  # Q32
    erf = rounding_shift_right(torch.where(x < 0, -erf, erf), 32 - INPUT_BITS)
    return rounding_shift_right(x * ((1 << INPUT_BITS) + erf), 2 * INPUT_BITS + 1 - GELU_BITS)


def sigmoid_polynomial(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), Q16 -> Q28, the exponential by its polynomial."""
    x = x.long().clamp(-ARGUMENT, ARGUMENT)  # beyond, the exponential is 0; -2^63 has no magnitude
    e = exp_polynomial(x.abs())
    top = torch.where(x < 0, e, 1 << EXP_BITS)
    return half_up_shifted(top, PROBABILITY_BITS, e + (1 << EXP_BITS))


def tanh_polynomial(x: Tensor) -> Tensor:
    """2 sigmoid(2 x) - 1, Q16 -> Q28."""
    return 2 * sigmoid_polynomial(2 * x.long().clamp(-ARGUMENT, ARGUMENT)) - (1 << PROBABILITY_BITS)


POLYNOMIALS = {
    "gelu": (gelu_polynomial, GELU_BITS),
    "sigmoid": (sigmoid_polynomial, PROBABILITY_BITS),
    "tanh": (tanh_polynomial, PROBABILITY_BITS),
}
