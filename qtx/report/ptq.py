"""The picture of `qtx ptq`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engines.backend import need
from ..files.container import write_picture


def picture(path: Path, kind: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Each recipe's difference to float with its interval, as a PNG. Raises MissingExtra without matplotlib."""
    matplotlib = need("matplotlib", "report", "the picture of the rows")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: row for name, row in rows.items() if name != "float" and None not in (row["low"], row["high"])}
    figure, axis = pyplot.subplots(figsize=(9, 1.5 + 0.24 * len(shown)), layout="constrained")
    for place, row in enumerate(shown.values()):
        color = "tab:blue" if row["runs_as"] == "integers" else "tab:orange"
        axis.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2)
        axis.plot(row["difference"], place, "o", color=color, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), labels=list(shown), fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    if kind == "accuracy":
        axis.set_xlabel("accuracy, points to float, with the bootstrap interval")
    else:
        axis.set_xlabel("perplexity, percent above float, with the bootstrap interval")
        axis.set_xscale("symlog", linthresh=1)
    handles = [pyplot.Line2D([], [], color=color, marker="o", label=label)
               for color, label in (("tab:blue", "integers"), ("tab:orange", "simulation"))]  # fmt: skip
    axis.legend(handles=handles, loc="lower left")
    write_picture(path, figure)
    pyplot.close(figure)
