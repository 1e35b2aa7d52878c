"""What `qtx finetune` does: a classifier made of a BERT's or ViT's encoder, trained and evaluated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qtx_ref.spec import Family, OptimSpec, SpecError

from ..data import SPLITS, ChainData, DataSpec, ImageData, LabelledText, TextData, load, splits
from ..engines.protocols import Batch
from ..files.checkpoint import Checkpoint
from ..measure import scores
from ..measure.scores import Score
from ..runs.reading import RunSpec
from .opening import check_tokenizer, make_model, need_tokenizer
from .resolving import (
    change_dropout,
    change_optim,
    check_lr,
    check_needs,
    list_changes,
    make_data,
    make_machine,
    make_step,
    make_train,
    refuse_model,
)
from .resume import check_run
from .run import Start, claim
from .starts import Origin, make_classifier, open_origin
from .training import train

FULL_LR, HEAD_LR = 5e-5, 1e-3
EPOCHS, PER_STEP = 3.0, 32
REFUSED = ("init", "model.attention", "data.tokenizer", "data.vocab")  # the checkpoint has its own


@dataclass(frozen=True)
class FinetuneRequest:
    """The checkpoint to begin with, and the run: its labelled data are `data.sources`, `data.window` the most tokens of
    a text (128 unless said)."""

    checkpoint: Path
    out: Path  # the folder; the classifier is its model.safetensors
    run: RunSpec = field(default_factory=RunSpec)
    head_only: bool = False  # the encoder keeps its bytes
    epochs: float | None = None  # None: EPOCHS, or the run's optim.steps
    resume: bool = False
    change: tuple[str, ...] = ()  # keys, or tables of them, that may be others than the run that is gone on with has
    move: bool = False  # it may go on with another device or number of threads

    @property
    def changes(self) -> frozenset[str]:
        """What may be another, as `training.train` takes it."""
        return list_changes(self.change, self.move)

    @property
    def path(self) -> Path:
        """The run's checkpoint."""
        return self.out / "model.safetensors"


def finetune(request: FinetuneRequest) -> tuple[Checkpoint, Score]:
    """Trains a new head on a checkpoint's encoder, and the encoder too unless `head_only`.

    Returns what is then at `request.path`, and its score on the evaluation split (accuracy in percent), as trained.

    Raises:
        SpecError: an OPT, data that are not named or do not fit, both `epochs` and steps, or training that diverged.
        DataError: data that cannot be had, or that trained the checkpoint and would evaluate it.
        FileError: a checkpoint that is quantized or cannot be read, or a `path` that is not to be gone on with.
        MissingExtra, WriteError, Interrupted: see `training.train`.
    """
    run, path, steps = request.run, request.path, request.run.get("optim.steps")
    if request.epochs is not None and steps is not None:
        raise SpecError(f"--epochs {request.epochs:g} and --steps {steps}: give one of them")
    if request.head_only and (only := run.get("optim.only")):
        raise SpecError(f"--head-only and optim.only {', '.join(only)}: give one of them")
    refuse_model(run, str(request.checkpoint), REFUSED)
    check_lr(run)
    check_needs(run)
    about, machine = make_data(run), make_machine(run)
    if not about.sources:
        raise SpecError("data.sources is not said: name the labelled data with --data")
    machine.check()
    with claim(path, request.resume, machine):
        origin = open_origin(request.checkpoint)
        rate = run.get("optim.lr", HEAD_LR if request.head_only else FULL_LR)
        optim = OptimSpec(lr=rate, only=("head.",) if request.head_only else run.get("optim.only", ()))
        train_quant, step = run.get("quant.train"), make_step(run)
        check_run(path, origin.checkpoint.spec, optim, machine, train_quant, step, request.changes)
        data = load_labelled(origin, about)
        spec, params = make_classifier(origin.checkpoint, data.classes, run.get("seed", 0))
        spec, batch = change_dropout(spec, run), run.get("data.batch", PER_STEP)
        sizes = (request.epochs or EPOCHS) * len(data.hashes("train")) / batch
        count = steps or max(1, math.ceil(sizes))
        optim = change_optim(replace(optim, warmup=count // 10, steps=count), run)
        whole = make_train(run, spec, optim, origin.sha256, batch)
        start, change = Start(params, origin.describe()), request.changes
        trained = train(whole, data, path, machine, resume=request.resume, change=change, start=start)
        if "diverged_at" in trained.meta:
            raise SpecError(f"{path}: training diverged at step {trained.meta['diverged_at']}: give a lower --lr")

        def read() -> Iterable[Batch]:
            return data.split_batches("evaluation", spec, splits.BATCH, 0)

        model = make_model(trained, machine, data, trained.recipe)
        return trained, scores.evaluate(model, read(), "evaluate", sum(1 for _ in read()))


def load_labelled(origin: Origin, about: DataSpec) -> LabelledText | ImageData:
    """Labelled data for the checkpoint's family and tokenizer, all three splits filled; `window` is the most tokens of
    a text.

    Raises SpecError, DataError: they do not fit, a class has no train rows, or evaluation or calibration data trained
    the checkpoint or one that it began with.
    """
    spec, meta = origin.checkpoint.spec, origin.checkpoint.meta
    data = ", ".join(source.path for source in about.sources)
    if spec.family is Family.OPT:
        raise SpecError(f"{origin.path} is an opt, which has no classifier: fine-tune a bert or vit checkpoint")
    if spec.family is Family.VIT and about.window is not None:
        raise SpecError(f"--length {about.window}: images have none; leave it out")
    need_tokenizer(origin.path, spec, meta)
    tokenizer, scaling = meta.get("tokenizer"), meta.get("images")
    source = load(about, spec, labelled=True, tokenizer=tokenizer, scaling=scaling)
    if isinstance(source, TextData | ChainData):
        raise SpecError(f"{data} has no labels: a fine-tuning needs them")
    check_tokenizer(origin.path, meta, source)
    for split in SPLITS:
        if not source.hashes(split):
            raise SpecError(f"{data} has no {split} rows: a fine-tuning needs {', '.join(SPLITS)}")
    if untrained := sorted({*range(source.classes)} - {*source.labels_of("train").tolist()}):
        name = untrained[0] if source.names is None else source.names[untrained[0]]
        raise SpecError(f"{data} has no train rows of class {name!r}: give it some, or remove the class")
    for split in ("evaluation", "calibration"):
        splits.refuse_overlap(meta, source, split)
    return source
