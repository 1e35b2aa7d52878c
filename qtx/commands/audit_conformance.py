"""`qtx audit conformance`."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from qtx_ref.profiles import profile
from qtx_ref.spec import SpecError

from ..audit.conformance import COUNT, NODE_CASES, Report, choose_paths, conform, count_work
from ..audit.golden_vectors import write_golden
from ..audit.known import read_known
from ..audit.node_cases import CaseResult
from ..audit.tallies import Tally
from ..progress import Progress
from ..report.tables import format_table
from .options import JSON, say, write_json
from .parity import Verdicts

HEADER = ("path", "profile", "vectors", "mismatches", "gaussian", "near ties", "worst", "refused", "crashes")


@click.command(name="conformance", cls=Verdicts)
@click.option("--engine", "engines", multiple=True, help=f"An engine, or {NODE_CASES}; all by default; several times.")
@click.option("--op", "ops", multiple=True, help="An operation; all by default; several times.")
@click.option("--cpu", help="A CPU to imitate: avx2, or one of qemu-user's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--vectors", type=click.IntRange(1), default=COUNT, show_default=True, help="Of each operation of a path."
)
@click.option("--known", type=click.Path(path_type=Path), help="JSON of known findings in place of the package's.")
@click.option(
    "--write-golden", "folder", type=click.Path(path_type=Path), help="Write what engines give there instead."
)
@JSON
def conformance_command(
    engines: tuple[str, ...],
    ops: tuple[str, ...],
    cpu: str | None,
    seed: int,
    vectors: int,
    known: Path | None,
    folder: Path | None,
    json_path: str | None,
) -> None:
    """Hold each path of the installed engines to its profile.

    Vectors by family, mismatches, the worst difference and the first witness; golden vectors stand in for engines that
    are not installed. Exit status 1 where something differs or crashes that no known finding explains.
    """
    paths, absent = choose_paths(engines, ops)
    if folder is not None:
        if ops or cpu or known:
            raise SpecError("--op, --cpu and --known do not go with --write-golden, which takes all of an engine here")
        names = dict.fromkeys(path.engine for path in paths if path.engine not in absent)
        if not names:
            raise SpecError(f"--write-golden {folder}: none of {', '.join(engines) or 'the engines'} runs here")
        files = [str(write_golden(folder, name, profile, seed)) for name in names]
        say("\n".join(files), json_path)
        write_json(json_path, {"golden": files})
        return
    explained = read_known(known)
    with Progress("conformance", count_work([path for path in paths if path.engine not in absent], vectors)) as bar:
        report = conform(engines, ops, cpu, vectors, seed, explained, bar.advance)
    say("\n\n".join(part for part in tell(report) if part), json_path)
    write_json(json_path, {"seed": seed, "vectors": vectors, "cpu": cpu, **asdict(report)})
    if report.failed:
        sys.exit(1)


def tell(report: Report) -> list[str]:
    """The report as text: a line for each path, what is not clean by family, node cases, and the verdict."""
    grouped: dict[tuple[str, str], list[Tally]] = {}
    for row in report.rows:
        grouped.setdefault((row.path, row.op), []).append(row)
    parts = [format_table(HEADER, [summarize(rows) for rows in grouped.values()])] if grouped else []
    parts += [describe(row) for row in report.rows if not row.clean]
    parts += [f"{name}: {row}" for name, row in list_refusals(report.rows)]
    parts += [f"{name} is absent: golden vectors of {made}" for name, made in report.golden.items()]
    parts += [line for name, line in report.absent.items() if name not in report.golden]
    parts += tell_cases(report.cases)
    news = len(report.unexplained) + sum(case.verdict == "differs" and not case.finding for case in report.cases)
    return [*parts, f"{news} unexplained"]


def summarize(rows: list[Tally]) -> list[str]:
    """A path's line."""
    by_family = {row.family: row for row in rows}

    def rate(family: str) -> str:
        row = by_family.get(family)
        return "-" if row is None or not row.vectors else f"{row.mismatches}/{row.vectors}"

    first = rows[0]
    sums = [sum(getattr(row, key) for row in rows) for key in ("vectors", "mismatches", "refused", "crashes")]
    worst = max(row.worst for row in rows)
    middle = [rate("gaussian"), rate("near ties"), str(worst), str(sums[2]), str(sums[3])]
    return [f"{first.path} {first.op}", first.profile, str(sums[0]), str(sums[1]), *middle]


def describe(row: Tally) -> str:
    """A row that has something to explain, and by what it is."""
    what = f"{row.mismatches} of {row.vectors} differ, by {row.worst} at most"
    what += f"; {row.crashes} calls ended the engine: {row.crash}" if row.crashes else ""
    what += f"; explained by {', '.join(row.findings)}" if row.findings else ""
    what += f"; {row.unexplained} unexplained" if row.unexplained else ""
    return f"{row.path} {row.op}, {row.family}: {what}\n  {row.witness}"


def list_refusals(rows: list[Tally]) -> list[tuple[str, str]]:
    """What each path refuses: families of one refusal together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.refused:
            grouped.setdefault((f"{row.path} {row.op}", row.refusal), []).append(row.family)
    return [(name, f"refuses {', '.join(families)}: {words}") for (name, words), families in grouped.items()]


def tell_cases(cases: list[CaseResult]) -> list[str]:
    """Counts of ONNX's node cases, each that differs, and why some cannot be said."""
    if not cases:
        return []
    counts = Counter(case.verdict for case in cases)
    reasons = Counter(case.note for case in cases if case.verdict == "not expressible")
    lines = [f"ONNX's node cases: {len(cases)}, " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())]
    lines += [f"  {count} not expressible: {reason}" for reason, count in reasons.items()]
    lines += [f"  {c.name}: {c.note}; {c.finding or 'unexplained'}" for c in cases if c.verdict == "differs"]
    return ["\n".join(lines)]
