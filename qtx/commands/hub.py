"""`qtx import` and `qtx export`."""

from __future__ import annotations

from pathlib import Path

import click

from qtx_ref.spec import SpecError

from ..hub import APART
from ..hub.files import FLOATS
from ..jobs.exchange import export_checkpoint, import_folder
from ..report.tables import format_table
from .options import CHECKPOINT, JSON, OUT, say, write_json


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
@CHECKPOINT
@click.option("--format", "form", default="hf", show_default=True, help="hf: the folder that transformers loads.")
@click.option("--out", type=OUT, required=True, help="The folder to write, new or empty.")
@JSON
def export_command(checkpoint: Path, form: str, out: Path, json_path: str | None) -> None:
    """Write a checkpoint for another library.

    A model that was imported and has its structure still gets the same names, dtypes and configuration again; another
    one the names of today's transformers.
    """
    if form != "hf":
        raise SpecError(f"--format {form}: only hf, a folder that transformers loads, is known")
    written = export_checkpoint(checkpoint, out)
    kind = "as it was imported" if written.as_imported else "under the names of transformers"
    say(f"{out}: {', '.join(written.files)}; {', '.join(written.dtypes)}, {kind}", json_path)
    result = {"folder": str(out), "files": written.files, "dtype": written.dtypes, "as_imported": written.as_imported}
    write_json(json_path, result)
