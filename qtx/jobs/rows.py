"""The rows of a study: which runs its grids make, what each is called, and what its file keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from qtx_ref.presets import preset
from qtx_ref.spec import ModelSpec, OptimSpec, SpecError, to_dict

from ..data.spec import DataSpec
from ..engines.machine import Machine
from ..engines.protocols import Data
from ..recipes.named import training_recipe
from ..runs.reading import RunSpec, make_run
from .opening import load_data
from .resolving import ATTENTION, MODEL, make_data, make_machine, make_model, make_optim, make_train
from .run import Start, TrainSpec
from .starts import Origin, continue_run, load_continued, open_origin

ATTENTIONS, RECIPES = ("vanilla", "clipped", "gated"), ("w8a8",)  # unless a run says others
KIND, QUANT, SEED = "model.attention", "quant.train", "seed"
INTEGERS, LIMIT = "evaluation.integers", "evaluation.limit"
# of a run, what may be another when its study goes on; but for LIMIT
BESIDE = ("evaluation", "saving", "log", "stop")


@dataclass(frozen=True)
class Row:
    """One run of a study: what it is called without its seed, what varies beside attention, recipe and seed, and its
    specs as far as they are known before data are read."""

    line: str
    run: RunSpec
    varied: Mapping[str, Any]
    model: ModelSpec
    optim: OptimSpec
    data: DataSpec
    machine: Machine
    origin: Origin | None = None  # the checkpoint that it begins with

    @property
    def kind(self) -> str:
        """The name of its attention."""
        return self.run.get(KIND, ATTENTION)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.run.get(SEED, 0)

    @property
    def name(self) -> str:
        """The name of the run and of its folder."""
        return f"{self.line}-seed{self.seed}".replace("/", "_")

    @property
    def quant(self) -> str | None:
        """What it is trained under, as it was said."""
        return self.run.get(QUANT)

    @property
    def recipe(self) -> str | None:
        """The name of the recipe that this stands for."""
        return training_recipe(self.quant, self.model).name if self.quant else None

    @property
    def integers(self) -> tuple[str, ...]:
        """The recipes by which it is run in integers, too, once it is trained."""
        return self.run.get(INTEGERS, ())

    @property
    def limit(self) -> int | None:
        """The evaluation batches that it is then scored on; None: the whole split."""
        return self.run.get(LIMIT)

    def load(self) -> Data:
        """Its data. Raises SpecError, DataError where they cannot be had or do not fit."""
        if self.origin is None:
            return load_data(self.data, self.model)
        return load_continued(self.origin, self.model, self.data)

    def begin(self) -> Start | None:
        """What it begins with; None where its parameters are drawn."""
        if self.origin is None:
            return None
        return Start(continue_run(self.origin, self.run)[1], self.origin.describe())

    def make_train(self, model: ModelSpec) -> TrainSpec:
        """The whole run, of the model with the vocabulary of its data."""
        return make_train(self.run, model, self.optim, None if self.origin is None else self.origin.sha256)

    def identify(self) -> dict[str, Any]:
        """What must be equal for a study to go on, as JSON values. To another `stop` a run goes on, and is evaluated
        anew."""
        train = to_dict(self.make_train(self.model))
        kept = {name: value for name, value in train.items() if name not in BESIDE}
        limit = {} if self.limit is None else {"limit": self.limit}
        return {"train": kept, "data": to_dict(self.data), "machine": to_dict(self.machine), **limit}


def list_recipes(run: RunSpec) -> tuple[str, ...]:
    """The recipes by which every trained model is quantized. Raises SpecError for none, or one twice."""
    names = run.get("quant.recipes", RECIPES)
    if not names or len(set(names)) < len(names):
        raise SpecError(f"--bits is {','.join(names)!r}: name at least one, each once")
    return names


def list_integers(rows: Mapping[str, Row]) -> tuple[str, ...]:
    """The recipes by which some row is run in integers."""
    return tuple(dict.fromkeys(name for row in rows.values() for name in row.integers))


def complete_grids(run: RunSpec) -> dict[str, tuple[Any, ...]]:
    """What varies from the outermost to the innermost: seed, what the run says, attention."""
    kinds = run.grids.get(KIND) or ((run.get(KIND),) if KIND in run.settings else ATTENTIONS)
    others = {key: values for key, values in run.grids.items() if key not in (KIND, SEED)}
    return {SEED: run.grids.get(SEED) or (run.get(SEED, 0),), **others, KIND: kinds}


def make_rows(run: RunSpec) -> dict[str, Row]:
    """Every run of a study by its name. Raises SpecError for what no run can have, or two of one name,
    FileError for a checkpoint that no run can begin with."""
    grids = complete_grids(run)
    if "quant.recipes" in grids:
        raise SpecError("study.quant.recipes: every run is compared under all of quant.recipes; name them there")
    rows: dict[str, Row] = {}
    origins: dict[str, Origin] = {}
    for values in product(*grids.values()):
        point = dict(zip(grids, values, strict=True))
        varied = {key: value for key, value in point.items() if key not in (KIND, SEED, QUANT)}
        one, origin = run.at(point), None
        if (init := one.get("init")) is None:
            model, data = make_model(one), make_data(one)
        else:
            origin = origins[init] = origins.get(init) or open_origin(Path(init))
            model, _, data = continue_run(origin, one)
        line = name_line(one, varied, grids)
        row = Row(line, one, varied, model, make_optim(one, model), data, make_machine(one), origin)
        if row.name in rows:
            raise SpecError(f"two runs of the study would be called {row.name}: leave one of them out")
        row.make_train(model)
        rows[row.name] = row
    return rows


def name_line(run: RunSpec, varied: Mapping[str, Any], grids: Mapping[str, tuple[Any, ...]]) -> str:
    """What a row is called: its attention, FQ where its training quantizes, and each other key that varies."""
    name, quant = run.get(KIND, ATTENTION), run.get(QUANT)
    if quant:
        several = len({*grids.get(QUANT, ())} - {None}) > 1
        name += f"-{quant}" if several else "-FQ"
    lasts = [key.rpartition(".")[2] for key in varied]
    for key, last in zip(varied, lasts, strict=True):
        name += f"-{last if lasts.count(last) == 1 else key}={name_value(varied[key])}"
    return name


def name_value(value: Any) -> str:
    """A value within a name."""
    if isinstance(value, tuple):
        return "+".join(str(getattr(one, "path", one)) for one in value) or "none"
    return (
        f"{value:g}" if isinstance(value, float) else str(value).lower() if value in (None, True, False) else str(value)
    )


# --- what study.json keeps --------------------------------------------------------------------------------------------


def keep_run(run: RunSpec) -> dict[str, Any]:
    """What is said of a study's runs, as JSON values."""
    return {
        "settings": {name: keep_value(one.value) for name, one in run.settings.items()},
        "grids": {name: [keep_value(one) for one in values] for name, values in run.grids.items()},
    }


def keep_value(value: Any) -> Any:
    """A value of a key as JSON values."""
    return [to_dict(one) for one in value] if isinstance(value, tuple) else to_dict(value)


def read_kept(kept: Mapping[str, Any], source: str) -> RunSpec:
    """The run of a study's file, those of 0.2 and before among them. Raises SpecError for one that is none."""
    if "settings" in kept or "grids" in kept:
        parts = [kept.get(name) for name in ("settings", "grids")]
        if kept.keys() != {"settings", "grids"} or not all(isinstance(part, dict) for part in parts):
            raise SpecError(f"{source} keeps no run: expected a table of settings and one of grids")
        return make_run(kept["settings"], source, kept["grids"])
    names = {
        "model": "model.preset",
        "data": "data.sources",
        "tokenizer": "data.tokenizer",
        "vocab": "data.vocab",
        "steps": "optim.steps",
        "batch": "data.batch",
        "lr": "optim.lr",
        "recipes": "quant.recipes",
    }
    if odd := kept.keys() - names.keys() - {"attention", "train_quant", "seeds", "machine", "watch_integer"}:
        raise SpecError(f"unknown key in {source} is {sorted(odd)[0]!r}")
    if not isinstance(kept.get("machine", {}), dict):
        raise SpecError(f"machine in {source} is {kept['machine']!r}: expected a table")
    said = {key: kept[name] for name, key in names.items() if kept.get(name) is not None}
    said |= {f"machine.{name}": value for name, value in kept.get("machine", {}).items()}
    grids = {KIND: kept.get("attention", ATTENTIONS), SEED: kept.get("seeds", (0,))}
    if kept.get("train_quant"):
        grids[QUANT] = (None, kept["train_quant"])
    return make_run(said, source, grids)


def describe_shape(rows: Mapping[str, Row]) -> str | None:
    """The preset whose shape every row has, attention and vocabulary apart; None where none is."""
    names = {row.run.get("model.preset", MODEL) for row in rows.values()}
    if len(names) > 1:
        return None
    (name,) = names
    same = ("attention", "vocab", "start", "dropout", "attention_dropout")  # may be others
    shape = preset(name)
    kept = (replace(row.model, **{one: getattr(shape, one) for one in same}) for row in rows.values())
    return name if all(one == shape for one in kept) else None
