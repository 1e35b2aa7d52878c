"""What a study measures of a run that is trained: its scores, its outliers and sinks, and itself quantized."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..data import DataError
from ..data.splits import BATCH
from ..engines.machine import Machine
from ..engines.protocols import Batch, Data
from ..files.checkpoint import Checkpoint
from ..files.container import FileError
from ..measure.outliers import measure_outliers
from ..measure.scores import IntegerScorer, evaluate, to_json_values
from ..measure.sinks import measure_sinks
from ..measure.sizes import count_stored_bytes, ranges_json
from ..prepare.calibration import bind, calibration_batches
from ..prepare.prepare import Prepared, prepare
from ..recipes.named import recipe, resolve
from .comparison import make_integers

OUTLIER_BATCHES = 16  # evaluation batches behind inf norm, kurtosis and sinks


class Finished:
    """A trained run and the data and machine that it is measured with; all its scores are of the same batches."""

    def __init__(self, checkpoint: Checkpoint, data: Data, machine: Machine, limit: int | None, label: str) -> None:
        """limit: the first batches of the evaluation split that it is scored on; None: all. label: of the bars, and of
        what is said."""
        self.checkpoint, self.data, self.machine, self.limit, self.label = checkpoint, data, machine, limit, label
        self.spec, self.params = checkpoint.spec, checkpoint.params
        self.total = sum(1 for _ in self.read())

    def read(self, most: int | None = None) -> Iterable[Batch]:
        """What it is scored on, at most its first `most` batches."""
        limits = [limit for limit in (self.limit, most) if limit is not None]
        return self.data.split_batches("evaluation", self.spec, BATCH, 0, limit=min(limits, default=None))

    def measure(self, recipes: Sequence[str], integers: Sequence[str], *, trained: bool) -> dict[str, Any]:
        """JSON values, as `study.json` has them of each run: under `recipes`, and by `integers` in integers. trained:
        it was trained under quantization, and is scored so too.

        What one recipe cannot do is said, and stops no other.
        """
        model = self.machine.model(self.spec, self.params)
        result: dict[str, Any] = {"float": to_json_values(evaluate(model, self.read(), self.label, self.total))}
        result["float_bytes"] = count_stored_bytes(self.params, {}, {})
        result["outliers"] = to_json_values(measure_outliers(model, self.read(OUTLIER_BATCHES)))
        result["sinks"] = measure_sinks(model, self.data, self.read(OUTLIER_BATCHES)).to_json_values()
        if trained and self.checkpoint.recipe is not None:
            bind(model, self.checkpoint.recipe, self.checkpoint.ranges)
            result["trained"] = to_json_values(evaluate(model, self.read(), f"{self.label} as trained", self.total))
        result["recipes"], result["integers"] = {}, {}
        for name in dict.fromkeys((*recipes, *integers)):
            try:
                prepared = self.prepare(name)
                if name in recipes:
                    result["recipes"][name] = self.score_simulated(name, prepared)
                if name in integers:
                    result["integers"][name] = self.score_integers(name, prepared)
            except (FileError, DataError):
                raise
            except ValueError as error:  # a model near divergence, or one that has no integers
                why = " ".join(str(error).split())
                print(f"{self.label} {name}: {why}", file=sys.stderr)
                if name in integers:
                    result["integers"][name] = {"why": why}
        return result

    def prepare(self, name: str) -> Prepared:
        """What a recipe makes of the model. Raises ValueError where it makes nothing."""
        batches = calibration_batches(self.data, self.spec)
        return prepare(self.machine, self.spec, self.params, batches, recipe(name, self.spec))

    def score_simulated(self, name: str, prepared: Prepared) -> dict[str, Any]:
        """The score under a recipe's fake quantization, its bytes and its ranges."""
        chosen = recipe(name, self.spec)
        model = prepared.model(self.machine, self.spec, chosen)
        quantized = evaluate(model, self.read(), f"{self.label} {name}", self.total)
        size = count_stored_bytes(prepared.params, resolve(chosen, self.spec), prepared.ranges)
        return to_json_values(quantized) | {"bytes": size, "ranges": ranges_json(prepared.ranges)}

    def score_integers(self, name: str, prepared: Prepared) -> dict[str, Any]:
        """The score in a recipe's integers, and the bytes of what runs. Raises ValueError where it cannot run so."""
        model, size = make_integers(self.spec, prepared, recipe(name, self.spec), self.machine)
        score = evaluate(IntegerScorer(model), self.read(), f"{self.label} {name} in integers", self.total)
        return to_json_values(score) | {"bytes": size}
