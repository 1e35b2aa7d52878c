"""Post-training quantization, remedies side by side: one model, one data set, a row for each recipe.

Every row's metric, latency and size belong to one thing: the integer artifact where the recipe can run in integers, else
the simulation, float32 parameters with quantizers between them; the row says which.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.integer.lowering import make_constants
from qtx_ref.numerics import is_weight
from qtx_ref.ops import hadamard
from qtx_ref.quant import quantizer as quantizers
from qtx_ref.random import stream
from qtx_ref.spec import (
    QTX,
    FloatQuantSpec,
    Granularity,
    InputTransform,
    ModelSpec,
    Nonlinear,
    ObserverKind,
    Quant,
    Range,
    Recipe,
    SpecError,
    check_integer,
    to_dict,
)
from qtx_ref.tape import const

from ..data import DataError
from ..data.splits import BATCH
from ..engines.backend import backend
from ..engines.machine import Machine
from ..files.artifact import Artifact, count_constant_bytes
from ..files.checkpoint import Checkpoint, save_checkpoint
from ..files.container import COMPARISON, CheckpointError, check_writable, sha_of, write_sealed_json
from ..files.locks import hold
from ..files.results import read_comparison
from ..measure.scores import Answers, answer_batch, metric
from ..prepare.calibration import CALIBRATION_SEED
from ..prepare.prepare import Prepared, prepare
from ..progress import Progress
from ..recipes.named import recipe, resolve
from .run import describe_difference

RESAMPLES = 2000  # of the bootstrap
CONFIDENCE = 95  # percent, of its interval
RESULTS = "ptq.json"
PROBED = 4  # calibration sequences on which each quantizer's error is taken
WORST = 3  # sites named in a row
Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]


@dataclass(frozen=True)
class PtqSpec:
    """Everything that a comparison's numbers depend on, beside the files' own hashes."""

    recipes: tuple[str, ...]
    sequences: int  # of the evaluation split
    calibration: int  # batches of BATCH
    seed: int  # of the bootstrap
    machine: Machine = Machine()


@dataclass(frozen=True)
class Measured:
    """One pass over the evaluation batches."""

    answers: Answers  # of the sequences that have a target
    seconds: float

    def values(self, kind: str, times: np.ndarray | None = None) -> np.ndarray:
        """Accuracy in percent, or perplexity, (R,): of resamples where `times` (R, N) says how often each drew a sequence,
        else of all sequences once, R = 1."""
        each = np.ones((1, len(self.answers.count))) if times is None else times
        loss, count, right = (each @ part for part in self.answers)
        with np.errstate(over="ignore"):
            return 100 * right / count if kind == "accuracy" else np.exp(loss / count)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a target, nats."""
        return math.fsum(self.answers.loss) / int(self.answers.count.sum())


def measure(model: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> Measured:
    began = time.perf_counter()
    parts = [answer_batch(model, batch) for batch in batches]
    seconds = time.perf_counter() - began
    whole = Answers(*(np.concatenate(part) for part in zip(*parts, strict=True))) if parts else None
    if whole is None or not whole.count.any():
        raise SpecError("evaluation found no target: the data are empty")
    return Measured(Answers(*(part[whole.count > 0] for part in whole)), seconds)


def compare(kind: str, quantized: Measured, plain: Measured, seed: int) -> tuple[float, tuple[float, float]]:
    """Difference to float, points of accuracy or percent of perplexity, and its interval by a paired bootstrap over
    sequences (Efron and Tibshirani 1993, chapter 13)."""
    count = len(plain.answers.count)
    times = stream(seed, "bootstrap").multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # (R, N)

    def differ(times: np.ndarray | None) -> np.ndarray:
        after, before = quantized.values(kind, times), plain.values(kind, times)
        return after - before if kind == "accuracy" else 100 * (after / before - 1)

    tail = (100 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):  # of a row that diverged
        low, high = np.percentile(differ(times), [tail, 100 - tail])
        return float(differ(None)[0]), (float(low), float(high))


class Calibrated:
    """Ranges that several recipes share: what an observer found depends neither on the bits (but for least squares) nor on
    how channels are grouped. It does depend, in its last bits, on which sites are quantized: a backend may fuse ops between
    which nobody looks."""

    def __init__(self, model: Any, batches: Batches) -> None:
        self.model = model
        self.batches = batches
        self.known: dict[frozenset[str], dict[tuple[str, Any], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def of(self, chosen: Recipe, quants: Mapping[str, Quant]) -> dict[str, Range] | None:
        """The static ranges of a recipe; None where they depend on more than the float model."""
        if chosen.transforms or chosen.quantize_while_calibrating or chosen.masked_scores:
            return None
        static = {site: quant for site, quant in quants.items() if not quant.dynamic}
        known = self.known.setdefault(frozenset(quants), {})
        if any((site, observed(quant)) not in known for site, quant in static.items()):
            for site, found in self.model.calibrate(self.batches(), quants).items():
                known[site, observed(quants[site])] = found.low, found.high, quantizers.was_silent(found)
        ranges = {site: known[site, observed(quant)] for site, quant in static.items()}
        return {
            site: Range(low, high, *quantizers.static_scale(low, high, silent, quants[site]))
            for site, (low, high, silent) in ranges.items()
        }


def observed(quant: Quant) -> Any:
    """What the low and high ends of a range depend on, beside the tensor."""
    if quant.observer.kind in (ObserverKind.MSE_GRID, ObserverKind.MSE_GOLDEN) or isinstance(quant, FloatQuantSpec):
        return quant
    grouped = quant.granularity is Granularity.GROUP  # united from the ends of its channels
    return quant.observer, Granularity.CHANNEL if grouped else quant.granularity


def site_errors(
    model: Any,
    batch: Mapping[str, np.ndarray],
    quants: Mapping[str, Quant],
    found: Prepared,
) -> dict[str, float]:
    """Of each quantizer fed the float model's own tensor: squared error over squared tensor, largest first. That of a
    weight counts from before it was rewritten. Codes are the reference's, whichever backend recorded the tensors."""
    weights = [site for site in quants if is_weight(site)]
    errors = {}
    for some in by_layer(site for site in quants if not is_weight(site)):  # a layer's tensors are held at a time
        for site, (x, where) in model.record(batch, some).items():
            change = found.transforms.get(site.removesuffix(".input")) if site.endswith(".input") else None
            x = transformed(x, change) if change else x
            errors[site] = relative_error(x, where, quants[site], found.ranges.get(site))
    for site in weights:
        name = site if site in found.params else "embed.token.weight"  # a head tied to the token table
        own = None if found.before is None else found.before[name]
        errors[site] = relative_error(found.params[name], None, quants[site], found.ranges.get(site), True, own)
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def by_layer(names: Iterable[str]) -> list[list[str]]:
    """Sites of each layer, and those of none, apart."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        found.setdefault(parts[1] if parts[0] == "layer" else "", []).append(name)
    return list(found.values())


def transformed(x: np.ndarray, change: InputTransform) -> np.ndarray:
    """A linear's input as its quantizer sees it."""
    x = x if change.divisor is None else x / change.divisor
    return hadamard(const(x), change.block).value if change.block else x


def relative_error(
    x: np.ndarray,
    where: np.ndarray | None,
    quant: Quant,
    range: Range | None,
    weight: bool = False,
    wanted: np.ndarray | None = None,
) -> float:
    """Squared error over squared tensor of the elements that count; 0 of a tensor of zeros. wanted: what x stands for, x
    itself unless given."""
    ends = quantizers.dynamic_scale(x, quant, where, weight) if range is None else (range.scale, range.zero_point)
    y, _ = quantizers.fake_quantize(x, *ends, quant)
    keep = True if where is None else np.broadcast_to(where, x.shape)
    wanted = x if wanted is None else wanted
    size = np.square(wanted, dtype=np.float64).sum(where=keep)
    return float(np.square(np.subtract(y, wanted, dtype=np.float64)).sum(where=keep) / size) if size else 0.0


def integer_model(spec: ModelSpec, found: Prepared, chosen: Recipe, machine: Machine) -> tuple[Any, int]:
    """The recipe as an artifact: its model in integers and the bytes of its tensors. Raises ValueError saying what cannot
    run in integers."""
    quants = resolve(chosen, spec)
    check_integer(quants, QTX, transforms=found.transforms)
    constants = make_constants(spec, found.params, quants, found.ranges, QTX, Nonlinear.TABLE)
    size = sum(count_constant_bytes(Artifact(spec, chosen, QTX, Nonlinear.TABLE, constants)).values())
    return backend(machine.backend).IntegerModel(spec, constants, quants, QTX, device=machine.device), size


class Comparison:
    """A comparison in a folder: `ptq.json`, written after each row, and the models of the rows that are to be kept."""

    def __init__(
        self, spec: PtqSpec, checkpoint: Checkpoint, data: Any, out: Path, identity: Mapping[str, Any], *, resume: bool
    ) -> None:
        """identity: JSON values that tell the model and the data apart from others.

        Raises:
            SpecError: a recipe that does not exist, or does not fit the model.
            CheckpointError: `out` holds a comparison, and `resume` is not set or it is another one.
        """
        self.spec, self.data, self.out = spec, data, out
        self.model_spec, self.params, self.meta = checkpoint.spec, checkpoint.params, checkpoint.meta
        self.kind = metric(self.model_spec)
        self.recipes = {name: replace(recipe(name, self.model_spec), batches=spec.calibration) for name in spec.recipes}
        self.quants = {name: resolve(chosen, self.model_spec) for name, chosen in self.recipes.items()}
        files = {name: sha_of(Path(name)) for name in spec.recipes if name.endswith(".json")}
        self.identity = {"spec": json.loads(json.dumps(to_dict(spec))), **identity} | (
            {"files": files} if files else {}
        )
        self.path = out / RESULTS
        self.rows: dict[str, dict[str, Any]] = {}
        self.sites: dict[str, list[dict[str, Any]]] = {}
        if self.path.exists():
            self._resume(resume)
        check_writable(self.path)

    def _resume(self, resume: bool) -> None:
        if not resume:
            raise CheckpointError(f"{self.path} exists: go on with --resume, or choose another --out")
        known = read_comparison(self.path, self.kind, self.recipes)
        was, self.rows, self.sites = known["of"], known["rows"], known["sensitivity"]
        if was != self.identity:
            raise CheckpointError(f"{self.path} is another comparison: {describe_difference('of', was, self.identity)}")

    def save(self) -> None:
        found = {"of": self.identity, "metric": self.kind, "rows": self.rows, "sensitivity": self.sites}
        write_sealed_json(self.path, COMPARISON, found)

    def evaluation(self) -> Iterable[Mapping[str, np.ndarray]]:
        limit = -(-self.spec.sequences // BATCH)
        left = self.spec.sequences
        for batch in self.data.split_batches("evaluation", self.model_spec, BATCH, 0, limit=limit):
            yield {key: value[:left] for key, value in batch.items()}
            left -= BATCH

    def calibration(self, count: int) -> Iterable[Mapping[str, np.ndarray]]:
        return self.data.split_batches("calibration", self.model_spec, BATCH, CALIBRATION_SEED, limit=count)

    def start(self) -> None:
        """The float model, its answers, and a few of its tensors."""
        self.model = self.spec.machine.model(self.model_spec, self.params)
        for batch in islice(self.evaluation(), 1):  # the first pass is slower
            answer_batch(self.model, batch)
        self.plain = measure(self.model, self.evaluation())
        if not math.isfinite(self.plain.loss) or not math.isfinite(self.plain.values(self.kind)[0]):
            raise SpecError(
                f"the float model diverges: its loss is {self.plain.loss}, so there is nothing to compare with"
            )
        self.calibrated = Calibrated(self.model, lambda: self.calibration(self.spec.calibration))
        if (first := next(iter(self.calibration(1)), None)) is None:
            raise SpecError("calibration found nothing: the data are empty")
        self.probe = {key: value[:PROBED] for key, value in first.items()}
        size = sum(value.nbytes for value in self.params.values())
        self.rows.setdefault("float", {**self.numbers(self.plain), "runs_as": "float", "bytes": size, "worst": []})

    def run(self, keep: tuple[str, ...] = ()) -> None:
        """Measures every row that is not known yet; the models of `keep` are left in the folder."""
        self.start()
        with hold(self.out), Progress("ptq", len(self.recipes), len(self.rows) - 1) as bar:
            for name in self.recipes:
                if name not in self.rows or (name in keep and not (self.out / kept_name(name)).exists()):
                    self.rows[name] = self.tried(name, name in keep)
                    self.save()
                    bar.advance(note=name)
            self.save()

    def tried(self, name: str, kept: bool) -> dict[str, Any]:
        """The row, or one that says why there is none: what one recipe cannot do stops no other."""
        try:
            return self.row(name, kept)
        except (CheckpointError, DataError):  # of files
            raise
        except ValueError as error:
            nothing = dict.fromkeys(("value", "loss", "difference", "low", "high", "ms", "bytes"))
            return {"runs_as": "failed", "why": " ".join(str(error).split()), "worst": [], **nothing}

    def prepared(self, name: str) -> tuple[Prepared, Any]:
        """What a recipe makes of the model, and the float model of its parameters."""
        chosen, machine = self.recipes[name], self.spec.machine
        ranges = self.calibrated.of(chosen, self.quants[name])
        found = prepare(machine, self.model_spec, self.params, self.calibration, chosen, ranges=ranges)
        return found, self.model if found.params is self.params else machine.model(self.model_spec, found.params)

    def row(self, name: str, kept: bool) -> dict[str, Any]:
        """Raises ValueError for what cannot be prepared."""
        chosen, quants = self.recipes[name], self.quants[name]
        began = time.perf_counter()
        found, model = self.prepared(name)
        prepared = time.perf_counter() - began
        if kept:
            self.keep(name, chosen, found)
        model.bind(quants, found.ranges, masked_scores=chosen.masked_scores, transforms=found.transforms)
        try:
            simulated = measure(model, self.evaluation())
        finally:
            model.bind({}, {})
        worst = list(site_errors(self.model, self.probe, quants, found).items())[:WORST]
        size = sum(value.nbytes for value in found.params.values())
        row = {"simulated": self.numbers(simulated), "worst": worst, "prepare_seconds": prepared}
        try:
            integers, size = integer_model(self.model_spec, found, chosen, self.spec.machine)
            return row | {"runs_as": "integers", "bytes": size, **self.numbers(measure(integers, self.evaluation()))}
        except ValueError as error:
            reason = " ".join(str(error).split())
            return row | {"runs_as": "simulation", "why": reason, "bytes": size, **row["simulated"]}

    def numbers(self, found: Measured) -> dict[str, Any]:
        """A pass as JSON values; what is not finite becomes null."""
        shift, (low, high) = compare(self.kind, found, self.plain, self.spec.seed)
        values = {"value": float(found.values(self.kind)[0]), "loss": found.loss, "difference": shift, "low": low,
                  "high": high, "ms": 1000 * found.seconds / len(found.answers.count)}  # fmt: skip
        return {key: value if math.isfinite(value) else None for key, value in values.items()}

    def keep(self, name: str, chosen: Recipe, found: Prepared) -> None:
        """Leaves the row's model as a checkpoint with its ranges."""
        meta = {**self.meta, "quantized_from": self.identity["checkpoint"],
                "calibration": self.data.hashes("calibration")}  # fmt: skip
        whole = Checkpoint(self.model_spec, found.params, {}, chosen, found.ranges, meta, transforms=found.transforms)
        save_checkpoint(self.out / kept_name(name), whole)

    def sensitivity(self, name: str) -> None:
        """Quantizes one site of a recipe at a time; `sites[name]` has what each costs, the dearest first. Raises SpecError
        for a recipe that rewrites weights, all of which would differ from float."""
        quants, chosen = self.quants[name], self.recipes[name]
        if chosen.rewrite is not None:
            raise SpecError(f"--sensitivity {name}: {chosen.rewrite} changes all weights at once; take it without")
        self.start()
        found, model = self.prepared(name)
        known = {entry["site"]: entry for entry in self.sites.get(name, [])}
        with hold(self.out), Progress("sensitivity", len(quants), len(known)) as bar:
            for site, quant in quants.items():
                if site not in known:
                    ranges = {site: found.ranges[site]} if site in found.ranges else {}
                    model.bind({site: quant}, ranges, masked_scores=chosen.masked_scores, transforms=found.transforms)
                    known[site] = {"site": site, **self.numbers(measure(model, self.evaluation()))}
                    self.sites[name] = sorted(known.values(), key=lambda entry: cost(entry, self.kind), reverse=True)
                    self.save()
                    bar.advance(note=site)


def kept_name(name: str) -> str:
    """The file of a row's model; a recipe of a file is named by the file, wherever that lies."""
    return f"{Path(name).name}.safetensors"


def cost(entry: Mapping[str, Any], kind: str) -> tuple[float, float]:
    """What a row is ranked by: the metric lost, then the loss."""
    shift = entry["difference"]
    lost = math.inf if shift is None else -shift if kind == "accuracy" else shift
    return lost, entry["loss"] if entry["loss"] is not None else math.inf
