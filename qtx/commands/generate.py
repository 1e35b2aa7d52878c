"""`qtx generate`."""

from __future__ import annotations

from pathlib import Path

import click

from ..engines.machine import Machine
from ..jobs.generate import HOTTEST, TOKENS, GenerateRequest, generate
from .options import DATA, EITHER, JSON, MACHINE, RECIPE, Number, say, write_json


@click.command(name="generate")
@EITHER
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--tokens", type=click.IntRange(1), default=TOKENS, show_default=True, help="Number of new tokens.")
@click.option(
    "--temperature", type=Number(0, HOTTEST), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@RECIPE
@DATA
@MACHINE
@JSON
def generate_command(
    checkpoint: Path,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    recipe_name: str | None,
    data: str | None,
    tokenizer: Path | None,
    machine: Machine,
    json_path: str | None,
) -> None:
    """Go on with a text (OPT).

    Token by token, with cached keys and values, in float, under a recipe, or from a MODEL.qtx in integers.
    """
    request = GenerateRequest(checkpoint, prompt, tokens, temperature, seed, recipe_name, data, tokenizer, machine)
    text = generate(request)
    say(text.text, json_path)
    write_json(json_path, {"tokens": text.tokens, "prompt_tokens": text.prompt_tokens, "text": text.text})
