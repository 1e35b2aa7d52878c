"""`qtx runs`."""

from __future__ import annotations

import click

from qtx_ref.spec import SpecError

from ..jobs.resolving import resolve
from ..report.tables import format_table
from ..runs.keys import FORMS, Key, list_keys, write_kind
from ..runs.reading import RunSpec, list_bundled, open_run, parse_setting, read_bundled, write_run
from .run_options import FILE


@click.command(name="runs")
@click.argument("name", required=False, metavar=f"[{FILE}]")
@click.option("--resolved", is_flag=True, help="Every key that counts in it, with its value and who said it.")
@click.option("--keys", is_flag=True, help="Every key that a run may have: what it takes, its default, what it is.")
@click.option("--set", "said", multiple=True, metavar="KEY=VALUE", help="With --resolved: as qtx train takes it.")
def runs_command(name: str | None, resolved: bool, keys: bool, said: tuple[str, ...]) -> None:
    """Print a published run as a file, each line with its source; without a name, which there are.

    `qtx runs paper-opt-125m > run.toml`, and `qtx train run.toml` trains it.
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
        click.echo(format_table(["run", "what it is"], [[one, describe(one)] for one in list_bundled()]))


def describe(name: str) -> str:
    """The first line of a bundled run."""
    return read_bundled(name).partition("\n")[0].removeprefix("# ")


def tabulate_keys() -> str:
    """Every key that a run may have, a line each."""
    rows = [[f"`{key.name}`", write_taken(key), key.default, escape(key.what)] for key in list_keys().values()]
    return format_table(["key", "takes", "default", "what it is"], rows)


def write_taken(key: Key) -> str:
    """What a key takes, its units with it."""
    return FORMS.get(key.name, write_kind(key.kind))


def escape(text: str) -> str:
    """A comment of a field for those who write files."""
    return text.replace("None: ", "none: ").replace("|", "\\|")
