"""What `qtx train` does: a model by name, or a checkpoint's, trained on the data that it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qtx_ref.presets import attention, preset
from qtx_ref.spec import SpecError

from ..data import load, splits
from ..engines.machine import Machine
from ..files.checkpoint import Checkpoint
from .opening import open_data
from .resume import check_run
from .run import PER_STEP, STEPS, Start, TrainSpec, claim, watch_integer
from .starts import continue_model, open_origin
from .training import default_optim, fit_vocabulary, train


@dataclass(frozen=True)
class PretrainRequest:
    """One run of training by names and files; `TrainSpec` is the run itself."""

    out: Path  # the folder; the run is its model.safetensors
    model: str | None = None  # a preset; None: opt-tiny, or the model of `init`
    init: Path | None = None  # a checkpoint to go on from
    data: str | None = None  # None: the bundled data, or those of `init`
    tokenizer: Path | None = None
    vocab: int | None = None  # of a tokenizer trained here
    attention: str | None = None  # None: vanilla, or that of `init`
    steps: int = STEPS
    batch: int = PER_STEP  # sequences or images per step
    lr: float | None = None  # None: by the model's width
    train_quant: str | None = None  # recipe of the forward pass while training
    watch_integer: int | None = None  # every so many steps the model is quantized and run in integers
    seed: int = 0
    resume: bool = False
    machine: Machine = Machine()

    @property
    def path(self) -> Path:
        """The run's checkpoint."""
        return self.out / "model.safetensors"


def pretrain(request: PretrainRequest) -> Checkpoint:
    """Trains a model from its first values, or goes on with a checkpoint's, and leaves it at `request.path`.

    Returns what is there: the model, in `extra` its curves and the optimizer's state, in `meta` the run and whether it
    diverged.

    Raises:
        SpecError: a model, attention, recipe or machine that does not exist, or that the checkpoint cannot take.
        DataError: data that cannot be had, do not fit, or on which the checkpoint was trained otherwise.
        FileError: `path` exists without `resume`, holds another run, or its folder is held by another process.
        MissingExtra, WriteError, Interrupted: see `training.train`.
    """
    request.machine.check()
    with claim(request.path, request.resume):
        if request.init is None:
            return begin(request)
        return go_on(request, request.init)


def begin(request: PretrainRequest) -> Checkpoint:
    """A run from first values drawn from the seed."""
    spec = replace(preset(request.model or "opt-tiny"), attention=attention(request.attention or "vanilla"))
    optim = default_optim(spec, request.steps, request.lr)
    check_run(request.path, spec, optim, request.machine, request.train_quant)
    data = load(request.data, spec, tokenizer=request.tokenizer, vocab=request.vocab)
    spec = fit_vocabulary(spec, data)
    watch = watch_integer(request.watch_integer)
    run = TrainSpec(spec, optim, request.batch, request.seed, request.train_quant, evaluation=watch)
    return train(run, data, request.path, request.machine, resume=request.resume, label=name_run(request))


def go_on(request: PretrainRequest, init: Path) -> Checkpoint:
    """A run from the parameters of a checkpoint, on its data unless others are named."""
    for name in ("model", "tokenizer", "vocab"):
        if (value := getattr(request, name)) is not None:
            raise SpecError(f"--init and --{name} {value}: the checkpoint has its own; leave one of them out")
    origin = open_origin(init)
    meta = origin.checkpoint.meta
    spec, params = continue_model(origin.checkpoint, request.attention, request.seed)
    optim = default_optim(spec, request.steps, request.lr)
    check_run(request.path, spec, optim, request.machine, request.train_quant)
    data = open_data(init, spec, meta, request.data, None)
    for split in ("evaluation", "calibration"):
        splits.refuse_overlap(meta, data, split)
    watch = watch_integer(request.watch_integer)
    run = TrainSpec(spec, optim, request.batch, request.seed, request.train_quant, init=origin.sha256, evaluation=watch)
    start = Start(params, origin.describe())
    return train(run, data, request.path, request.machine, resume=request.resume, label=name_run(request), start=start)


def name_run(request: PretrainRequest) -> str:
    """What stands beside the bar."""
    return request.attention or request.out.name
