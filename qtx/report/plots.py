"""The curves of runs, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .figures import (
    GRAY,
    Look,
    add_legend,
    choose_looks,
    choose_scale,
    finite,
    new_panels,
    plain,
    save_figure,
    say_empty,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

WHAT = "the picture of the curves"
WINDOWS = 50  # the loss is averaged over this part of the longest run


class Curves(Protocol):
    """One run: per step the loss in nats; now and then the largest inf norm."""

    loss: list[float]
    watch_step: list[int]
    inf_norm: list[float]

    def watched(self) -> Watched:
        """Where integers were watched: `integer_step`, `integer_perplexity`, `float_perplexity` and the published
        average `kurtosis`."""


Watched = dict[str, list[float]]
Points = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]  # x and y of a line


def draw_curves(path: Path, runs: Mapping[str, Curves], title: str) -> None:
    """Writes `curve_figure` as a PNG. Raises MissingExtra without matplotlib."""
    save_figure(make_curve_figure(runs, title), path)


def make_curve_figure(runs: Mapping[str, Curves], title: str) -> Figure:
    """Training loss, the runs' distance from their mean, and max inf norm, by step. Where integers were watched also
    kurtosis, integer perplexity above float's, and for each run a panel of both perplexities.

    Runs that lie over one another in the loss are told apart by the second panel. Raises MissingExtra without
    matplotlib.
    """
    watched = {name: seen for name, run in runs.items() if (seen := run.watched())["integer_step"]}
    several = len(runs) > 1
    window = max([1, *(len(run.loss) // WINDOWS for run in runs.values())])
    seeds = {name: name.rpartition("-seed")[2] if "-seed" in name else "" for name in runs}
    common = {
        seed: mean_loss([runs[name] for name in runs if seeds[name] == seed], window) for seed in set(seeds.values())
    }
    parts: list[tuple[str, Callable[[str, Curves], Points]]] = [
        (
            f"training loss, nats{f' (mean of {window} steps)' if window > 1 else ''}",
            lambda _, run: smooth_loss(run, window),
        )
    ]
    if several:
        apart = "loss less its seed's mean, nats"
        parts.append((apart, lambda name, run: subtract_mean(run, window, common[seeds[name]])))
    parts.append(("max inf norm", lambda _, run: (run.watch_step, run.inf_norm)))
    if watched:
        parts.append(("average kurtosis", lambda _, run: take_points(run.watched(), "kurtosis")))
        parts.append(("integer perplexity above float, %", lambda _, run: compare_perplexities(run.watched())))
    count = len(parts) + len(watched)
    figure, panels = new_panels(4.6, 3.3, count, 2 if len(parts) == 2 else 3, WHAT)
    looks = choose_looks(list(runs))
    for panel, (label, points) in zip(panels, parts, strict=False):
        draw_lines(panel, {name: points(name, run) for name, run in runs.items()}, looks)
        panel.set(xlabel="step", ylabel=label)
        if label.startswith(("loss less", "integer perplexity")):
            panel.axhline(0, color=GRAY, linewidth=0.8, zorder=0)
    draw_perplexities(panels[len(parts) :], watched, looks)
    handles = [make_legend_line(looks[name]) for name in runs]
    add_legend(figure, handles, list(runs))
    set_title(figure, title)
    return figure


def draw_norms(path: Path, sites: Mapping[str, Mapping[str, Points]], title: str) -> None:
    """Writes `make_norm_figure` as a PNG. Raises MissingExtra without matplotlib."""
    save_figure(make_norm_figure(sites, title), path)


def make_norm_figure(sites: Mapping[str, Mapping[str, Points]], title: str) -> Figure:
    """A panel for each site, in it a line for each run: the inf norm by step. Raises MissingExtra without
    matplotlib."""
    figure, panels = new_panels(6.4, 3.6, len(sites), 2, WHAT)
    names = list(dict.fromkeys(name for runs in sites.values() for name in runs))
    looks = choose_looks(names)
    for panel, (site, runs) in zip(panels, sites.items(), strict=True):
        draw_lines(panel, runs, looks)
        panel.set(xlabel="step", ylabel=f"inf norm of {plain(site)}")
    add_legend(figure, [make_legend_line(looks[name]) for name in names], names)
    set_title(figure, title)
    return figure


def make_legend_line(look: Look) -> Line2D:
    """What stands for a run in the legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look.style(1))


def mask_infinite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Float64, with NaN, which leaves a gap in a line, in place of infinities."""
    numbers = np.asarray(values, np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def smooth_loss(run: Curves, window: int) -> Points:
    """Steps and the mean loss of the last `window` steps; a run that is shorter is drawn as it is."""
    loss = mask_infinite(run.loss)
    if len(loss) < window:
        return np.arange(1, len(loss) + 1), loss
    means = np.convolve(loss, np.ones(window) / window, mode="valid") if len(loss) else loss
    return np.arange(window, len(loss) + 1), means


def mean_loss(runs: Sequence[Curves], window: int) -> dict[int, float]:
    """By step the mean over the runs that have reached it."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for step, loss in zip(*smooth_loss(run, window), strict=True):
            values.setdefault(int(step), []).append(float(loss))
    return {step: float(np.mean(known)) for step, losses in values.items() if (known := finite(losses))}


def subtract_mean(run: Curves, window: int, common: Mapping[int, float]) -> Points:
    """The loss of a run less the runs' mean at the same step, NaN where there is none."""
    steps, loss = smooth_loss(run, window)
    return steps, [value - common.get(int(step), np.nan) for step, value in zip(steps, loss, strict=True)]


def take_points(watched: Watched, name: str) -> Points:
    """One of the watch's curves."""
    return watched["integer_step"], watched[name]


def compare_perplexities(watched: Watched) -> Points:
    """What integers lose: their perplexity above float's, percent."""
    integers, floats = mask_infinite(watched["integer_perplexity"]), mask_infinite(watched["float_perplexity"])
    return watched["integer_step"], 100 * (integers / floats - 1)


def draw_lines(panel: Axes, lines: Mapping[str, Points], looks: Mapping[str, Look]) -> None:
    """One line per run, in its look; the first lies uppermost."""
    values: list[float] = []
    for order, (name, (x, y)) in enumerate(lines.items()):
        known = mask_infinite(y)
        values += finite(known)
        panel.plot(x, known, **looks[name].style(len(known)), label=name, zorder=3 - order / 100)
    choose_scale(panel, "y", values)
    panel.grid(alpha=0.25)
    if not values:
        say_empty(panel)


def draw_perplexities(panels: Sequence[Axes], runs: Mapping[str, Watched], looks: Mapping[str, Look]) -> None:
    """A panel for each run, all of one scale: perplexity in float as a wide pale line, in integers as points upon
    it."""
    every = [value for run in runs.values() for value in (*run["integer_perplexity"], *run["float_perplexity"])]
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        look = looks[name]
        steps = run["integer_step"]
        panel.plot(steps, mask_infinite(run["float_perplexity"]), color=GRAY, alpha=0.5, linewidth=4, label="float")
        panel.plot(
            steps,
            mask_infinite(run["integer_perplexity"]),
            look.marker,
            color=look.color,
            markersize=4,
            label="integers",
        )
        choose_scale(panel, "y", every)
        if known := finite(every):
            margin = 0.05 * (max(known) - min(known)) or 1
            low = min(known) / 1.1 if panel.get_yscale() == "log" else min(known) - margin
            panel.set_ylim(low, max(known) + margin)
        panel.set(xlabel="step", ylabel="perplexity")
        panel.set_title(plain(name), fontsize=10)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=9)
