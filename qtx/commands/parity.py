"""`qtx parity`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from qtx_ref.spec import SpecError

from ..data import DataError
from ..engines.backend import MissingDevice, MissingExtra
from ..files.artifact import SUFFIX
from ..files.checkpoint import file_of
from ..files.container import FileError, check_writable, write_beside
from ..files.formats import REPORT
from ..jobs.opening import is_artifact
from ..jobs.parity import ParityRequest, check_file
from ..progress import Progress, clock
from ..report.tables import format_table
from .options import DATA, JSON, say, write_json

DIFFERS, REFUSED, MISSING = 1, 2, 3  # exit statuses; click's own for a wrong option is 2 as well
NARROWEST = 20  # characters of the case's name that a narrow terminal leaves at least
OPTIONAL = ("want", "got", "where", "measure")  # columns that a narrow terminal goes without, the first one first


class Refused(click.ClickException):
    """An option or a file that is refused."""

    exit_code = REFUSED


class Missing(click.ClickException):
    """A backend, a device or a package that is not here."""

    exit_code = MISSING


class Verdicts(click.Command):
    """A command whose exit status tells a difference from an input that is refused and from what is missing."""

    def make_context(self, *given: Any, **options: Any) -> click.Context:
        with set_exit_statuses():
            return super().make_context(*given, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with set_exit_statuses():
            return super().invoke(ctx)


@contextmanager
def set_exit_statuses() -> Iterator[None]:
    """Turns an error that a user can mend into one line and its exit status."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (SpecError, DataError, FileError, MissingExtra, OSError) as error:
        kind = Missing if isinstance(error, (MissingDevice, MissingExtra)) else Refused
        raise kind(" ".join(str(error).split())) from None


def check_junit(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuses a place that cannot be written, or that holds anything but an earlier report, before any work."""
    if path is None:
        return None
    check_writable(path, REPORT)
    return path


@click.command(name="parity", cls=Verdicts)
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False, metavar=f"[CHECKPOINT|MODEL{SUFFIX}]")
@click.option(
    "--backend",
    "backend_name",
    default="torch",
    show_default=True,
    help="torch: held to the reference. ref: the reference held to outside truth.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with --backend torch.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    help="Of the cases: float32; bfloat16 with torch. A file is compared in its own.",
)
@DATA
@click.option("--only", help="Only cases whose group/name contains this text or matches this pattern.")
@click.option(
    "--junit",
    "junit_path",
    type=click.Path(path_type=Path),
    callback=check_junit,
    help="Also write JUnit XML there, one test case a row.",
)
@JSON
def parity_command(
    checkpoint: Path | None,
    backend_name: str,
    device: str,
    dtype: str,
    data: str | None,
    tokenizer: Path | None,
    only: str | None,
    junit_path: Path | None,
    json_path: str | None,
) -> None:
    """Prove that the backends agree, by case or on a file.

    Without a file: the table of cases. CHECKPOINT: every site of that model, in float32 and under its recipe.
    MODEL.qtx: every code of every site.

    \b
    Exit status:
      0  all agree
      1  something differs: the table says where
      2  an option or a file is refused
      3  the backend, the device or a package that was asked for is not here

    In CI: make integers with `qtx quantize CHECKPOINT --out MODEL.qtx`, then run this on both files with --junit and
    --json, and keep the reports. Status 3 lets a job tell a machine without a GPU from a difference.
    """
    # only here: the proof is not needed to use qtx
    from parity_tests import junit, runner

    if junit_path is not None and junit_path.resolve() in list_others(checkpoint, json_path):
        raise FileError(f"--junit {junit_path} is another file of this command: choose another")
    if checkpoint is None and (given := data or tokenizer):
        raise SpecError(f"{given}: the table of cases has its own data; give a CHECKPOINT, or leave it out")
    runner.check_place(backend_name, device)
    rows: list[Any] = []
    with tell_stopped(rows), Progress("parity", 0) as bar:

        def advance(done: int, total: int, row: Any) -> None:
            rows.append(row)
            bar.total = total
            bar.advance(note=row.name)

        if checkpoint is None:
            report = runner.run(backend_name, device, dtype, only, advance)
        else:
            refuse_options(checkpoint, backend_name, dtype, only)
            report = check_file(ParityRequest(checkpoint, device, data, tokenizer), runner, advance)
    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    say(fit_table(runner.HEADER, runner.report_rows(report), width), json_path)
    groups = ", ".join(f"{group} {count}" for group, count in report.counts.items())
    failed = sum(not row.ok for row in report.rows)
    total = f"{len(report.rows)} cases ({groups}): {failed} failed, {clock(report.seconds)}"
    say(textwrap.fill(total, width, break_on_hyphens=False), json_path)
    if report.first:
        say(f"the backends part first at site {report.first}", json_path)
    write_json(json_path, report.as_json())
    if junit_path is not None:
        write_beside(junit_path, junit.document(report))
    if not report.ok:
        sys.exit(DIFFERS)


@contextmanager
def tell_stopped(rows: Sequence[Any]) -> Iterator[None]:
    """Says, where a signal ends what compares, what the cases so far came to."""
    try:
        yield
    except KeyboardInterrupt:
        failed = [f"{row.group}/{row.name}" for row in rows if not row.ok]
        names = f": {', '.join(failed)}" if failed else ""
        click.echo(f"{len(rows)} cases were compared, {len(failed)} failed{names}", err=True)
        raise


def list_others(checkpoint: Path | None, json_path: str | None) -> set[Path]:
    """Files that the command reads or writes beside its JUnit report."""
    paths = [] if checkpoint is None else [checkpoint, file_of(checkpoint)]
    return {path.resolve() for path in (*paths, *([] if json_path in (None, "-") else [Path(json_path)]))}


def fit_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    """The table in lines of at most `width` characters.

    Where it is too wide, it goes without some columns, which then follow for the rows that failed, and with shorter
    names.
    """
    chosen = list(header)
    for dropped in OPTIONAL:
        if measure_width(header, rows, chosen) <= width:
            break
        chosen.remove(dropped)
    excess = measure_width(header, rows, chosen) - width
    longest = max(len(row[0]) for row in rows)
    room = max(NARROWEST, longest - max(0, excess))
    kept = [header.index(name) for name in chosen]
    short = [[shorten(row[0], room), *(row[i] for i in kept[1:])] for row in rows]
    details = (
        [] if len(chosen) == len(header) else [describe_failure(dict(zip(header, row, strict=True))) for row in rows]
    )
    wrapped = [textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in details if line]
    return "\n".join([format_table(chosen, short), *wrapped])


def measure_width(header: Sequence[str], rows: Sequence[Sequence[str]], chosen: Sequence[str]) -> int:
    """Characters of a line of the table with these columns: each has three around it, and one ends the line."""
    places = [header.index(name) for name in chosen]
    return 1 + sum(3 + max(len(row[i]) for row in [header, *rows]) for i in places)


def shorten(name: str, room: int) -> str:
    """A name in at most `room` characters: its beginning and its end."""
    half = (room - 3) // 2
    return name if len(name) <= room else f"{name[: room - 3 - half]}...{name[len(name) - half :]}"


def describe_failure(row: Mapping[str, str]) -> str:
    """Of a row that failed, in words, what has no column."""
    if row["verdict"] == "ok":
        return ""
    if not row["where"]:
        return f"{row['case']}: {row['measure']}"
    return (
        f"{row['case']}: {row['where']}: {row['measure']} {row['worst error']} above {row['tolerance']}; "
        f"got {row['got']}, want {row['want']}"
    )


def refuse_options(path: Path, backend_name: str, dtype: str, only: str | None) -> None:
    """Raises SpecError for an option that belongs to the table of cases."""
    if backend_name != "torch":
        raise SpecError(f"--backend {backend_name}: {path} is held to the reference in torch; leave it out")
    if dtype != "float32":
        reason = "an integer model has no float dtype" if is_artifact(path) else "a checkpoint is compared in float32"
        raise SpecError(f"--dtype {dtype}: {reason}; leave it out")
    if only:
        raise SpecError(f"--only {only}: a file has no table of cases; leave it out")
