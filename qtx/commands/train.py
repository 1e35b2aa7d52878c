"""`qtx train`."""

from __future__ import annotations

from pathlib import Path

import click

from qtx_ref.presets import PRESETS

from ..engines.machine import Machine
from ..jobs.pretrain import PretrainRequest, pretrain
from ..jobs.run import PER_STEP, STEPS
from ..measure.history import History
from ..report.tables import format_number, format_table
from .options import DATA, JSON, MACHINE, OUT, RATE, VOCAB, WATCH, say, write_json


@click.command(name="train")
@click.option("--model", help=f"One of {', '.join(PRESETS)}; default opt-tiny, without --init.")
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Go on pre-training from its parameters, with its tokenizer.",
)
@DATA
@VOCAB
@click.option(
    "--attention",
    "attention_name",
    help="Default vanilla, or that of --init; to its model a linear gate (gated:pi=0.5) may be added, or its softmax "
    "changed (clipped).",
)
@click.option("--steps", type=click.IntRange(1), default=STEPS, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=PER_STEP, show_default=True)
@click.option("--lr", type=RATE, help="Peak learning rate; default 1e-3 for the tiny models, 1e-4 for larger ones.")
@click.option(
    "--train-quant", help="Quantize while training: w8a8 (matmuls, per token), lsq-w8a8 (learned ranges), ..."
)
@WATCH
@MACHINE
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=OUT, default=Path("runs/train"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@JSON
def train_command(
    model: str | None,
    init: Path | None,
    data: str | None,
    tokenizer: Path | None,
    vocab: int | None,
    attention_name: str | None,
    steps: int,
    batch: int,
    lr: float | None,
    train_quant: str | None,
    watch_integer: int | None,
    machine: Machine,
    seed: int,
    out: Path,
    resume: bool,
    json_path: str | None,
) -> None:
    """Train one model; leaves OUT/model.safetensors."""
    request = PretrainRequest(
        out=out,
        model=model,
        init=init,
        data=data,
        tokenizer=tokenizer,
        vocab=vocab,
        attention=attention_name,
        steps=steps,
        batch=batch,
        lr=lr,
        train_quant=train_quant,
        watch_integer=watch_integer,
        seed=seed,
        resume=resume,
        machine=machine,
    )
    checkpoint = pretrain(request)
    curve = checkpoint.extra["history.loss"]
    state = " (diverged)" if checkpoint.meta["diverged"] else ""
    watched = History.of(checkpoint.extra).watched() if watch_integer else {}
    if watched:
        points = zip(*watched.values(), strict=True)
        rows = [[str(step), *(format_number(value) for value in values)] for step, *values in points]
        say(format_table(["step", "integer ppl", "float ppl", "avg kurtosis", "max inf norm"], rows), json_path)
    say(f"{request.path}: {len(curve)} steps, loss {curve[-20:].mean():.4f}{state}", json_path)
    result = {"checkpoint": str(request.path), "diverged": checkpoint.meta["diverged"], "loss": curve.tolist()}
    write_json(json_path, result | watched)
