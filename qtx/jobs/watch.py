"""What is measured of a model while it trains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import cast

from qtx_ref.integer.lowering import lower
from qtx_ref.spec import QTX, QuantSpec

from ..data.splits import BATCH
from ..engines.backend import backend
from ..engines.machine import Machine
from ..engines.protocols import Batch, Data, Model
from ..measure.history import WATCHED, History
from ..measure.outliers import measure_outliers
from ..measure.scores import IntegerScorer, evaluate
from ..prepare.calibration import calibrate
from ..recipes.named import recipe, resolve
from ..recipes.sites import paper_sites
from .run import TrainSpec

WATCH_BATCHES = 2  # of the integer watch: of calibration, and of the evaluation slice


def measure_inf_norm(model: Model, batch: Batch) -> float:
    """The published max inf norm of a float forward pass over one batch."""
    sites = model.statistics(batch, paper_sites(model.spec).inf_norm, ("inf_norm",))
    return max(float(statistics["inf_norm"].mean()) for statistics in sites.values())


def watch_integers(run: TrainSpec, model: Model, data: Data, machine: Machine, history: History, step: int) -> None:
    """Adds one point of the integer watch: the parameters as they are, quantized by w8a8 and run in integers.

    Raises ValueError where they cannot be.
    """
    chosen = replace(recipe("w8a8", run.model), batches=WATCH_BATCHES)
    params = model.params()
    plain = machine.model(run.model, params)
    ranges = calibrate(plain, data, chosen)
    quants = cast(Mapping[str, QuantSpec], resolve(chosen, run.model))  # none of small floats
    constants = lower(run.model, params, quants, ranges)
    integers = IntegerScorer(
        backend(machine.backend).IntegerModel(run.model, constants, quants, QTX, device=machine.device)
    )

    def read(split: str) -> Iterable[Batch]:
        return data.split_batches(split, run.model, BATCH, 0, limit=WATCH_BATCHES)

    point = [evaluate(scored, read("evaluation")).perplexity for scored in (integers, plain)]
    sizes = measure_outliers(plain, read("calibration"))
    point += [sizes.average_kurtosis, sizes.max_inf_norm]
    if strange := [name for name, value in zip(WATCHED[1:], point, strict=True) if not math.isfinite(value)]:
        raise ValueError(f"{', '.join(strange)} not finite")
    history.integer_step.append(step)
    for name, value in zip(WATCHED[1:], point, strict=True):
        getattr(history, name).append(value)
