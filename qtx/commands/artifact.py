"""`qtx show`, `qtx diff`, `qtx vectors`: what is in an artifact, what differs, and what each step must give."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from qtx_ref.spec import SpecError, to_dict

from ..files.artifact import (
    SUFFIX,
    Artifact,
    Size,
    differences,
    load_artifact,
    size,
    stored_bytes,
)
from ..files.container import CheckpointError, check_writable
from ..files.vectors import differing, inputs, load_vectors, run_vectors, save_vectors
from ..jobs.opening import describe_head, make_artifact_model, open_model
from ..jobs.training import Machine
from ..report.tables import format_table
from .options import DATA, JSON, MACHINE, OUT, say, write_json

MODEL = click.argument("model", type=click.Path(path_type=Path), metavar=f"MODEL{SUFFIX}")


def size_text(sizes: Size) -> str:
    return (
        f"{sizes.file:,} bytes, {sizes.file / sizes.tensors:.4f} times its tensors, "
        f"{sizes.file / sizes.codes:.4f} times the weights' codes alone"
    )


@click.command()
@MODEL
@JSON
def show(model, json_path):
    """Print an artifact's sites, scales and sizes."""
    artifact = load_artifact(model)
    sizes, stored = size(model, artifact), stored_bytes(artifact)
    facts = [
        ["model", f"{artifact.spec.family}, {artifact.spec.layers} layers, width {artifact.spec.width}"],
        ["recipe", artifact.recipe.name],
        ["profile", f"{artifact.profile.name}, version {artifact.profile.version}"],
        ["nonlinear functions", str(artifact.nonlinear)],
        *([f"sha256 of {key}", value] for key, value in artifact.meta.get("hashes", {}).items()),
        ["size", size_text(sizes)],
    ]
    say(format_table(["", str(model)], facts), json_path)
    say(format_table(["profile", "value"], [[k, str(v)] for k, v in to_dict(artifact.profile).items()]), json_path)
    rows = site_rows(artifact, stored)
    header = ["site", "bits", "codes", "per", "scale", "zero point", "constants", "bytes"]
    say(format_table(header, [[str(row[key]) for key in header] for row in rows]), json_path)
    if note := describe_head(artifact):
        say(note, json_path)
    write_json(json_path, {
        "spec": to_dict(artifact.spec), "recipe": to_dict(artifact.recipe), "profile": to_dict(artifact.profile),
        "nonlinear": str(artifact.nonlinear), "meta": artifact.meta, "bytes": asdict(sizes), "sites": rows,
    })  # fmt: skip


def site_rows(artifact: Artifact, stored: dict[str, int]) -> list[dict[str, Any]]:
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
        rows.append({
            "site": site,
            "bits": quant.bits if quant else "-",
            "codes": "-" if quant is None else f"{quant.code_min}..{quant.code_max}",
            "per": "-" if quant is None else f"{quant.granularity}{', dynamic' if quant.dynamic else ''}",
            "scale": span(numbers[0]),
            "zero point": span(numbers[1]),
            "constants": " ".join(s for s in short if s not in ("scale", "zero_point")) or "-",
            "bytes": sum(stored[name] for name in names),
        })  # fmt: skip
    return rows


def span(values: np.ndarray | None) -> str:
    """One number, or the ends of several."""
    if values is None:
        return "-"
    low, high = values.min(), values.max()
    return f"{low:.6g}" if low == high else f"{low:.4g} to {high:.4g}"


@click.command()
@click.argument("first", type=click.Path(path_type=Path), metavar=f"FIRST{SUFFIX}")
@click.argument("second", type=click.Path(path_type=Path), metavar=f"SECOND{SUFFIX}")
@JSON
def diff(first, second, json_path):
    """Compare two artifacts.

    Model, recipe, profile, origin and every constant. Exit status 1 if they differ.
    """
    found = differences(load_artifact(first), load_artifact(second))
    if found:
        say(format_table(["differs", f"{first} and {second}"], [[d.where, d.what] for d in found]), json_path)
    say(f"{len(found)} difference(s)", json_path)
    write_json(json_path, {"differences": [asdict(d) for d in found]})
    if found:
        sys.exit(1)


@click.command()
@MODEL
@DATA
@click.option("--out", type=OUT, help="The .safetensors to write.")
@click.option("--check", type=click.Path(path_type=Path), help="Vectors to hold this model and backend to instead.")
@click.option("--count", type=click.IntRange(1), help="Sequences or images to write; default 2.")
@click.option("--strict", is_flag=True, help="Run in integer dtypes only.")
@MACHINE
@JSON
def vectors(model, data, tokenizer, out, check, count, strict, backend_name, device, dtype, json_path):
    """Write golden vectors, or hold a backend to them.

    Inputs, the codes of every site in the order of the forward pass, accumulators and outputs, for porting to a device.
    --check runs the file's own inputs again; exit status 1 if anything differs.
    """
    if (out is None) == (check is None):
        raise SpecError("give --out FILE to write vectors, or --check FILE to compare with them")
    if check is not None and (data or tokenizer or count):
        raise SpecError(f"--data, --tokenizer and --count belong to --out: {check} has its own inputs")
    machine = Machine(backend_name, device, dtype)
    if check is not None:
        artifact = load_artifact(model)
        expected = load_vectors(check, model, artifact.spec)
        compare(expected, make_artifact_model(artifact, machine, strict=strict), json_path)
        return
    if out.suffix.lower() == SUFFIX:
        raise SpecError(f"--out {out}: vectors are no model; give a name ending in .safetensors")
    if out.exists():
        raise CheckpointError(f"{out} exists: choose another --out")
    check_writable(out)
    opened = open_model(model, machine, data, tokenizer, strict=strict)
    batch = next(iter(opened.data.split_batches("evaluation", opened.found.spec, count or 2, 0, limit=1)))
    found = run_vectors(opened.model, batch)
    save_vectors(out, model, found)
    say(f"{out}: {len(found)} tensors of {len(next(iter(batch.values())))} inputs", json_path)
    write_json(json_path, {"vectors": str(out), "tensors": list(found)})


def compare(expected: dict[str, np.ndarray], runner: Any, json_path: str | None) -> None:
    """Runs the vectors' inputs again. Exit status 1 if anything differs; the first in forward order is named."""
    found = run_vectors(runner, inputs(expected))
    wrong = differing(expected, found)
    say(f"{len(found)} tensors, {len(wrong)} differ" + (f", first {wrong[0]}" if wrong else ""), json_path)
    write_json(json_path, {"tensors": len(found), "differ": wrong})
    if wrong:
        sys.exit(1)
