"""Sums, softmax, LayerNorm and nonlinear functions in integers.

Values are integers in a stated unit: "Q28" counts 2^-28. Divisions are floors of exact quotients with the half added
first, so they round half up.

Arrays: int64 unless said otherwise, so that every product below fits; element by element, arguments broadcast against
each other, unless a shape is said.

Tables hold one entry per code and are made once, in float64, by `lowering`. The polynomials are those of I-BERT (Kim et
al. 2021, arXiv 2101.01321, sections 3.4 and 3.5) evaluated in integers; its published code evaluates them in floats.
"""

from __future__ import annotations

import numpy as np

from ..quant.checks import check_range, check_shape
from ..spec import ONE_ROUNDING, AddRule
from .fixed_point import INT32_MAX, INT32_MIN, multiply_exact, rounding_shift_right, shift_right

__all__ = [
    "EXP_BITS",
    "GELU_BITS",
    "INPUT_BITS",
    "NORM_BITS",
    "POLYNOMIALS",
    "PROBABILITY_BITS",
    "SINK_BITS",
    "ZETA_BITS",
    "bit_length",
    "clip_stretch",
    "exp_polynomial",
    "gelu_polynomial",
    "half_up",
    "half_up_shifted",
    "mean",
    "normalize",
    "row_gamma",
    "sigmoid_polynomial",
    "softmax",
    "square_root",
    "tanh_polynomial",
    "weighted_sum",
]

EXP_BITS = 24  # an exponential is at most 1
PROBABILITY_BITS = 28
SINK_BITS = 20  # the part of a sink's exponential that lies between two codes
ZETA_BITS = 24
NORM_BITS = 16  # of a normalized value, |r| <= sqrt(D)
INPUT_BITS = 16  # of a polynomial's argument
GELU_BITS = 20
ARGUMENT = 2**26  # Q16, of a polynomial: 1024, far beyond where each is flat


def half_up(numerator: np.ndarray, denominator: np.ndarray | int) -> np.ndarray:
    """floor(numerator / denominator + 1/2), denominator > 0. No int64 is too large: nothing is doubled."""
    quotient, rest = np.divmod(numerator, denominator)
    return quotient + (rest >= denominator - rest)


def half_up_shifted(numerator: np.ndarray, shift: np.ndarray | int, denominator: np.ndarray) -> np.ndarray:
    """floor(numerator 2^shift / denominator + 1/2) of one denominator > 0 per row; no more than int64 holds."""
    return half_up(numerator.astype(np.int64) << shift, denominator)


def weighted_sum(
    parts: list[np.ndarray], multipliers: list[np.ndarray], shift: np.ndarray, rule: AddRule
) -> np.ndarray:
    """round(sum_i parts_i multipliers_i / 2^shift), the products and their sum exact, one rounding.

    Parts are codes less their zero points or int32 accumulators, three at most; multipliers, up to 2^30, and shift are
    one, or one per column. Raises ValueError beyond these, and where a multiplier or shift does not fit the shape of
    the sum.
    """
    if len(parts) > 3:
        raise ValueError(f"{len(parts)} parts: the sum of more than 3 could leave int64")
    total, shape = np.int64(0), np.broadcast_shapes(*(part.shape for part in parts))
    for part, multiplier in zip(parts, multipliers, strict=True):
        check_range("part", part, INT32_MIN, INT32_MAX, "a sum takes codes, or accumulators of 32 bits")
        check_range("multiplier", multiplier, 0, 2**30, "use lowering.common_shift")
        check_shape("multiplier", multiplier, shape, "give one, or one per column")
        total = total + part.astype(np.int64) * multiplier
    check_shape("shift", shift, shape, "give one, or one per column")
    return shift_right(total, shift, rule.rounding)


def mean(x: np.ndarray, where: np.ndarray | None) -> np.ndarray:
    """Mean over axis 1 of the rows where `where` (B, T, 1) is true, half up: (B, T, C) -> (B, 1, C); 0 without a row.

    Raises ValueError where the sum could leave int64.
    """
    limit = 2**63 // max(x.shape[1], 1) - 1
    check_range("value", x, -limit, limit, f"the sum of {x.shape[1]} rows would leave int64")
    x = x.astype(np.int64)
    if where is None:
        return half_up(x.sum(axis=1, keepdims=True), x.shape[1])
    count = np.maximum(where.astype(np.int64).sum(axis=1, keepdims=True), 1)
    return half_up((x * where).sum(axis=1, keepdims=True), count)


# --- softmax ----------------------------------------------------------------------------------------------------------


def softmax(
    code: np.ndarray,
    mask: np.ndarray,
    exponential: np.ndarray | tuple[np.ndarray, np.ndarray],
    sink: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Probabilities, Q28, of score codes (B, H, Tq, Tk) under a mask that broadcasts against them.

    e_j = exponential[m - code_j] (Q24), m the row's largest code; p_j = e_j / sum e. `exponential` is a table, its last
    entry standing for all larger distances, or the multiplier and shift that turn a distance into Q16 for the
    polynomial. `sink` is (code, factor Q20), each (H,) or (1,): a further logit of no key, exp(sink) =
    exponential[m - code] factor. A row without keys gives zeros. Raises ValueError for codes beyond 30 bits and factors
    beyond 36.
    """
    check_range("score", code, -(2**30), 2**30 - 1, "scores are codes of 16 bits at most")
    code = code.astype(np.int64)
    mask = np.broadcast_to(mask, code.shape)
    lowest = np.iinfo(np.int32).min
    largest = np.where(mask, code, lowest).max(axis=-1, keepdims=True)
    if sink is not None:
        check_range("sink", sink[0], -(2**30), 2**30 - 1, "it is a code, or near one")
        check_range("sink factor", sink[1], 0, 2**36, "its product with an exponential would leave int64")
        position, factor = (part.astype(np.int64).reshape(-1, 1, 1) for part in sink)
        largest = np.maximum(largest, position)

    def exp(distance: np.ndarray) -> np.ndarray:
        if isinstance(exponential, tuple):
            return exp_polynomial(multiply_exact(distance.astype(np.int32), *exponential, ONE_ROUNDING))
        return exponential[np.minimum(distance, exponential.size - 1)].astype(np.int64)

    e = exp(np.where(mask, largest - code, 0)) * mask
    total = e.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + rounding_shift_right(exp(largest - position) * factor, SINK_BITS)
    return half_up_shifted(e, PROBABILITY_BITS, np.maximum(total, 1))


def clip_stretch(p: np.ndarray, zeta: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """clip((zeta - gamma) p + gamma, 0, 1) as zeta p + gamma (1 - p): p and gamma <= 0 Q28, zeta Q24 -> Q28.

    Raises ValueError where p is not in [0, 1], zeta in [0, 64] or gamma in [-64, 0].
    """
    check_range("probability", p, 0, 1 << PROBABILITY_BITS, "it is at most 1, in Q28")
    check_range("zeta", zeta, 0, 64 << ZETA_BITS, "it is at most 64, in Q24")
    check_range("gamma", gamma, -(64 << PROBABILITY_BITS), 0, "it is at least -64, in Q28")
    one = 1 << PROBABILITY_BITS
    stretched = rounding_shift_right(zeta * p, ZETA_BITS) + rounding_shift_right(gamma * (one - p), PROBABILITY_BITS)
    return np.clip(stretched, 0, one)


def row_gamma(alpha: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """-alpha / keys of each row, Q28: alpha Q28, mask (..., Tq, Tk) -> (..., Tq, 1). Raises ValueError where alpha is
    not in [0, 64]."""
    check_range("alpha", alpha, 0, 64 << PROBABILITY_BITS, "it is at most 64, in Q28")
    keys = np.maximum(mask.astype(np.int64).sum(axis=-1, keepdims=True), 1)
    return -half_up(alpha, keys)


# --- LayerNorm --------------------------------------------------------------------------------------------------------


def square_root(x: np.ndarray) -> np.ndarray:
    """floor(sqrt(x)) for x in [2^60, 2^62): Newton's method from above (I-BERT, algorithm 4)."""
    root = np.full_like(x, 2**31)
    for _ in range(6):  # the error, at most 1 at first, is squared and halved each time
        root = (root + x // root) >> 1
    return root - (root * root > x)


def bit_length(x: np.ndarray) -> np.ndarray:
    """The number of bits of x in [1, 2^62)."""
    length = np.ones_like(x)
    for step in (32, 16, 8, 4, 2, 1):
        more = (x >> step > 0) * step
        x, length = x >> more, length + more
    return length


def normalize(code: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) over the last axis, Q16, from codes of at most 16 bits; their zero point cancels.

    With n = D c - sum c and W = D sum c^2 - (sum c)^2 + eps', it is n / sqrt(W): eps' = eps (D / scale)^2 as an
    integer. W is shifted up by an even number of bits into [2^60, 2^62) before its root is taken. Raises ValueError
    where W could leave them, which takes a D of more than 28,000 with 16-bit codes, or codes of more bits.
    """
    width, limits = code.shape[-1], np.iinfo(code.dtype)
    check_range("eps", eps, 0, 2**60, "values are too small beside it")
    if (width * (limits.max - limits.min)) ** 2 + 2**60 >= 2**62:  # the dtype alone does not say that it fits
        span = int(code.max(initial=0)) - int(code.min(initial=0))
        if (width * span) ** 2 + 2**60 >= 2**62:
            raise ValueError(f"{width} codes that span {span}: their variance would leave int64; use fewer bits")
    code = code.astype(np.int64)
    code = code - code[..., :1]  # smaller squares; it cancels too
    total = code.sum(axis=-1, keepdims=True)
    w = np.maximum(width * (code * code).sum(axis=-1, keepdims=True) - total * total + eps, 1)
    half = (62 - bit_length(w)) >> 1
    return half_up_shifted(width * code - total, half + NORM_BITS, square_root(w << (2 * half)))  # sqrt(D) 2^47 at most


# --- I-BERT's polynomials ---------------------------------------------------------------------------------------------

LN2 = 45426  # Q16, rounded, as all below
EXP_A, EXP_B, EXP_C = 23495, 88670, 1477468750  # 0.3585 (p + 1.353)^2 + 0.344; c is Q32
ERF_A, ERF_B, HALF_ROOT = 18927, 115933, 46341  # 1 - 0.2888 (t - 1.769)^2; 1 / sqrt(2)


def exp_polynomial(x: np.ndarray) -> np.ndarray:
    """exp(-x), x >= 0 Q16 -> Q24: 2^-z L(-r) with x = z ln 2 + r (I-BERT, eq. 12 to 14). Raises ValueError
    where x < 0."""
    check_range("argument", x, 0, 2**63 - 1, "it is a distance below the largest")
    x = x.astype(np.int64)
    z, r = x // LN2, x % LN2
    square = (EXP_B - r) ** 2
    value = rounding_shift_right(square * EXP_A, INPUT_BITS) + EXP_C
    return rounding_shift_right(value, np.minimum(z, 50) + 32 - EXP_BITS)


def gelu_polynomial(x: np.ndarray) -> np.ndarray:
    """x / 2 (1 + sign(x) (1 - 0.2888 (min(|t|, 1.769) - 1.769)^2)), t = x / sqrt 2; Q16 -> Q20 (I-BERT, eq. 8)."""
    x = np.clip(x.astype(np.int64), -ARGUMENT, ARGUMENT)
    t = np.minimum(rounding_shift_right(np.abs(x) * HALF_ROOT, INPUT_BITS), ERF_B)
    erf = (1 << 32) - rounding_shift_right((t - ERF_B) ** 2 * ERF_A, INPUT_BITS)  # Q32
    erf = rounding_shift_right(np.where(x < 0, -erf, erf), 32 - INPUT_BITS)
    return rounding_shift_right(x * ((1 << INPUT_BITS) + erf), 2 * INPUT_BITS + 1 - GELU_BITS)


def sigmoid_polynomial(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), Q16 -> Q28, the exponential by its polynomial."""
    x = np.clip(x.astype(np.int64), -ARGUMENT, ARGUMENT)  # beyond, the exponential is 0; -2^63 has no magnitude
    e = exp_polynomial(np.abs(x))
    top = np.where(x < 0, e, 1 << EXP_BITS)
    return half_up_shifted(top, PROBABILITY_BITS, e + (1 << EXP_BITS))


def tanh_polynomial(x: np.ndarray) -> np.ndarray:
    """2 sigmoid(2 x) - 1, Q16 -> Q28."""
    return 2 * sigmoid_polynomial(2 * np.clip(x.astype(np.int64), -ARGUMENT, ARGUMENT)) - (1 << PROBABILITY_BITS)


POLYNOMIALS = {
    "gelu": (gelu_polynomial, GELU_BITS),
    "sigmoid": (sigmoid_polynomial, PROBABILITY_BITS),
    "tanh": (tanh_polynomial, PROBABILITY_BITS),
}
