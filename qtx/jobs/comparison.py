"""Recipes of post-training quantization side by side: one model, one data set, a row for each.

Every row's metric, latency and size belong to one thing: the integer artifact where the recipe can run in integers,
else the simulation, float32 parameters with quantizers between them; the row says which.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from qtx_ref.integer.lowering import make_constants
from qtx_ref.spec import QTX, ModelSpec, Nonlinear, QuantSpec, Recipe, SpecError, check_integer, to_dict

from ..data import DataError
from ..data.splits import BATCH
from ..engines.backend import backend
from ..engines.machine import Machine
from ..engines.protocols import Batch, Data, IntegerModel, Model
from ..files.artifact import Artifact, count_constant_bytes
from ..files.checkpoint import Checkpoint, save_checkpoint
from ..files.container import COMPARISON, FileError, check_writable, sha_of, write_sealed_json
from ..files.locks import hold
from ..files.results import read_comparison
from ..measure.damage import compare_damage, find_spared, measure_spared
from ..measure.marks import make_kinds
from ..measure.paired import Measured, compare, measure
from ..measure.scores import answer_batch, metric
from ..measure.site_errors import measure_site_errors
from ..prepare.calibration import CALIBRATION_SEED
from ..prepare.prepare import Prepared, prepare
from ..prepare.shared_ranges import Calibrated
from ..progress import Progress
from ..recipes.named import recipe, resolve
from .run import describe_difference

RESULTS = "ptq.json"
PROBED = 4  # calibration sequences on which each quantizer's error is taken
WORST = 3  # sites named in a row


@dataclass(frozen=True)
class PtqSpec:
    """Everything that a comparison's numbers depend on, beside the files' own hashes."""

    recipes: tuple[str, ...]
    sequences: int  # of the evaluation split
    calibration: int  # batches of BATCH
    seed: int  # of the bootstrap
    machine: Machine = Machine()
    spare: tuple[str, ...] = ()  # kinds of tokens whose part of the damage is measured


def make_integers(spec: ModelSpec, prepared: Prepared, chosen: Recipe, machine: Machine) -> tuple[IntegerModel, int]:
    """The recipe as an artifact: its model in integers and the bytes of its tensors. Raises ValueError saying what
    cannot run in integers."""
    quants = resolve(chosen, spec)
    check_integer(quants, QTX, transforms=prepared.transforms)
    codes = cast(Mapping[str, QuantSpec], quants)  # none of small floats, which are refused
    constants = make_constants(spec, prepared.params, codes, prepared.ranges, QTX, Nonlinear.TABLE)
    size = sum(count_constant_bytes(Artifact(spec, chosen, QTX, Nonlinear.TABLE, constants)).values())
    return backend(machine.backend).IntegerModel(spec, constants, codes, QTX, device=machine.device), size


class Comparison:
    """A comparison in a folder: `ptq.json`, written after each row, and the models of the rows that are to be kept."""

    def __init__(
        self, spec: PtqSpec, checkpoint: Checkpoint, data: Data, out: Path, identity: Mapping[str, Any], *, resume: bool
    ) -> None:
        """identity: JSON values that tell the model and the data apart from others.

        Raises:
            SpecError: a recipe that does not exist, or does not fit the model.
            FileError: `out` holds a comparison, and `resume` is not set or it is another one.
        """
        self.spec, self.data, self.out = spec, data, out
        self.model_spec, self.params, self.meta = checkpoint.spec, checkpoint.params, checkpoint.meta
        self.kind = metric(self.model_spec)
        self.recipes = {name: replace(recipe(name, self.model_spec), batches=spec.calibration) for name in spec.recipes}
        self.quants = {name: resolve(chosen, self.model_spec) for name, chosen in self.recipes.items()}
        files = {name: sha_of(Path(name)) for name in spec.recipes if name.endswith(".json")}
        about = json.loads(json.dumps(to_dict(spec)))
        if not spec.spare:  # comparisons from before there was the field go on
            del about["spare"]
        self.identity = {"spec": about, **identity} | ({"files": files} if files else {})
        self.kinds = make_kinds(self.model_spec, data) if spec.spare else None
        self.path = out / RESULTS
        self.rows: dict[str, dict[str, Any]] = {}
        self.sites: dict[str, list[dict[str, Any]]] = {}
        if self.path.exists():
            self._resume(resume)
        check_writable(self.path)

    def _resume(self, resume: bool) -> None:
        if not resume:
            raise FileError(f"{self.path} exists: go on with --resume, or choose another --out")
        known = read_comparison(self.path, self.kind, self.recipes)
        was = known["of"]
        self.rows = cast(dict[str, dict[str, Any]], known["rows"])
        self.sites = cast(dict[str, list[dict[str, Any]]], known["sensitivity"])
        if was != self.identity:
            raise FileError(f"{self.path} is another comparison: {describe_difference('of', was, self.identity)}")

    def save(self) -> None:
        """Writes all rows so far."""
        result = {"of": self.identity, "metric": self.kind, "rows": self.rows, "sensitivity": self.sites}
        write_sealed_json(self.path, COMPARISON, result)

    def evaluation(self) -> Iterable[Batch]:
        """The sequences that every recipe is evaluated on."""
        limit = -(-self.spec.sequences // BATCH)
        left = self.spec.sequences
        for batch in self.data.split_batches("evaluation", self.model_spec, BATCH, 0, limit=limit):
            yield {key: value[:left] for key, value in batch.items()}
            left -= BATCH

    def calibration(self, count: int) -> Iterable[Batch]:
        """The first `count` batches to calibrate on, the same ones at every call."""
        return self.data.split_batches("calibration", self.model_spec, BATCH, CALIBRATION_SEED, limit=count)

    def find_spared(self, batch: Batch) -> np.ndarray:
        """The tokens whose part of the damage is measured, (B, T)."""
        return find_spared(self.model_spec, batch, self.spec.spare, self.kinds)

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
        self.rows.setdefault("float", {**self.describe(self.plain), "runs_as": "float", "bytes": size, "worst": []})

    def run(self, keep: tuple[str, ...] = ()) -> None:
        """Measures every row that is not known yet; the models of `keep` are left in the folder."""
        self.start()
        with hold(self.out), Progress("ptq", len(self.recipes), len(self.rows) - 1) as bar:
            for name in self.recipes:
                if name not in self.rows or (name in keep and not (self.out / kept_name(name)).exists()):
                    self.rows[name] = self.try_row(name, name in keep)
                    self.save()
                    bar.advance(note=name)
            self.save()

    def try_row(self, name: str, kept: bool) -> dict[str, Any]:
        """The row, or one that says why there is none: what one recipe cannot do stops no other."""
        try:
            return self.make_row(name, kept)
        except (FileError, DataError):  # of files
            raise
        except ValueError as error:
            nothing = dict.fromkeys(("value", "loss", "difference", "low", "high", "ms", "bytes"))
            return {"runs_as": "failed", "why": " ".join(str(error).split()), "worst": [], **nothing}

    def prepare(self, name: str) -> tuple[Prepared, Model]:
        """What a recipe makes of the model, and the float model of its parameters."""
        chosen, machine = self.recipes[name], self.spec.machine
        ranges = self.calibrated.of(chosen, self.quants[name])
        prepared = prepare(machine, self.model_spec, self.params, self.calibration, chosen, ranges=ranges)
        return prepared, self.model if prepared.params is self.params else machine.model(
            self.model_spec, prepared.params
        )

    def make_row(self, name: str, kept: bool) -> dict[str, Any]:
        """Raises ValueError for what cannot be prepared."""
        chosen, quants = self.recipes[name], self.quants[name]
        began = time.perf_counter()
        prepared, model = self.prepare(name)
        seconds = time.perf_counter() - began
        if kept:
            self.keep(name, chosen, prepared)
        model.bind(quants, prepared.ranges, masked_scores=chosen.masked_scores, transforms=prepared.transforms)
        try:
            simulated = measure(model, self.evaluation())
        finally:
            model.bind({}, {})
        worst = list(measure_site_errors(self.model, self.probe, quants, prepared).items())[:WORST]
        size = sum(value.nbytes for value in prepared.params.values())
        simulation = self.describe(simulated)
        row = {"simulated": simulation, "worst": worst, "prepare_seconds": seconds}
        if self.spec.spare:
            row |= self.measure_damage(chosen, simulated)
        try:
            integers, size = make_integers(self.model_spec, prepared, chosen, self.spec.machine)
            return row | {"runs_as": "integers", "bytes": size, **self.describe(measure(integers, self.evaluation()))}
        except ValueError as error:
            reason = " ".join(str(error).split())
            return row | {"runs_as": "simulation", "why": reason, "bytes": size, **simulation}

    def measure_damage(self, chosen: Recipe, simulated: Measured) -> dict[str, Any]:
        """The row's pass with tokens spared, and how much of its damage belongs to them, as JSON values."""
        machine, evaluation = self.spec.machine, self.evaluation
        spared = measure_spared(
            machine, self.model_spec, self.params, chosen, self.calibration, evaluation, self.find_spared
        )
        damage = compare_damage(self.plain, simulated, spared, self.spec.seed)
        return {"spared": self.describe(spared), "damage": asdict(damage)}

    def describe(self, measured: Measured) -> dict[str, Any]:
        """A pass as JSON values; what is not finite becomes null."""
        shift, (low, high) = compare(self.kind, measured, self.plain, self.spec.seed)
        values = {
            "value": float(measured.values(self.kind)[0]),
            "loss": measured.loss,
            "difference": shift,
            "low": low,
            "high": high,
            "ms": 1000 * measured.seconds / len(measured.answers.count),
        }
        return {key: value if math.isfinite(value) else None for key, value in values.items()}

    def keep(self, name: str, chosen: Recipe, prepared: Prepared) -> None:
        """Leaves the row's model as a checkpoint with its ranges."""
        meta = {
            **self.meta,
            "quantized_from": self.identity["checkpoint"],
            "calibration": self.data.hashes("calibration"),
        }
        whole = Checkpoint(
            self.model_spec, prepared.params, {}, chosen, prepared.ranges, meta, transforms=prepared.transforms
        )
        save_checkpoint(self.out / kept_name(name), whole)

    def sensitivity(self, name: str) -> None:
        """Quantizes one site of a recipe at a time; `sites[name]` has what each costs, the dearest first. Raises
        SpecError for a recipe that rewrites weights, all of which would differ from float."""
        quants, chosen = self.quants[name], self.recipes[name]
        if chosen.rewrite is not None:
            raise SpecError(f"--sensitivity {name}: {chosen.rewrite} changes all weights at once; take it without")
        self.start()
        prepared, model = self.prepare(name)
        known = {entry["site"]: entry for entry in self.sites.get(name, [])}
        with hold(self.out), Progress("sensitivity", len(quants), len(known)) as bar:
            for site, quant in quants.items():
                if site not in known:
                    ranges = {site: prepared.ranges[site]} if site in prepared.ranges else {}
                    model.bind(
                        {site: quant}, ranges, masked_scores=chosen.masked_scores, transforms=prepared.transforms
                    )
                    known[site] = {"site": site, **self.describe(measure(model, self.evaluation()))}
                    self.sites[name] = sorted(known.values(), key=lambda entry: rank(entry, self.kind), reverse=True)
                    self.save()
                    bar.advance(note=site)


def kept_name(name: str) -> str:
    """The file of a row's model; a recipe of a file is named by the file, wherever that lies."""
    return f"{Path(name).name}.safetensors"


def rank(entry: Mapping[str, Any], kind: str) -> tuple[float, float]:
    """What a row is ranked by: the metric lost, then the loss."""
    shift = entry["difference"]
    lost = math.inf if shift is None else -shift if kind == "accuracy" else shift
    return lost, entry["loss"] if entry["loss"] is not None else math.inf
