"""What a model scores on a task: loss, perplexity, accuracy, in float, under fake quantization or in integers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from qtx.progress import Progress
from qtx_ref.integer.lifting import real
from qtx_ref.ops import cross_entropy
from qtx_ref.spec import (
    ModelSpec,
    Output,
    SpecError,
)
from qtx_ref.tape import const


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


def evaluate(model: Any, batches: Iterable[Mapping[str, Any]], label: str = "evaluate", total: int = 0) -> Score:
    """The score of a model, float or bound, over batches. Raises SpecError without a target."""
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
    """Of each sequence (or image) of a batch, (B,) each: summed negative log-likelihood in nats, targets, and how many of
    them were predicted right."""

    loss: np.ndarray
    count: np.ndarray
    right: np.ndarray


def answers(model: Any, batch: Mapping[str, Any]) -> Answers:
    """What a model of either kind answers, scored by the reference's float64 code, whichever backend ran it."""
    integer = not hasattr(model, "forward")
    output = model.run(batch) if integer else model.forward(batch)
    targets = batch["targets"] if "targets" in batch else batch["labels"]
    found = np.zeros((3, len(targets)))
    for i in range(len(targets)):  # float64 logits of one sequence at a time
        row = slice(i, i + 1)
        real_targets = targets[row] >= 0
        if real_targets.any():
            one = Output(*(part[row] if part.ndim and len(part) > 1 else part for part in output)) if integer else None
            logits = real(one) if integer else output[row]
            right = ((logits.argmax(axis=-1) == targets[row]) & real_targets).sum()
            some = real_targets.sum()
            found[:, i] = float(cross_entropy(const(logits), targets[row]).value) * some, some, right
    return Answers(found[0], found[1].astype(np.int64), found[2].astype(np.int64))


class IntegerScorer:
    """What `evaluate` asks of an integer model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int, int]:
        """Summed negative log-likelihood in nats, number of targets, number predicted right."""
        loss, count, right = answers(self.model, batch)
        return math.fsum(loss), int(count.sum()), int(right.sum())


def as_json(record: Any) -> dict[str, Any]:
    """A score or an outlier record as JSON values; numbers that are not finite become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(record).items()
    }
