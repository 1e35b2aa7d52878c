"""The checker is checked: every comparator refuses what it must, and so do the runner and its report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from parity_tests.proof import verdict
from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict
from parity_tests.runner import Report, Row, report_rows, run, run_case
from qtx_ref.spec import SpecError

X = np.linspace(-2, 3, 24, dtype=np.float32).reshape(4, 6)
COMPARATORS: dict[str, Callable[[np.ndarray, np.ndarray], Verdict]] = {
    "exact": lambda got, want: verdict.exact("x", got, want),
    "within": lambda got, want: verdict.within("x", got, want, 1e-3, "test"),
    "relative": lambda got, want: verdict.relative("x", got, want, 1e-3, "test"),
    "relative_rms": lambda got, want: verdict.relative_rms("x", got, want, 1e-3, "test"),
    "against_truth": lambda got, want: verdict.against_truth("x", got, want, 1e-4, 4.0, "test", plain=want),
}


def change_one(x: np.ndarray, value: float) -> np.ndarray:
    y = x.copy()
    y[2, 3] = value
    return y


@pytest.mark.parametrize("name", COMPARATORS)
def test_comparators_refuse(name: str) -> None:
    check = COMPARATORS[name]
    assert check(X, X.copy()).ok
    for got, want in [
        (change_one(X, np.nan), X),
        (X, change_one(X, np.nan)),
        (change_one(X, np.nan), change_one(X, np.nan)),
    ]:
        result = check(got, want)
        assert not result.ok and result.index == (2, 3) and math.isnan(result.error)
    assert not check(change_one(X, np.inf), X).ok
    assert not check(X[:3], X).ok
    assert not check(X.reshape(6, 4), X).ok
    assert not check(2 * X, X).ok  # the cosine of these is 1
    result = check(change_one(X, X[2, 3] + 1), X)
    assert not result.ok and result.index == (2, 3) and result.got == X[2, 3] + 1 and result.want == X[2, 3]


def test_exact_means_every_bit() -> None:
    codes = np.arange(12, dtype=np.int32).reshape(3, 4)
    off = codes.copy()
    off[1, 2] += 1
    result = verdict.exact("codes", off, codes)
    assert not result.ok and result.error == 1 and result.index == (1, 2)
    assert not verdict.exact("x", np.float32([0.0]), np.float32([-0.0])).ok
    assert not verdict.exact("x", np.nextafter(np.float32(1), np.float32(2)), np.float32(1)).ok
    assert verdict.exact("x", np.float32([np.inf]), np.float32([np.inf])).ok


def test_bounds_of_truth() -> None:
    truth = np.ones(100)
    assert verdict.against_truth("x", truth + 1e-3, truth, 1e-4, 4.0, "test", plain=truth + 6e-4).ok
    assert not verdict.against_truth("x", truth + 1e-3, truth, 1e-4, 4.0, "test", plain=truth + 4e-4).ok
    assert verdict.against_truth("x", truth + 3e-4, truth, 1e-4, 4.0, "test").ok
    assert not verdict.against_truth("x", truth * 1e-9, truth * 0, 1e-4, 4.0, "test").ok
    assert verdict.against_truth("x", truth * 1e-9, truth * 0, 1e-4, 4.0, "test", scale=1.0).ok


def test_numbers_that_are_not() -> None:
    assert not verdict.holds("x", math.nan, 1.0, "test").ok
    assert not verdict.report("x", "rate", math.nan, "test").ok
    assert not verdict.report("x", "rate", math.inf, "test").ok
    assert not verdict.equal("names", ["a", "b"], ["b", "a"]).ok


def test_a_case_that_raises_or_compares_nothing_fails() -> None:
    def fail(context: Context) -> list[Verdict]:
        raise RuntimeError("two\nlines")

    row = run_case(Case("g", "broken", "ref", fail), Context())
    assert not row.ok and row.failure == "RuntimeError: two lines"
    assert not run_case(Case("g", "empty", "ref", lambda context: []), Context()).ok
    assert not Report("ref", "cpu", "float32").ok


def test_report_names_the_worst_and_is_json() -> None:
    good, bad = verdict.exact("a", X, X), verdict.exact("b", change_one(X, np.nan), X)
    report = Report("ref", "cpu", "float32", [Row("g", "fine", 0.1, (good,)), Row("g", "bad", 0.1, (good, bad))])
    assert [line[1] for line in report_rows(report)] == ["ok", "FAIL"] and not report.ok
    assert report_rows(report)[1][5] == "b [2, 3]"
    written = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert written["cases"] == {"g": 2} and written["rows"][1]["verdicts"][1]["error"] == "nan"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"backend": "jax"}, "'jax'"),
        ({"dtype": "float16"}, "'float16'"),
        ({"backend": "ref", "dtype": "bfloat16"}, "'bfloat16'"),
        ({"only": "no-such-case"}, "'no-such-case'"),
        ({"device": "tpu"}, "'tpu'"),
        ({"backend": "ref", "device": "cuda"}, "'cuda'"),
    ],
)
def test_runner_refuses(asked: dict[str, str], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        run(**asked)
