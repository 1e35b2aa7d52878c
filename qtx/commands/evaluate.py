"""`qtx evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from ..engines.machine import Machine
from ..files.artifact import SUFFIX
from ..jobs.evaluate import EvaluateRequest, evaluate
from ..measure.scores import to_json_values
from .options import DATA, EITHER, JSON, LIMIT, MACHINE, RECIPE, say, tabulate_result, write_json


@click.command(name="evaluate")
@EITHER
@DATA
@RECIPE
@click.option("--numerics", type=click.Choice(["integer", "fake"]), help=f"Of a MODEL{SUFFIX}; default: integer.")
@click.option("--strict", is_flag=True, help=f"Of a MODEL{SUFFIX}: integer dtypes only, in every op; slow.")
@click.option(
    "--compiled",
    is_flag=True,
    help=f"Of a MODEL{SUFFIX}: the same codes by torch.compile, which takes a minute at first.",
)
@click.option("--profile", "profile_name", help=f"A name, or a FILE.json; default: a MODEL{SUFFIX}'s own, else qtx.")
@LIMIT
@MACHINE
@JSON
def evaluate_command(
    checkpoint: Path,
    data: str | None,
    tokenizer: Path | None,
    recipe_name: str | None,
    numerics: str | None,
    strict: bool,
    compiled: bool,
    profile_name: str | None,
    batches: int | None,
    machine: Machine,
    json_path: str | None,
) -> None:
    """Perplexity or accuracy of a model.

    Of a CHECKPOINT in float or under fake quantization, of a MODEL.qtx in integers or, with --numerics fake, under the
    fake quantization of the same codes.
    """
    request = EvaluateRequest(
        checkpoint, recipe_name, numerics, strict, batches, data, tokenizer, machine, profile_name, compiled
    )
    score, words = evaluate(request)
    result = {"numerics": words.numerics, **to_json_values(score)}
    note = {"note": words.note} if words.note else {}
    say("\n".join([tabulate_result(checkpoint, result), *note.values()]), json_path)
    write_json(json_path, result | note)
