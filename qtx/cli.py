"""The command line. Every error that a user can mend is one line on stderr and exit status 1."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from qtx_ref.presets import PRESETS, attention, preset
from qtx_ref.spec import ModelSpec, SpecError, check_generation, to_dict

from . import __version__
from .commands.analyze import analyze
from .commands.artifact import diff, show, vectors
from .commands.cost import cost_command
from .commands.finetune import finetune
from .commands.hub import export, import_command
from .commands.options import (
    DATA,
    EITHER,
    JSON,
    LIMIT,
    MACHINE,
    OUT,
    RATE,
    VOCAB,
    WATCH,
    Number,
    claim,
    hold_out,
    say,
    split_list,
    write_json,
)
from .commands.parity import parity
from .commands.ptq import ptq
from .commands.quantize import quantize
from .data import DataError, load, splits
from .data.tokenizing import encode_prompt, open_tokenizer
from .engines.backend import MissingExtra
from .engines.machine import Machine
from .files.artifact import SUFFIX, Artifact
from .files.checkpoint import Checkpoint
from .files.container import CheckpointError
from .jobs.opening import need_head, open_data, open_model
from .jobs.resume import check_run
from .jobs.run import Start, TrainSpec
from .jobs.starts import continue_model, open_origin
from .jobs.study import Study, StudySpec
from .jobs.training import default_optim, fit_vocabulary, train
from .measure import scores
from .measure.history import History
from .recipes import named as recipes
from .report.tables import number, table
from .signals import Interrupted, exit_status, handle, interrupt

HOTTEST = 1e100  # temperature at which every token is as likely as any other, and nothing overflows
MENDABLE = (SpecError, DataError, CheckpointError, MissingExtra, OSError)


class Commands(click.Group):
    """Turns mendable errors into one line; SIGINT and SIGTERM end every command with 130 and 143."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was named. Raises ClickException for what a user can mend, click's Exit for a signal."""
        try:
            with handle(interrupt):
                return super().invoke(ctx)
        except Interrupted as stop:
            click.echo(f"\n{stop}; the same command with --resume goes on", err=True)
            ctx.exit(exit_status(stop))
        except KeyboardInterrupt as stop:
            resumes = ctx.invoked_subcommand in ("finetune", "ptq", "study", "train")
            click.echo("\nstopped" + ("; the same command with --resume goes on" if resumes else ""), err=True)
            ctx.exit(exit_status(stop))
        except BrokenPipeError:  # whoever read the output has enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # nothing is left to flush at exit
            ctx.exit(1)
        except MENDABLE as error:
            raise click.ClickException(" ".join(str(error).split())) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Quantized transformers: train without outliers, quantize, and prove what the integers mean."""


@main.command()
@click.option("--model", default="opt-tiny", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@DATA
@VOCAB
@click.option(
    "--steps", type=click.IntRange(1), default=StudySpec.steps, show_default=True, help="Training steps of each run."
)
@click.option("--batch", type=click.IntRange(1), default=StudySpec.batch, show_default=True, help="Sequences per step.")
@click.option("--lr", type=RATE, help="Peak learning rate; default 1e-3 for the tiny models, 1e-4 for larger ones.")
@click.option(
    "--attention",
    "attentions",
    default="vanilla,clipped,gated",
    show_default=True,
    help="Comma list; `clipped:gamma=-0.03`, `mlp`, `clipped+gated:pi=0.25`, ...",
)
@click.option("--recipe", "recipe_name", help="One quantization recipe: the same as --bits with one name.")
@click.option("--bits", help="Comma list of recipes, a column each: w8a8,w6a6,paper-opt,... (default w8a8)")
@click.option("--train-quant", help="Train all models again with quantized matmuls, for example w8a8.")
@WATCH
@MACHINE
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Number of seeds, from --seed on."
)
@click.option("--out", type=OUT, default=Path("runs/study"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the study in --out, if there is one.")
@JSON
def study(
    model,
    data,
    tokenizer,
    vocab,
    steps,
    batch,
    lr,
    attentions,
    recipe_name,
    bits,
    train_quant,
    watch_integer,
    backend_name,
    device,
    dtype,
    seed,
    seeds,
    out,
    resume,
    json_path,
):
    """Train, quantize and compare attentions: the paper's table."""
    if recipe_name and bits:
        raise SpecError(f"--recipe {recipe_name} and --bits {bits}: give one of them")
    hold_out(out)
    spec = StudySpec(
        model=model,
        data=data,
        tokenizer=None if tokenizer is None else str(tokenizer),
        vocab=vocab,
        steps=steps,
        batch=batch,
        lr=lr,
        attention=split_list(attentions),
        recipes=split_list(recipe_name or bits or "w8a8"),
        train_quant=train_quant,
        watch_integer=watch_integer,
        seeds=tuple(range(seed, seed + seeds)),
        machine=Machine(backend_name, device, dtype),
    )
    job = Study(spec, out, resume=resume)
    job.run()
    say(job.table(), json_path)
    say(f"written to {out}: {', '.join(job.written)}", json_path)
    write_json(json_path, job.result())


@main.command(name="train")
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
@click.option("--steps", type=click.IntRange(1), default=StudySpec.steps, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=StudySpec.batch, show_default=True)
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
    model,
    init,
    data,
    tokenizer,
    vocab,
    attention_name,
    steps,
    batch,
    lr,
    train_quant,
    watch_integer,
    backend_name,
    device,
    dtype,
    seed,
    out,
    resume,
    json_path,
):
    """Train one model; leaves OUT/model.safetensors."""
    path, machine = out / "model.safetensors", Machine(backend_name, device, dtype)
    claim(path, resume)
    origin = start = None
    if init is None:
        spec = replace(preset(model or "opt-tiny"), attention=attention(attention_name or "vanilla"))
    else:
        for name, value in (("model", model), ("tokenizer", tokenizer), ("vocab", vocab)):
            if value is not None:
                raise SpecError(f"--init and --{name} {value}: the checkpoint has its own; leave one of them out")
        origin = open_origin(init)
        spec, params = continue_model(origin.checkpoint, attention_name, seed)
        start = Start(params, origin.describe())
    optim = default_optim(spec, steps, lr)
    check_run(path, spec, optim, machine, train_quant)
    if origin is None:
        source = load(data, spec, tokenizer=tokenizer, vocab=vocab)
        spec = fit_vocabulary(spec, source)
    else:
        source = open_data(init, spec, origin.checkpoint.meta, data, None)
        for split in ("evaluation", "calibration"):
            splits.refuse_overlap(origin.checkpoint.meta, source, split)
    run = TrainSpec(spec, optim, batch, seed, train_quant, watch_integer, origin and origin.sha256)
    checkpoint = train(run, source, path, machine, resume=resume, label=attention_name or out.name, start=start)
    curve = checkpoint.extra["history.loss"]
    state = " (diverged)" if checkpoint.meta["diverged"] else ""
    history = History.of(checkpoint.extra)
    if watch_integer:
        points = zip(*history.watched().values(), strict=True)
        rows = [[str(step), *(number(value) for value in values)] for step, *values in points]
        say(table(["step", "integer ppl", "float ppl", "avg kurtosis", "max inf norm"], rows), json_path)
    say(f"{path}: {len(curve)} steps, loss {curve[-20:].mean():.4f}{state}", json_path)
    result = {"checkpoint": str(path), "diverged": checkpoint.meta["diverged"], "loss": curve.tolist()}
    write_json(json_path, result | history.watched() if watch_integer else result)


@main.command()
@EITHER
@DATA
@click.option(
    "--recipe", "recipe_name", help="float, or a recipe to calibrate and apply; default: the checkpoint's own."
)
@click.option("--numerics", type=click.Choice(["integer", "fake"]), help=f"Of a MODEL{SUFFIX}; default: integer.")
@click.option("--strict", is_flag=True, help=f"Of a MODEL{SUFFIX}: integer dtypes only, in every op; slow.")
@LIMIT
@MACHINE
@JSON
def evaluate(
    checkpoint, data, tokenizer, recipe_name, numerics, strict, batches, backend_name, device, dtype, json_path
):
    """Perplexity or accuracy of a model.

    Of a CHECKPOINT in float or under fake quantization, of a MODEL.qtx in integers or, with --numerics fake, under the fake
    quantization of the same codes.
    """
    opened = open_model(
        checkpoint,
        Machine(backend_name, device, dtype),
        data,
        tokenizer,
        recipe_name=recipe_name,
        numerics=numerics,
        strict=strict,
        split="evaluation",
        check=lambda found: need_head(checkpoint, found.spec),
    )

    def evaluation():
        return opened.data.split_batches("evaluation", opened.found.spec, splits.BATCH, 0, limit=batches)

    label, total = f"evaluate {opened.numerics}", sum(1 for _ in evaluation())
    score = scores.evaluate(opened.scored, evaluation(), label, total)
    check_finite(str(checkpoint), score, opened.found.spec)
    result = {"numerics": opened.numerics, **scores.as_json(score)}
    rows = [[key, number(value, 4) if isinstance(value, float) else str(value)] for key, value in result.items()]
    note = opened.note
    say(table(["", str(checkpoint)], rows) + (f"\n{note}" if note else ""), json_path)
    write_json(json_path, result | ({"note": note} if note else {}))


def check_finite(what: str, score: scores.Score, spec: ModelSpec) -> None:
    """Raises SpecError where a model's loss or its metric is no finite number."""
    for name in ("loss", scores.metric(spec)):
        if not math.isfinite(value := getattr(score, name)):
            raise SpecError(
                f"{what} diverges: {name} is {value} over {score.targets} targets; take another model or recipe"
            )


@main.command()
@EITHER
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--tokens", type=click.IntRange(1), default=40, show_default=True, help="Number of new tokens.")
@click.option(
    "--temperature", type=Number(0, HOTTEST), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--recipe", "recipe_name", help="float, or a recipe to calibrate and apply; default: the checkpoint's own."
)
@DATA
@MACHINE
@JSON
def generate(checkpoint, prompt, tokens, temperature, seed, recipe_name, data, tokenizer, backend_name, device, dtype,
             json_path):  # fmt: skip
    """Go on with a text (OPT).

    Token by token, with cached keys and values, in float, under a recipe, or from a MODEL.qtx in integers.
    """
    from qtx_ref.random import stream

    def check(found: Checkpoint | Artifact) -> None:
        check_generation(found.spec, {}, tokens + 1)
        need_head(checkpoint, found.spec)

    machine = Machine(backend_name, device, dtype)
    opened = open_model(checkpoint, machine, data, tokenizer, recipe_name=recipe_name, check=check)
    model = opened.model
    words, _, _ = open_tokenizer(opened.data.tokenizer_json, "a prompt")
    start = np.array([encode_prompt(words, prompt)], np.int64)
    if start.size == 0:
        raise SpecError(f"prompt {prompt!r} has no token: give some text")
    rng = stream(seed, "generate")

    def choose(logits: np.ndarray) -> np.ndarray:  # (B, V) -> (B,); Gumbel: argmax of logits / t + noise is a sample
        noise = rng.gumbel(size=logits.shape) * temperature
        return (logits + noise).argmax(axis=-1)

    text = model.generate(start, tokens, choose)[0].tolist()
    say(words.decode(text), json_path)
    write_json(json_path, {"tokens": text, "prompt_tokens": start.size, "text": words.decode(text)})


@main.command(name="recipes")
@click.argument("name", required=False)
@click.option("--model", default="opt-tiny", show_default=True, help="The model that the recipe is for.")
@click.option("--attention", "attention_name", default="vanilla", show_default=True)
@JSON
def recipes_command(name, model, attention_name, json_path):
    """Print a recipe as JSON.

    Each rule with its source, and the sites it quantizes in a model; without a name, the names.
    """
    if name is None:
        click.echo(f"recipes: {recipes.NAMES}")
        return
    spec = replace(preset(model), attention=attention(attention_name))
    chosen = recipes.recipe(name, spec)
    resolved = {site: to_dict(quant) for site, quant in recipes.resolve(chosen, spec).items()}
    write_json(json_path or "-", {"recipe": to_dict(chosen), "sites": resolved})


for command in (analyze, quantize, ptq, cost_command, parity, show, diff, vectors, import_command, export, finetune):
    main.add_command(command)
