"""`qtx finetune`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import click

from qtx_ref.spec import Family, OptimSpec, SpecError

from ..data import SPLITS, ImageData, LabelledText, load, splits
from ..engines.machine import Machine
from ..engines.protocols import Batch
from ..jobs.opening import check_tokenizer, need_tokenizer
from ..jobs.resume import check_run
from ..jobs.run import Start, TrainSpec
from ..jobs.starts import Origin, make_classifier, open_origin
from ..jobs.training import train
from ..measure import scores
from ..report.tables import format_number, format_table
from .options import JSON, MACHINE, OUT, RATE, claim, say, write_json

FULL_LR, HEAD_LR = 5e-5, 1e-3
EPOCHS = 3.0


def refuse_nan(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Refuses NaN, which is in every range."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number")
    return value


@click.command()
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
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Texts or images per step.")
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
def finetune(
    checkpoint,
    data,
    out,
    head_only,
    epochs,
    steps,
    batch,
    lr,
    length,
    dropout,
    seed,
    resume,
    backend_name,
    device,
    dtype,
    json_path,
):
    """Make a classifier of a BERT or ViT.

    A new head on the checkpoint's encoder, trained on labelled data; then its accuracy on the evaluation split.
    """
    if epochs is not None and steps is not None:
        raise SpecError(f"--epochs {epochs:g} and --steps {steps}: give one of them")
    path, machine = out / "model.safetensors", Machine(backend_name, device, dtype)
    claim(path, resume)
    origin = open_origin(checkpoint)
    rate = lr if lr is not None else HEAD_LR if head_only else FULL_LR
    only = ("head.",) if head_only else ()
    check_run(path, origin.checkpoint.spec, OptimSpec(lr=rate, only=only), machine, None)
    source = load_labelled(origin, data, length)
    spec, params = make_classifier(origin.checkpoint, source.classes, seed, dropout)
    count = steps or max(1, math.ceil((epochs or EPOCHS) * len(source.hashes("train")) / batch))
    optim = OptimSpec(lr=rate, warmup=count // 10, steps=count, only=only)
    run = TrainSpec(spec, optim, batch, seed, init=origin.sha256)
    made = train(run, source, path, machine, resume=resume, start=Start(params, origin.describe()))
    if "diverged_at" in made.meta:
        raise SpecError(f"{path}: training diverged at step {made.meta['diverged_at']}: give a lower --lr")

    def evaluation() -> Iterable[Batch]:
        return source.split_batches("evaluation", spec, splits.BATCH, 0)

    total = sum(1 for _ in evaluation())
    score = scores.evaluate(machine.model(spec, made.params), evaluation(), "evaluate", total)
    loss = made.extra["history.loss"]
    result = {"steps": len(loss), **scores.as_json(score)}
    rows = [[key, format_number(value, 4) if isinstance(value, float) else str(value)] for key, value in result.items()]
    say(format_table(["", str(path)], rows), json_path)
    write_json(
        json_path, {"checkpoint": str(path), "diverged": made.meta["diverged"], "curve": loss.tolist(), **result}
    )


def load_labelled(origin: Origin, data: str, length: int | None) -> LabelledText | ImageData:
    """Labelled data for the checkpoint's family and tokenizer, all three splits filled.

    Raises SpecError, DataError: they do not fit, a class has no train rows, or evaluation or calibration data trained the
    checkpoint or one that it began with.
    """
    spec, meta = origin.checkpoint.spec, origin.checkpoint.meta
    if spec.family is Family.OPT:
        raise SpecError(f"{origin.path} is an opt, which has no classifier: fine-tune a bert or vit checkpoint")
    if spec.family is Family.VIT and length is not None:
        raise SpecError(f"--length {length}: images have none; leave it out")
    need_tokenizer(origin.path, spec, meta)
    own = {"tokenizer": meta.get("tokenizer"), "scaling": meta.get("images")}
    source = load(data, spec, length=length, labelled=True, **own)
    check_tokenizer(origin.path, meta, source)
    for split in SPLITS:
        if not source.hashes(split):
            raise SpecError(f"{data} has no {split} rows: a fine-tuning needs {', '.join(SPLITS)}")
    if untrained := sorted({*range(source.classes)} - {*source.labels_of("train").tolist()}):
        name = untrained[0] if source.names is None else source.names[untrained[0]]
        raise SpecError(f"{data} has no train rows of class {name!r}: give it some, or remove the class")
    for split in ("evaluation", "calibration"):
        splits.refuse_overlap(meta, source, split)
    return source
