"""`qtx finetune`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from ..engines.machine import Machine
from ..jobs.finetune import EPOCHS, FULL_LR, HEAD_LR, PER_STEP, FinetuneRequest, finetune
from ..measure.scores import to_json_values
from .options import JSON, MACHINE, OUT, RATE, say, tabulate_result, write_json


def refuse_nan(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuses NaN, which is in every range."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number")
    return value


@click.command(name="finetune")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    metavar="FILE|DIR|books|digits",
    help="A .csv or .jsonl of text, label and perhaps split; a folder of pictures per class.",
)
@click.option("--out", type=OUT, required=True, help="A folder; the model is model.safetensors.")
@click.option("--head-only", is_flag=True, help="Train the new head alone; the encoder keeps its bytes.")
@click.option(
    "--epochs",
    type=click.FloatRange(0, 1e6, min_open=True),
    callback=refuse_nan,
    help=f"Passes over the train split; default {EPOCHS:g}.",
)
@click.option("--steps", type=click.IntRange(1), help="Training steps, in place of --epochs.")
@click.option("--batch", type=click.IntRange(1), default=PER_STEP, show_default=True, help="Texts or images per step.")
@click.option("--lr", type=RATE, help=f"Peak learning rate; default {FULL_LR:g}, with --head-only {HEAD_LR:g}.")
@click.option("--length", type=click.IntRange(3), help="Most tokens of a text, [CLS] and [SEP] included; default 128.")
@click.option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    callback=refuse_nan,
    help="Of hidden states and attention probabilities; default: the checkpoint's.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@MACHINE
@JSON
def finetune_command(
    checkpoint: Path,
    data: str,
    out: Path,
    head_only: bool,
    epochs: float | None,
    steps: int | None,
    batch: int,
    lr: float | None,
    length: int | None,
    dropout: float | None,
    seed: int,
    resume: bool,
    machine: Machine,
    json_path: str | None,
) -> None:
    """Make a classifier of a BERT or ViT.

    A new head on the checkpoint's encoder, trained on labelled data; then its accuracy on the evaluation split.
    """
    request = FinetuneRequest(
        checkpoint=checkpoint,
        data=data,
        out=out,
        head_only=head_only,
        epochs=epochs,
        steps=steps,
        batch=batch,
        lr=lr,
        length=length,
        dropout=dropout,
        seed=seed,
        resume=resume,
        machine=machine,
    )
    trained, score = finetune(request)
    loss = trained.extra["history.loss"].tolist()
    result = {"steps": len(loss), **to_json_values(score)}
    say(tabulate_result(request.path, result), json_path)
    run = {"checkpoint": str(request.path), "diverged": trained.meta["diverged"], "curve": loss}
    write_json(json_path, run | result)
