"""Training: steps, curves, a checkpoint now and then, and resuming to the bit."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.integer.lowering import lower
from qtx_ref.models.initial import init_params
from qtx_ref.spec import QTX, ModelSpec, OptimSpec, SpecError, to_dict

from ..engines.backend import backend
from ..files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..files.container import CheckpointError, check_writable
from ..prepare.quantization import (
    BATCH,
    IntegerScorer,
    bind,
    calibrate,
    evaluate,
    outliers,
)
from ..progress import Progress
from ..recipes.named import recipe, resolve, training_recipe
from ..recipes.sites import paper_sites

SAVE_SECONDS = 30  # a kill loses at most this much
WATCHES = 50  # points of the inf-norm curve
WATCH_BATCHES = 2  # of the integer watch: of calibration, and of the evaluation slice


class Interrupted(Exception):
    """Ctrl-C came; everything up to the step under way is saved."""


@dataclass(frozen=True)
class Machine:
    """Where a model runs."""

    backend: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"

    def model(self, spec: ModelSpec, params: dict[str, np.ndarray]) -> Any:
        return backend(self.backend).Model(spec, params, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class TrainSpec:
    """One run: equal specs and data give equal runs."""

    model: ModelSpec
    optim: OptimSpec
    batch: int  # sequences or images per step
    seed: int
    train_quant: str | None = None  # recipe of the forward pass while training; w8a8 stands for train-w8a8
    watch_integer: int | None = None  # every so many steps the model is quantized and run in integers
    init: str | None = None  # sha256 of the checkpoint whose parameters it begins with; None: they are drawn


@dataclass(frozen=True)
class Start:
    """What a run begins with where its parameters are not drawn; the run's `TrainSpec.init` says which file it is of."""

    params: dict[str, np.ndarray]
    kept: dict[str, Any] = field(default_factory=dict)  # JSON values that every checkpoint of the run keeps


@dataclass
class History:
    """Per step the loss in nats; now and then the largest inf norm over the paper's sites, on one fixed batch.

    Where integers are watched, also perplexity in integers and in float on a fixed slice, and the float model's published
    average kurtosis and max inf norm on another.
    """

    loss: list[float] = field(default_factory=list)
    watch_step: list[int] = field(default_factory=list)
    inf_norm: list[float] = field(default_factory=list)
    integer_step: list[int] = field(default_factory=list)
    integer_perplexity: list[float] = field(default_factory=list)
    float_perplexity: list[float] = field(default_factory=list)
    kurtosis: list[float] = field(default_factory=list)
    watched_inf_norm: list[float] = field(default_factory=list)

    def tensors(self) -> dict[str, np.ndarray]:
        kept = {key: value for key, value in vars(self).items() if value or key not in WATCHED}
        return {f"history.{k}": np.array(v, np.int64 if k.endswith("step") else np.float64) for k, v in kept.items()}

    @classmethod
    def of(cls, extra: dict[str, np.ndarray]) -> History:
        names = [f.name for f in fields(cls) if f.name not in WATCHED or f"history.{f.name}" in extra]
        return cls(**{name: extra[f"history.{name}"].tolist() for name in names})

    def watched(self) -> dict[str, list]:
        """The integer watch's curves."""
        return {name: getattr(self, name) for name in WATCHED}


WATCHED = ("integer_step", "integer_perplexity", "float_perplexity", "kurtosis", "watched_inf_norm")


@contextmanager
def interrupt_flag() -> Iterator[list[bool]]:
    """Turns the first Ctrl-C into a flag, so that no step is cut in two; a second one interrupts at once."""
    flag = [False]

    def handle(number: int, frame: Any) -> None:
        if flag[0]:
            raise KeyboardInterrupt
        flag[0] = True
        sys.stderr.write("\nstopping after this step\n")

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: leave Ctrl-C to whoever has it
        yield flag
        return
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def identity(run: TrainSpec, data: Any, machine: Machine) -> dict[str, Any]:
    """What must be equal for a resumed run to give the bits of an uninterrupted one."""
    train = to_dict(run)
    for options, name, unset in ((train, "watch_integer", None), (train, "init", None), (train["optim"], "only", [])):
        if options[name] == unset:
            del options[name]  # as runs before it was an option
    return {
        "train": train,
        "machine": to_dict(machine),
        "threads": backend(machine.backend).threads(),
        "data": data.describe(),
    }


def train(
    run: TrainSpec, data: Any, path: Path, machine: Machine, *, resume: bool = False, label: str = "",
    start: Start | None = None,
) -> Checkpoint:  # fmt: skip
    """Trains a model and leaves it, with optimizer and curves, at `path`; returns what is there. `start`: None where the
    parameters are drawn.

    A run whose loss is not finite (it ends there) or has risen (see `risen`) is marked `meta["diverged"]`. With
    `resume`, goes on from `path` if it exists.

    Raises:
        CheckpointError: `path` exists without `resume`, or holds another run.
        Interrupted: Ctrl-C; `path` is up to date.
    """
    label = label or path.parent.name
    check_writable(path)
    wanted = identity(run, data, machine)
    start = start or Start(init_params(run.model, run.seed))
    model, trainer, history, checkpoint = begin(run, data, path, machine, wanted, resume, start.params)
    if checkpoint is not None and checkpoint.meta["done"]:
        return checkpoint
    step = len(history.loss)
    every = max(1, run.optim.steps // WATCHES)
    fixed = next(data.split_batches("calibration", run.model, BATCH, 0, limit=1))
    batches = data.train_batches(run.model, run.batch, run.seed, start=step)
    saved = time.monotonic()

    def keep(done: bool) -> Checkpoint:
        chosen = training_recipe(run.train_quant, run.model) if run.train_quant else None
        meta = {**start.kept, **wanted, "done": done, "diverged": done and risen(history.loss)}
        if "tokenizer_sha256" in wanted["data"]:
            meta["tokenizer"] = data.tokenizer_json
        params, extra = model.params(), history.tensors() | trainer.state()
        if not all(np.isfinite(value).all() for value in (params | extra).values()):
            return diverge(path, run, history, wanted, start.params)
        found = Checkpoint(run.model, params, extra, chosen, model.ranges(), meta)
        save_checkpoint(path, found)
        return found

    with interrupt_flag() as interrupted, Progress(label, run.optim.steps, step) as bar:
        if run.watch_integer and step == 0:
            try:
                watch(run, model, data, machine, history, step)
            except ValueError as error:  # now, and not where it would first be needed
                raise SpecError(f"--watch-integer: {error}") from None
        while step < run.optim.steps:
            loss, _ = trainer.step(next(batches))
            history.loss.append(loss)
            step += 1
            if not math.isfinite(loss):
                return diverge(path, run, history, wanted, start.params)
            if (step % every == 0 or step == run.optim.steps) and math.isfinite(norm := inf_norm(model, fixed)):
                history.watch_step.append(step)
                history.inf_norm.append(norm)
            if run.watch_integer and (step % run.watch_integer == 0 or step == run.optim.steps):
                try:
                    watch(run, model, data, machine, history, step)
                except ValueError as error:  # a model near divergence
                    sys.stderr.write(f"\nstep {step} not watched: {error}\n")
            bar.advance(note=f"loss {np.mean(history.loss[-20:]):.3f}")
            if interrupted[0] or time.monotonic() - saved > SAVE_SECONDS:
                if keep(done=False).meta["done"]:
                    break  # it has diverged
                saved = time.monotonic()
                if interrupted[0]:
                    raise Interrupted(f"stopped at step {step} of {run.optim.steps}, saved in {path}")
    kept = keep(done=True)
    if interrupted[0]:  # after the last step's check
        raise Interrupted(f"stopped after the last step, saved in {path}")
    return kept


def widened(model: ModelSpec, data: Any) -> ModelSpec:
    """The model with a vocabulary that holds all of the data's tokens."""
    return replace(model, vocab=max(model.vocab, data.vocab)) if model.vocab else model


def begin(
    run: TrainSpec, data: Any, path: Path, machine: Machine, wanted: dict[str, Any], resume: bool,
    first: dict[str, np.ndarray],
) -> tuple[Any, Any, History, Checkpoint | None]:  # fmt: skip
    """Model, trainer and curves at the start of a run, with its `first` parameters, or where `path` left it."""
    checkpoint = None
    if path.exists():
        if not resume:
            raise CheckpointError(f"{path} exists: go on with --resume, or choose another --out")
        checkpoint = load_checkpoint(path)
        if (checkpoint.ranges or checkpoint.transforms) and not run.train_quant:
            raise CheckpointError(f"{path} is a quantized model, not a run of qtx train; choose another --out")
        if "train" not in checkpoint.meta:
            raise CheckpointError(f"{path} was not made by qtx train and cannot be resumed; choose another --out")
        for key, value in wanted.items():
            if checkpoint.meta.get(key) != value:
                raise CheckpointError(f"{path} is another run: {difference(key, checkpoint.meta.get(key), value)}")
    model = machine.model(run.model, checkpoint.params if checkpoint else first)
    if run.train_quant:
        chosen = training_recipe(run.train_quant, run.model)
        static = any(rule.quant is not None and not rule.quant.dynamic for rule in chosen.rules)
        ranges = checkpoint.ranges if checkpoint else calibrate(model, data, chosen) if static else {}
        bind(model, chosen, ranges)
    trainer = backend(machine.backend).Trainer(model, run.optim, seed=run.seed)
    if checkpoint is None:
        return model, trainer, History(), None
    try:
        if "diverged_at" not in checkpoint.meta:
            trainer.load_state(checkpoint.extra)
            if int(checkpoint.extra["optim.step"]) != checkpoint.extra["history.loss"].size:
                raise CheckpointError(f"{path}: its curves and its optimizer are at different steps")
        if not {"done", "diverged"} <= checkpoint.meta.keys():
            raise KeyError("done")
        return model, trainer, History.of(checkpoint.extra), checkpoint
    except KeyError as error:
        raise CheckpointError(f"{path} cannot be resumed: {error} is missing; choose another --out") from None


def diverge(
    path: Path, run: TrainSpec, history: History, wanted: dict[str, Any], first: dict[str, np.ndarray]
) -> Checkpoint:
    """Leaves the first parameters and the curves of a run whose numbers are finite no more; nothing evaluates it."""
    last = [loss for loss in history.loss if math.isfinite(loss)]
    curves = replace(history, loss=last)
    meta = {**wanted, "done": True, "diverged": True, "diverged_at": len(history.loss)}
    found = Checkpoint(run.model, first, curves.tensors(), None, {}, meta)
    save_checkpoint(path, found)
    return found


def risen(loss: list[float]) -> bool:
    """Whether training ended more than half a nat above its best, both as means over a twentieth of the steps."""
    window = max(1, len(loss) // 20)
    means = np.convolve(loss, np.ones(window) / window, mode="valid")
    return bool(means[-1] > means.min() + 0.5)


def inf_norm(model: Any, batch: dict[str, np.ndarray]) -> float:
    """The published max inf norm of a float forward pass over one batch."""
    found = model.statistics(batch, paper_sites(model.spec).inf_norm, ("inf_norm",))
    return max(float(statistics["inf_norm"].mean()) for statistics in found.values())


def watch(run: TrainSpec, model: Any, data: Any, machine: Machine, history: History, step: int) -> None:
    """One point of the integer watch: the parameters as they are, quantized by w8a8 and run in integers.

    Raises ValueError where they cannot be.
    """
    chosen = replace(recipe("w8a8", run.model), batches=WATCH_BATCHES)
    params = model.params()
    plain = machine.model(run.model, params)
    ranges = calibrate(plain, data, chosen)
    quants = resolve(chosen, run.model)
    constants = lower(run.model, params, quants, ranges)
    integers = IntegerScorer(
        backend(machine.backend).IntegerModel(run.model, constants, quants, QTX, device=machine.device)
    )

    def fixed(split: str) -> Any:
        return data.split_batches(split, run.model, BATCH, 0, limit=WATCH_BATCHES)

    point = [evaluate(scored, fixed("evaluation")).perplexity for scored in (integers, plain)]
    found = outliers(plain, fixed("calibration"))
    point += [found.average_kurtosis, found.max_inf_norm]
    if strange := [name for name, value in zip(WATCHED[1:], point, strict=True) if not math.isfinite(value)]:
        raise ValueError(f"{', '.join(strange)} not finite")
    history.integer_step.append(step)
    for name, value in zip(WATCHED[1:], point, strict=True):
        getattr(history, name).append(value)


def difference(key: str, was: Any, now: Any) -> str:
    """The first place where two JSON values differ, in words."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*now, *was]):
            if was.get(name) != now.get(name):
                return difference(f"{key}.{name}", was.get(name), now.get(name))
    remedy = " (set OMP_NUM_THREADS)" if key == "threads" else ""
    return f"{key} was {was!r} and is {now!r}{remedy}; choose another --out or the same settings"


def default_optim(spec: ModelSpec, steps: int, lr: float | None = None) -> OptimSpec:
    """AdamW with a tenth of the steps, at most 10,000, as warm-up; 1e-3 for widths up to 256, 1e-4 above."""
    if steps < 1:
        raise SpecError(f"steps is {steps}: give at least 1")
    rate = lr if lr is not None else 1e-3 if spec.width <= 256 else 1e-4
    return OptimSpec(lr=rate, weight_decay=0.01, clip_norm=1.0, warmup=min(steps // 10, 10_000), steps=steps)
