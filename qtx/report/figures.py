"""What all pictures have in common: how runs look, which axes are logarithmic, what a font can write, where titles
stand.

A figure is built by one function and written by another, so that what it draws can be read from its artists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from ..engines.backend import need
from ..files.container import write_picture

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers as well; their yellow is too pale for a line on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
Line = Literal["-", "--", "-.", ":"] | tuple[int, tuple[int, ...]]  # a name, or where dashes begin and their lengths
LINES: tuple[Line, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GRAY = "#777777"
LOG_DECADES = 1.5  # data that span more are drawn on a logarithmic axis
LONGEST = 48  # characters of a name in a picture
INCH = 11.0  # characters of a legend in an inch
MARKED = 40  # points of a line up to which each is marked


class LineStyle(TypedDict):
    """Keywords of `Axes.plot`."""

    color: str
    linestyle: Line
    marker: str
    markersize: float
    linewidth: float


def new_figure(width: float, height: float, what: str) -> Figure:
    """An empty figure of so many inches; `what` it is, for the error. Raises MissingExtra without matplotlib."""
    need("matplotlib", "report", what)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def new_panels(width: float, height: float, count: int, columns: int, what: str) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of so many inches each, in rows of at most `columns`. Raises MissingExtra."""
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure = new_figure(width * columns, height * rows + 0.6, what)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG; folders on the way are made. Raises FileError where a picture is that qtx did not write."""
    write_picture(path, figure)


def plain(text: str, longest: int = LONGEST) -> str:
    """A text as the font can write it, in one line: a character that it lacks is a question mark, a $ begins no
    formula, and the middle of what is longer than `longest` characters is left out. Raises MissingExtra without
    matplotlib."""
    need("matplotlib", "report", "a picture")
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    known = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in " ".join(text.split()))
    if len(known) > longest:
        head = (longest - 1) // 2
        known = f"{known[:head]}…{known[len(known) - (longest - 1 - head) :]}"
    return known.replace("$", r"\$")


def set_title(figure: Figure, title: str, note: str = "") -> None:
    """What is drawn, of which model and run, and below it in small letters how to read it."""
    width = figure.get_figwidth()
    lines = [plain(title, int(width * 10))]
    figure.suptitle("\n".join([*lines, *filter(None, [note])]), fontsize=11)


def finite(values: Iterable[float | None]) -> list[float]:
    """The numbers among the values: neither None, NaN nor infinite."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def spans_decades(values: Iterable[float | None]) -> bool:
    """Whether the finite values are all positive and more than a decade and a half apart."""
    known = finite(values)
    return bool(known) and min(known) > 0 and math.log10(max(known)) - math.log10(min(known)) > LOG_DECADES


def choose_scale(axes: Axes, which: Literal["x", "y"], values: Iterable[float | None]) -> None:
    """A logarithmic axis where the values span more than a decade and a half, with ticks written often enough to be
    read; else a linear one."""
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter

    known = finite(values)
    if not spans_decades(known):
        return
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    few = max(known) / min(known) < 200
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=20))
    axis.set_minor_locator(LogLocator(subs=tuple(range(1, 10)), numticks=99))
    short = min(known) >= 1e-3 and max(known) < 1e6
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}") if short else LogFormatterMathtext())
    axis.set_minor_formatter(NullFormatter())


def say_empty(axes: Axes, text: str = "no data") -> None:
    """Words in the middle of a panel that has nothing to draw."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GRAY)
    axes.set(xticks=[], yticks=[])


@dataclass(frozen=True)
class Look:
    """How a run is drawn, in every panel of a picture."""

    color: str
    line: Line
    marker: str

    def style(self, points: int) -> LineStyle:
        """Keywords of `Axes.plot` for a line of so many points; few points are marked, one alone could not be seen."""
        marker = self.marker if points <= MARKED else "None"
        return {"color": self.color, "linestyle": self.line, "marker": marker, "markersize": 3.5, "linewidth": 1.3}


def choose_looks(names: Sequence[str]) -> dict[str, Look]:
    """One look per run, no two alike up to 42 runs. Runs that differ in their seed alone (`vanilla-seed0`,
    `vanilla-seed1`) share a colour and a marker."""
    seeds = [name.rpartition("-seed")[2] if "-seed" in name else "" for name in names]
    groups = [name.rpartition("-seed")[0] or name for name in names]
    kinds = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    ranks = {seed: i for i, seed in enumerate(dict.fromkeys(seeds))} if len(set(groups)) < len(names) else {}
    looks = {}
    for name, group, seed in zip(names, groups, seeds, strict=True):
        kind = kinds[group]
        turn = ranks[seed] + kind // len(COLORS) * len(ranks) if ranks else kind
        line = LINES[turn % len(LINES)]
        looks[name] = Look(COLORS[kind % len(COLORS)], line, MARKERS[kind % len(MARKERS)])
    return looks


def add_legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """A legend below all panels, in as many columns as fit."""
    if not handles:
        return
    texts = [plain(name) for name in names]
    columns = int(figure.get_figwidth() * INCH / (max(map(len, texts)) + 8))
    figure.legend(handles, texts, loc="outside lower center", ncols=max(1, min(columns, len(texts))), fontsize=9)
