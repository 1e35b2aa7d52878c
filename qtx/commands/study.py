"""`qtx study`."""

from __future__ import annotations

from pathlib import Path

import click

from qtx_ref.presets import PRESETS
from qtx_ref.spec import SpecError

from ..engines.machine import Machine
from ..jobs.run import PER_STEP, STEPS
from ..jobs.study import StudySpec, run_study
from .options import DATA, JSON, MACHINE, OUT, RATE, VOCAB, WATCH, say, split_list, write_json


@click.command(name="study")
@click.option("--model", default="opt-tiny", show_default=True, help=f"One of {', '.join(PRESETS)}.")
@DATA
@VOCAB
@click.option("--steps", type=click.IntRange(1), default=STEPS, show_default=True, help="Training steps of each run.")
@click.option("--batch", type=click.IntRange(1), default=PER_STEP, show_default=True, help="Sequences per step.")
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
def study_command(
    model: str,
    data: str | None,
    tokenizer: Path | None,
    vocab: int | None,
    steps: int,
    batch: int,
    lr: float | None,
    attentions: str,
    recipe_name: str | None,
    bits: str | None,
    train_quant: str | None,
    watch_integer: int | None,
    machine: Machine,
    seed: int,
    seeds: int,
    out: Path,
    resume: bool,
    json_path: str | None,
) -> None:
    """Train, quantize and compare attentions: the paper's table."""
    if recipe_name and bits:
        raise SpecError(f"--recipe {recipe_name} and --bits {bits}: give one of them")
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
        machine=machine,
    )
    study = run_study(spec, out, resume=resume)
    say(study.tabulate(), json_path)
    say(f"written to {out}: {', '.join(study.written)}", json_path)
    write_json(json_path, study.result())
