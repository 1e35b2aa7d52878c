"""Where a run stands: at its beginning, or where its checkpoint left it, to the bit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from qtx_ref.spec import ModelSpec, OptimSpec, StepSpec

from ..engines.backend import backend
from ..engines.machine import Machine, identify_machine
from ..engines.protocols import Arrays, Data, Model, Trainer
from ..files.checkpoint import Checkpoint, load_checkpoint
from ..files.container import FileError
from ..files.shares import SUFFIX, find_state, load_shares
from ..files.writing import check_space
from ..measure.history import History
from ..prepare.calibration import bind, calibrate
from ..recipes.named import training_recipe
from .identity import check_changes, find_changes
from .run import TrainSpec, checkpoint_bytes


@dataclass
class State:
    """All that changes in a run: the model's parameters and learned ranges, the optimizer's averages, the curves."""

    model: Model
    trainer: Trainer
    history: History


def check_run(
    path: Path,
    spec: ModelSpec,
    optim: OptimSpec,
    machine: Machine,
    train_quant: str | None,
    step: StepSpec,
    change: Collection[str] = (),
) -> None:
    """What can be known of a run before its data are read; change: as `training.train` takes it.

    Raises:
        SpecError, MissingExtra: no such recipe, machine, backend or step.
        FileError: what is at `path` is no run, or one of another machine.
        WriteError: there is no room for its checkpoint.
    """
    if train_quant:
        training_recipe(train_quant, spec)
    machine.check()
    check_changes(change)
    if found := find_state(path):
        checkpoint = read_run(found, train_quant)
        find_changes(path, checkpoint.meta, identify_machine(machine), change)
        if checkpoint.meta.get("done"):
            return
    machine.check_step(step)
    check_space(path, checkpoint_bytes(spec, optim, machine.dtype))


def read_run(path: Path, train_quant: str | None, shared: tuple[int, int] | None = None) -> Checkpoint:
    """The checkpoint of a run, a file or a folder of `files.shares`; of that, where this is one of the processes that
    read their shares of it (`shared`, its number and how many there are), without them. Raises FileError where it is of
    none."""
    if path.suffix != SUFFIX:
        checkpoint = load_checkpoint(path)
    else:
        checkpoint = load_shares(path) if shared is None else load_shares(path, False, *shared)
    if (checkpoint.ranges or checkpoint.transforms) and not train_quant:
        raise FileError(f"{path} is a quantized model, not a run of qtx train; choose another --out")
    if "train" not in checkpoint.meta:
        raise FileError(f"{path} was not made by qtx train and cannot be resumed; choose another --out")
    return checkpoint


def begin_run(run: TrainSpec, data: Data, machine: Machine, params: Arrays) -> State:
    """A run before its first step, with its first parameters; static ranges are calibrated on `data`."""
    return State(*build(run, data, machine, params, None), History())


def resume_run(path: Path, run: TrainSpec, data: Data, machine: Machine, checkpoint: Checkpoint) -> State:
    """A run where its checkpoint left it; one that diverged has nothing but its curves to go on with.

    Raises FileError, naming `path`, where the checkpoint lacks a part of the run.
    """
    model, trainer = build(run, data, machine, dict(checkpoint.params), checkpoint)
    try:
        if "diverged_at" not in checkpoint.meta:
            if trainer.shared and path.suffix == SUFFIX:
                trainer.load_shares(str(path), checkpoint.extra)
            else:
                trainer.load_state(checkpoint.extra)
            if int(checkpoint.extra["optim.step"]) != checkpoint.extra["history.loss"].size:
                raise FileError(f"{path}: its curves and its optimizer are at different steps")
        if not {"done", "diverged"} <= checkpoint.meta.keys():
            raise KeyError("done")
        return State(model, trainer, History.of(checkpoint.extra))
    except KeyError as error:
        raise FileError(f"{path} cannot be resumed: {error} is missing; choose another --out") from None


def build(
    run: TrainSpec, data: Data, machine: Machine, params: Arrays, checkpoint: Checkpoint | None
) -> tuple[Model, Trainer]:
    """The run's model, quantized as it is trained, and its trainer. Ranges are the checkpoint's, where there is one."""
    model = machine.model(run.model, params)
    if run.train_quant:
        chosen = training_recipe(run.train_quant, run.model)
        static = any(rule.quant is not None and not rule.quant.dynamic for rule in chosen.rules)
        ranges = checkpoint.ranges if checkpoint else calibrate(model, data, chosen) if static else {}
        bind(model, chosen, ranges)
    return model, backend(machine.backend).Trainer(model, run.optim, seed=run.seed, step=run.step)
