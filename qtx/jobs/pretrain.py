"""What `qtx train` does: a model by name, or a checkpoint's, trained on the data that it is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..engines.machine import Machine
from ..engines.protocols import Data
from ..files.checkpoint import Checkpoint
from ..files.container import write_beside
from ..files.formats import RUN, check_replaceable
from ..runs.reading import RunSpec, write_run
from ..signals import Interrupted
from .opening import load_data
from .resolving import (
    check_needs,
    list_changes,
    make_data,
    make_machine,
    make_model,
    make_optim,
    make_step,
    make_train,
    resolve,
)
from .resume import check_run
from .run import Start, TrainSpec, claim
from .starts import continue_run, load_continued, open_origin
from .training import fit_vocabulary, train

RUN_FILE = "run.toml"  # beside the checkpoint: the whole run, for `qtx train OUT/run.toml`


@dataclass(frozen=True)
class PretrainRequest:
    """One run of training by names and files, and where it is left; `TrainSpec` is the run itself."""

    out: Path  # the folder; the run is its model.safetensors
    run: RunSpec = field(default_factory=RunSpec)
    resume: bool = False
    change: tuple[str, ...] = ()  # keys, or tables of them, that may be others than the run that is gone on with has
    move: bool = False  # it may go on with another device, number of threads or of processes

    @property
    def changes(self) -> frozenset[str]:
        """What may be another, as `training.train` takes it."""
        return list_changes(self.change, self.move)

    @property
    def path(self) -> Path:
        """The run's checkpoint."""
        return self.out / "model.safetensors"

    @property
    def label(self) -> str:
        """What stands beside the bar."""
        return self.run.get("model.attention") or self.out.name


def pretrain(request: PretrainRequest) -> Checkpoint:
    """Trains a model from its first values, or goes on with a checkpoint's, and leaves it at `request.path`.

    Returns what is there: the model, in `extra` its curves and the optimizer's state, in `meta` the run and whether it
    diverged. Beside it stands `run.toml`, the whole run.

    Raises:
        SpecError: a model, attention, recipe or machine that does not exist, or that the checkpoint cannot take.
        DataError: data that cannot be had, do not fit, or on which the checkpoint was trained otherwise.
        FileError: `path` exists without `resume`, holds another run, or its folder is held by another process.
        MissingExtra, WriteError, Interrupted: see `training.train`.
    """
    check_needs(request.run)
    machine = make_machine(request.run)
    machine.check()
    with machine.join(), claim(request.path, request.resume, machine):
        init = request.run.get("init")
        return begin(request) if init is None else go_on(request, Path(init))


def begin(request: PretrainRequest) -> Checkpoint:
    """A run from first values drawn from the seed."""
    run = request.run
    spec, machine = make_model(run), make_machine(run)
    optim = make_optim(run, spec)
    check_run(request.path, spec, optim, machine, run.get("quant.train"), make_step(run), request.changes)
    data = load_data(make_data(run), spec)
    return complete(request, make_train(run, fit_vocabulary(spec, data), optim), data, machine)


def go_on(request: PretrainRequest, init: Path) -> Checkpoint:
    """A run from the parameters of a checkpoint, on its data unless others are named."""
    run, machine, origin = request.run, make_machine(request.run), open_origin(init)
    spec, params, about = continue_run(origin, run)
    optim = make_optim(run, spec)
    check_run(request.path, spec, optim, machine, run.get("quant.train"), make_step(run), request.changes)
    data = load_continued(origin, spec, about)
    whole = make_train(run, spec, optim, origin.sha256)
    return complete(request, whole, data, machine, Start(params, origin.describe()))


def complete(
    request: PretrainRequest, whole: TrainSpec, data: Data, machine: Machine, start: Start | None = None
) -> Checkpoint:
    """Trains, and leaves the run's file: before the first step, or where a run goes on, once it has."""
    path, content = request.out / RUN_FILE, write_run(resolve(request.run)).encode()
    check_replaceable(path, RUN)

    def leave_file() -> None:
        if machine.is_first:
            write_beside(path, content)

    if not request.path.exists():
        leave_file()
    try:
        checkpoint = train(
            whole,
            data,
            request.path,
            machine,
            resume=request.resume,
            change=request.changes,
            label=request.label,
            start=start,
        )
    except Interrupted:
        leave_file()
        raise
    leave_file()
    return checkpoint
