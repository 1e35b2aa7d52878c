"""The tables of what was kept: see `__main__`."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from effect_figures import MARKS

from qtx.report.tables import format_range, format_table

BITS = ("w8a8", "w6a6", "w4a8")
DEAREST = 8  # sites that are shown


def group(found: dict[str, dict], part: str) -> Iterator[tuple[str, list]]:
    """By row what its seeds have of a part."""
    rows: dict[str, list] = defaultdict(list)
    for name, parts in found.items():
        if part in parts:
            rows[re.sub(r"(?<!=)-(seed)?\d+$", "", name)].append(parts[part])
    yield from rows.items()


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, behind it the smallest and the largest where there are several."""
    mean = f"{math.fsum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({format_range(values, digits)})"


def tabulate_curves(found: dict[str, dict], only: int | None = None) -> str:
    """A line for each row and step, of all its seeds; or of one step only. Perplexity as trained: of those that are
    trained under quantization, with their quantizers."""
    lines = [line for parts in found.values() for line in parts.get("curves", [])]
    as_trained = ["ppl as trained"] if any("trained.loss" in line["evaluation"] for line in lines) else []
    header = ["row", "step", "seeds", "float ppl", *as_trained]
    header += ["first-token mass", "idle heads", "max inf norm", "kurtosis"]
    cells = []
    for name, seeds in group(found, "curves"):
        by_step: dict[int, list[dict]] = defaultdict(list)
        for line in (line for curves in seeds for line in curves):
            by_step[line["step"]].append(line["evaluation"])
        for step, values in by_step.items():
            if only not in (None, step):
                continue
            keys = [f"integer.{bits}.loss" for bits in BITS]
            lost = [[each[key] - each["float.loss"] for each in values if key in each] for key in keys]
            trained = [math.exp(each["trained.loss"]) for each in values if "trained.loss" in each]
            cells.append([
                name, str(step), str(len(values)),
                spread([math.exp(each["float.loss"]) for each in values], 2),
                *(spread(trained, 2) if trained else "" for _ in as_trained),
                spread([each["sink.first"] for each in values], 2),
                spread([each["heads.idle"] for each in values], 0),
                spread([each["inf_norm"] for each in values], 1),
                spread([each["kurtosis"] for each in values], 1),
                *(spread(each, 3) if each else "" for each in lost),
            ])  # fmt: skip
    return format_table([*header, *(f"{bits.upper()}, nats" for bits in BITS)], cells)


def tabulate_heads(found: dict[str, dict]) -> str:
    """A line for each run: by layer the first token's mass in every head, at the last step evaluated."""
    rows = {name: parts["curves"][-1] for name, parts in found.items() if parts.get("curves")}
    last = {name: line["heads"]["first"] for name, line in rows.items() if "first" in line.get("heads", {})}
    depth = max((len(mass) for mass in last.values()), default=0)
    header = ["first-token mass of each head", "step", *(f"layer {layer}" for layer in range(depth))]
    cells = [
        [name, str(rows[name]["step"]), *(" ".join(f"{value:.2f}" for value in layer) for layer in mass)]
        for name, mass in last.items()
    ]
    return format_table(header, cells)


def tabulate_analysis(found: dict[str, dict]) -> str:
    """A line for each row: idle heads and why, largest masses, the largest peak and kurtosis."""
    cells = []
    for name, seeds in group(found, "analysis"):
        reasons = [Counter(head["reason"] for head in each["heads"] if head["reason"]) for each in seeds]
        why = sorted({reason for each in reasons for reason in each})
        largest = [[max(head["mass"][mark] for head in each["heads"]) for each in seeds] for mark in range(len(MARKS))]
        peaks = [max(each["sites"].items(), key=lambda pair: pair[1]["inf_norm"]) for each in seeds]
        tails = [[site["kurtosis"] for site in each["sites"].values()] for each in seeds]
        cells.append([
            name, str(len(seeds)), f"{spread([sum(each.values()) for each in reasons], 0)} of {len(seeds[0]['heads'])}",
            ", ".join(f"{reason} {spread([each[reason] for each in reasons], 0)}" for reason in why),
            " / ".join(spread(each, 2) for each in largest),
            f"{spread([site['inf_norm'] for _, site in peaks], 1)} {' '.join(sorted({place for place, _ in peaks}))}",
            spread([max(each) for each in tails], 0),
            spread([math.fsum(each) / len(each) for each in tails], 0),
        ])  # fmt: skip
    header = ["row", "seeds", "idle heads", "why", f"most of a head on {' / '.join(MARKS)}", "largest peak", "kurtosis"]
    return format_table([*header, "its mean over sites"], cells)


def show_difference(part: dict | None) -> str:
    """Nats with their interval."""
    return "destroyed" if part is None else f"{part['nats']:+.4f} ({part['low']:+.4f}..{part['high']:+.4f})"


def tabulate_recipes(found: dict[str, dict]) -> str:
    """A line for each row and recipe, of the seeds that have it: perplexity, the nats that the recipe adds, the percent
    with the ends of all seeds' intervals, and the spared tokens' part."""
    spared = any("damage" in row for parts in found.values() for row in parts.get("recipes", {}).values())
    cells = []
    for name, seeds in group(found, "recipes"):
        for recipe in dict.fromkeys(recipe for rows in seeds for recipe in rows):
            pairs = [(rows[recipe], rows["float"]) for rows in seeds if rows.get(recipe, {}).get("loss") is not None]
            line = [name, recipe, str(len(pairs)), spread([row["value"] for row, _ in pairs], 2)]
            if recipe != "float":
                ends = min(row["low"] for row, _ in pairs), max(row["high"] for row, _ in pairs)
                line.append(spread([row["loss"] - float_row["loss"] for row, float_row in pairs], 3))
                line.append(f"{ends[0]:+.1f}..{ends[1]:+.1f} %")
            damage = [row["damage"] for row, _ in pairs if "damage" in row]
            line += ["; ".join(show_difference(each[part]) for each in damage) for part in ("whole", "part") if damage]
            cells.append(line + [""] * (8 if spared else 6))
    header = ["row", "recipe", "seeds", "perplexity", "nats", "to float, 95 % interval"]
    header += ["simulated, nats", "of it the spared tokens'"] if spared else []
    return format_table(header, [line[: len(header)] for line in cells])


def tabulate_sensitivity(found: dict[str, dict]) -> str:
    """The dearest sites of each run and recipe, a line each, and the nats that each adds alone."""
    lines = [
        [name, recipe, site, f"{nats:.3f}"]
        for name, parts in found.items()
        for recipe, sites in parts.get("sensitivity", {}).items()
        for site, nats in list(sites.items())[:DEAREST]
    ]
    return format_table(["run", "recipe", "site quantized alone", "nats"], lines)


def tabulate_studies(found: dict[str, dict]) -> str:
    """A line for each row of a study: what its models are after training, and the nats that each recipe adds, in
    integers where the study has them."""
    runs = [parts["study"] for parts in found.values() if "study" in parts]
    recipes = list(dict.fromkeys(name for run in runs for name in run.get("recipes", {})))
    trained = any("trained" in run for run in runs)
    cells = []
    for name, seeds in group(found, "study"):
        known = [run for run in seeds if not run["diverged"]]
        line = [name, str(len(seeds)), f"{len(seeds) - len(known)}"]
        line.append(spread([run["mean_loss"] for run in known], 3) if known else "")
        if known:
            line.append(spread([math.exp(run["float"]["loss"]) for run in known], 3))
            scores = [run["trained"]["loss"] for run in known if "trained" in run]
            line += [spread([math.exp(loss) for loss in scores], 3) if scores else ""] if trained else []
            line.append(spread([max(map(max, run["sinks"]["mass"]["first"])) for run in known], 2))
            line.append(spread([run["sinks"]["idle"] for run in known], 0))
            line.append(spread([run["outliers"]["max_inf_norm"] for run in known], 1))
            line.append(spread([run["outliers"]["average_kurtosis"] for run in known], 1))
            for recipe in recipes:
                scores = [run["recipes"][recipe] | run.get("integers", {}).get(recipe, {}) for run in known]
                added = [each["loss"] - run["float"]["loss"] for each, run in zip(scores, known, strict=True)]
                line.append(spread(added, 4))
        cells.append(line)
    header = ["row", "seeds", "diverged", "mean training loss", "float ppl", *(["ppl as trained"] if trained else [])]
    header += ["first-token mass", "idle heads", "max inf norm", "kurtosis"]
    header += [f"{recipe.upper()}, nats" for recipe in recipes]
    return format_table(header, [line + [""] * (len(header) - len(line)) for line in cells])


def tabulate_chains(found: dict[str, dict]) -> str:
    """A line for each run on a chain: what the first layer's heads do, of several the one that rests most."""
    header = ["run", "layers", "step", "above the least", "[BOS] idle / trigger", "peak [BOS] / elsewhere", "kurtosis"]
    cells = []
    for run in (parts["chains"] for parts in found.values() if "chains" in parts):
        values, last = run["evaluation"], list(run["peak_first"])[-1]
        head = max(range(len(run["mass_idle"][0])), key=lambda h: run["mass_idle"][0][h])
        cells.append([
            run["run"], str(run["layers"]), str(run["step"]),
            f"{values['float.loss'] - run['least_loss']:.4f}",
            f"{run['mass_idle'][0][head]:.2f} / {run['mass_trigger'][0][head]:.2f}",
            f"{run['peak_first'][last]:.1f} / {run['peak_elsewhere'][last]:.1f}",
            f"{values['kurtosis']:.1f}",
            *(f"{values[f'integer.{bits}.loss'] - values['float.loss']:+.4f}" for bits in BITS),
        ])  # fmt: skip
    return format_table([*header, *BITS], cells)


TABLES = {
    "chains": (tabulate_chains,),
    "study": (tabulate_studies,),
    "curves": (tabulate_curves, tabulate_heads),
    "analysis": (tabulate_analysis,),
    "recipes": (tabulate_recipes,),
    "sensitivity": (tabulate_sensitivity,),
}
