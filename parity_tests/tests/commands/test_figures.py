"""Pictures by their artists: titles, labels with units, kinds of scale, legends, and a mark for every row."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra report")

from qtx.measure.analysis import Analysis, SiteSums, bin_edges
from qtx.measure.history import WATCH, History
from qtx.report.costs import make_cost_figure
from qtx.report.figures import choose_looks, plain, spans_decades
from qtx.report.outliers import make_channel_figure, make_depth_figure, make_histogram_figure, space_apart
from qtx.report.plots import make_curve_figure
from qtx.report.ptq import make_row_figure

NAMES = [f"{kind}-seed{seed}" for seed in range(3) for kind in ("vanilla", "clipped", "gated")]


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def record(loss, watched=False):
    history = History(loss, [1, 2], [4.0, 4.6])
    for step, (integer, real, kurtosis) in ((0, (2000.0, 1990.0, 3.0)), (10, (150.0, 149.0, 3.5))):
        if watched:
            values = (math.log(integer), math.log(real), kurtosis, 5.0)
            history.add(step, dict(zip(WATCH, values, strict=True)))
    return history


def test_a_logarithmic_axis_needs_a_decade_and_a_half():
    assert spans_decades([1, 32]) and not spans_decades([1, 31])
    assert not spans_decades([0, 1000]) and not spans_decades([-1, 1000]) and not spans_decades([])
    assert spans_decades([1, math.nan, math.inf, None, 100])


def test_curves_say_what_they_are():
    runs = {name: record([7.0 - i / 100, 6.0]) for i, name in enumerate(NAMES)}
    figure = make_curve_figure(runs, "qtx study: opt-tiny")
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "qtx study: opt-tiny" and texts(figure.legends[0]) == NAMES
    assert [panel.get_ylabel() for panel in figure.axes] == [
        "training loss, nats",
        "loss less its seed's mean, nats",
        "max inf norm",
    ]
    assert all(panel.get_yscale() == "linear" and panel.get_xlabel() == "step" for panel in figure.axes)
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in lines}) == len(NAMES)
    apart = [line.get_ydata()[0] for line in figure.axes[1].get_lines()[: len(NAMES)]]
    np.testing.assert_allclose(apart, [0.01, 0, -0.01] * 3, atol=1e-12)


def test_each_watched_run_has_its_own_panel():
    runs = {name: record([7.0, 6.0], watched=True) for name in NAMES[:3]}
    figure = make_curve_figure(runs, "a")
    assert [panel.get_title() for panel in figure.axes[-3:]] == NAMES[:3]
    assert texts(figure.axes[-1].get_legend()) == ["float", "integers"]


@pytest.mark.parametrize("loss", [[], [3.0], [3.0, math.nan, math.inf]])
def test_runs_that_are_short_or_diverged(loss):
    make_curve_figure(
        {"漢字 $x$ (diverged)": record(loss), "b": record([3.0, 2.0])}, "x" * 500
    ).draw_without_rendering()
    make_curve_figure({}, "none").draw_without_rendering()


def test_looks_are_distinct():
    assert len(set(choose_looks([f"run {i}" for i in range(42)]).values())) == 42
    looks = choose_looks(NAMES)
    assert len(set(looks.values())) == 9 and looks["gated-seed0"].color == looks["gated-seed2"].color


def test_words_that_a_font_can_write():
    assert plain("漢 $a$\n\udc80é") == r"? \$a\$ ?é"
    assert len(plain("a" * 500, 20)) == 20


def row(difference, runs_as="integers"):
    low, high = (None, None) if difference is None else (difference - 1, difference + 1)
    numbers = {"value": 80.0, "difference": difference, "low": low, "high": high, "ms": 3.0, "bytes": 2**20}
    return {**numbers, "runs_as": runs_as}


def test_every_row_is_in_the_picture():
    rows = {"float": row(0.0, "float"), **{f"w8a8-{i}": row(-0.1 * i) for i in range(46)}}
    rows |= {"w2a2": row(None), "gptq": row(None, "failed"), "w4a4": row(-40.0, "simulation")}
    figure = make_row_figure("accuracy", rows, "qtx ptq: sst")
    figure.draw_without_rendering()
    whole, near = figure.axes[:2]
    assert [label.get_text() for label in whole.get_yticklabels()] == list(rows)
    assert figure.get_suptitle().startswith("qtx ptq: sst\n") and whole.get_xlabel() == "accuracy, points to float"
    for panel in (whole, near):
        marked = {line.get_ydata()[0] for line in panel.get_lines() if line.get_marker() not in ("None", None)}
        marked |= {
            text.get_position()[1] for text in panel.texts if text.get_text().strip() in ("failed", "not finite")
        }
        assert set(range(len(rows))) <= marked
    assert near.get_xlim()[0] > -10 and whole.get_xlim()[0] < -40
    assert len(texts(figure.legends[0])) == 4
    assert len(texts(make_row_figure("accuracy", {"float": row(0.0, "float")}, "a").legends[0])) == 1
    make_row_figure("perplexity", {}, "none").draw_without_rendering()


def test_damage_has_a_panel_of_its_own():
    def difference(nats):
        return {"nats": nats, "low": nats - 0.01, "high": nats + 0.01}

    damaged = {"w8a8": row(1.0) | {"damage": {"whole": difference(0.5), "part": difference(0.4)}}}
    destroyed = {"w4a8": row(900.0) | {"damage": {"whole": difference(3.0), "part": None}}}
    plain = {"float": row(0.0, "float")}
    count = len(make_row_figure("perplexity", plain, "a").axes)
    figure = make_row_figure("perplexity", plain | damaged | destroyed, "a")
    figure.draw_without_rendering()
    panel = next(panel for panel in figure.axes if "damage" in panel.get_xlabel())
    points = [line.get_xdata()[0] for line in panel.get_lines() if line.get_marker() == "s"]
    assert points == [0.5, 0.4] and [text.get_text().strip() for text in panel.texts] == ["destroyed"]
    assert len(figure.axes) == count + 2  # and the enlarged one


def test_costs_have_a_bar_or_words_for_every_row():
    cell = {
        "1x64": {"median": 0.02, "p95": 0.03, "memory": 2**20},
        "8x128": {"median": 0.8, "p95": 0.9, "memory": 2**21},
    }
    quick = {"1x64": {"median": 0.0004, "p95": 0.0005, "memory": 2**20}, "8x128": {"median": 0.03, "memory": 2**20}}
    variants = [
        {"name": "float32", "cells": quick, "finding": None},
        {"name": "integers", "cells": cell, "finding": None},
    ]
    variants.append({"name": "onnxruntime", "cells": {}, "finding": "crashed"})
    result = {
        "cells": [{"name": "1x64"}, {"name": "8x128"}],
        "variants": variants,
        "checkpoint": "sst",
        "recipe": "w8a8",
    }
    figure = make_cost_figure(result)
    figure.draw_without_rendering()
    assert figure.get_suptitle().startswith("qtx cost: sst, w8a8")
    assert [panel.get_xscale() for panel in figure.axes[:2]] == ["log", "linear"]  # 50 times, and 27
    for panel in figure.axes:
        assert len(panel.patches) == 2 and len(panel.texts) == 3
    assert [panel.get_xlabel() for panel in figure.axes] == ["latency, ms"] * 2 + ["peak memory, MiB"] * 2
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [v["name"] for v in variants]
    make_cost_figure({"cells": [], "variants": []}).draw_without_rendering()


def analysis():
    """One layer whose sum has a far element of 8192 others."""
    stream = ("embed.sum", "layer.0.attn.residual", "layer.0.ffn.residual")
    histogram = np.zeros(len(bin_edges()) - 1, np.int64)
    histogram[np.searchsorted(bin_edges(), [1.0, 100.0]) - 1] = [8191, 1]
    one = {"inf_norm": 2.0, "rms": 1.0, "kurtosis": 4.0}
    names = (*stream, "layer.0.attn.output", "layer.0.ffn.output")
    sites = [SimpleNamespace(site=site, **one) for site in names]
    named = [SimpleNamespace(channel=c) for c in (5, 6, 60)]
    energy = {site: np.linspace(1, 2, 64) for site in stream}
    histograms = dict.fromkeys(stream, histogram)
    return Analysis(sites, stream, named, [], [], [], energy, histograms, {}, None, {}, None)


def test_a_bin_far_out_stands_on_the_axis():
    figure = make_histogram_figure(analysis(), "qtx analyze: sst")
    figure.draw_without_rendering()
    (panel,) = figure.axes
    assert panel.get_title() == "layer.0.ffn.residual" and figure.get_suptitle().startswith("qtx analyze: sst")
    values = panel.patches[0].get_data().values
    assert np.isfinite(values).all() and np.count_nonzero(values) == 2  # no gaps around which dashes would hang
    assert 0 < panel.get_ylim()[0] < 1 / 8192
    assert texts(figure.legends[0]) == ["elements", "a normal variable", "6 times the root mean square"]
    assert SiteSums().histogram.shape == analysis().histograms["embed.sum"].shape


def test_every_recurring_channel_is_named():
    figure = make_channel_figure(analysis(), "qtx analyze: sst")
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].texts] == ["5", "6", "60"]
    assert space_apart([5, 6, 60, 63], 4, 64) == [5, 9, 60, 64]


def test_depth_is_linear_over_half_a_decade():
    figure = make_depth_figure(analysis(), "qtx analyze: sst")
    figure.draw_without_rendering()
    assert [panel.get_yscale() for panel in figure.axes] == ["linear", "linear"]
    assert [panel.get_ylabel() for panel in figure.axes] == ["kurtosis", "inf norm, mean over sequences"]
    assert len(texts(figure.legends[0])) == 5
