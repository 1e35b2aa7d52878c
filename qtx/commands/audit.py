"""qtx audit: what the engines compute, and why two of them differ."""

from __future__ import annotations

import click

from .audit_bisect import bisect_command
from .audit_certificate import certificate_command
from .audit_conformance import conformance_command
from .audit_engines import engines_command
from .audit_findings import findings_command
from .audit_fingerprint import fingerprint_command


@click.group("audit")
def audit_command() -> None:
    """Why engines give different integers, and what each computes."""


audit_command.add_command(bisect_command)
audit_command.add_command(certificate_command)
audit_command.add_command(conformance_command)
audit_command.add_command(engines_command)
audit_command.add_command(findings_command)
audit_command.add_command(fingerprint_command)
