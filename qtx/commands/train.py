"""`qtx train`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from ..jobs.pretrain import PretrainRequest, pretrain
from ..measure.history import History
from ..report.tables import format_number, format_table
from ..runs.reading import RunSpec
from . import run_options as given
from .options import JSON, OUT, say, write_json


@click.command(name="train")
@given.with_run(
    given.MODEL,
    given.INIT,
    given.SOURCE,
    given.TOKENIZER,
    given.VOCAB,
    given.ATTENTION,
    given.STEPS,
    given.STOP,
    given.BATCH,
    given.RATES,
    given.TRAIN_QUANT,
    given.WATCH,
    given.PLACE,
    given.SEED,
)
@click.option("--out", type=OUT, default=Path("runs/train"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@given.CHANGES
@JSON
def train_command(
    run: RunSpec, out: Path, resume: bool, change: tuple[str, ...], move: bool, json_path: str | None
) -> None:
    """Train one model: a run by name or file.

    `qtx runs` lists the names; options stand over the run, and --set over them. Leaves OUT/model.safetensors and
    OUT/run.toml, the whole run. One that was stopped, by --stop or a signal, goes on with --resume.
    """
    if run.grids:
        say(f"one run, without its grids of {', '.join(run.grids)}: qtx study trains them all", "-")
    request = PretrainRequest(out=out, run=run, resume=resume, change=change, move=move)
    checkpoint = pretrain(request)
    curve = checkpoint.extra["history.loss"]
    state = " (diverged)" if checkpoint.meta["diverged"] else ""
    history = History.of(checkpoint.extra)
    watched = history.watched() if "w8a8" in run.get("evaluation.integers", ()) else {}
    if watched:
        points = zip(*watched.values(), strict=True)
        rows = [[str(step), *(format_number(value) for value in values)] for step, *values in points]
        say(format_table(["step", "integer ppl", "float ppl", "avg kurtosis", "max inf norm"], rows), json_path)
    elif history.curves:
        rows = [[name, str(points[-1][0]), format_number(points[-1][1])] for name, points in history.curves.items()]
        say(format_table(["held out", "step", "value"], rows), json_path)
    say(f"{request.path}: {len(curve)} steps, loss {curve[-20:].mean():.4f}{state}", json_path)
    result = {"checkpoint": str(request.path), "diverged": checkpoint.meta["diverged"], "loss": curve.tolist()}
    write_json(json_path, result | watched | {"evaluation": keep_finite(history.curves)})


def keep_finite(curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, list[list[float | None]]]:
    """What was measured on held-out data, [step, value] each, as JSON values."""
    return {
        name: [[step, value if math.isfinite(value) else None] for step, value in points]
        for name, points in curves.items()
    }
