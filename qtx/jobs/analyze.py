"""What `qtx analyze` does: where a model's outliers are, and pictures of it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from ..data import splits
from ..engines.backend import need
from ..engines.machine import Machine
from ..engines.protocols import Batch
from ..files.container import ANALYSIS, check_writable, write_sealed_json
from ..files.locks import hold
from ..measure import analysis
from ..measure.analysis import Analysis
from ..report import outliers
from .opening import make_float_model, open_checkpoint, open_data

BATCHES = 16
RESULTS = "analysis.json"


@dataclass(frozen=True)
class AnalyzeRequest:
    """A checkpoint, the data that it is shown, and where pictures are to go."""

    checkpoint: Path
    out: Path | None = None  # None: no pictures
    batches: int = BATCHES  # at most so many of the evaluation split
    data: str | None = None  # None: the model's own
    tokenizer: Path | None = None
    machine: Machine = Machine()


def analyze(request: AnalyzeRequest) -> tuple[Analysis, list[str]]:
    """Measures a float model's sites, residual stream, channels, tokens and attention heads on evaluation data.

    Returns what was measured, and the names of the files that are then in `out`.

    Raises:
        SpecError: a machine that is not to be had.
        DataError: data that cannot be had or do not fit.
        FileError: the checkpoint cannot be read, or a file of `out` exists or cannot be written.
        MissingExtra: pictures without matplotlib, or a backend or tokenizer whose package is not installed.
    """
    out = request.out
    if out is not None:
        need("matplotlib", "report", "--out")
    with nullcontext() if out is None else hold(out):
        if out is not None:
            for name in (RESULTS, *outliers.NAMES):
                check_writable(out / name)
        request.machine.check()
        stored = open_checkpoint(request.checkpoint)
        data = open_data(request.checkpoint, stored.spec, stored.meta, request.data, request.tokenizer)
        model = make_float_model(stored, request.machine)

        def read() -> Iterable[Batch]:
            return data.split_batches("evaluation", stored.spec, splits.BATCH, 0, limit=request.batches)

        result = analysis.analyze(model, data, read(), sum(1 for _ in read()))
        if out is None:
            return result, []
        written = outliers.draw_analysis(out, model, result, f"qtx analyze: {request.checkpoint}")
        write_sealed_json(out / RESULTS, ANALYSIS, result.to_json_values())
        return result, [*written, RESULTS]
