"""`qtx parity`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qtx_ref.spec import SpecError

from . import recipes
from .artifact import load_artifact
from .backend import backend
from .options import JSON, artifact_model, is_artifact, open_checkpoint, open_data, say, write_json
from .progress import Progress, clock
from .report.tables import table
from .training import Machine


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--backend", "backend_name", default="torch", show_default=True,
              help="torch: held to the reference. ref: the reference held to outside truth.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--only", help="Only cases whose group/name contains this text or matches this pattern.")
@JSON
def parity(checkpoint, backend_name, device, dtype, only, json_path):
    """Prove that the backends agree, by case or on your own CHECKPOINT or MODEL.qtx. Exit status 1 if anything fails."""
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
    for name, value, accepted in (("--backend", backend_name, "torch"), ("--dtype", dtype, "float32")):
        if value != accepted:
            raise SpecError(f"{name} is {value!r}: a checkpoint is compared between ref and {accepted}")
    if only:
        raise SpecError(f"--only {only}: a checkpoint has no table of cases; leave it out")
    if is_artifact(path):
        artifact = load_artifact(path)
        source = open_data(path, artifact.spec, artifact.meta, None, None)
        batch = next(iter(source.split_batches("evaluation", artifact.spec, 4, 0, limit=1)))
        models = [artifact_model(artifact, Machine(name, where)) for name, where in (("ref", "cpu"), ("torch", device))]
        return runner.check_integers(*models, batch, device=device, progress=seen)
    found, _, source = open_checkpoint(path, Machine("ref"), None, None)
    batches = list(source.split_batches("evaluation", found.spec, 4, 0, limit=1))
    quants = recipes.resolve(found.recipe, found.spec) if found.recipe else {}
    masked = found.recipe.masked_scores if found.recipe else False
    return runner.check_checkpoint(
        found.spec, found.params, batches, quants, found.ranges, masked_scores=masked, device=device, progress=seen
    )
