"""`qtx show`, `qtx diff`, `qtx vectors`: what is in an artifact, what differs, and what each step must give."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qtx_ref.spec import SpecError, to_dict

from .artifact import SUFFIX, Artifact, Size, differences, load_artifact, size, stored_bytes
from .files import CheckpointError, check_writable, write_beside
from .options import DATA, JSON, MACHINE, artifact_model, head_note, open_data, say, write_json
from .progress import Progress
from .report.tables import table
from .training import Machine

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
    """Print an artifact's sites, scales, zero points, sizes and profile."""
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
    say(table(["", str(model)], facts), json_path)
    say(table(["profile", "value"], [[k, str(v)] for k, v in to_dict(artifact.profile).items()]), json_path)
    rows = site_rows(artifact, stored)
    header = ["site", "bits", "codes", "per", "scale", "zero point", "constants", "bytes"]
    say(table(header, [[str(row[key]) for key in header] for row in rows]), json_path)
    if note := head_note(artifact):
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
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@JSON
def diff(first, second, json_path):
    """Compare two artifacts: model, recipe, profile, origin and every constant. Exit status 1 if they differ."""
    found = differences(load_artifact(first), load_artifact(second))
    if found:
        say(table(["differs", f"{first} and {second}"], [[d.where, d.what] for d in found]), json_path)
    say(f"{len(found)} difference(s)", json_path)
    write_json(json_path, [asdict(d) for d in found])
    if found:
        sys.exit(1)


@click.command()
@MODEL
@DATA
@click.option("--out", type=click.Path(path_type=Path), help="The .safetensors to write.")
@click.option("--check", type=click.Path(path_type=Path), help="Vectors to hold this model and backend to instead.")
@click.option("--count", type=click.IntRange(1), default=2, show_default=True, help="Sequences or images.")
@click.option("--strict", is_flag=True, help="Run in integer dtypes only.")
@MACHINE
@JSON
def vectors(model, data, tokenizer, out, check, count, strict, backend_name, device, dtype, json_path):
    """Golden vectors: inputs, the codes of every site, accumulators and outputs, for porting to a device."""
    if (out is None) == (check is None):
        raise SpecError("give --out FILE to write vectors, or --check FILE to compare with them")
    artifact = load_artifact(model)
    runner = artifact_model(artifact, Machine(backend_name, device, dtype), strict=strict)
    if check is not None:
        compare(model, check, runner, json_path)
        return
    if out.exists():
        raise CheckpointError(f"{out} exists: choose another --out")
    check_writable(out)
    source = open_data(model, artifact.spec, artifact.meta, data, tokenizer)
    batch = next(iter(source.split_batches("evaluation", artifact.spec, count, 0, limit=1)))
    found = run_vectors(runner, batch)
    write_beside(out, save(found, {"qtx": json.dumps({"format": "qtx-vectors", "version": 1, "model": sha256(model)})}))
    say(f"{out}: {len(found)} tensors of {len(next(iter(batch.values())))} inputs", json_path)
    write_json(json_path, {"vectors": str(out), "tensors": list(found)})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_vectors(runner: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`input.*`, `code.<site>` in the order of the forward pass, `output.value`, `.scale`, `.zero_point`."""
    found = {f"input.{name}": np.ascontiguousarray(value) for name, value in batch.items()}
    with Progress("vectors", 0) as bar:

        def watch(site: str, value: np.ndarray) -> None:
            found[f"code.{site}"] = np.ascontiguousarray(value)
            bar.advance(note=site)

        output = runner.run(batch, watch)
    return found | {f"output.{key}": np.array(value) for key, value in output._asdict().items()}


def compare(model: Path, check: Path, runner: Any, json_path: str | None) -> None:
    """Runs the vectors' inputs again. Exit status 1 at the first site that differs."""
    try:
        with safe_open(check, framework="np") as file:
            header = json.loads((file.metadata() or {})["qtx"])
            expected = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{check}: damaged or no vectors of qtx ({error})") from None
    if header.get("format") != "qtx-vectors" or header.get("model") != sha256(model):
        raise CheckpointError(f"{check}: not the vectors of {model}; write them with qtx vectors {model} --out FILE")
    batch = {n.removeprefix("input."): value for n, value in expected.items() if n.startswith("input.")}
    found = run_vectors(runner, batch)
    missing = sorted(expected.keys() ^ found.keys())
    wrong = [name for name in found if name in expected and not np.array_equal(found[name], expected[name])]
    first = wrong[0] if wrong else missing[0] if missing else None
    say(f"{len(found)} tensors, {len(wrong) + len(missing)} differ" + (f", first {first}" if first else ""), json_path)
    write_json(json_path, {"tensors": len(found), "differ": wrong + missing})
    if first:
        sys.exit(1)
