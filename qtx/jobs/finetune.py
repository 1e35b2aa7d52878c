"""What `qtx finetune` does: a classifier made of a BERT's or ViT's encoder, trained and evaluated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qtx_ref.spec import Family, OptimSpec, SpecError

from ..data import SPLITS, ImageData, LabelledText, TextData, load, splits
from ..engines.machine import Machine
from ..engines.protocols import Batch
from ..files.checkpoint import Checkpoint
from ..measure import scores
from ..measure.scores import Score
from .opening import check_tokenizer, need_tokenizer
from .resume import check_run
from .run import Start, TrainSpec, claim
from .starts import Origin, make_classifier, open_origin
from .training import train

FULL_LR, HEAD_LR = 5e-5, 1e-3
EPOCHS, PER_STEP = 3.0, 32


@dataclass(frozen=True)
class FinetuneRequest:
    """The checkpoint to begin with, labelled data, and the run."""

    checkpoint: Path
    data: str
    out: Path  # the folder; the classifier is its model.safetensors
    head_only: bool = False  # the encoder keeps its bytes
    epochs: float | None = None  # None: EPOCHS
    steps: int | None = None  # in place of `epochs`
    batch: int = PER_STEP  # texts or images per step
    lr: float | None = None  # the peak; None: FULL_LR, or HEAD_LR where the head alone is trained
    length: int | None = None  # most tokens of a text; None: 128
    dropout: float | None = None  # of hidden states and attention probabilities; None: the checkpoint's
    seed: int = 0
    resume: bool = False
    machine: Machine = Machine()

    @property
    def path(self) -> Path:
        """The run's checkpoint."""
        return self.out / "model.safetensors"


def finetune(request: FinetuneRequest) -> tuple[Checkpoint, Score]:
    """Trains a new head on a checkpoint's encoder, and the encoder too unless `head_only`.

    Returns what is then at `request.path`, and its score on the evaluation split (accuracy in percent).

    Raises:
        SpecError: an OPT, data that do not fit, both `epochs` and `steps`, or training that diverged.
        DataError: data that cannot be had, or that trained the checkpoint and would evaluate it.
        FileError: a checkpoint that is quantized or cannot be read, or a `path` that is not to be gone on with.
        MissingExtra, WriteError, Interrupted: see `training.train`.
    """
    if request.epochs is not None and request.steps is not None:
        raise SpecError(f"--epochs {request.epochs:g} and --steps {request.steps}: give one of them")
    path, machine = request.path, request.machine
    machine.check()
    with claim(path, request.resume):
        origin = open_origin(request.checkpoint)
        rate = request.lr if request.lr is not None else HEAD_LR if request.head_only else FULL_LR
        only = ("head.",) if request.head_only else ()
        check_run(path, origin.checkpoint.spec, OptimSpec(lr=rate, only=only), machine, None)
        data = load_labelled(origin, request.data, request.length)
        spec, params = make_classifier(origin.checkpoint, data.classes, request.seed, request.dropout)
        sizes = (request.epochs or EPOCHS) * len(data.hashes("train")) / request.batch
        count = request.steps or max(1, math.ceil(sizes))
        optim = OptimSpec(lr=rate, warmup=count // 10, steps=count, only=only)
        run = TrainSpec(spec, optim, request.batch, request.seed, init=origin.sha256)
        trained = train(run, data, path, machine, resume=request.resume, start=Start(params, origin.describe()))
        if "diverged_at" in trained.meta:
            raise SpecError(f"{path}: training diverged at step {trained.meta['diverged_at']}: give a lower --lr")

        def read() -> Iterable[Batch]:
            return data.split_batches("evaluation", spec, splits.BATCH, 0)

        model = machine.model(spec, trained.params)
        return trained, scores.evaluate(model, read(), "evaluate", sum(1 for _ in read()))


def load_labelled(origin: Origin, data: str, length: int | None) -> LabelledText | ImageData:
    """Labelled data for the checkpoint's family and tokenizer, all three splits filled.

    Raises SpecError, DataError: they do not fit, a class has no train rows, or evaluation or calibration data trained
    the checkpoint or one that it began with.
    """
    spec, meta = origin.checkpoint.spec, origin.checkpoint.meta
    if spec.family is Family.OPT:
        raise SpecError(f"{origin.path} is an opt, which has no classifier: fine-tune a bert or vit checkpoint")
    if spec.family is Family.VIT and length is not None:
        raise SpecError(f"--length {length}: images have none; leave it out")
    need_tokenizer(origin.path, spec, meta)
    tokenizer, scaling = meta.get("tokenizer"), meta.get("images")
    source = load(data, spec, length=length, labelled=True, tokenizer=tokenizer, scaling=scaling)
    if isinstance(source, TextData):
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
