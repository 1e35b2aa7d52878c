"""`qtx parity`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qtx_ref.spec import SpecError

from ..engines.backend import backend
from ..files.artifact import SUFFIX, Artifact
from ..jobs.training import Machine
from ..progress import Progress, clock
from ..recipes import named as recipes
from ..report.tables import table
from .options import (
    JSON,
    artifact_model,
    is_artifact,
    open_model,
    say,
    write_json,
)

FEW = 4  # sequences of a batch


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False, metavar=f"[CHECKPOINT|MODEL{SUFFIX}]")
@click.option("--backend", "backend_name", default="torch", show_default=True,
              help="torch: held to the reference. ref: the reference held to outside truth.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda with --backend torch.")
@click.option("--dtype", default="float32", show_default=True,
              help="Of the cases: float32, float64; bfloat16 with torch. A file is compared in its own.")  # fmt: skip
@click.option("--only", help="Only cases whose group/name contains this text or matches this pattern.")
@JSON
def parity(checkpoint, backend_name, device, dtype, only, json_path):
    """Prove that the backends agree, by case or on a file.

    Without a file: the table of cases. CHECKPOINT: every site of that model, in float32 and under its recipe. MODEL.qtx:
    every code of every site. Exit status 1 if anything fails.
    """
    from parity_tests import runner  # only here: the proof is not needed to use qtx

    report = run_parity(runner, checkpoint, backend_name, device, dtype, only)
    say(table(runner.HEADER, runner.report_rows(report)), json_path)
    groups = ", ".join(f"{group} {count}" for group, count in report.counts.items())
    failed = sum(not row.ok for row in report.rows)
    say(f"{len(report.rows)} cases ({groups}): {failed} failed, {clock(report.seconds)}", json_path)
    if report.first:
        say(f"the backends part first at site {report.first}", json_path)
    write_json(json_path, report.as_json())
    if not report.ok:
        sys.exit(1)


def run_parity(runner: Any, path: Path | None, backend_name: str, device: str, dtype: str, only: str | None) -> Any:
    backend(backend_name)
    with Progress("parity", 0) as bar:

        def seen(done: int, total: int, row: Any) -> None:
            bar.total = total
            bar.advance(note=row.name)

        if path is None:
            return runner.run(backend=backend_name, device=device, dtype=dtype, only=only, progress=seen)
        return parity_of(runner, path, backend_name, device, dtype, only, seen)


def parity_of(runner: Any, path: Path, backend_name: str, device: str, dtype: str, only: str | None, seen: Any) -> Any:
    """The report on a checkpoint or an artifact. Raises SpecError for an option that belongs to the table of cases."""
    if backend_name != "torch":
        raise SpecError(f"--backend {backend_name}: {path} is held to the reference in torch; leave it out")
    if dtype != "float32":
        reason = "an integer model has no float dtype" if is_artifact(path) else "a checkpoint is compared in float32"
        raise SpecError(f"--dtype {dtype}: {reason}; leave it out")
    if only:
        raise SpecError(f"--only {only}: a file has no table of cases; leave it out")
    opened = open_model(path, Machine("ref"))
    found = opened.found

    def some(split: str, count: int) -> list:
        return list(opened.data.split_batches(split, found.spec, FEW, 0, limit=count))

    batches = some("evaluation", 1)
    if isinstance(found, Artifact):
        other = artifact_model(found, Machine("torch", device))
        return runner.check_integers(opened.model, other, batches[0], device=device, progress=seen)
    quants = recipes.resolve(found.recipe, found.spec) if found.recipe else {}
    masked = found.recipe.masked_scores if found.recipe else False
    return runner.check_checkpoint(
        found.spec,
        found.params,
        batches,
        quants,
        found.ranges,
        masked_scores=masked,
        transforms=found.transforms,
        calibration=some("calibration", 2) if found.recipe else (),
        quantize=bool(found.recipe and found.recipe.quantize_while_calibrating),
        device=device,
        progress=seen,
    )
