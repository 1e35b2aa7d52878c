"""`qtx import` and `qtx export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qtx_ref.spec import SpecError

from ..graphs.export import EXTERNAL, FORMS
from ..graphs.export_check import EngineCheck
from ..hub import APART
from ..hub.files import FLOATS
from ..jobs.exchange import check_graph, export_checkpoint, export_graph, import_folder
from ..report.tables import format_table
from .options import EITHER, JSON, OUT, say, write_json


@click.command(name="import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", type=OUT, required=True, help="The .safetensors to write.")
@JSON
def import_command(folder: Path, out: Path, json_path: str | None) -> None:
    """Make a checkpoint of a Hugging Face model.

    FOLDER holds config.json, model.safetensors (or shards and their index) and, for text, tokenizer.json: a BERT, OPT
    or ViT, with or without its head.
    """
    if json_path not in (None, "-") and Path(json_path).resolve().parent == folder.resolve():
        raise SpecError(f"--json {json_path} is in the folder that is read: choose another")
    imported = import_folder(folder, out)
    spec, hub = imported.spec, imported.meta["hub"]
    result = {
        "checkpoint": str(out),
        "family": str(spec.family),
        "head": str(spec.head),
        "layers": spec.layers,
        "width": spec.width,
        "heads": spec.heads,
        "parameters": sum(value.size for value in imported.params.values()),
        "dtype": sorted({FLOATS[hub["dtypes"][name]] for name in hub["names"].values()}),
        "tokenizer": "tokenizer" in imported.meta,
        "tied": sorted(hub["tied"]),
        "apart": sorted(name.removeprefix(APART) for name in imported.extra),
    }
    printed = {
        **result,
        "parameters": f"{result['parameters']:,}",
        "tokenizer": "yes" if result["tokenizer"] else "none",
    }
    rows = [
        [key, ", ".join(value) or "none" if isinstance(value, list) else str(value)] for key, value in printed.items()
    ]
    say(format_table(["", str(folder)], rows[1:]) + f"\n{out}: see qtx analyze {out}", json_path)
    write_json(json_path, result)


@click.command(name="export")
@EITHER
@click.option(
    "--format",
    "kind",
    type=click.Choice(["hf", "onnx"]),
    default="hf",
    show_default=True,
    help="hf: the folder that transformers loads, of a checkpoint. onnx: a graph, of a quantized model.",
)
@click.option("--out", type=OUT, required=True, help="The folder to write, new or empty; the .onnx to write.")
@click.option(
    "--form",
    type=click.Choice(list(FORMS)),
    help="Of onnx. integer (the default): integer operators alone, every code the reference's. qdq: float operators "
    "between quantizers, as deployment tools expect.",
)
@click.option(
    "--external-data-above",
    "external_above",
    type=click.IntRange(0),
    help=f"Of onnx: constants of more bytes than this go into a file beside it. Default {EXTERNAL}.",
)
@click.option("--expose", is_flag=True, help="Of onnx: the codes of every site are outputs too.")
@click.option(
    "--check",
    "verify",
    is_flag=True,
    help="Of onnx: run it in onnxruntime at each level and in ONNX's evaluator, code by code.",
)
@JSON
def export_command(
    checkpoint: Path,
    kind: str,
    out: Path,
    form: str | None,
    external_above: int | None,
    expose: bool,
    verify: bool,
    json_path: str | None,
) -> None:
    """Write a model for another library.

    As hf, a checkpoint that was imported and has its structure still gets the same names, dtypes and configuration
    again; another one the names of today's transformers.
    """
    if kind == "onnx":
        limit = EXTERNAL if external_above is None else external_above
        export_as_onnx(checkpoint, out, form or "integer", limit, expose, verify, json_path)
        return
    for name, given in (("form", form), ("external-data-above", external_above), ("expose", expose), ("check", verify)):
        if given not in (None, False):
            raise SpecError(f"--{name} is of --format onnx, not of hf: leave it out")
    written = export_checkpoint(checkpoint, out)
    how = "as it was imported" if written.as_imported else "under the names of transformers"
    say(f"{out}: {', '.join(written.files)}; {', '.join(written.dtypes)}, {how}", json_path)
    result = {"folder": str(out), "files": written.files, "dtype": written.dtypes, "as_imported": written.as_imported}
    write_json(json_path, result)


def export_as_onnx(
    path: Path, out: Path, form: str, external_above: int, expose: bool, verify: bool, json_path: str | None
) -> None:
    """The graph of an artifact, and how it fares; exit status 1 where a code that must be equal is not."""
    written = export_graph(path, out, form, external_above=external_above, expose=expose)
    files = ", ".join(f"{name} ({size:,} bytes)" for name, size in written.files.items())
    operators = ", ".join(f"{name} {count}" for name, count in written.operators.items())
    say(f"{files}\n{form} form, profile {written.profile}, {len(written.sites)} sites\n{operators}", json_path)
    if written.session:
        entries = ", ".join(f"{key} {value}" for key, value in written.session.items())
        say(f"an onnxruntime session needs the entries {entries}", json_path)
    result: dict[str, Any] = asdict(written)
    checks = list(check_graph(path, out)) if verify else []
    if verify:
        result["checks"] = [asdict(one) | {"equal": one.equal} for one in checks]
        say("\n" + format_checks(checks), json_path)
    write_json(json_path, result)
    if not all(one.equal for one in checks):
        raise click.exceptions.Exit(1)


def format_checks(checks: Sequence[EngineCheck]) -> str:
    """A table of engines, and under it the sites that differ."""
    rows: list[list[str]] = []
    flipped: dict[str, list[str]] = {}
    for one in checks:
        numbers = [f"{number:,}" for number in one.count()]
        rows.append([one.engine, *numbers, "yes" if one.exposing else "no"])
        flips = ", ".join(f"{site.site} {site.free:,} of {site.codes:,}" for site in one.sites if site.free)
        flipped.setdefault(flips, []).append(one.engine)
    head = ["engine", "exact codes", "differ", "near", "float codes", "flip", "by", "flip, free", "same when exposed"]
    lines = [f"{', '.join(engines)}, run freely: {flips}" for flips, engines in flipped.items() if flips]
    return "\n".join([format_table(head, rows), *lines])
