"""Holds torch to the reference on a model, site by site: `python examples/parity_of_a_checkpoint.py [PATH [TEXT]]`.

PATH is a checkpoint or a MODEL.qtx; it is run on its own data, or on TEXT. Without one a small BERT is made, with
ranges of `w8a8`. The exit status is 1 where the backends part and 2 for a file that is refused, as of `qtx parity`.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from parity_tests import runner
from qtx.data import DataError, load
from qtx.engines.machine import Machine
from qtx.files.checkpoint import Checkpoint, save_checkpoint
from qtx.files.container import FileError
from qtx.jobs.parity import ParityRequest, check_file
from qtx.prepare.calibration import calibration_batches
from qtx.prepare.prepare import prepare
from qtx.recipes.named import recipe
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import SpecError


def make_checkpoint(path: Path) -> None:
    """Writes a BERT that was never trained, under w8a8."""
    spec = replace(preset("bert-tiny"), layers=1, length=32)
    params, chosen = init_params(spec, seed=0), recipe("w8a8", spec)
    data = load("books", spec)
    ranges = prepare(Machine("ref"), spec, params, calibration_batches(data, spec), chosen).ranges
    save_checkpoint(path, Checkpoint(spec, params, {}, chosen, ranges, {"data": data.describe()}))


def main(path: Path | None = None, text: str | None = None) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "model.safetensors"
            make_checkpoint(path)
        report = check_file(ParityRequest(path, data=text), runner)
    for case, verdict, measure, error, tolerance, *_ in runner.report_rows(report):
        print(f"{verdict:4} {case:40} {measure:24} {error:>10} of {tolerance}")
    print("the backends agree" if report.ok else f"the backends part at {report.first}")
    return report.ok


if __name__ == "__main__":
    try:
        sys.exit(0 if main(*map(Path, sys.argv[1:2]), *sys.argv[2:3]) else 1)
    except (SpecError, DataError, FileError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
