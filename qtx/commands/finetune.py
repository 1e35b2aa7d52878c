"""`qtx finetune`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ..jobs.finetune import EPOCHS, FULL_LR, HEAD_LR, PER_STEP, FinetuneRequest, finetune
from ..measure.scores import to_json_values
from ..runs.reading import RunSpec
from . import run_options as given
from .options import JSON, OUT, RATE, say, tabulate_result, write_json
from .run_options import run_option


def refuse_nan(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuses NaN, which is in every range."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number")
    return value


class Share(click.FloatRange):
    """A number from 0 to below 1."""

    def __init__(self) -> None:
        super().__init__(0, 1, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("nan is no number", param, ctx)
        return number


@click.command(name="finetune")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@given.with_run(
    run_option(
        "--data",
        "data.sources",
        metavar="FILE|DIR|books|digits",
        help="A .csv or .jsonl of text, label and perhaps split; a folder of pictures per class.",
    ),
    run_option("--steps", "optim.steps", type=click.IntRange(1), help="Training steps, in place of --epochs."),
    run_option("--batch", "data.batch", type=click.IntRange(1), help=f"Texts or images per step; default {PER_STEP}."),
    run_option(
        "--lr", "optim.lr", type=RATE, help=f"Peak learning rate; default {FULL_LR:g}, with --head-only {HEAD_LR:g}."
    ),
    run_option(
        "--length",
        "data.window",
        type=click.IntRange(3),
        help="Most tokens of a text, [CLS] and [SEP] included; default 128.",
    ),
    run_option(
        "--dropout",
        "model.dropout",
        "model.attention_dropout",
        type=Share(),
        help="Of hidden states and attention probabilities; default: the checkpoint's.",
    ),
    given.TRAIN_QUANT,
    given.SEED,
    given.PLACE,
    argument=False,
)
@click.option("--out", type=OUT, required=True, help="A folder; the model is model.safetensors.")
@click.option("--head-only", is_flag=True, help="Train the new head alone; the encoder keeps its bytes.")
@click.option(
    "--epochs",
    type=click.FloatRange(0, 1e6, min_open=True),
    callback=refuse_nan,
    help=f"Passes over the train split; default {EPOCHS:g}.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@given.CHANGES
@JSON
def finetune_command(
    checkpoint: Path,
    run: RunSpec,
    out: Path,
    head_only: bool,
    epochs: float | None,
    resume: bool,
    change: tuple[str, ...],
    move: bool,
    json_path: str | None,
) -> None:
    """Make a classifier of a BERT or ViT.

    A new head on the checkpoint's encoder, trained on labelled data; then its accuracy on the evaluation split.
    """
    request = FinetuneRequest(
        checkpoint=checkpoint,
        out=out,
        run=run,
        head_only=head_only,
        epochs=epochs,
        resume=resume,
        change=change,
        move=move,
    )
    trained, score = finetune(request)
    loss = trained.extra["history.loss"].tolist()
    result = {"steps": len(loss), **to_json_values(score)}
    say(tabulate_result(request.path, result), json_path)
    about = {"checkpoint": str(request.path), "diverged": trained.meta["diverged"], "curve": loss}
    write_json(json_path, about | result)
