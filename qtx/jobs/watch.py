"""What is measured of a model while it trains; nothing here changes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple, cast

from qtx_ref.integer.lowering import lower
from qtx_ref.spec import QTX, ModelSpec, QuantSpec, SpecError

from ..data.splits import BATCH
from ..engines.backend import backend
from ..engines.machine import Machine
from ..engines.protocols import Batch, Data, Model, Runnable
from ..measure.outliers import measure_outliers
from ..measure.scores import IntegerScorer, evaluate
from ..measure.sinks import measure_sinks
from ..prepare.calibration import calibration_batches
from ..prepare.prepare import Prepared, prepare
from ..recipes.named import recipe, resolve
from ..recipes.sites import layer_inputs, paper_sites, sites
from ..recipes.transforms import list_left_transforms
from .run import TrainSpec

SEEN = 16  # sequences or images of a step's batch that the log's sites are measured on
Values = dict[str, float]


def measure_inf_norm(model: Model, batch: Batch) -> float:
    """The published max inf norm of a float forward pass over one batch."""
    sites = model.statistics(batch, paper_sites(model.spec).inf_norm, ("inf_norm",))
    return max(float(statistics["inf_norm"].mean()) for statistics in sites.values())


def find_sites(spec: ModelSpec, names: Iterable[str]) -> dict[str, str]:
    """The sites of `LogSpec.sites` by the name given there: a site, or `layer.4.input`, which is what layer 5 takes in.

    Raises SpecError for one that the model does not have.
    """
    inputs = {f"layer.{i}.input": site for i, site in enumerate(layer_inputs(spec))}
    known = {name: inputs.get(name, name) for name in names}
    for name, site in known.items():
        if site not in sites(spec).results:
            raise SpecError(f"log site {name!r} is not one of this model's: give one such as {list(inputs)[-1]}")
    return known


def measure_sites(model: Model, batch: Batch, names: Mapping[str, str]) -> dict[str, Values]:
    """Inf norm and published kurtosis of sites, by the names of `find_sites`, each the mean over the first `SEEN`
    sequences of a batch.

    A float forward pass of its own, without dropout: about a third of a training step on as many.
    """
    units = dict.fromkeys(names.values(), "sequence")
    part = {name: value[:SEEN] for name, value in batch.items()}
    found = model.statistics(part, units, ("inf_norm", "kurtosis_published"))
    return {
        name: {
            "inf_norm": float(found[site]["inf_norm"].mean()),
            "kurtosis": float(found[site]["kurtosis_published"].mean()),
        }
        for name, site in names.items()
    }


class Point(NamedTuple):
    """What was measured of a model on held-out data."""

    values: Values  # by curve, see `History`
    heads: dict[str, list[list[float]]]  # probability on each kind of sink by layer and head
    faults: list[str]  # in words, what could not be had

    def to_json_values(self) -> dict[str, object]:
        """As the line of the log says it."""
        return {"evaluation": self.values, **({"heads": self.heads} if self.heads else {})}


class HeldOut:
    """`EvaluationSpec`, carried out on one run."""

    def __init__(self, run: TrainSpec, data: Data, machine: Machine) -> None:
        self.run, self.data, self.machine, self.spec = run, data, machine, run.evaluation

    def is_due(self, step: int) -> bool:
        """Whether something is measured after this step. The last is that of the schedule: a `stop` before it is a
        pause, which leaves no point that the uninterrupted run does not have."""
        every = self.spec.every
        return every is not None and (step % every == 0 or step == self.run.optim.steps)

    def measure(self, model: Model) -> Point:
        """Of the parameters in float, of the model as it is trained where that is quantized, and under each recipe.

        It is done on copies: the run keeps its bits.
        """
        values, heads, faults = point = Point({}, {}, [])
        params = model.params()
        plain = self.machine.model(self.run.model, params)

        @cache
        def prepared(name: str) -> Prepared:
            chosen = replace(recipe(name, self.run.model), batches=self.spec.batches)
            batches = calibration_batches(self.data, self.run.model)
            return prepare(self.machine, self.run.model, params, batches, chosen)

        def take(name: str, measured: Callable[[], Values]) -> None:
            try:
                got = measured()
            except ValueError as error:  # a model near divergence
                faults.append(f"{name}: {error}")
                return
            if strange := [key for key, value in got.items() if not math.isfinite(value)]:
                faults.append(f"{name}: {', '.join(strange)} not finite")
            values.update({key: value for key, value in got.items() if math.isfinite(value)})

        def score(name: str, make: Callable[[], Runnable]) -> None:
            take(name, lambda: self.score(name, make()))

        score("float", lambda: plain)
        if self.run.train_quant:
            score("trained", lambda: model)
        for name in self.spec.recipes:
            score(name, partial(self.fake, name, prepared))
        for name in self.spec.integers:
            score(f"integer.{name}", partial(self.lower, name, prepared))
        take("outliers", lambda: self.measure_outliers(plain))

        def measure_heads() -> Values:
            sinks = measure_sinks(plain, self.data, self.read("calibration"))
            heads.update(sinks.list_heads())
            return sinks.values()

        take("sinks", measure_heads)
        return point

    def fake(self, name: str, prepared: Callable[[str], Prepared]) -> Runnable:
        """The model under a recipe's fake quantization."""
        return prepared(name).model(self.machine, self.run.model, recipe(name, self.run.model))

    def lower(self, name: str, prepared: Callable[[str], Prepared]) -> Runnable:
        """The model in a recipe's integers. Raises SpecError where it has none."""
        chosen, spec = recipe(name, self.run.model), self.run.model
        if list_left_transforms(chosen, spec):
            raise SpecError(f"recipe {name} cannot run in integers while training: its transforms stay at inputs")
        made = prepared(name)
        quants = cast(Mapping[str, QuantSpec], resolve(chosen, spec))  # lowering refuses small floats
        constants = lower(spec, made.params, quants, made.ranges)
        module = backend(self.machine.backend)
        return IntegerScorer(module.IntegerModel(spec, constants, quants, QTX, device=self.machine.device))

    def score(self, name: str, model: Runnable) -> Values:
        """Loss and accuracy on the first batches of the evaluation split."""
        got = evaluate(model, self.read("evaluation"))
        return {f"{name}.loss": got.loss, f"{name}.accuracy": got.accuracy}

    def measure_outliers(self, model: Model) -> Values:
        """The published metrics on the first batches of the calibration split."""
        got = measure_outliers(model, self.read("calibration"))
        return {"kurtosis": got.average_kurtosis, "inf_norm": got.max_inf_norm}

    def read(self, split: str) -> Iterable[Batch]:
        """The split's first batches."""
        return self.data.split_batches(split, self.run.model, BATCH, 0, limit=self.spec.batches)
