"""`qtx audit engines`."""

from __future__ import annotations

import click

from ..audit.engine_table import list_rows, show_tables
from ..engines.paths import OPERATIONS, engine_names, missing
from .options import JSON, say, write_json
from .parity import Verdicts


@click.command(name="engines", cls=Verdicts)
@JSON
def engines_command(json_path: str | None) -> None:
    """Print what each path of each engine does, axis by axis: the tables of docs/engines.md."""
    say(show_tables(), json_path)
    for name in engine_names():
        if line := missing(name):
            click.echo(line, err=True)
    write_json(json_path, {"engines": {op: list_rows(op) for op in OPERATIONS}})
