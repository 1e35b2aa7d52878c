"""Holds torch to the reference on a checkpoint, site by site: `python examples/parity_of_a_checkpoint.py [CHECKPOINT]`.

Without one it makes a small BERT with ranges of `w8a8`. The exit status is 1 where the backends part, as of `qtx
parity`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from parity_tests.runner import check_checkpoint, report_rows
from qtx.data import load
from qtx.data.splits import BATCH
from qtx.engines.machine import Machine
from qtx.files.checkpoint import Checkpoint, load_checkpoint
from qtx.prepare.calibration import calibration_batches
from qtx.prepare.prepare import prepare
from qtx.recipes.named import recipe, resolve
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset


def make_checkpoint() -> Checkpoint:
    """A BERT that was never trained, under w8a8."""
    spec = replace(preset("bert-tiny"), layers=1, length=32)
    params, chosen = init_params(spec, seed=0), recipe("w8a8", spec)
    batches = calibration_batches(load("books", spec), spec)
    return Checkpoint(spec, params, {}, chosen, prepare(Machine("ref"), spec, params, batches, chosen).ranges)


def main(path: Path | None = None) -> bool:
    checkpoint = load_checkpoint(path) if path else make_checkpoint()
    spec, chosen = checkpoint.spec, checkpoint.recipe
    batches = list(load(None, spec).split_batches("evaluation", spec, BATCH, seed=0, limit=1))
    quants = resolve(chosen, spec) if chosen else {}
    report = check_checkpoint(spec, checkpoint.params, batches, quants, checkpoint.ranges)
    for case, verdict, measure, error, tolerance, *_ in report_rows(report):
        print(f"{verdict:4} {case:40} {measure:24} {error:>10} of {tolerance}")
    print("the backends agree" if report.ok else f"the backends part at {report.first}")
    return report.ok


if __name__ == "__main__":
    sys.exit(0 if main(*map(Path, sys.argv[1:2])) else 1)
