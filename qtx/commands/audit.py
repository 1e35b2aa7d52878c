"""`qtx audit`: its commands, each in a file of its own."""

from __future__ import annotations

import click

from .audit_findings import findings_command


@click.group(name="audit")
def audit_command() -> None:
    """What an engine computes: held to a profile, named rule by rule, explained."""


audit_command.add_command(findings_command)
