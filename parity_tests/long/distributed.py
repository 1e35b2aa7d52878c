"""Several processes against one: `python -m parity_tests.long.distributed`.

torchrun starts 2 and 4 processes over gloo; each case is one step, whose loss and every gradient are held to float64
beside the error of one process with the whole batch, and 20 steps. With dropout, a batch in two parts on each process,
unequal numbers of targets. All processes must end in equal parameters, and their collectives' bytes are counted.

Where codes or kinks can flip (quantized training, ReLU), 20 steps part freely: they are held to twice the distance that
one process has to itself when it sums the batch in as many parts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.mirror.accumulation import ROWS, STEP_LOSS, make_batches
from parity_tests.mirror.models import GRADIENT, LOSS, NOTHING, largest, no_gradient
from parity_tests.mirror.steps import DRIFT
from parity_tests.proof.verdict import EPS, Verdict, against_truth, equal, holds, relative, relative_rms
from parity_tests.subjects import small_models
from qtx.prepare.calibration import bind
from qtx.recipes.named import resolve, training_recipe
from qtx_ref import backend as ref_backend
from qtx_ref.models.initial import shapes
from qtx_ref.spec import OptimSpec, Recipe, Sharding, StepSpec
from qtx_torch import backend, distributed, models
from qtx_torch.numerics import Float

ROOT = Path(__file__).parents[2]
OPTIM = OptimSpec(lr=1e-3, warmup=5, steps=100, clip_norm=0.1)
SECONDS = 300  # for all cases of one number of processes
FLIPS = 2.0, "twice what one process in parts differs from itself: codes and kinks flip"
Arrays = dict[str, np.ndarray]
Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """A small model and how it is trained."""

    model: str
    recipe: str | None = None
    recompute: bool = False
    parts: int = 2  # of the rows of each process
    rate: float = 0.1

    def build(self, accumulate: int = 1, sharding: Sharding = Sharding.NONE) -> backend.Trainer:
        """A trainer at its first step."""
        small = small_models.build(self.model)
        spec = replace(small.spec, dropout=self.rate, attention_dropout=self.rate)
        model = backend.Model(spec, small.params)
        if self.recipe is not None:
            recipe = training_recipe(self.recipe, spec)
            bind(model, recipe, self.calibrate(model, recipe))
        step = StepSpec(accumulate=accumulate, recompute=self.recompute, sharding=sharding)
        return backend.Trainer(model, OPTIM, seed=3, step=step)

    def calibrate(self, model: backend.Model, recipe: Recipe) -> dict:
        """Static ranges, the same in all processes."""
        quants = resolve(recipe, model.spec)
        return {} if all(quant.dynamic for quant in quants.values()) else model.calibrate(self.batches(model), quants)

    def batches(self, model: backend.Model, count: int = 1) -> Iterator[Batch]:
        return make_batches(model.spec, count)

    @property
    def name(self) -> str:
        return f"{self.model} {self.recipe or 'float'}{' recomputed' if self.recompute else ''}"


SUBJECTS = (
    Subject("bert_plain"),
    Subject("bert_plain", recompute=True),
    Subject("bert_sink_and_mlp"),
    Subject("opt_plain"),
    Subject("vit_plain"),
    Subject("bert_plain", "w8a8"),
    Subject("bert_plain", "lsq-w8a8"),
    Subject("bert_plain", "w8a8+grad8"),
    Subject(
        "bert_plain", "w8a8-tensor", parts=1
    ),  # a range per tensor is that of all processes' rows, not of all parts
)


class Bytes(TorchDispatchMode):
    """Counts what collectives are given: an all-reduce its tensor, a gather or scatter the whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            name = func.__name__.partition(".")[0].strip("_")
            size = max((x.numel() * x.element_size() for x in tensors), default=0)
            if "allreduce" in name:
                size = sum(x.numel() * x.element_size() for x in tensors)
            self.moved[name] = self.moved.get(name, 0) + size
        return func(*args, **(kwargs or {}))


# --- one of the processes ---------------------------------------------------------------------------------------------


def work(folder: Path, steps: int, subjects: Iterable[int]) -> None:
    """What each process does: every subject with either sharding; the first one writes what came out."""
    torch.set_num_threads(1)
    rank, count = distributed.processes()
    with backend.join("cpu"):
        for index in subjects:
            for sharding in Sharding:
                results = train(SUBJECTS[index], sharding, rank, count, steps)
                if rank == 0:
                    np.savez(folder / f"{index}-{sharding}-{count}.npz", **results)


def train(subject: Subject, sharding: Sharding, rank: int, count: int, steps: int) -> Arrays:
    """Loss and gradients of the first step, the losses of `steps`, the parameters after them; bytes of one step."""
    trainer = subject.build(subject.parts, sharding)
    batches = subject.batches(trainer.model, steps)
    rows = slice(ROWS * rank // count, ROWS * (rank + 1) // count)
    results: Arrays = {}
    losses = []
    for step, batch in enumerate(batches):
        part = {name: value[rows] for name, value in batch.items()}
        if step == 0:
            loss, grads = take_gradients(trainer, part, rows.start)
            results |= {f"grad.{name}": value for name, value in grads.items()} | {"loss": np.array(loss)}
        with Bytes() as counted:
            losses.append(trainer.step(part, first=rows.start, total=ROWS))
    params = trainer.model.trainable()
    digest = hashlib.sha256(b"".join(value.tobytes() for value in (params | trainer.state()).values())).digest()
    number = int.from_bytes(digest[:6], "big")
    most, least = distributed.agree([number, -number])
    results |= {f"param.{name}": value for name, value in params.items()}
    results |= {f"bytes.{name}": np.array(value) for name, value in counted.moved.items()}
    return results | {"losses": np.array(losses), "differ": np.array(most + least)}


def take_gradients(trainer: backend.Trainer, part: Batch, first: int) -> tuple[float, Arrays]:
    """Loss and gradients of the whole batch, as `Trainer.step` has them."""
    model = trainer.model
    inputs = model.accept(part)
    targets = models.count_targets(inputs)
    make = partial(Float, training=True, seed=3, step=0)
    total = int(distributed.add(torch.tensor(targets)))
    loss, grads = model.backward(inputs, make, None, accumulate=trainer.spec.accumulate, first=first, count=total)
    return loss.item(), {name: distributed.gather(value).numpy().copy() for name, value in grads.items()}


# --- what they are held to --------------------------------------------------------------------------------------------


def launch(folder: Path, count: int, steps: int, subjects: Iterable[int]) -> None:
    """Starts the processes. Raises RuntimeError where they fail."""
    chosen = [str(index) for index in subjects]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [
        "-m",
        "parity_tests.long.distributed",
        "--work",
        str(folder),
        "--steps",
        str(steps),
        "--subjects",
        *chosen,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {done.stderr[-3000:]}")


def compare(subject: Subject, steps: int, runs: Mapping[str, Mapping[str, np.ndarray]]) -> list[Verdict]:
    """Several processes, by name, beside one."""
    whole, parts = subject.build(), subject.build(4)
    spec = whole.model.spec
    batch = next(subject.batches(whole.model))
    draws = {"training": True, "seed": 3, "step": 0}
    plain_loss, plain = whole.model.gradients(batch, **draws)
    verdicts: list[Verdict] = []
    if subject.recipe is None:
        truth = ref_backend.Model(spec, small_models.build(subject.model).params, dtype="float64")
        want_loss, want = truth.gradients(batch, **draws)
        for who, run in runs.items():
            verdicts.append(against_truth(f"{who}: loss", run["loss"], want_loss, EPS["float32"], *LOSS, plain_loss))
            for key, g in want.items():
                nothing = no_gradient(key, spec)
                scale = largest(want[key.replace("bias", "weight")]) if nothing else None
                c, reason = (GRADIENT[0], NOTHING) if nothing else GRADIENT
                what, got = f"{who}: gradient of {key}", run[f"grad.{key}"]
                verdicts.append(against_truth(what, got, g, EPS["float32"], c, reason, plain[key], scale))
    free = [(whole.step(one)[0], parts.step(one)[0]) for one in subject.batches(whole.model, steps)]
    losses, apart = np.array(free).T
    params = whole.model.trainable()
    smooth = subject.recipe is None and spec.smooth
    drift = np.abs(apart / losses - 1).max()
    for who, run in runs.items():
        verdicts.append(equal(f"{who}: all processes have the same", float(run["differ"]), 0.0))
        got = run["losses"][:, 0]
        verdicts.append(relative(f"{who}: loss of step 1", got[0], losses[0], *STEP_LOSS))
        if smooth:
            verdicts += [
                relative(f"{who}: loss of step {step + 1}", value, losses[step], *STEP_LOSS)
                for step, value in enumerate(got)
            ]
            verdicts += [
                relative_rms(f"{who}: {key} after {steps} steps", run[f"param.{key}"], value, *DRIFT)
                for key, value in params.items()
                if not no_gradient(key, spec)
            ]
        else:
            bound = max(FLIPS[0] * drift, STEP_LOSS[0])
            verdicts.append(holds(f"{who}: loss of {steps} steps", np.abs(got / losses - 1).max(), bound, FLIPS[1]))
    return verdicts


def count_bytes(subject: Subject, run: Mapping[str, np.ndarray]) -> str:
    """Bytes that collectives took in a step, beside those of the parameters."""
    size = 4 * sum(int(np.prod(shape)) for shape in shapes(small_models.build(subject.model).spec).values())
    moved = {name.removeprefix("bytes."): int(run[name]) for name in run if name.startswith("bytes.")}
    return ", ".join(f"{name} {value} ({value / size:.2f} of the parameters)" for name, value in moved.items())


def check(counts: Iterable[int], steps: int, subjects: Iterable[int]) -> Iterator[tuple[str, list[Verdict], list[str]]]:
    """Verdicts of each subject, and lines on what was moved."""
    chosen = list(subjects)
    with tempfile.TemporaryDirectory() as name:
        for count in counts:
            launch(Path(name), count, steps, chosen)
        for index in chosen:
            files = sorted(Path(name).glob(f"{index}-*.npz"))
            runs = {file.stem.partition("-")[2]: dict(np.load(file)) for file in files}
            moved = [f"{who}: {count_bytes(SUBJECTS[index], run)}" for who, run in runs.items()]
            yield SUBJECTS[index].name, compare(SUBJECTS[index], steps, runs), moved


def main() -> None:
    """Prints a line per subject; exit status 1 where a bound is passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--subjects", type=int, nargs="+", default=list(range(len(SUBJECTS))))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.steps, given.subjects)
        return
    faults = 0
    for name, verdicts, moved in check(given.processes, given.steps, given.subjects):
        wrong = [verdict for verdict in verdicts if not verdict.ok]
        faults += len(wrong)
        worst = max((v.error for v in verdicts if "loss" in v.what), default=0.0)
        print(f"{name}: {len(verdicts) - len(wrong)} of {len(verdicts)} hold, losses within {worst:.2g}")
        for line in (*moved, *map(str, wrong[:5])):
            print(f"  {line}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
