"""From what a run says to the specs that it is. Where nothing is said, a run is what it was before runs were files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from qtx_ref.presets import attention, preset
from qtx_ref.spec import Family, Head, ModelSpec, OptimSpec, SpecError, StepSpec
from qtx_ref.spec.base import field_types, refuse

from ..data.spec import DataSpec
from ..engines.machine import Machine
from ..runs.keys import TABLES, count_steps
from ..runs.reading import RunSpec, Setting
from ..runs.spec import EvaluationSpec, LogSpec, SavingSpec
from .identity import MOVE
from .run import PER_STEP, STEPS, TrainSpec
from .training import check_rate, default_optim

MODEL, ATTENTION = "opt-tiny", "vanilla"
KEPT = ("model.attention", "model.dropout", "model.attention_dropout")  # what a checkpoint's model may change
T = TypeVar("T")


def make_machine(run: RunSpec) -> Machine:
    """Where the run computes."""
    return fill(Machine(), run, "machine")


def make_data(run: RunSpec) -> DataSpec:
    """What the run's data are. Raises SpecError for settings that do not go together."""
    return fill(DataSpec(), run, "data")


def change_data(meta: Mapping[str, Any], run: RunSpec) -> DataSpec | None:
    """The data of a checkpoint's `meta` with what a run says of them; None where it says nothing. Raises SpecError for
    settings that do not go together."""
    said = run.table("data").keys() - {"batch"}
    return fill(DataSpec.of(meta.get("data", {})), run, "data") if said else None


def make_model(run: RunSpec) -> ModelSpec:
    """The model of a run whose parameters are drawn: its preset with what is said of its fields.

    `alpha` of its attention divides by the window of the data. Raises SpecError for a shape that no model has, or a
    window that the model has no positions for.
    """
    shape = preset(run.get("model.preset", MODEL))
    if shape.family is Family.VIT and "model.length" in run.settings:
        raise SpecError(f"model.length is {run.get('model.length')}: a vit's follows from its image and patch size")
    plain = fill(shape, run, "model")
    if plain.head is Head.NONE:
        raise SpecError("model.head is none: a model is trained by what its head says; leave it out")
    if plain.family is Family.BERT and not plain.types:
        raise SpecError("model.types is 0: every token of a bert has a type; give at least 1")
    return with_attention(plain, run.get("model.attention", ATTENTION), run)


def with_attention(model: ModelSpec, name: str, run: RunSpec) -> ModelSpec:
    """The model with an attention whose `alpha` divides by the run's window. Raises SpecError as `make_model`."""
    window = run.get("data.window")
    if window is not None and window > model.length:
        raise SpecError(f"data.window is {window}: the model has {model.length} positions; set model.length too")
    return replace(model, attention=attention(name).with_length(window or model.length))


def make_optim(run: RunSpec, model: ModelSpec) -> OptimSpec:
    """The optimizer: that of `default_optim` with what is said. Raises SpecError for what trains nothing."""
    check_lr(run)
    return change_optim(default_optim(model, run.get("optim.steps", STEPS), run.get("optim.lr")), run)


def change_optim(optim: OptimSpec, run: RunSpec) -> OptimSpec:
    """An optimizer with what a run says of its fields but the rate and the steps."""
    said = {name: value for name, value in run.table("optim").items() if name not in ("lr", "steps")}
    if "warmup" in said:
        said["warmup"] = count_steps(said["warmup"], optim.steps)
    return replace(optim, **said)


def check_lr(run: RunSpec) -> None:
    """Raises SpecError for a learning rate that trains nothing, naming who said it."""
    if (said := run.settings.get("optim.lr")) is not None:
        try:
            check_rate(said.value)
        except SpecError as error:
            raise SpecError(f"{said.origin}: optim.lr: {error}") from None


def make_step(run: RunSpec) -> StepSpec:
    """How a run says that a step is computed."""
    return fill(StepSpec(), run, "step")


def check_needs(run: RunSpec) -> None:
    """Raises SpecError where a run that is not a study's has a key without the one that it needs."""
    if run.get("step.int8") and run.get("quant.train") is None:
        refuse("step int8", True, "give quant train too, w8a8 or another of 8 bits at most: its codes are multiplied")
    if (names := run.get("evaluation.integers")) and run.get("evaluation.every") is None:
        refuse("evaluation integers", names, "give evaluation every too: then they are measured")


def make_train(
    run: RunSpec, model: ModelSpec, optim: OptimSpec, init: str | None = None, batch: int = PER_STEP
) -> TrainSpec:
    """The whole run, of a model and an optimizer that are made. init: sha256 of the checkpoint it begins with. batch:
    its size unless said."""
    return TrainSpec(
        model,
        optim,
        run.get("data.batch", batch),
        run.get("seed", 0),
        run.get("quant.train"),
        init,
        make_step(run),
        run.get("stop"),
        fill(EvaluationSpec(), run, "evaluation"),
        fill(SavingSpec(), run, "saving"),
        fill(LogSpec(), run, "log"),
    )


def list_changes(keys: Iterable[str], move: bool) -> frozenset[str]:
    """What a run that goes on may have otherwise, as `training.train` takes it: keys or tables, and what a move is."""
    return frozenset("batch" if name == "data.batch" else name for name in keys) | (MOVE if move else frozenset())


def fill(spec: T, run: RunSpec, table: str) -> T:
    """A spec with what a run says of its fields, and of those of a spec within it."""
    said: dict[str, Any] = {}
    own: Any = type(spec)
    for name, kind in field_types(own).items():
        key = f"{table}.{name}"
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and run.table(key):
            said[name] = fill(getattr(spec, name), run, key)
        elif key in run.settings and key != "model.attention":
            said[name] = run.get(key)
    return replace(spec, **said) if said else spec  # type: ignore[type-var]


def refuse_model(run: RunSpec, name: str, others: Iterable[str] = ()) -> None:
    """Raises SpecError for a key of the model that a checkpoint has already, and `others`; `name`: the option or
    argument that names the checkpoint."""
    for key, setting in run.settings.items():
        if (key.startswith("model.") and key not in KEPT) or key in others:
            own = setting.origin != "--set" and setting.origin.startswith("--")
            what = f"{setting.origin} {setting.value}" if own else f"{key} of {setting.origin}"
            raise SpecError(f"{name} and {what}: the checkpoint has its own; leave one of them out")


def change_dropout(model: ModelSpec, run: RunSpec) -> ModelSpec:
    """A checkpoint's model with the dropout that is said."""
    names = ("dropout", "attention_dropout")
    return replace(model, **{name: run.get(f"model.{name}", getattr(model, name)) for name in names})


def resolve(run: RunSpec) -> dict[str, Setting]:
    """Every key that counts in a run, with its value and who said it. Raises SpecError for what no run can have."""
    begun = run.get("init") is not None
    model = make_model(run)
    optim = make_optim(run, model)
    train = make_train(run, model, optim)
    specs = {"model": model, "optim": optim, "data": make_data(run), "machine": make_machine(run)}
    specs |= {table: getattr(train, table) for table in TABLES if table not in specs}
    name = run.get("model.preset", MODEL)
    values = {"seed": train.seed, "model.preset": name, "model.attention": run.get("model.attention", ATTENTION)}
    every = {key: Setting(value, "default") for key, value in (values | {"data.batch": train.batch}).items()}
    for table, spec in specs.items():
        every |= list_values(spec, table, f"preset {name}" if table == "model" else "default")
    if model.family is Family.VIT:
        del every["model.length"]  # it follows
    every |= run.settings
    return {key: one for key, one in every.items() if not (begun and is_of_checkpoint(key, run))}


def is_of_checkpoint(key: str, run: RunSpec) -> bool:
    """Whether a key is the checkpoint's own where a run begins with one, its data too unless others are named."""
    own = key.startswith(("model.", "optim.lr", "optim.warmup", "data.")) and key != "data.batch"
    return own and key not in run.settings


def list_values(spec: Any, table: str, origin: str) -> dict[str, Setting]:
    """The fields of a spec by key; those that hold nothing are left out, and a model's attention, said in a text."""
    values: dict[str, Setting] = {}
    for field in dataclasses.fields(spec):
        value, key = getattr(spec, field.name), f"{table}.{field.name}"
        if dataclasses.is_dataclass(value) and key != "model.attention":
            values |= list_values(value, key, origin)
        elif value is not None and key != "model.attention":
            values[key] = Setting(value, origin)
    return values
