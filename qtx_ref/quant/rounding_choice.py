"""Which way each weight is rounded, chosen for what its linear computes: GPTQ and AdaRound.

With x the inputs of calibration and G = sum x x^T their Gram matrix (I, I), the error of a row w~ in place of w is
sum (w~ x - w x)^2 = (w~ - w) G (w~ - w)^T. Both look for codes of small error on the given grid, whose scale is one per
tensor or per row; a row for which plain rounding to nearest has no larger error keeps that.

Arrays: weights (O, I), or (H, O, I) with a matrix per head, float32; Gram matrices (I, I), or (H I, H I) of which each
head has its part on the diagonal, float64 or float32; scales (float32) and zero points (int32) one, or (O, 1). Inside,
rows (O, I) are float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg, special

from ..spec import FloatQuantSpec, Quant, QuantSpec, SpecError
from . import affine

__all__ = ["adaround", "check_grid", "descend", "gptq", "per_matrix", "row_errors"]

ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid (Nagel et al. 2020, eq. 23)
ROWS = 64  # that AdaRound works on at a time, so that they stay in the cache


def row_errors(change: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """(w~ - w) G (w~ - w)^T of each row, (O,)."""
    return np.einsum("oi,oi->o", change @ gram, change)


def check_grid(quant: Quant, site: str) -> None:
    """Raises SpecError for a quantizer that has no fixed uniform grid, naming its site."""
    if isinstance(quant, FloatQuantSpec) or quant.dynamic:
        kind = "a small float" if isinstance(quant, FloatQuantSpec) else "dynamic"
        raise SpecError(f"the quantizer of {site} is {kind}: gptq and adaround choose codes of a static uniform grid")
    if quant.axis is not None:
        raise SpecError(f"the quantizer of {site} names axis {quant.axis}: gptq and adaround have one grid per row")


def per_matrix(
    choose: Callable[..., np.ndarray],
    weight: np.ndarray,
    gram: np.ndarray,
    quant: QuantSpec,
    scale: np.ndarray,
    zero_point: np.ndarray,
) -> np.ndarray:
    """`choose(weight, gram, scale, zero)` in float64 for a matrix (O, I), or for each head's of (H, O, I) with its part
    of gram (H I, H I); rows that it does not better, rounded to nearest."""
    scale = np.broadcast_to(np.asarray(scale, np.float32), (*weight.shape[:-1], 1))
    zero = np.broadcast_to(np.asarray(zero_point), scale.shape)
    if weight.ndim == 3:
        width = weight.shape[-1]
        parts = [slice(h * width, (h + 1) * width) for h in range(len(weight))]
        heads = [per_matrix(choose, weight[h], gram[p, p], quant, scale[h], zero[h]) for h, p in enumerate(parts)]
        return np.stack(heads)
    plain, _ = affine.fake_quantize(weight, scale, zero, quant)
    chosen = choose(weight.astype(np.float64), gram, scale, zero).astype(weight.dtype)
    better = row_errors(chosen - weight.astype(np.float64), gram) < row_errors(plain - weight.astype(np.float64), gram)
    return np.where(better[:, None], chosen, plain)


def gptq(
    weight: np.ndarray,
    gram: np.ndarray,
    quant: QuantSpec,
    scale: np.ndarray,
    zero_point: np.ndarray,
    damping: float = 0.01,
    block: int = 128,
) -> np.ndarray:
    """GPTQ (Frantar et al. 2023, algorithm 1), columns in their order: each is rounded to nearest, and what is not yet
    rounded makes up for its error by the inverse of H = G + damping mean(diag G) I; updates reach the columns beyond a
    block at its end. A channel without input has H = 1 on the diagonal.

    weight (O, I), or (H, O, I); gram (I, I), or (H I, H I). The quantizer is uniform (`check_grid`). Returns values of
    the grid: `fake_quantize` gives them back to the bit.
    """

    def choose(w: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        h = gram.astype(np.float64)
        h[np.diag_indices_from(h)] += damping * np.diag(gram).mean()
        dead = np.diag(h) <= 0
        h[dead, dead] = 1.0
        inverse = linalg.cho_solve(linalg.cho_factor(h, lower=True), np.eye(len(h)))
        upper = linalg.cholesky(inverse)  # inverse = U^T U
        w, rounded = w.copy(), np.empty_like(w)
        for first in range(0, w.shape[1], block):
            last = min(first + block, w.shape[1])
            errors = np.empty((len(w), last - first))
            for j in range(first, last):
                column = w[:, j : j + 1].astype(np.float32)
                rounded[:, j] = affine.fake_quantize(column, scale, zero, quant)[0][:, 0]
                errors[:, j - first] = (w[:, j] - rounded[:, j]) / upper[j, j]
                w[:, j:last] -= np.outer(errors[:, j - first], upper[j, j:last])
            w[:, last:] -= errors @ upper[first:last, last:]
        return rounded

    return per_matrix(choose, weight, gram, quant, scale, zero_point)


def adaround(
    weight: np.ndarray,
    gram: np.ndarray,
    quant: QuantSpec,
    scale: np.ndarray,
    zero_point: np.ndarray,
    *,
    iterations: int = 1000,
    rate: float = 0.02,
    weighting: float = 0.3,
    warm: float = 0.2,
) -> np.ndarray:
    """AdaRound (Nagel et al. 2020, eq. 21 to 25): each weight is floor(w / s) + h(V), clipped to the codes, with the
    rectified sigmoid h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1). V is found by Adam on

        error in units of s / mean(diag G) + weighting sum(1 - |2 h(V) - 1|^beta),

    from h(V) = w / s - floor(w / s); beta falls from 20 to 2 by a cosine after the first `warm` share of the
    iterations, which leave the regulariser out. In the end h is rounded. Rows do not touch each other, so that a unit
    per row changes no minimum. Rate and weighting (0.3: the paper's 0.01 belongs to another unit and to ten times as
    many steps) are those of least error on correlated inputs here. Adam's steps are float32; errors are compared in
    float64.

    Arguments and result as of `gptq`.
    """

    def choose(w: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        energy = np.diag(gram).mean()
        if energy <= 0:
            return w
        unit = (gram / energy).astype(np.float32)
        target = w / scale  # in units of the scale, the zero point left out
        floor = np.floor(target)
        ends = quant.code_min - zero, quant.code_max - zero
        up = np.empty(w.shape, bool)
        for first in range(0, len(w), ROWS):
            part = slice(first, first + ROWS)
            low, high = (end[part].astype(np.float32) for end in ends)
            share, base = (target - floor)[part], floor[part].astype(np.float32)
            up[part] = descend(share, base, low, high, unit, iterations, rate, weighting, warm)
        return scale * np.clip(floor + up, *ends).astype(np.float32)

    return per_matrix(choose, weight, gram, quant, scale, zero_point)


def descend(
    share: np.ndarray,
    floor: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    gram: np.ndarray,
    iterations: int,
    rate: float,
    weighting: float,
    warm: float,
) -> np.ndarray:
    """Which weights `adaround` rounds up, boolean (O, I): share = w / s - floor(w / s), codes floor + h(V) inside low
    to high."""
    start = np.clip((share - GAMMA) / (ZETA - GAMMA), 1e-6, 1 - 1e-6)
    v = special.logit(start).astype(np.float32)
    share = share.astype(np.float32)
    first, second = np.zeros_like(v), np.zeros_like(v)  # Adam's moments (Kingma and Ba 2015)
    for step in range(iterations):
        sigmoid = special.expit(v)
        h = np.clip(sigmoid * (ZETA - GAMMA) + GAMMA, 0, 1)
        moved = np.clip(h, low - floor, high - floor)
        slope = 2 * ((moved - share) @ gram) * (moved == h)
        if step >= warm * iterations:
            progress = (step - warm * iterations) / ((1 - warm) * iterations)
            beta = 2 + 9 * (1 + np.cos(progress * np.pi))
            away = 2 * h - 1
            slope -= np.float32(2 * weighting * beta) * np.copysign(np.abs(away) ** np.float32(beta - 1), away)
        slope *= sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1)) * (ZETA - GAMMA)
        first += 0.1 * (slope - first)
        second += 0.001 * (slope * slope - second)
        root = np.sqrt(second * np.float32(1 / (1 - 0.999 ** (step + 1)))) + np.float32(1e-8)
        v -= np.float32(rate / (1 - 0.9 ** (step + 1))) * first / root
    return special.expit(v) * (ZETA - GAMMA) + GAMMA >= 0.5
