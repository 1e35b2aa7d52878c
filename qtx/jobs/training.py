"""Training: steps, curves, a checkpoint now and then, and resuming to the bit."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import init_params
from qtx_ref.optim import learning_rate
from qtx_ref.spec import ModelSpec, OptimSpec, Sharding, SpecError, divide_rows

from ..data import ChainData, LabelledText, TextData
from ..data.splits import BATCH
from ..engines.backend import backend
from ..engines.machine import Machine
from ..engines.protocols import Data
from ..files.checkpoint import Checkpoint
from ..files.container import FileError
from ..files.shares import find_state
from ..files.writing import check_space
from ..progress import Progress
from ..recipes.named import training_recipe
from ..signals import Interrupted, postpone
from .identity import check_changes, find_changes, identify
from .log import Clock, Log, peak_memory
from .resume import State, begin_run, read_run, resume_run
from .run import Start, TrainSpec, checkpoint_bytes, claim
from .saving import Saving, SharedSaving
from .watch import HeldOut, find_sites, measure_inf_norm, measure_sites

Text = TextData | ChainData | LabelledText  # data that have a tokenizer
WATCHES = 50  # points of the inf-norm curve
SKIPS = 50  # in a row: the loss scale has long been at its least
RATE = float(np.finfo(np.float32).tiny)  # the least learning rate that float32 takes for a number other than 0


def train(
    run: TrainSpec,
    data: Data,
    path: Path,
    machine: Machine,
    *,
    resume: bool = False,
    change: Collection[str] = (),
    label: str = "",
    start: Start | None = None,
) -> Checkpoint:
    """Trains a model and leaves it, with optimizer and curves, at `path`; returns what is there. Beside it stands
    `log.jsonl`, and the numbered checkpoints that `run.saving` keeps.

    resume: go on from `path` if it exists. change: fields that may then be others than in the file, such as
    `optim.steps`, `optim` for all of it, or those of `identity.MOVE` for another machine; what changed stands in
    `meta["changes"]`, each with the step. `run.stop` may always be another: a run that stopped goes on to the bits of
    the one that never did. label: of the bar; the folder's name unless given. start: None where the parameters are
    drawn.

    A run whose loss is not finite (it ends there) or has risen (see `has_risen`) is marked `meta["diverged"]`.

    Raises:
        SpecError: `change` names what no run can change, `run.stop` is passed, or what is to be evaluated or logged
            cannot be; the batch is not divisible by processes and parts.
        FileError: `path` exists without `resume`, holds another run, or its folder is held by another process.
        MissingExtra: `run.log.tensorboard` without its package.
        WriteError: the disk has no room for the checkpoint, before the first step or for a minute at the end.
        Interrupted: SIGINT or SIGTERM; `path` is up to date.
    """
    check_changes(change)
    check_parts(run, machine.processes[1])
    with machine.join(), claim(path, resume, machine):
        identity = identify(run, data, machine)
        start = start or Start(init_params(run.model, run.seed))
        if found := find_state(path):
            checkpoint = read_run(found, run.train_quant, machine.processes if shares_state(run, machine) else None)
            changes = find_changes(path, checkpoint.meta, identity, change)
            if run.train_quant and checkpoint.recipe not in (None, training_recipe(run.train_quant, run.model)):
                said = f"what {run.train_quant} says is no more what it said"  # a file that was edited
                raise FileError(f"{path} is another run: {said}; choose another --out or the same recipe")
            state = resume_run(found, run, data, machine, checkpoint)
            done = len(state.history.loss)
            if "diverged_at" in checkpoint.meta or (checkpoint.meta["done"] and done == run.last):
                return checkpoint
            if done > run.last:
                raise SpecError(f"stop is {run.last}: {path} has {done} steps already; give as many, or more")
            known = checkpoint.meta.get("changes", [])
            if known or changes:
                identity["changes"] = [*known, *({"step": done, **one} for one in changes)]
        else:
            state = begin_run(run, data, machine, start.params)
        check_space(path, checkpoint_bytes(run.model, run.optim, machine.dtype) * (1 + run.saving.keep))
        return Loop(run, data, path, machine, identity, start, state).complete(label or path.parent.name)


class Loop:
    """One run from where it stands to its last step. Each thing that is done in a step is a method of its own:
    `advance` trains, `measure` adds to the curves, `note` writes the line of the log, `save` keeps what `snapshot`
    says."""

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
        self.sites = find_sites(run.model, run.log.sites)
        self.held_out = HeldOut(run, data, machine)
        trainer = state.trainer
        self.saving = SharedSaving(path, run.saving, machine, trainer) if trainer.shared else Saving(path, run.saving)
        self.probe = next(iter(data.split_batches("calibration", run.model, BATCH, 0, limit=1)))
        self.rows = own_rows(run.batch, *machine.processes)
        self.batches = data.train_batches(run.model, run.batch, run.seed, start=self.step, rows=self.rows)
        self.clock = Clock(self.step, run.last, machine.processes[1])
        self.skipped = 0  # steps in a row that overflowed

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.state.history.loss)

    def complete(self, label: str) -> Checkpoint:
        """Trains to the last step and returns what is then at `path`. Raises Interrupted and WriteError, see
        `train`."""
        last = self.run.last
        log = Log(self.path.parent, self.run.log, self.step, writes=self.machine.is_first)
        with postpone() as stop, log as self.log:
            self.begin()
            with Progress(label, last, self.step) as bar:
                while self.step < last:
                    line = self.advance()
                    if not math.isfinite(self.state.history.loss[-1]):
                        self.log.add(line)
                        break
                    self.note(line | self.measure())
                    bar.advance(note=f"loss {np.mean(self.state.history.loss[-20:]):.3f}")
                    number, due = map(int, self.machine.agree(stop.number or 0, self.saving.is_due(self.step)))
                    if (number or due) and self.save(last=number > 0).meta["diverged"]:
                        break
                    if number:
                        where = f"at step {self.step} of {last}, saved in {find_state(self.path)}"
                        raise Interrupted(f"stopped {where}", number)
            kept = self.save(last=True, done=True)
        if stop.number is not None:
            raise Interrupted(f"stopped after the last step, saved in {self.path}", stop.number)
        return kept

    def begin(self) -> None:
        """What is done once, before the first step. Raises SpecError where the held-out data cannot be evaluated as
        asked."""
        if self.run.evaluation.every and self.step == 0:
            point = self.held_out.measure(self.state.model)
            if point.faults:  # now, and not where it would first be needed
                raise SpecError(f"evaluation of {point.faults[0]}")
            self.state.history.add(0, point.values)
            self.log.add({"step": 0, **point.to_json_values()})

    def advance(self) -> dict[str, Any]:
        """One step on the next batch; the line of the log that it gives."""
        batch = next(self.batches)
        line: dict[str, Any] = {"step": self.step + 1}
        seen = self.sites and self.is_logged(self.step + 1)
        with self.clock.step(batch):
            sites = measure_sites(self.state.model, batch, self.sites) if seen else {}
            loss, norm = self.state.trainer.step(batch, first=self.rows.start, total=self.run.batch)
        line |= {"loss": loss, "rate": learning_rate(self.run.optim, self.step), "norm": norm}
        self.state.history.loss.append(self.judge(loss, norm))
        return line | {"sites": sites} if sites else line

    def judge(self, loss: float, norm: float) -> float:
        """The loss as the curve takes it: not finite where the run has diverged.

        In float16 a step may overflow, and is then skipped while the loss scale falls: where its loss is not finite,
        the curve repeats the one before. It has diverged where that goes on for `SKIPS` steps.
        """
        self.skipped = self.skipped + 1 if self.machine.dtype == "float16" and not math.isfinite(norm) else 0
        if self.skipped == SKIPS:
            return math.nan
        known = self.state.history.loss
        return known[-1] if self.skipped and known and not math.isfinite(loss) else loss

    def measure(self) -> dict[str, Any]:
        """Adds to the curves the points that this step has; those of held-out data as the line of the log says them."""
        step, history, last = self.step, self.state.history, self.step == self.run.optim.steps
        if step % self.every == 0 or last:
            norm = measure_inf_norm(self.state.model, self.probe)
            if math.isfinite(norm):
                history.watch_step.append(step)
                history.inf_norm.append(norm)
        if not self.held_out.is_due(step):
            return {}
        point = self.held_out.measure(self.state.model)
        for fault in point.faults if self.machine.is_first else ():  # a model near divergence
            sys.stderr.write(f"\nstep {step} not evaluated: {fault}\n")
        history.add(step, point.values)
        return point.to_json_values()

    def is_logged(self, step: int) -> bool:
        """Whether the step has a line whatever is measured. The last of a `stop` has none of its own: it is a pause."""
        return step % self.run.log.every == 0 or step == self.run.optim.steps

    def note(self, line: dict[str, Any]) -> None:
        """Adds a line to the log, with what it takes in time and memory."""
        if self.is_logged(self.step) or "evaluation" in line:
            held = backend(self.machine.backend).peak_memory(self.machine.device)
            memory = {"memory": peak_memory(), **({} if held is None else {"device_memory": held})}
            self.log.add(line | self.clock.read(self.step) | memory)

    def save(self, *, last: bool, done: bool = False) -> Checkpoint:
        """Saves and returns a checkpoint, the log before it; see `Saving.save`. That of a run that diverged is the
        last."""
        checkpoint = self.snapshot(done)
        self.log.sync()
        if self.machine.is_first or self.state.trainer.shared:
            self.saving.save(checkpoint, self.step, last=last or checkpoint.meta["done"])
        return checkpoint

    def snapshot(self, done: bool) -> Checkpoint:
        """The run as it stands. Of one whose numbers are finite no more, its first parameters and its curves as far as
        they are finite: nothing evaluates it."""
        state, run = self.state, self.run
        loss = state.history.loss
        params, extra = {}, state.history.tensors()
        finite = not state.trainer.shared or not self.machine.agree(not state.trainer.is_finite())[0]
        if not state.trainer.shared:
            params, extra = state.model.params(), extra | state.trainer.state()
        if not finite or not all(np.isfinite(value).all() for value in (params | extra).values()):
            curves = replace(state.history, loss=[value for value in loss if math.isfinite(value)])
            meta = {**self.identity, "done": True, "diverged": True, "diverged_at": len(loss)}
            return Checkpoint(run.model, self.start.params, curves.tensors(), None, {}, meta)
        meta = {**self.start.kept, **self.identity, "done": done, "diverged": done and has_risen(loss)}
        if isinstance(self.data, Text):
            meta["tokenizer"] = self.data.tokenizer_json
        chosen = training_recipe(run.train_quant, run.model) if run.train_quant else None
        return Checkpoint(run.model, params, extra, chosen, state.model.ranges(), meta)


def own_rows(batch: int, rank: int, count: int) -> slice:
    """The rows of a batch that one of `count` processes computes, as many as another or one more. Raises SpecError
    where there is none for it."""
    if batch < count:
        raise SpecError(f"batch is {batch}, and {count} processes compute it: give at least {count}")
    return slice(batch * rank // count, batch * (rank + 1) // count)


def check_parts(run: TrainSpec, count: int) -> None:
    """Raises SpecError, the same in all of `count` processes, where the rows of one have no so many equal parts."""
    for rank in range(count):
        rows = own_rows(run.batch, rank, count)
        divide_rows(rows.stop - rows.start, run.step.accumulate)


def shares_state(run: TrainSpec, machine: Machine) -> bool:
    """Whether each of several processes has a share of the run's state."""
    return machine.processes[1] > 1 and run.step.sharding is not Sharding.NONE


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
