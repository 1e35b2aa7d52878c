"""What was measured, as tables and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtx.report.figures import COLORS, GRAY, new_figure, new_panels, save_figure
from qtx.report.tables import format_number, format_table

from .groups import GROUPS
from .harness import ROOT, Row

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "speed.md"
PART = re.compile(r"<!-- (?P<place>[\w-]+) (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)
SIZE = re.compile(r"(?P<what>.+), (?P<unit>T|D|B|bits) (?P<size>\d+)")  # the name of a row of cost against size


def format_spread(row: Row) -> str:
    return f"{row.low:.3f} to {row.high:.3f}"


def format_row(row: Row) -> str:
    """One line for a terminal."""
    bound = f", at most {row.bound:.3g}" if row.bound is not None else ""
    return f"{row.name} against {row.against}: {row.ratio:.3f} ({format_spread(row)}{bound}); {row.notes}"


def list_rows(group: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in group["rows"]]


def format_header(header: dict[str, Any]) -> str:
    """The machine and the versions in a sentence; what is not known is left out."""
    parts = [header["gpu"] or f"{header['cpu']} ({', '.join(header['flags'])})"]
    parts += [f"oneDNN held to {header['isa']}"] * bool(header["isa"])
    parts += [f"{header['cores']} cores"] * bool(header["cores"])
    parts += [f"CUDA {header['cuda']}"] * bool(header["cuda"])
    parts += [f"python {header['python']}"] * bool(header["python"])
    parts += [f"{name} {version}" for name, version in header["packages"].items()]
    return f"{', '.join(parts)}."


def format_group(group: dict[str, Any], title: str) -> str:
    """The table of one group; columns that no row has are left out."""
    rows, threads = list_rows(group), group["header"]["threads"]
    bounded = any(row.bound is not None for row in rows)
    weighed = any(row.mib is not None or row.against_mib is not None for row in rows)
    head = [f"{title}, {threads} thread" + "s" * (threads > 1), "against", "ms", "ms", "ratio", "of rounds"]
    head += ["at most"] * bounded + ["MiB", "MiB"] * weighed + ["checked"]
    lines = []
    for row in rows:
        times = [format_number(row.ms, 2), format_number(row.against_ms, 2)]
        bound = ["" if row.bound is None else f"{row.bound:.3g}"] * bounded
        memory = [format_number(mib, 0) for mib in (row.mib, row.against_mib)] * weighed
        lines.append(
            [row.name, row.against, *times, f"{row.ratio:.3f}", format_spread(row), *bound, *memory, row.notes]
        )
    skipped = list(dict.fromkeys(f"Without {each['name']}: {each['why']}." for each in group["skipped"]))
    return "\n\n".join([format_table(head, lines), *skipped])


def fit_exponents(rows: list[Row]) -> dict[tuple[str, str], tuple[list[int], list[float], float]]:
    """Of the rows whose names end in a size: by what and unit the sizes, the milliseconds, and the slope of the
    straight line through their logarithms, by least squares."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        for name, ms in ((row.name, row.ms), (row.against, row.against_ms)):
            if found := SIZE.fullmatch(name):
                series.setdefault((found["what"], found["unit"]), []).append((int(found["size"]), ms))
    fitted = {}
    for key, points in series.items():
        sizes, times = zip(*sorted(dict(points).items()), strict=True)
        if len(sizes) > 1:
            slope = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
            fitted[key] = (list(sizes), list(times), slope)
    return fitted


def format_exponents(rows: list[Row]) -> str:
    """One line for each thing and size: its milliseconds, and the exponent."""
    lines = [
        [what, f"{unit} {sizes[0]} to {sizes[-1]}", *(format_number(times[i], 2) for i in (0, -1)), f"{slope:.2f}"]
        for (what, unit), (sizes, times, slope) in fit_exponents(rows).items()
    ]
    return format_table(["cost", "size", "ms, first", "ms, last", "exponent"], lines) if lines else ""


def format_part(results: dict[str, Any], name: str) -> str:
    """The tables of one group, or what `machine` the results are of: each that one of the groups was taken on."""
    if name == "machine":
        return "\n\n".join(dict.fromkeys(format_header(found["header"]) for found in results["groups"].values()))
    found = results["groups"][name]
    question = next(group.question for group in GROUPS if group.name == name)
    return "\n\n".join(filter(None, [format_group(found, question), format_exponents(list_rows(found))]))


def format_results(results: dict[str, Any]) -> str:
    """The machine, and all groups in their order."""
    names = [group.name for group in GROUPS if group.name in results["groups"]]
    return "\n\n".join(format_part(results, name) for name in ("machine", *names))


def fill_page(page: str, found: Mapping[str, dict[str, Any]]) -> str:
    """The page with what stands between `<!-- PLACE NAME -->` and `<!-- end -->` written anew: the part NAME of the
    results of PLACE, nothing where it was not measured."""

    def fill(match: re.Match[str]) -> str:
        place, name = match["place"], match["name"]
        known = name == "machine" or name in found.get(place, {"groups": {}})["groups"]
        text = format_part(found[place], name) if place in found and known else ""
        return f"<!-- {place} {name} -->\n{text}\n<!-- end -->" if text else f"<!-- {place} {name} -->\n<!-- end -->"

    return PART.sub(fill, page)


def read_file(path: Path) -> dict[str, Any]:
    """A file of results: `groups`, done, and `unfinished`, begun or still to be. Ends the command for any other."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SystemExit(f"{path} holds no results: {error}") from None
    for key in ("groups", "unfinished"):
        if not isinstance(results, dict) or not isinstance(results.get(key), dict):
            raise SystemExit(f"{path} holds no results: it has no {key}")
    return results


def read_results() -> dict[str, dict[str, Any]]:
    """All results by the place where they were measured."""
    return {path.stem: read_file(path) for path in sorted(RESULTS.glob("*.json"))}


def draw_results(results: dict[str, Any], path: Path) -> list[Path]:
    """Two pictures beside the file: every ratio with its spread and what is asked for; cost against size."""
    groups = {name: list_rows(group) for name, group in results["groups"].items()}
    ratios = {
        name: kept
        for name, rows in groups.items()
        if (kept := [row for row in rows if row.bound is not None or not SIZE.fullmatch(row.name)])
    }
    drawn = []
    if ratios:
        lines = sum(len(rows) + 1 for rows in ratios.values())
        figure = new_figure(9, 0.19 * lines + 0.8, "benchmarks draw")
        axes, at, labels = figure.subplots(), 0, []
        for i, (name, rows) in enumerate(ratios.items()):
            axes.text(0.002, at, name, transform=axes.get_yaxis_transform(), color=GRAY, fontsize=7, va="center")
            labels.append((at, ""))
            at += 1
            for row in rows:
                axes.plot([row.low, row.high], [at, at], color=COLORS[i % len(COLORS)], linewidth=1)
                axes.plot([row.ratio], [at], "o", color=COLORS[i % len(COLORS)], markersize=3)
                if row.bound is not None:
                    axes.plot([row.bound], [at], "|", color="black", markersize=7)
                labels.append((at, f"{row.name} / {row.against}"))
                at += 1
        axes.axvline(1, color=GRAY, linewidth=0.7)
        axes.set_xscale("log")
        axes.set_yticks([y for y, _ in labels], [text for _, text in labels], fontsize=6)
        axes.set_ylim(at, -1)
        axes.set_xlabel("ratio of times; | is what is asked for at most")
        drawn.append((figure, path.with_suffix(".png")))
    sizes = {key: value for rows in groups.values() for key, value in fit_exponents(rows).items()}
    if sizes:
        units = list(dict.fromkeys(unit for _, unit in sizes))
        figure, panels = new_panels(3.4, 3.0, len(units), 4, "benchmarks draw")
        for panel, unit in zip(panels, units, strict=True):
            lines = [(what, *found) for (what, of), found in sizes.items() if of == unit]
            for i, (what, at, ms, slope) in enumerate(lines):
                panel.loglog(at, ms, "o-", color=COLORS[i % len(COLORS)], markersize=3, label=f"{what} ^{slope:.2f}")
            every = sorted({each for _, at, _, _ in lines for each in at})
            panel.set_xticks(every, [str(each) for each in every], fontsize=7)
            panel.set_xticks([], minor=True)
            low, high = panel.get_ylim()
            panel.set_ylim(low / 2, high * 2)  # so that what does not grow looks flat
            panel.set_xlabel(unit)
            panel.set_ylabel("ms")
            panel.legend(fontsize=6)
        drawn.append((figure, path.with_name(f"{path.stem}-sizes.png")))
    for figure, out in drawn:
        save_figure(figure, out)
    return [out for _, out in drawn]
