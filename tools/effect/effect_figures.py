"""What is kept of the runs in a folder: see `__main__`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from effect_chains import measure_run

DIGITS = 6  # of what is kept
MARKS = ("[CLS]", "[SEP]")


def shorten(value: object) -> object:
    """JSON values with fewer digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: shorten(each) for key, each in value.items()}
    return [shorten(each) for each in value] if isinstance(value, list) else value


def read_curves(path: Path) -> list[dict]:
    """Of each step that was evaluated what the log has, without speed."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    keep = ("step", "evaluation", "heads")
    return [{key: line[key] for key in keep if key in line} for line in lines if line.get("evaluation")]


def read_analysis(path: Path) -> dict:
    """Of an analysis the heads' masses and why they are idle, and peak and kurtosis of the sites that every attention
    has, so that their means are of the same."""
    analysis = json.loads(path.read_text(encoding="utf-8"))
    heads = [(head["reason"], [head["mass"].get(mark, 0.0) for mark in MARKS]) for head in analysis["heads"]]
    sites = {
        site["site"]: {key: site[key] for key in ("inf_norm", "kurtosis")}
        for site in analysis["sites"]
        if site["site"].startswith(("embed", "layer")) and ".attn.gate" not in site["site"]
    }
    return {"heads": [{"reason": reason, "mass": mass} for reason, mass in heads], "sites": sites}


def read_rows(path: Path) -> dict:
    """Of a comparison each recipe's row, without what depends on the machine."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    keep = ("value", "loss", "low", "high", "runs_as", "damage")
    return {name: {key: row[key] for key in keep if key in row} for name, row in rows.items()}


def read_sensitivity(path: Path) -> dict:
    """By recipe the nats that each site adds when it alone is quantized, the dearest first."""
    found = json.loads(path.read_text(encoding="utf-8"))
    start = found["rows"]["float"]["loss"]
    return {
        name: {site["site"]: site["loss"] - start for site in sites} for name, sites in found["sensitivity"].items()
    }


def read_study(path: Path) -> dict[str, dict]:
    """By run what a study says of its trained model."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    keep = ("diverged", "mean_loss", "outliers", "sinks")
    losses = ("float", "trained", "recipes", "integers")
    return {
        name: {key: run[key] for key in keep} | {key: strip_scores(run[key]) for key in losses if run.get(key)}
        for name, run in runs.items()
    }


def strip_scores(scores: dict) -> dict:
    """Losses, of one score or by recipe; where there is none, why."""
    if "loss" in scores or not all(isinstance(each, dict) for each in scores.values()):
        return {key: scores[key] for key in ("loss", "failed") if key in scores}
    return {name: strip_scores(each) for name, each in scores.items()}


PARTS: tuple[tuple[str, str, Callable[[Path], list | dict]], ...] = (
    ("curves", "/log.jsonl", read_curves),
    ("recipes", "/ptq.json", read_rows),
    ("recipes", ".ptq.json", read_rows),
    ("analysis", ".analyze.json", read_analysis),
    ("sensitivity", ".sensitivity.json", read_sensitivity),
)


CHAINS = ("chains", "/model.safetensors", lambda path: measure_run(path.parent))


def collect(folder: Path, skip: Sequence[str], *, chains: bool = False) -> dict[str, dict]:
    """By row what there is of it in a folder; with `chains` also what models on chains do with the first token."""
    found: dict[str, dict] = defaultdict(dict)
    for part, suffix, read in (*PARTS, *([CHAINS] if chains else [])):
        for path in sorted(folder.glob(f"*{suffix}")):
            name = path.relative_to(folder).as_posix().removesuffix(suffix)
            if not any(fnmatch(name, pattern) for pattern in skip) and (values := read(path)):
                found[name][part] = shorten(values)
    if (path := folder / "study.json").exists():
        for name, run in read_study(path).items():
            if not any(fnmatch(name, pattern) for pattern in skip):
                found[name]["study"] = shorten(run)
    if not found:
        raise SystemExit(f"{folder}: no row there has {', '.join(suffix for _, suffix, _ in PARTS)}")
    return dict(found)
