"""Comparators: each holds what was got to what was wanted and returns a `Verdict`.

NaN anywhere fails, and so does a wrong shape. Tolerance is exact unless the caller gives a number and its reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float64": 2.0**-52}  # spacing of the numbers just above 1


@dataclass(frozen=True)
class Verdict:
    """One comparison. `error`, in the unit of `measure`, is the worst; it was met at `index`."""

    what: str  # the tensor or quantity: a site, a parameter, "loss"
    measure: str
    error: float
    tolerance: float
    reason: str  # why the tolerance is what it is
    ok: bool
    index: tuple[int, ...] | None = None
    got: Any = None
    want: Any = None

    @property
    def strain(self) -> float:
        """The error as a share of the tolerance: above 1 fails; infinite for any error where exactness was asked."""
        if self.ok and self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance and not math.isnan(self.error) else math.inf


def exact(what: str, got: Any, want: Any) -> Verdict:
    """Every element equal to the bit (minus zero is not zero); the error is the largest difference."""
    got, want = np.asarray(got), np.asarray(want)
    if (wrong := _refuse_shapes(what, "exact", got, want)) is not None:
        return wrong
    differs = got != want
    if got.dtype.kind == want.dtype.kind == "f":
        differs |= np.signbit(got) != np.signbit(want)
    error = _difference(got, want)
    worst = np.where(differs, np.maximum(error, np.finfo(float).tiny), 0.0)
    return _judge(what, "exact", float(worst.max(initial=0.0)), 0.0, "every bit", got, want, worst)


def within(what: str, got: Any, want: Any, tolerance: float, reason: str) -> Verdict:
    """max |got - want| at most `tolerance`."""
    got, want = np.asarray(got), np.asarray(want)
    if (wrong := _refuse_shapes(what, "max abs", got, want)) is not None:
        return wrong
    error = _difference(got, want)
    return _judge(what, "max abs", float(error.max(initial=0.0)), tolerance, reason, got, want, error)


def relative(what: str, got: Any, want: Any, tolerance: float, reason: str) -> Verdict:
    """max |got - want| at most `tolerance` times max |want|."""
    got, want = np.asarray(got), np.asarray(want)
    if (wrong := _refuse_shapes(what, "max relative", got, want)) is not None:
        return wrong
    error = _difference(got, want)
    return _judge(
        what, "max relative", _share(error.max(initial=0.0), _largest(want)), tolerance, reason, got, want, error
    )


def relative_rms(what: str, got: Any, want: Any, tolerance: float, reason: str) -> Verdict:
    """RMS of got - want at most `tolerance` times the RMS of want."""
    got, want = np.asarray(got), np.asarray(want)
    if (wrong := _refuse_shapes(what, "relative rms", got, want)) is not None:
        return wrong
    error = _difference(got, want)
    return _judge(what, "relative rms", _share(rms(error), rms(want)), tolerance, reason, got, want, error)


def against_truth(
    what: str, got: Any, truth: Any, eps: float, c: float, reason: str, plain: Any = None, scale: float | None = None
) -> Verdict:
    """RMS error against float64 at most max(2 x that of `plain`, c eps max |truth|).

    `plain` is what an obvious composition of another library gives (None: the second bound alone). `scale` stands for
    max |truth| where the truth is 0 by theory and only noise is left of its terms.
    """
    got, truth = np.asarray(got), np.asarray(truth)
    if (wrong := _refuse_shapes(what, "rms", got, truth)) is not None:
        return wrong
    error = _difference(got, truth)
    tolerance = c * eps * (_largest(truth) if scale is None else scale)
    if plain is not None:
        tolerance = max(tolerance, 2 * rms(_difference(np.asarray(plain), truth)))
    return _judge(what, "rms", rms(error), tolerance, reason, got, truth, error)


def equal(what: str, got: Any, want: Any) -> Verdict:
    """Two plain values, names or lists of them that must be the same."""
    ok = bool(got == want)
    return Verdict(what, "equal", 0.0 if ok else math.inf, 0.0, "the same", ok, None, got, want)


def holds(what: str, got: float, below: float, reason: str) -> Verdict:
    """A single number that must not be above another."""
    return Verdict(what, "value", got, below, reason, bool(got <= below), None, got, below)


def report(what: str, measure: str, value: float, reason: str) -> Verdict:
    """A measurement without a bound; only NaN and infinity fail."""
    return Verdict(what, measure, value, math.inf, reason, math.isfinite(value))


def rms(x: np.ndarray) -> float:
    x = np.asarray(x, np.float64)
    return float(np.sqrt(np.square(x).mean())) if x.size else 0.0


def _difference(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """|got - want| in float64; infinities that agree differ by 0, NaN stays NaN."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b))


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x.astype(np.float64)).max(initial=0.0))


def _share(error: float, scale: float) -> float:
    return float(error / scale) if scale else (0.0 if error == 0 else math.inf)


def _refuse_shapes(what: str, measure: str, got: np.ndarray, want: np.ndarray) -> Verdict | None:
    if got.shape == want.shape:
        return None
    return Verdict(what, measure, math.inf, 0.0, "shapes differ", False, None, list(got.shape), list(want.shape))


def _judge(
    what: str,
    measure: str,
    error: float,
    tolerance: float,
    reason: str,
    got: np.ndarray,
    want: np.ndarray,
    by: np.ndarray,
) -> Verdict:
    """`by` is the error of each element; its first NaN, else its largest, is where."""
    if not by.size:
        return Verdict(what, measure, 0.0, tolerance, reason, True)
    bad = np.isnan(got.astype(np.float64)) | np.isnan(want.astype(np.float64))
    place = int(bad.argmax() if bad.any() else np.nan_to_num(by, nan=math.inf).argmax())
    index = tuple(int(i) for i in np.unravel_index(place, by.shape))
    ok = not bad.any() and error <= tolerance
    error = math.nan if bad.any() else error
    return Verdict(what, measure, error, tolerance, reason, bool(ok), index, got[index].item(), want[index].item())
