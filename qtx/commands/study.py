"""`qtx study`."""

from __future__ import annotations

from pathlib import Path

import click

from qtx_ref.presets import PRESETS
from qtx_ref.spec import SpecError

from ..jobs.study import run_study
from ..runs.reading import RunSpec, make_run
from . import run_options as given
from .options import JSON, OUT, say, split_list, write_json


@click.command(name="study")
@given.with_run(
    given.run_option("--model", "model.preset", help=f"One of {', '.join(PRESETS)}; default opt-tiny."),
    given.INIT,
    given.SOURCE,
    given.TOKENIZER,
    given.VOCAB,
    given.STEPS,
    given.BATCH,
    given.RATES,
    given.WATCH,
    given.PLACE,
    given.SEED,
)
@click.option(
    "--attention",
    "attentions",
    help="Comma list; `clipped:gamma=-0.03`, `mlp`, `clipped+gated:pi=0.25`, ...; default vanilla,clipped,gated.",
)
@click.option("--recipe", "recipe_name", help="One quantization recipe: the same as --bits with one name.")
@click.option("--bits", help="Comma list of recipes, a column each: w8a8,w6a6,paper-opt,... (default w8a8)")
@click.option("--train-quant", help="Train all models again with quantized matmuls, for example w8a8.")
@click.option("--seeds", type=click.IntRange(1, 1000), help="Number of seeds, from --seed on; default 1.")
@click.option("--out", type=OUT, default=Path("runs/study"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the study in --out, if there is one.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Train so many runs at once, each in a process of its own with its part of the threads.",
)
@JSON
def study_command(
    run: RunSpec,
    attentions: str | None,
    recipe_name: str | None,
    bits: str | None,
    train_quant: str | None,
    seeds: int | None,
    out: Path,
    resume: bool,
    jobs: int,
    json_path: str | None,
) -> None:
    """Train, quantize and compare attentions: the paper's table.

    A run's table [study] has the values of each key that varies; options stand over it.
    """
    if recipe_name and bits:
        raise SpecError(f"--recipe {recipe_name} and --bits {bits}: give one of them")
    grids: dict[str, object] = {}
    if attentions is not None:
        grids["model.attention"] = split_list(attentions)
    if train_quant is not None:
        grids["quant.train"] = ("none", train_quant)
    if seeds is not None:
        first = run.get("seed", 0)
        grids["seed"] = range(first, first + seeds)
    names = recipe_name or bits
    said = {} if names is None else {"quant.recipes": split_list(names)}
    study = run_study(run.under(make_run(said, "--bits", grids)), out, resume=resume, jobs=jobs)
    say(study.tabulate(), json_path)
    say(f"written to {out}: {', '.join(study.written)}", json_path)
    write_json(json_path, study.result())
    if study.failed:
        each = [f"{name} {how}" for name, how in study.failed.items()]
        raise click.ClickException("\n".join([f"{len(each)} of {len(study.rows)} runs failed", *each]))
