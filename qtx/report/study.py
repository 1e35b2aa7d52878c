"""The table of a study: a row for each attention (and what else varies), its seeds together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .tables import DIVERGED, format_range, format_spread, format_table

NATS = "+nats"  # at the head of the loss that quantization adds
Result = Mapping[str, Any]  # of one run, as `study.json` has it


@dataclass(frozen=True)
class Layout:
    """Which columns a study's table has."""

    metric: str  # perplexity or accuracy
    recipes: Sequence[str]
    integers: Sequence[str] = ()  # recipes whose models were also run in integers
    trained: bool = False  # some runs were trained under quantization
    sinks: Sequence[str] = ("first",)  # of `measure.sinks.SINKS`
    published: Sequence[str] = ()  # a cell for each row, or none
    notes: Sequence[str] = field(default=())  # lines below the table

    @property
    def unit(self) -> str:
        """Of a score, in a header."""
        return "acc %" if self.metric == "accuracy" else "ppl"


def tabulate_study(rows: Mapping[str, Sequence[Result]], layout: Layout) -> str:
    """The table, and the notes below it. Several seeds give mean and sample standard deviation; of sinks and idle heads
    the smallest and the largest."""
    header = ["attention", f"FP {layout.unit}", "max inf norm", "avg kurtosis"]
    header += ["sink" if name == "first" else f"{name} sink" for name in layout.sinks]
    header.append("idle heads")
    if layout.trained:
        header += [f"as trained {layout.unit}", "mean loss"]
    for name in layout.recipes:
        header += [f"{title_recipe(name)} {layout.unit}", "degradation", NATS]
    for name in layout.integers:
        header += [f"{title_recipe(name)} integers {layout.unit}", NATS]
    if layout.published:
        header.append("published")
    lines = []
    for i, (name, runs) in enumerate(rows.items()):
        lost = sum(run["diverged"] for run in runs)
        label = name + (f" (diverged{f' {lost} of {len(runs)}' if len(runs) > 1 else ''})" if lost else "")
        lines.append([label, *make_cells(runs, layout), *layout.published[i : i + 1]])
    return "\n".join([format_table(header, lines), *layout.notes])


def title_recipe(name: str) -> str:
    """A recipe's name at the head of a column."""
    return name.upper() if name.startswith("w") else name


def make_cells(runs: Sequence[Result], layout: Layout) -> list[str]:
    """The cells of a row, but for its name and what is published."""
    cells = [format_spread(take_values(runs, "float", layout.metric))]
    cells += [format_spread(take_values(runs, "outliers", name), 2) for name in ("max_inf_norm", "average_kurtosis")]
    cells += [format_range([find_largest_mass(run, name) for run in runs], 2) for name in layout.sinks]
    cells.append(count_idle(runs))
    if layout.trained:
        cells += [format_spread(take_values(runs, "trained", layout.metric))]
        cells += [format_spread(take_values(runs, "mean_loss"))]
    for name in layout.recipes:
        cells.append(format_spread(take_values(runs, "recipes", name, layout.metric)))
        cells.append(format_spread(compare(layout.metric, runs, "recipes", name), 2))
        if cells[-1] not in ("-", DIVERGED):
            cells[-1] += " pt" if layout.metric == "accuracy" else " %"
        cells.append(format_spread(compare("loss", runs, "recipes", name), 4))
    for name in layout.integers:
        cells.append(format_spread(take_values(runs, "integers", name, layout.metric)))
        cells.append(format_spread(compare("loss", runs, "integers", name), 4))
    return cells


def take_values(runs: Sequence[Result], *keys: str) -> list[float | None]:
    """What stands under the keys, in each run; None where nothing does, infinity where a number was not finite."""
    values = []
    for run in runs:
        scores: Any = run
        for key in keys[:-1]:
            scores = None if scores is None else scores.get(key)
        value = None if scores is None else scores.get(keys[-1])
        values.append(math.inf if value is None and keys[-1] in (scores or {}) else value)
    return values


def compare(metric: str, runs: Sequence[Result], *keys: str) -> list[float | None]:
    """What quantization takes of each run, see `degradation`; keys: where its score stands."""
    pairs = zip(take_values(runs, "float", metric), take_values(runs, *keys, metric), strict=True)
    return [degradation(metric, *pair) for pair in pairs]


def find_largest_mass(run: Result, sink: str) -> float | None:
    """The probability that the head which gives most gives to that kind of token."""
    layers = ((run.get("sinks") or {}).get("mass") or {}).get(sink)
    return None if layers is None else max(max(heads) for heads in layers)


def count_idle(runs: Sequence[Result]) -> str:
    """How many heads add nothing, the fewest and the most over the runs, of how many."""
    known = [run["sinks"] for run in runs if run.get("sinks")]
    if len(known) < len(runs) or not known:
        return "-"
    return f"{format_range([sinks['idle'] for sinks in known], 0)} of {known[0]['heads']}"


def degradation(metric: str, before: float | None, after: float | None) -> float | None:
    """Of a perplexity its relative increase in percent, of an accuracy the percentage points lost, of a loss the nats
    added. None where one is missing."""
    if before is None or after is None:
        return None
    if metric == "perplexity":
        return 100 * (after / before - 1)
    return before - after if metric == "accuracy" else after - before
