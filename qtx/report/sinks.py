"""Pictures of attention sinks: of trained runs head by head, and how they and the outliers grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .figures import add_legend, choose_looks, new_panels, plain, save_figure, set_title
from .plots import Points, draw_lines, make_legend_line
from .study import title_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHAT = "the pictures of sinks"
NUMBERED = 96  # heads of a panel up to which each has its number
PALE = 0.55  # of the colour's scale; on darker ground letters are white
Curve = Sequence[tuple[int, float]]  # step and value
OUTLIERS = {"inf_norm": "max inf norm", "kurtosis": "average kurtosis"}  # by curve what an axis says
SHARES = {  # the same, of axes that begin at 0
    "sink.first": "first-token mass, largest of a head",
    "sink.separator": "delimiters' mass, largest of a head",
    "sink.background": "background's mass, largest of a head",
    "heads.idle": "heads that add nothing",
    "energy": "energy in the top 1 % of channels",
}
LOSS, FLOAT, TRAINED, INTEGER = ".loss", "float.loss", "trained.loss", "integer."


@dataclass(frozen=True)
class Panel:
    """One run's heads: the probability that each gives to a sink, and by what means it adds nothing (None: it does),
    both by layer."""

    title: str
    mass: Sequence[Sequence[float]]
    reasons: Sequence[Sequence[str | None]]


def draw_sinks(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Writes `make_sink_figure` as a PNG. Raises MissingExtra without matplotlib."""
    save_figure(make_sink_figure(panels, title), path)


def make_sink_figure(panels: Sequence[Panel], title: str) -> Figure:
    """Layers down, heads across, all panels of one scale from 0 to 1; a dot on each head that adds nothing. Raises
    MissingExtra without matplotlib."""
    deepest, widest = (max((np.shape(panel.mass)[axis] for panel in panels), default=1) for axis in (0, 1))
    figure, axes = new_panels(1.8 + 0.36 * widest, 1.2 + 0.3 * deepest, len(panels), 4, WHAT)
    for axis, panel in zip(axes, panels, strict=True):
        mass = np.array(panel.mass)
        drawn = axis.imshow(mass, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for (layer, head), value in np.ndenumerate(mass):
            color = "white" if value > PALE else "black"
            if mass.size <= NUMBERED:
                axis.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
            if panel.reasons[layer][head] is not None:
                axis.plot(head + 0.36, layer - 0.32, ".", color=color, markersize=4)
        axis.set(xlabel="head", ylabel="layer")
        axis.locator_params(integer=True)
        axis.set_title(plain(panel.title), fontsize=10)
    if panels:
        figure.colorbar(drawn, ax=axes, label="mean probability")
    set_title(figure, title, "a dot: a head that adds nothing")
    return figure


def draw_growth(path: Path, runs: Mapping[str, Mapping[str, Curve]], title: str) -> None:
    """Writes `make_growth_figure` as a PNG. Raises MissingExtra without matplotlib."""
    save_figure(make_growth_figure(runs, title), path)


def make_growth_figure(runs: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
    """By step a panel for each curve of OUTLIERS and SHARES that a run has, and for each recipe the nats that it adds
    to the float loss. Raises MissingExtra without matplotlib."""
    panels: dict[str, dict[str, Points]] = {}
    for name, curves in runs.items():
        for curve, label in (OUTLIERS | SHARES).items():
            if curve in curves:
                panels.setdefault(label, {})[name] = split_points(curves[curve])
        for curve in sorted(curves):
            if curve.endswith(LOSS) and curve not in (FLOAT, TRAINED):
                panels.setdefault(label_loss(curve), {})[name] = subtract_curve(curves[curve], curves.get(FLOAT, ()))
    figure, axes = new_panels(4.6, 3.3, len(panels), 3, WHAT)
    looks = choose_looks(list(runs))
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        draw_lines(axis, lines, looks)
        axis.set(xlabel="step", ylabel=label)
        if label in SHARES.values():
            axis.set(yscale="linear", ylim=(0, None))
    add_legend(figure, [make_legend_line(looks[name]) for name in runs], list(runs))
    set_title(figure, title, "on held-out data")
    return figure


def label_loss(curve: str) -> str:
    """What the axis of a recipe's loss says."""
    name = curve.removesuffix(LOSS)
    way = " in integers" if name.startswith(INTEGER) else ""
    return f"nats that {title_recipe(name.removeprefix(INTEGER))}{way} adds"


def split_points(curve: Curve) -> Points:
    """Steps, and values."""
    return [step for step, _ in curve], [value for _, value in curve]


def subtract_curve(curve: Curve, other: Curve) -> Points:
    """One curve less another, at the steps that both have."""
    known = dict(other)
    return split_points([(step, value - known[step]) for step, value in curve if step in known])
