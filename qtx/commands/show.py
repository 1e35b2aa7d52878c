"""`qtx show`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from qtx_ref.spec import to_dict

from ..files.artifact import Artifact, count_constant_bytes, load_artifact, measure_size
from ..jobs.opening import describe_head
from ..report.tables import format_table
from .options import ARTIFACT, JSON, describe_size, say, write_json

COLUMNS = ("site", "bits", "codes", "per", "scale", "zero point", "constants", "bytes")


@click.command(name="show")
@ARTIFACT
@JSON
def show_command(model: Path, json_path: str | None) -> None:
    """Print an artifact's sites, scales and sizes."""
    artifact = load_artifact(model)
    sizes = measure_size(model, artifact)
    facts = [
        ["model", f"{artifact.spec.family}, {artifact.spec.layers} layers, width {artifact.spec.width}"],
        ["recipe", artifact.recipe.name],
        ["profile", f"{artifact.profile.name}, version {artifact.profile.version}"],
        ["nonlinear functions", str(artifact.nonlinear)],
        *([f"sha256 of {key}", value] for key, value in artifact.meta.get("hashes", {}).items()),
        ["size", describe_size(sizes)],
    ]
    say(format_table(["", str(model)], facts), json_path)
    say(format_table(["profile", "value"], [[k, str(v)] for k, v in to_dict(artifact.profile).items()]), json_path)
    rows = list_sites(artifact, count_constant_bytes(artifact))
    say(format_table(COLUMNS, [[str(row[key]) for key in COLUMNS] for row in rows]), json_path)
    if note := describe_head(artifact):
        say(note, json_path)
    result = {
        "spec": to_dict(artifact.spec),
        "recipe": to_dict(artifact.recipe),
        "profile": to_dict(artifact.profile),
        "nonlinear": str(artifact.nonlinear),
        "meta": artifact.meta,
        "bytes": asdict(sizes),
        "sites": rows,
    }
    write_json(json_path, result)


def list_sites(artifact: Artifact, stored: Mapping[str, int]) -> list[dict[str, str | int]]:
    """One row per quantizer, and one per site that has constants without one; every constant is counted once."""
    owners: dict[str, list[str]] = {}
    for name in artifact.constants:
        owner = name if name in artifact.quants else name.rpartition(".")[0]
        owner = owner if owner in artifact.quants else owner.removesuffix(".weight").removesuffix(".bias")
        owners.setdefault(owner, []).append(name)
    rows = []
    order = list(artifact.quants)
    for site, names in sorted(
        owners.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)
    ):
        quant = artifact.quants.get(site)
        numbers = [artifact.constants.get(f"{site}.{key}") for key in ("scale", "zero_point")]
        short = [name.removeprefix(f"{site}.") if name != site else "codes" for name in names]
        rows.append(
            {
                "site": site,
                "bits": quant.bits if quant else "-",
                "codes": "-" if quant is None else f"{quant.code_min}..{quant.code_max}",
                "per": "-" if quant is None else f"{quant.granularity}{', dynamic' if quant.dynamic else ''}",
                "scale": format_span(numbers[0]),
                "zero point": format_span(numbers[1]),
                "constants": " ".join(s for s in short if s not in ("scale", "zero_point")) or "-",
                "bytes": sum(stored[name] for name in names),
            }
        )
    return rows


def format_span(values: np.ndarray | None) -> str:
    """One number, or the ends of several."""
    if values is None:
        return "-"
    low, high = values.min(), values.max()
    return f"{low:.6g}" if low == high else f"{low:.4g} to {high:.4g}"
