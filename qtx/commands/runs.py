"""`qtx runs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from qtx_ref.spec import SpecError

from ..jobs.resolving import resolve
from ..jobs.rows import keep_value
from ..runs.keys import FORMS, Key, list_keys, write_kind
from ..runs.reading import RunSpec, list_bundled, open_run, parse_setting, read_bundled, write_run
from .options import JSON, say, write_json
from .run_options import FILE


@click.command(name="runs")
@click.argument("name", required=False, metavar=f"[{FILE}]")
@click.option("--resolved", is_flag=True, help="Every key that counts in it, with its value and who said it.")
@click.option("--keys", is_flag=True, help="Every key that a run may have: what it takes, its default, what it is.")
@click.option("--set", "said", multiple=True, metavar="KEY=VALUE", help="With --resolved: as qtx train takes it.")
@JSON
def runs_command(name: str | None, resolved: bool, keys: bool, said: tuple[str, ...], json_path: str | None) -> None:
    """Print a published run as a file.

    Each line has its source; without a name, which runs there are. `qtx train` takes the name, and the file.
    """
    if keys and (name or resolved or said):
        raise SpecError("--keys is about all runs: leave the rest out")
    if said and not resolved:
        raise SpecError("--set belongs to --resolved")
    text, values = list_all_keys() if keys else print_run(name, resolved, said) if name or resolved else list_names()
    say(text, json_path)
    write_json(json_path, values)


def list_names() -> tuple[str, dict[str, Any]]:
    """The bundled runs, each with its first line."""
    told = {name: read_bundled(name).partition("\n")[0].removeprefix("# ") for name in list_bundled()}
    return "\n".join(f"{name:16} {what}" for name, what in told.items()), {"runs": told}


def print_run(name: str | None, resolved: bool, said: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A bundled run as its file is, or a run resolved."""
    run = open_run(name) if name else RunSpec()
    options = RunSpec({key: one for text in said for key, one in parse_setting(text).settings.items()})
    run = run.under(options)
    settings = resolve(run) if resolved else run.settings
    values = {key: {"value": keep_value(one.value), "origin": one.origin} for key, one in settings.items()}
    grids = {key: [keep_value(one) for one in varied] for key, varied in run.grids.items()}
    text = write_run(settings, run.grids) if resolved or name not in list_bundled() else read_bundled(name)
    return text.rstrip("\n"), {"settings": values, "grids": grids}


def list_all_keys() -> tuple[str, dict[str, Any]]:
    """Every key that a run may have, a line each."""
    keys = list_keys().values()
    rows = [[f"`{key.name}`", write_taken(key), key.default, key.what] for key in keys]
    values = {
        key.name: {"takes": takes, "default": default, "what": what}
        for key, (_, takes, default, what) in zip(keys, rows, strict=True)
    }
    return write_table(["key", "takes", "default", "what it is"], rows), {"keys": values}


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of words as Markdown, all to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_taken(key: Key) -> str:
    """What a key takes, its units with it."""
    return FORMS.get(key.name, write_kind(key.kind))
