"""`qtx diff`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from ..files.artifact import SUFFIX, list_differences, load_artifact
from ..report.tables import format_table
from .options import JSON, say, write_json


@click.command(name="diff")
@click.argument("first", type=click.Path(path_type=Path), metavar=f"FIRST{SUFFIX}")
@click.argument("second", type=click.Path(path_type=Path), metavar=f"SECOND{SUFFIX}")
@JSON
def diff_command(first: Path, second: Path, json_path: str | None) -> None:
    """Compare two artifacts.

    Model, recipe, profile, origin and every constant. Exit status 1 if they differ.
    """
    parts = list_differences(load_artifact(first), load_artifact(second))
    if parts:
        say(format_table(["differs", f"{first} and {second}"], [[d.where, d.what] for d in parts]), json_path)
    say(f"{len(parts)} difference(s)", json_path)
    write_json(json_path, {"differences": [asdict(part) for part in parts]})
    if parts:
        sys.exit(1)
