"""`qtx recipes`."""

from __future__ import annotations

from dataclasses import replace

import click

from qtx_ref.presets import attention, preset
from qtx_ref.spec import to_dict

from ..recipes.named import NAMES, recipe, resolve
from .options import JSON, write_json


@click.command(name="recipes")
@click.argument("name", required=False)
@click.option("--model", default="opt-tiny", show_default=True, help="The model that the recipe is for.")
@click.option("--attention", "attention_name", default="vanilla", show_default=True)
@JSON
def recipes_command(name: str | None, model: str, attention_name: str, json_path: str | None) -> None:
    """Print a recipe as JSON.

    Each rule with its source, and the sites it quantizes in a model; without a name, the names.
    """
    if name is None:
        click.echo(f"recipes: {NAMES}")
        return
    spec = replace(preset(model), attention=attention(attention_name))
    chosen = recipe(name, spec)
    resolved = {site: to_dict(quant) for site, quant in resolve(chosen, spec).items()}
    write_json(json_path or "-", {"recipe": to_dict(chosen), "sites": resolved})
