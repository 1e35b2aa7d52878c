"""Training watched in integers: its points, its picture, and what it refuses."""

import json
import math

import pytest

from parity_tests.tests.shell import TRAIN, call, good
from qtx.jobs import watch
from qtx.measure.history import WATCH, History
from qtx.measure.outliers import Outliers
from qtx.report.plots import draw_curves
from qtx_ref.spec import SpecError


def test_training_is_watched_in_integers(tmp_path):
    command = (*TRAIN, "--out", tmp_path, "--watch-integer", 4, "--json", "-")
    got = json.loads(good(*command).stdout)
    assert got["integer_step"] == [0, 4, 8]
    assert len(got["watched_inf_norm"]) == 3 and min(got["watched_inf_norm"]) > 0
    for integer, floating in zip(got["integer_perplexity"], got["float_perplexity"], strict=True):
        assert integer != floating
        assert abs(integer / floating - 1) < 0.05
    unwatched = json.loads(good(*TRAIN, "--out", tmp_path / "b", "--json", "-").stdout)
    assert unwatched["loss"] == got["loss"]  # watching changes nothing


def test_a_run_is_resumed_watched_or_not(tmp_path):
    """Watching changes no bit, and so no run."""
    loss = json.loads(good(*TRAIN, "--out", tmp_path, "--watch-integer", 8, "--json", "-").stdout)["loss"]
    assert json.loads(good(*TRAIN, "--out", tmp_path, "--resume", "--json", "-").stdout)["loss"] == loss


def test_a_point_that_is_not_finite_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "measure_outliers", lambda *_: Outliers(1.0, "a", math.inf, 1.0, "a"))
    result = call(*TRAIN, "--out", tmp_path, "--watch-integer", 4)
    assert result.exit_code == 1 and "kurtosis not finite" in result.output  # before training; later it goes on


def test_the_watch_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    watched = History([3.0, 2.0], [1, 2], [5.0, 6.0])
    for step, values in ((1, (3.0, 2.9, 3.0, 5.0)), (2, (2.1, 2.0, 3.1, 6.0))):
        watched.add(step, dict(zip(WATCH, values, strict=True)))
    draw_curves(tmp_path / "a.png", {"plain": History([3.0], [1], [5.0])}, "one")
    draw_curves(tmp_path / "b.png", {"watched": watched}, "two")
    assert (tmp_path / "b.png").stat().st_size > (tmp_path / "a.png").stat().st_size


def test_a_watch_that_could_not_run_is_refused_before_training(tmp_path):
    result = call(*TRAIN, "--attention", "clipped:gamma=-70", "--watch-integer", 4, "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert "gamma" in result.output and "cannot run in integers" in result.output
    assert isinstance(result.exception, SystemExit) and not isinstance(result.exception, SpecError)
