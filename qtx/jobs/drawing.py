"""The pictures of a study, of what stands in its folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engines.backend import MissingExtra
from ..files.checkpoint import load_checkpoint
from ..files.container import FileError
from ..files.lines import read_lines
from ..measure.history import History
from ..report.plots import Points, draw_curves, draw_norms
from ..report.sinks import Panel, draw_growth, draw_sinks
from .resolving import MODEL
from .rows import Row
from .run import LOG, PER_STEP

CURVES, NORMS, SINKS, GROWTH = "curves.png", "inf_norm.png", "sinks.png", "growth.png"
GROWS = "sink.first", "inf_norm"  # curves of a run that was evaluated on its way


def draw_study(
    out: Path, rows: Mapping[str, Row], runs: Mapping[str, Mapping[str, Any]], sinks: Sequence[str]
) -> list[str]:
    """Writes the pictures for which the runs have numbers, and gives their names; says where there can be none.

    sinks: the kinds of tokens whose mass is drawn. Raises FileError where a run's checkpoint is none of the study's.
    """
    names = {name: name + (" (diverged)" if run["diverged"] else "") for name, run in runs.items()}
    histories = {names[name]: load_history(out / run["checkpoint"]) for name, run in runs.items()}
    grown = {name: history.curves for name, history in histories.items() if history.curves.keys() & {*GROWS}}
    norms, panels = read_norms(out, runs, names), list(list_panels(rows, runs, sinks))
    about = describe_study(next(iter(rows.values())))
    written = []
    try:
        draw_curves(out / CURVES, histories, about)
        written.append(CURVES)
        if norms:
            draw_norms(out / NORMS, norms, f"{about}, float passes of each step's batch")
            written.append(NORMS)
        if panels:
            draw_sinks(out / SINKS, panels, f"{about}: probability on sinks")
            written.append(SINKS)
        if grown:
            draw_growth(out / GROWTH, grown, about)
            written.append(GROWTH)
    except (MissingExtra, FileError) as error:
        print(f"no picture: {error}", file=sys.stderr)
    return written


def describe_study(row: Row) -> str:
    """The title of a study's pictures, by its first row."""
    source = "+".join(source.path for source in row.data.sources) or "bundled data"
    batch, model = row.run.get("data.batch", PER_STEP), row.run.get("model.preset", MODEL)
    return f"qtx study: {model} on {source}, {row.optim.steps} steps of batch {batch}"


def load_history(path: Path) -> History:
    """The curves of a run. Raises FileError for a checkpoint that has none."""
    try:
        return History.of(load_checkpoint(path).extra)
    except KeyError as error:
        raise FileError(f"{path} is no run of this study: tensor {error} is missing") from None


def list_panels(
    rows: Mapping[str, Row], runs: Mapping[str, Mapping[str, Any]], sinks: Sequence[str]
) -> Iterator[Panel]:
    """A panel for each line of the table and each of `sinks`, of the first seed that was measured."""
    firsts: dict[str, str] = {}  # the run of each line
    for name, row in rows.items():
        if runs.get(name, {}).get("sinks"):
            firsts.setdefault(row.line, name)
    for line, name in firsts.items():
        known = runs[name]["sinks"]
        for sink in sinks:
            if sink in known["mass"]:
                title = f"{line}, seed {rows[name].seed}" + (f": {sink}" if len(sinks) > 1 else "")
                yield Panel(title, known["mass"][sink], known["reasons"])


def read_norms(
    out: Path, runs: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]
) -> dict[str, dict[str, Points]]:
    """By site and run the steps whose inf norm its log has, and the norms; see `LogSpec.sites`."""
    norms: dict[str, dict[str, Points]] = {}
    for name, run in runs.items():
        points: dict[str, list[tuple[int, float]]] = {}
        for line in read_lines((out / run["checkpoint"]).parent / LOG):
            for site, values in line.get("sites", {}).items():
                norm = values["inf_norm"]
                points.setdefault(site, []).append((line["step"], math.inf if norm is None else norm))
        for site, known in points.items():
            steps, values = zip(*known, strict=True)
            norms.setdefault(site, {})[names[name]] = (steps, values)
    return norms
