"""What a model scores on a task: loss, perplexity, accuracy, in float, under fake quantization or in integers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from qtx_ref.integer.lifting import real
from qtx_ref.ops import cross_entropy
from qtx_ref.spec import ModelSpec, Output, SpecError
from qtx_ref.tape import const

from ..engines.protocols import Batch, IntegerModel, Model, Runnable
from ..progress import Progress
from .outliers import Outliers


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood in nats over all targets, perplexity (its exponential) and accuracy in percent."""

    loss: float
    perplexity: float
    accuracy: float
    targets: int


def metric(spec: ModelSpec) -> str:
    """The field of `Score` that a family is judged by."""
    return "accuracy" if spec.classes else "perplexity"


def evaluate(model: Runnable, batches: Iterable[Batch], label: str = "evaluate", total: int = 0) -> Score:
    """The score of a model, float, bound or an `IntegerScorer`, over batches.

    label, total: of the progress bar, which is not drawn where the total number of batches is 0. Raises SpecError
    without a target.
    """
    total_loss, count, right = 0.0, 0, 0
    with Progress(label, total) as bar:
        for batch in batches:
            part = model.evaluate(batch)
            total_loss, count, right = total_loss + part[0], count + part[1], right + part[2]
            bar.advance()
    if count == 0:
        raise SpecError("evaluation found no target: the data are empty")
    mean = total_loss / count
    return Score(mean, math.exp(mean) if mean < 700 else math.inf, 100 * right / count, count)


class Answers(NamedTuple):
    """Of each sequence (or image) of a batch, (B,) each: summed negative log-likelihood in nats, targets, and how many
    of them were predicted right."""

    loss: np.ndarray
    count: np.ndarray  # type: ignore[assignment]  # of a tuple's method
    right: np.ndarray


def answer_batch(model: Model | IntegerModel, batch: Batch) -> Answers:
    """What a model of either kind answers, scored by the reference's float64 code, whichever backend ran it."""
    output = compute_output(model, batch)
    targets = batch["targets"] if "targets" in batch else batch["labels"]
    sums = np.zeros((3, len(targets)))
    for i in range(len(targets)):  # float64 logits of one sequence at a time
        row = slice(i, i + 1)
        real_targets = targets[row] >= 0
        if real_targets.any():
            logits = take_logits(output, row)
            right = ((logits.argmax(axis=-1) == targets[row]) & real_targets).sum()
            some = real_targets.sum()
            sums[:, i] = float(cross_entropy(const(logits), targets[row]).value) * some, some, right
    return Answers(sums[0], sums[1].astype(np.int64), sums[2].astype(np.int64))


def compute_output(model: Model | IntegerModel, batch: Batch) -> np.ndarray | Output:
    """Logits of a float or bound model, codes of an integer one."""
    return model.forward(batch) if hasattr(model, "forward") else model.run(batch)


def take_logits(output: np.ndarray | Output, row: slice) -> np.ndarray:
    """The logits of some sequences of an output, codes as the real numbers for which they stand."""
    if isinstance(output, Output):
        return real(Output(*(part[row] if part.ndim and len(part) > 1 else part for part in output)))
    return output[row]


class IntegerScorer:
    """What `evaluate` asks of an integer model."""

    def __init__(self, model: IntegerModel) -> None:
        self.model = model

    def evaluate(self, batch: Batch) -> tuple[float, int, int]:
        """Summed negative log-likelihood in nats, number of targets, number predicted right."""
        loss, count, right = answer_batch(self.model, batch)
        return math.fsum(loss), int(count.sum()), int(right.sum())


def to_json_values(record: Score | Outliers) -> dict[str, float | int | str | None]:
    """A score or the published outlier metrics as JSON values; numbers that are not finite become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(record).items()
    }
