"""`qtx ptq`."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qtx_ref.spec import Head, ModelSpec, SpecError

from ..data import splits
from ..engines.backend import MissingExtra
from ..files.checkpoint import file_of
from ..files.container import CHECKPOINT as CHECKPOINT_FORMAT
from ..files.container import COMPARISON, CheckpointError, check_writable, opened, sha_of
from ..jobs.opening import open_checkpoint, open_data, refuse_transformed
from ..jobs.ptq import CONFIDENCE, RESULTS, Comparison, PtqSpec, kept_name
from ..jobs.training import Machine
from ..recipes import remedies
from ..recipes.named import recipe, resolve
from ..report.ptq import draw_rows
from ..report.tables import DIVERGED, format_number, format_table
from .options import CHECKPOINT, DATA, JSON, MACHINE, OUT, hold_out, say, split_list, write_json


@click.command()
@CHECKPOINT
@DATA
@click.option("--recipes", "names", help="Comma list of recipes in place of the standard ones; see qtx recipes.")
@click.option(
    "--skip", default="", help="Comma list of patterns; recipes that match one are left out: '*gptq,*adaround'."
)
@click.option("--also", default="", help="Comma list of recipes beside these: 'w8a8-float[layer.*.ffn.residual]'.")
@click.option("--sequences", type=click.IntRange(2), default=512, show_default=True, help="Of the evaluation split.")
@click.option("--calibration", type=click.IntRange(1), default=8, show_default=True,
              help=f"Batches of {splits.BATCH} from the calibration split.")  # fmt: skip
@click.option(
    "--sensitivity", metavar="RECIPE", help="Quantize one site of RECIPE at a time and rank the sites, instead."
)
@click.option("--keep", default="", help="Comma list of recipes whose models are left as OUT/RECIPE.safetensors.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap.")
@MACHINE
@click.option("--out", type=OUT, default=Path("runs/ptq"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the comparison in --out, if there is one.")
@JSON
def ptq(checkpoint, data, tokenizer, names, skip, also, sequences, calibration, sensitivity, keep, seed,
        backend_name, device, dtype, out, resume, json_path):  # fmt: skip
    """Compare the remedies of post-training quantization.

    One row per recipe: task metric, its difference to float with a bootstrap interval over sequences, the sites with the
    largest error, latency and size. Leaves OUT/ptq.json and OUT/ptq.png.
    """
    hold_out(out)
    machine = Machine(backend_name, device, dtype)
    for option, value in (("recipes", names), ("skip", skip), ("also", also), ("keep", keep)):
        if sensitivity and value:
            raise SpecError(f"--sensitivity {sensitivity} and --{option} {value}: give one of them")
    found = open_checkpoint(checkpoint)
    if found.spec.head is Head.NONE:
        raise SpecError(f"{checkpoint} has no head, so no task to compare on: give it one with qtx finetune")
    refuse_transformed(found, str(checkpoint))
    chosen = (sensitivity,) if sensitivity else split_list(names) if names else remedies.list_standard(found.spec)
    chosen = tuple(name for name in chosen if not any(fnmatch.fnmatch(name, p) for p in split_list(skip)))
    chosen += split_list(also)
    if not chosen or len(set(chosen)) < len(chosen):
        raise SpecError(f"recipes are {','.join(chosen)!r}: name at least one, each once")
    kept = split_list(keep)
    if strange := [name for name in kept if name not in chosen]:
        raise SpecError(f"--keep {strange[0]}: it is not among the recipes compared; add it to --recipes")
    files = [kept_name(name) for name in kept]
    if twice := [name for name in files if files.count(name) > 1]:
        raise SpecError(f"--keep {keep}: two recipes would be left as {twice[0]}; rename one")
    for name in chosen:
        resolve(recipe(name, found.spec), found.spec)
    sha256 = sha_of(file_of(checkpoint))
    check_out(out, resume, files, sha256)
    source = open_data(checkpoint, found.spec, found.meta, data, tokenizer)
    for split in ("evaluation", "calibration"):
        splits.refuse_overlap(found.meta, source, split)
    spec = PtqSpec(chosen, sequences, calibration, seed, machine)
    identity = {"checkpoint": sha256} | {split: source.fingerprint(split) for split in ("calibration", "evaluation")}
    job = Comparison(spec, found, source, out, identity, resume=resume)
    written = [RESULTS]
    if sensitivity:
        job.sensitivity(sensitivity)
        say(sensitivity_table(job, sensitivity), json_path)
    else:
        job.run(kept)
        written += [name for name in files if (out / name).exists()]
        say(row_table(job, found.spec), json_path)
        try:
            about = f"{len(job.plain.answers.count)} sequences, {calibration} calibration batches of {splits.BATCH}"
            draw_rows(out / "ptq.png", job.kind, job.rows, f"qtx ptq: {checkpoint}, {about}")
            written.append("ptq.png")
        except (MissingExtra, CheckpointError) as error:
            print(f"no picture: {error}", file=sys.stderr)
    say(f"written to {out}: {', '.join(written)}", json_path)
    write_json(json_path, {"rows": job.rows, "sensitivity": job.sites})


def check_out(out: Path, resume: bool, kept: Sequence[str], sha256: str) -> None:
    """Raises CheckpointError where the folder cannot take the results, or has a file of that name that is not of a
    comparison of the checkpoint with this sha256. kept: files of models."""
    if (out / RESULTS).exists() and not resume:
        raise CheckpointError(f"{out / RESULTS} exists: go on with --resume, or choose another --out")
    check_writable(out / RESULTS, COMPARISON)
    for name in kept:
        check_writable(out / name, CHECKPOINT_FORMAT)
        if (out / name).exists():
            with opened(out / name, CHECKPOINT_FORMAT) as (header, _):
                if not resume or header.get("meta", {}).get("quantized_from") != sha256:
                    raise CheckpointError(f"{out / name} exists: choose another --out")


def row_table(job: Comparison, spec: ModelSpec) -> str:
    """The rows, and below them what is the same for all."""
    unit = "accuracy %" if job.kind == "accuracy" else "perplexity"
    header = ["recipe", unit, "to float", f"{CONFIDENCE} % interval", "loss", "simulated", "worst site", "error", "ms",
              "MiB", "from"]  # fmt: skip
    rows = [[name, *cells(row)] for name, row in job.rows.items()]
    shift = "points" if job.kind == "accuracy" else "percent"
    count = len(job.plain.answers.count)
    note = (
        f"{count} evaluation sequences, {job.spec.calibration} calibration batches of {splits.BATCH}; to float in "
        f"{shift}, its interval by a paired bootstrap over sequences. Metric, ms (of a sequence, as evaluated) and MiB of a "
        "row are of one thing: the integer artifact, or the simulation, which is float32 parameters and quantizers. error: "
        "squared error over squared tensor of the site's quantizer, fed the float model's tensor."
    )
    failed = "".join(f"\n{name} failed: {row['why']}" for name, row in job.rows.items() if row["runs_as"] == "failed")
    return f"{format_table(header, rows)}\n{note}{failed}"


def cells(row: Mapping[str, Any]) -> list[str]:
    def write(key: str, digits: int = 3, of: Mapping[str, Any] = row) -> str:
        if key in of and of[key] is None and row["runs_as"] != "failed":
            return DIVERGED
        return format_number(of.get(key), digits)

    interval = "-" if row["low"] is None or row["high"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
    shift = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
    site, error = row["worst"][0] if row["worst"] else ("-", None)
    size = "-" if row["bytes"] is None else f"{row['bytes'] / 2**20:.1f}"
    return [
        write("value", 2),
        shift,
        interval,
        write("loss", 4),
        write("value", 2, row.get("simulated", {})),
        site,
        "-" if error is None else f"{error:.1e}",
        write("ms", 2),
        size,
        row["runs_as"],
    ]


def sensitivity_table(job: Comparison, name: str) -> str:
    unit = "accuracy %" if job.kind == "accuracy" else "perplexity"
    rows = []
    for entry in job.sites[name]:
        shift = "-" if entry["difference"] is None else f"{entry['difference']:+.2f}"
        value, loss = (
            DIVERGED if entry[key] is None else format_number(entry[key], n) for key, n in (("value", 2), ("loss", 4))
        )
        rows.append([entry["site"], value, shift, loss])
    plain = job.rows["float"]
    title = f"one site of {name} quantized at a time; float: {format_number(plain['value'], 2)}, loss {format_number(plain['loss'], 4)}"
    return f"{title}\n{format_table(['site', unit, 'to float', 'loss'], rows)}"
