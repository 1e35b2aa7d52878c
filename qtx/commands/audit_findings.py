"""`qtx audit findings`."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..audit.findings import FINDINGS, find, format_finding, format_page
from .options import JSON, say, write_json
from .parity import Verdicts


@click.command(name="findings", cls=Verdicts)
@click.argument("name", required=False)
@JSON
def findings_command(name: str | None, json_path: str | None) -> None:
    """Print the findings, or one by its name, as Markdown."""
    chosen = list(FINDINGS.values()) if name is None else [find(name)]
    say(format_page(chosen) if name is None else format_finding(chosen[0]), json_path)
    write_json(json_path, {"findings": [asdict(finding) for finding in chosen]})
