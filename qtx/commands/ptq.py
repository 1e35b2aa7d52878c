"""`qtx ptq`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..data.splits import BATCH
from ..jobs.comparison import Comparison
from ..jobs.ptq import CALIBRATION, READ, SEQUENCES, PtqRequest, compare_recipes
from ..measure.damage import DESTROYED, SPARED
from ..measure.paired import CONFIDENCE
from ..report.tables import DIVERGED, format_number, format_table
from ..runs.reading import RunSpec
from . import run_options as given
from .options import CHECKPOINT, JSON, OUT, say, split_list, write_json


@click.command(name="ptq")
@CHECKPOINT
@given.with_run(
    given.SOURCE,
    given.TOKENIZER,
    given.run_option(
        "--recipes",
        "quant.recipes",
        type=given.NAMES,
        help="Comma list of recipes in place of the standard ones; see qtx recipes.",
    ),
    given.PLACE,
    argument=False,
    reads=READ,
)
@click.option(
    "--skip", default="", help="Comma list of patterns; recipes that match one are left out: '*gptq,*adaround'."
)
@click.option("--also", default="", help="Comma list of recipes beside these: 'w8a8-float[layer.*.ffn.residual]'.")
@click.option(
    "--sequences", type=click.IntRange(2), default=SEQUENCES, show_default=True, help="Of the evaluation split."
)
@click.option(
    "--calibration",
    type=click.IntRange(1),
    default=CALIBRATION,
    show_default=True,
    help=f"Batches of {BATCH} from the calibration split.",
)
@click.option(
    "--sensitivity", metavar="RECIPE", help="Quantize one site of RECIPE at a time and rank the sites, instead."
)
@click.option(
    "--spare",
    default="",
    help=f"Comma list of kinds of tokens ({', '.join(SPARED)}) whose part of the damage is measured: each recipe once "
    "more with their activations in float and out of calibration.",
)
@click.option("--keep", default="", help="Comma list of recipes whose models are left as OUT/RECIPE.safetensors.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap.")
@click.option("--out", type=OUT, default=Path("runs/ptq"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the comparison in --out, if there is one.")
@JSON
def ptq_command(
    checkpoint: Path,
    run: RunSpec,
    skip: str,
    also: str,
    sequences: int,
    calibration: int,
    sensitivity: str | None,
    spare: str,
    keep: str,
    seed: int,
    out: Path,
    resume: bool,
    json_path: str | None,
) -> None:
    """Compare the remedies of post-training quantization.

    One row per recipe: task metric, its difference to float with a bootstrap interval over sequences, the sites with
    the largest error, latency and size. Leaves OUT/ptq.json and OUT/ptq.png.
    """
    request = PtqRequest(
        checkpoint=checkpoint,
        out=out,
        run=run,
        skip=split_list(skip),
        also=split_list(also),
        sequences=sequences,
        calibration=calibration,
        sensitivity=sensitivity,
        keep=split_list(keep),
        spare=split_list(spare),
        seed=seed,
        resume=resume,
    )
    comparison, written = compare_recipes(request)
    say(tabulate_sites(comparison, sensitivity) if sensitivity else tabulate_rows(comparison), json_path)
    if request.spare:
        say(tabulate_damage(comparison), json_path)
    say(f"written to {out}: {', '.join(written)}", json_path)
    write_json(json_path, {"rows": comparison.rows, "sensitivity": comparison.sites})


def tabulate_rows(job: Comparison) -> str:
    """The rows, and below them what is the same for all."""
    unit = "accuracy %" if job.kind == "accuracy" else "perplexity"
    header = [
        "recipe",
        unit,
        "to float",
        f"{CONFIDENCE} % interval",
        "loss",
        "simulated",
        "worst site",
        "error",
        "ms",
        "MiB",
        "from",
    ]
    rows = [[name, *write_cells(row)] for name, row in job.rows.items()]
    shift = "points" if job.kind == "accuracy" else "percent"
    count = len(job.plain.answers.count)
    note = (
        f"{count} evaluation sequences, {job.spec.calibration} calibration batches of {BATCH}; to float in "
        f"{shift}, its interval by a paired bootstrap over sequences. Metric, ms (of a sequence, as evaluated) and MiB "
        "of a row are of one thing: the integer artifact, or the simulation, which is float32 parameters and "
        "quantizers. error: squared error over squared tensor of the site's quantizer, fed the float model's tensor."
    )
    failed = "".join(f"\n{name} failed: {row['why']}" for name, row in job.rows.items() if row["runs_as"] == "failed")
    return f"{format_table(header, rows)}\n{note}{failed}"


def write_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of ptq.json as the table's cells, beside its name."""

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


def tabulate_damage(job: Comparison) -> str:
    """What each row's quantization adds to the loss, and the part of it that belongs to the spared tokens."""
    names, interval = ", ".join(job.spec.spare), f"{CONFIDENCE} % interval"
    header = ["recipe", "damage, nats", interval, f"of it {names}'s, nats", interval, "loss, spared"]
    rows = []
    for name, row in job.rows.items():
        if "damage" in row:
            whole, part = (write_difference(row["damage"][key]) for key in ("whole", "part"))
            loss = row["spared"]["loss"]
            rows.append([name, *whole, *part, DIVERGED if loss is None else format_number(loss, 4)])
    note = (
        f"damage: the loss under fake quantization less that in float. Of it belongs to {names} what is gained where "
        "the activations of those tokens stay in float and out of calibration, weights being quantized all the same; "
        f"destroyed: perplexity above {DESTROYED:g} times float's, where no part is given."
    )
    return f"{format_table(header, rows)}\n{note}"


def write_difference(difference: Mapping[str, float] | None) -> tuple[str, str]:
    """A difference of losses and its interval as cells."""
    if difference is None:
        return "destroyed", "-"
    return f"{difference['nats']:+.4f}", f"{difference['low']:+.4f} to {difference['high']:+.4f}"


def tabulate_sites(job: Comparison, name: str) -> str:
    """What each site of a recipe costs when it alone is quantized, the dearest first."""
    unit = "accuracy %" if job.kind == "accuracy" else "perplexity"
    rows = []
    for entry in job.sites[name]:
        shift = "-" if entry["difference"] is None else f"{entry['difference']:+.2f}"
        value, loss = (
            DIVERGED if entry[key] is None else format_number(entry[key], n) for key, n in (("value", 2), ("loss", 4))
        )
        rows.append([entry["site"], value, shift, loss])
    plain = job.rows["float"]
    before = f"float: {format_number(plain['value'], 2)}, loss {format_number(plain['loss'], 4)}"
    table = format_table(["site", unit, "to float", "loss"], rows)
    return f"one site of {name} quantized at a time; {before}\n{table}"
