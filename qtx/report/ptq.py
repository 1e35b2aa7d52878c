"""The picture of `qtx ptq`: a row for each row of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files.results import RecipeRow
from .figures import (
    COLORS,
    GRAY,
    finite,
    new_figure,
    plain,
    save_figure,
    set_title,
)
from .tables import format_number

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
ROW = 0.21  # inches
NEAR = 75  # percent of the rows that the enlarged panel is made for
ENLARGED = 3.0  # times that the whole must be wider than those rows for an enlarged panel
LINEAR = 1.0  # percent of perplexity up to which an axis that spans decades is linear
# colour and marker of what a row's numbers were measured on
KINDS = {
    "float": (COLORS[4], "D"),
    "integers": (COLORS[0], "o"),
    "simulation": (COLORS[1], "s"),
    "failed": (GRAY, "x"),
}
MEANS = {
    "float": "the model in float",
    "integers": "measured in integers",
    "simulation": "simulated: float32 with quantizers",
    "failed": "could not be prepared",
}


def draw_rows(path: Path, kind: str, rows: Mapping[str, RecipeRow], title: str) -> None:
    """Writes `make_row_figure` as a PNG. Raises MissingExtra without matplotlib."""
    save_figure(make_row_figure(kind, rows, title), path)


def make_row_figure(kind: str, rows: Mapping[str, RecipeRow], title: str) -> Figure:
    """Every row's difference to float with its bootstrap interval; a second time, enlarged, where a few rows lie far
    from the others; and the row's latency and size.

    kind: "accuracy" (differences in points) or "perplexity" (in percent). A row without numbers says why. Raises
    MissingExtra without matplotlib.
    """
    ends = [end for row in rows.values() for end in finite([row["low"], row["high"], row["difference"]])]
    limit = near_limit(rows)
    enlarged = bool(ends) and max(map(abs, ends)) > ENLARGED * limit
    damaged = any("damage" in row for row in rows.values())
    widths = [4.0, *([4.0] if enlarged else []), *([2.6] if damaged else []), 1.3, 1.3]
    longest = max([0, *(len(plain(name)) for name in rows)])
    figure = new_figure(sum(widths) + 0.085 * longest + 0.4, 2.0 + ROW * max(len(rows), 3), "the picture of the rows")
    panels = list(
        figure.subplots(1, len(widths), sharey=True, gridspec_kw={"width_ratios": widths}, squeeze=False).flat
    )
    unit = "accuracy, points to float" if kind == "accuracy" else "perplexity, % above float"
    for panel in panels[: 1 + enlarged]:
        draw_intervals(panel, rows)
        panel.axvline(0, color="black", linewidth=0.8, zorder=1)
        panel.set_xlabel(unit)
    if enlarged:
        panels[0].set_title("all", fontsize=10)
        panels[1].set_title("enlarged (arrows: beyond the edge)", fontsize=10)
        panels[1].set_xlim(max(-limit, 1.15 * min(ends)), min(limit, 1.15 * max(0.0, *ends) + 0.05 * limit))
        draw_arrows(panels[1], rows)
    if kind == "perplexity" and ends and max(map(abs, ends)) > 10**1.5 * LINEAR:
        panels[0].set_xscale("symlog", linthresh=LINEAR)
        panels[0].set_xlim(2 * min(0.0, *ends) - LINEAR / 4, 2 * max(0.0, *ends) + LINEAR / 4)
        panels[0].set_xlabel(f"{unit} (logarithmic beyond {LINEAR:g})")
    if damaged:
        draw_damage(panels[-3], rows)
    draw_dots(panels[-2], [row["ms"] for row in rows.values()], rows, "latency, ms\nof a sequence")
    draw_dots(
        panels[-1], [None if row["bytes"] is None else row["bytes"] / MIB for row in rows.values()], rows, "size, MiB"
    )
    panels[0].set_yticks(range(len(rows)), [plain(name) for name in rows], fontsize=8)
    panels[0].set_ylim(max(len(rows), 1) - 0.5, -0.5)
    values = "accuracy, %" if kind == "accuracy" else "perplexity"
    side = panels[0].secondary_yaxis("right")
    side.set_yticks(range(len(rows)), [format_number(row["value"], 2) for row in rows.values()], fontsize=7)
    side.tick_params(length=0)
    panels[0].text(1.02, 1.0, f"{values}\n", transform=panels[0].transAxes, fontsize=7, va="center")
    for panel in panels:
        panel.grid(axis="both", alpha=0.25)
    add_kinds(figure, rows)
    set_title(figure, title, "line: 95 % bootstrap interval over sequences")
    return figure


def near_limit(rows: Mapping[str, RecipeRow]) -> float:
    """How far from 0 the intervals of most rows go, with a margin."""
    farthest = [
        max(map(abs, ends)) for row in rows.values() if (ends := finite([row["low"], row["high"]])) and any(ends)
    ]
    return 1.15 * float(np.percentile(farthest, NEAR, method="lower")) if farthest else 1.0


def draw_intervals(panel: Axes, rows: Mapping[str, RecipeRow]) -> None:
    """Each row's difference as a point on its interval, or words where it has none."""
    for place, row in enumerate(rows.values()):
        color, marker = KINDS[row["runs_as"]]
        if row["difference"] is None:
            words = "failed" if row["runs_as"] == "failed" else "not finite"
            panel.text(0, place, f" {words}", fontsize=8, va="center", color=GRAY)
            continue
        if row["low"] is not None and row["high"] is not None:
            panel.plot([row["low"], row["high"]], [place, place], color=color, linewidth=1.8)
        panel.plot(row["difference"], place, marker, color=color, markersize=5)


def draw_arrows(panel: Axes, rows: Mapping[str, RecipeRow]) -> None:
    """At the edge of the enlarged panel, where a row's point lies beyond it."""
    low, high = panel.get_xlim()
    inset = 0.015 * (high - low)
    for place, row in enumerate(rows.values()):
        if row["difference"] is not None and not low < row["difference"] < high:
            x, marker = (low + inset, "<") if row["difference"] <= low else (high - inset, ">")
            panel.plot(x, place, marker, color=KINDS[row["runs_as"]][0], markersize=6)


def draw_damage(panel: Axes, rows: Mapping[str, RecipeRow]) -> None:
    """What each row's quantization adds to the loss and, below it, the part that belongs to the spared tokens."""
    for place, row in enumerate(rows.values()):
        if "damage" not in row:
            continue
        whole, part = row["damage"]["whole"], row["damage"]["part"]
        if whole is None or part is None:
            panel.text(0, place, " destroyed", fontsize=8, va="center", color=GRAY)
            continue
        for difference, color, shift in ((whole, KINDS["simulation"][0], -0.15), (part, COLORS[2], 0.15)):
            panel.plot([difference["low"], difference["high"]], [place + shift] * 2, color=color, linewidth=1.8)
            panel.plot(difference["nats"], place + shift, "s", color=color, markersize=4)
    panel.axvline(0, color="black", linewidth=0.8, zorder=1)
    panel.set_xlabel("simulated damage, nats;\nbelow: the spared tokens' part")


def draw_dots(panel: Axes, values: Sequence[float | None], rows: Mapping[str, RecipeRow], label: str) -> None:
    """One number of each row, from 0 on."""
    for place, (value, row) in enumerate(zip(values, rows.values(), strict=True)):
        if value is not None:
            color, marker = KINDS[row["runs_as"]]
            panel.plot(value, place, marker, color=color, markersize=4)
    panel.set_xlabel(label)
    panel.set_xlim(0, 1.1 * max([*finite(values), 1e-3]))
    panel.locator_params(axis="x", nbins=4)


def add_kinds(figure: Figure, rows: Mapping[str, RecipeRow]) -> None:
    """A legend of what the rows that are there were measured on."""
    from matplotlib.lines import Line2D

    there = [kind for kind in KINDS if kind in {row["runs_as"] for row in rows.values()}]
    handles: list[Artist] = []
    for kind in there:
        color, marker = KINDS[kind]
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="-", markersize=5, label=MEANS[kind]))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
