"""Training: steps, curves, a checkpoint now and then, and resuming to the bit."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import init_params
from qtx_ref.spec import ModelSpec, OptimSpec, SpecError

from ..data import LabelledText, TextData
from ..data.splits import BATCH
from ..engines.machine import Machine
from ..engines.protocols import Data
from ..files.checkpoint import Checkpoint, save_checkpoint
from ..files.writing import WriteError, check_space
from ..progress import Progress
from ..recipes.named import training_recipe
from ..signals import Interrupted, postpone
from .resume import State, begin_run, read_run, resume_run
from .run import Start, TrainSpec, checkpoint_bytes, claim, identify
from .watch import measure_inf_norm, watch_integers

SAVE_SECONDS = 30  # a kill loses at most this much
LAST_SECONDS = 60  # for so long the last checkpoint is tried where the disk is full
RETRY_SECONDS = 2
Text = TextData | LabelledText  # data that have a tokenizer
WATCHES = 50  # points of the inf-norm curve
RATE = float(np.finfo(np.float32).tiny)  # the least learning rate that float32 takes for a number other than 0


def train(
    run: TrainSpec,
    data: Data,
    path: Path,
    machine: Machine,
    *,
    resume: bool = False,
    label: str = "",
    start: Start | None = None,
) -> Checkpoint:
    """Trains a model and leaves it, with optimizer and curves, at `path`; returns what is there.

    resume: go on from `path` if it exists. label: of the bar; the folder's name unless given. start: None where the
    parameters are drawn.

    A run whose loss is not finite (it ends there) or has risen (see `has_risen`) is marked `meta["diverged"]`.

    Raises:
        FileError: `path` exists without `resume`, holds another run, or its folder is held by another process.
        WriteError: the disk has no room for the checkpoint, before the first step or for a minute at the end.
        Interrupted: SIGINT or SIGTERM; `path` is up to date.
    """
    with claim(path, resume):
        identity = identify(run, data, machine)
        start = start or Start(init_params(run.model, run.seed))
        if path.exists():
            checkpoint = read_run(path, run.train_quant, identity)
            state = resume_run(path, run, data, machine, checkpoint)
            if checkpoint.meta["done"]:
                return checkpoint
        else:
            state = begin_run(run, data, machine, start.params)
        check_space(path, checkpoint_bytes(run.model, run.optim, machine.dtype))
        return Loop(run, data, path, machine, identity, start, state).complete(label or path.parent.name)


class Loop:
    """One run from where it stands to its last step. Each thing that is done in a step is a method of its own:
    `advance` trains, `record` measures, `is_due` and `save` are the policy of checkpoints, `snapshot` is what they
    hold."""

    def __init__(
        self,
        run: TrainSpec,
        data: Data,
        path: Path,
        machine: Machine,
        identity: dict[str, Any],
        start: Start,
        state: State,
    ) -> None:
        self.run, self.data, self.path, self.machine = run, data, path, machine
        self.identity, self.start, self.state = identity, start, state
        self.every = max(1, run.optim.steps // WATCHES)
        self.probe = next(iter(data.split_batches("calibration", run.model, BATCH, 0, limit=1)))
        self.batches = data.train_batches(run.model, run.batch, run.seed, start=self.step)
        self.saved = time.monotonic()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.state.history.loss)

    def complete(self, label: str) -> Checkpoint:
        """Trains to the last step and returns what is then at `path`. Raises Interrupted and WriteError, see
        `train`."""
        with postpone() as stop:
            with Progress(label, self.run.optim.steps, self.step) as bar:
                self.begin()
                while self.step < self.run.optim.steps:
                    if not self.advance():
                        break
                    self.record()
                    bar.advance(note=f"loss {np.mean(self.state.history.loss[-20:]):.3f}")
                    number = stop.number
                    stopping = number is not None
                    if (stopping or self.is_due()) and self.save(last=stopping).meta["diverged"]:
                        break
                    if number is not None:
                        where = f"at step {self.step} of {self.run.optim.steps}, saved in {self.path}"
                        raise Interrupted(f"stopped {where}", number)
            kept = self.save(last=True, done=True)
        if stop.number is not None:
            raise Interrupted(f"stopped after the last step, saved in {self.path}", stop.number)
        return kept

    def begin(self) -> None:
        """What is done once, before the first step. Raises SpecError where the integers cannot be watched."""
        if self.run.watch_integer and self.step == 0:
            try:
                self.watch()
            except ValueError as error:  # now, and not where it would first be needed
                raise SpecError(f"--watch-integer: {error}") from None

    def advance(self) -> bool:
        """One step on the next batch; whether its loss is finite."""
        loss, _ = self.state.trainer.step(next(self.batches))
        self.state.history.loss.append(loss)
        return math.isfinite(loss)

    def record(self) -> None:
        """The points of the curves that this step has."""
        step, history, last = self.step, self.state.history, self.step == self.run.optim.steps
        if step % self.every == 0 or last:
            norm = measure_inf_norm(self.state.model, self.probe)
            if math.isfinite(norm):
                history.watch_step.append(step)
                history.inf_norm.append(norm)
        if self.run.watch_integer and (step % self.run.watch_integer == 0 or last):
            try:
                self.watch()
            except ValueError as error:  # a model near divergence
                sys.stderr.write(f"\nstep {step} not watched: {error}\n")

    def watch(self) -> None:
        """A point of the integer watch. Raises ValueError where there is none."""
        watch_integers(self.run, self.state.model, self.data, self.machine, self.state.history, self.step)

    def is_due(self) -> bool:
        """Whether a checkpoint is to be saved although nothing ends."""
        return time.monotonic() - self.saved > SAVE_SECONDS

    def save(self, *, last: bool, done: bool = False) -> Checkpoint:
        """Saves and returns a checkpoint. Where it cannot be written, training goes on without; the `last` one, or that
        of a run that diverged, is tried for a minute, and then raises WriteError."""
        checkpoint = self.snapshot(done)
        last = last or checkpoint.meta["done"]
        until = time.monotonic() + LAST_SECONDS
        warned = False
        while True:
            try:
                save_checkpoint(self.path, checkpoint)
            except WriteError as error:
                if last and time.monotonic() >= until:
                    raise
                if not warned:
                    then = (
                        f"trying for {LAST_SECONDS} s" if last else f"training goes on, step {self.step} is not saved"
                    )
                    sys.stderr.write(f"\n{error}; {then}\n")
                    warned = True
            else:
                break
            if not last:
                break
            time.sleep(RETRY_SECONDS)
        self.saved = time.monotonic()
        return checkpoint

    def snapshot(self, done: bool) -> Checkpoint:
        """The run as it stands. Of one whose numbers are finite no more, its first parameters and its curves as far as
        they are finite: nothing evaluates it."""
        state, run = self.state, self.run
        loss = state.history.loss
        params, extra = state.model.params(), state.history.tensors() | state.trainer.state()
        if not all(np.isfinite(value).all() for value in (params | extra).values()):
            curves = replace(state.history, loss=[value for value in loss if math.isfinite(value)])
            meta = {**self.identity, "done": True, "diverged": True, "diverged_at": len(loss)}
            return Checkpoint(run.model, self.start.params, curves.tensors(), None, {}, meta)
        meta = {**self.start.kept, **self.identity, "done": done, "diverged": done and has_risen(loss)}
        if isinstance(self.data, Text):
            meta["tokenizer"] = self.data.tokenizer_json
        chosen = training_recipe(run.train_quant, run.model) if run.train_quant else None
        return Checkpoint(run.model, params, extra, chosen, state.model.ranges(), meta)


def has_risen(loss: list[float]) -> bool:
    """Whether training ended more than half a nat above its best, both as means over a twentieth of the steps."""
    window = max(1, len(loss) // 20)
    means = np.convolve(loss, np.ones(window) / window, mode="valid")
    return bool(means[-1] > means.min() + 0.5)


def fit_vocabulary(model: ModelSpec, data: Data) -> ModelSpec:
    """The model with a vocabulary that holds all of the data's tokens."""
    return replace(model, vocab=max(model.vocab, data.vocab)) if isinstance(data, Text) else model


def check_rate(rate: float) -> float:
    """The learning rate. Raises SpecError where a float32 parameter would not move, or only to infinity."""
    if not RATE <= rate < math.inf:
        raise SpecError(f"learning rate is {rate:g}: give a finite number of at least {RATE:.2g}")
    return rate


def default_optim(spec: ModelSpec, steps: int, lr: float | None = None) -> OptimSpec:
    """AdamW with a tenth of the steps, at most 10,000, as warm-up; 1e-3 for widths up to 256, 1e-4 above.

    Raises SpecError for a learning rate or a number of steps that trains nothing.
    """
    if steps < 1:
        raise SpecError(f"steps is {steps}: give at least 1")
    rate = check_rate(lr) if lr is not None else 1e-3 if spec.width <= 256 else 1e-4
    return OptimSpec(lr=rate, weight_decay=0.01, clip_norm=1.0, warmup=min(steps // 10, 10_000), steps=steps)
