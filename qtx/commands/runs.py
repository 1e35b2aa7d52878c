"""`qtx runs`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from qtx_ref.spec import SpecError

from ..jobs.resolving import resolve
from ..runs.keys import FORMS, Key, list_keys, write_kind
from ..runs.reading import RunSpec, list_bundled, open_run, parse_setting, read_bundled, write_run
from .run_options import FILE


@click.command(name="runs")
@click.argument("name", required=False, metavar=f"[{FILE}]")
@click.option("--resolved", is_flag=True, help="Every key that counts in it, with its value and who said it.")
@click.option("--keys", is_flag=True, help="Every key that a run may have: what it takes, its default, what it is.")
@click.option("--set", "said", multiple=True, metavar="KEY=VALUE", help="With --resolved: as qtx train takes it.")
def runs_command(name: str | None, resolved: bool, keys: bool, said: tuple[str, ...]) -> None:
    """Print a published run as a file.

    Each line has its source; without a name, which runs there are. `qtx runs paper-opt-125m > run.toml`, and `qtx train run.toml` trains it.
    """
    if keys:
        if name or resolved or said:
            raise SpecError("--keys is about all runs: leave the rest out")
        click.echo(tabulate_keys())
    elif resolved:
        run = open_run(name) if name else RunSpec()
        options = RunSpec({key: one for text in said for key, one in parse_setting(text).settings.items()})
        click.echo(write_run(resolve(run.under(options))), nl=False)
    elif said:
        raise SpecError("--set belongs to --resolved")
    elif name:
        click.echo(read_bundled(name), nl=False)
    else:
        click.echo("\n".join(f"{one:16} {describe(one)}" for one in list_bundled()))


def describe(name: str) -> str:
    """The first line of a bundled run."""
    return read_bundled(name).partition("\n")[0].removeprefix("# ")


def tabulate_keys() -> str:
    """Every key that a run may have, a line each."""
    rows = [[f"`{key.name}`", write_taken(key), key.default, key.what] for key in list_keys().values()]
    return write_table(["key", "takes", "default", "what it is"], rows)


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of words as Markdown, all to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_taken(key: Key) -> str:
    """What a key takes, its units with it."""
    return FORMS.get(key.name, write_kind(key.kind))
