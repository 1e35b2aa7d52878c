"""Two models on the same sequences: what each answers, and how far apart they are."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import SpecError

from ..engines.protocols import Batch, IntegerModel, Model
from .scores import Answers, answer_batch

RESAMPLES = 2000  # of the bootstrap
CONFIDENCE = 95  # percent, of its interval


@dataclass(frozen=True)
class Measured:
    """One pass over the evaluation batches."""

    answers: Answers  # of the sequences that have a target
    seconds: float

    def values(self, kind: str, times: np.ndarray | None = None) -> np.ndarray:
        """Accuracy in percent, perplexity, or loss in nats, (R,): of resamples where `times` (R, N) says how often each
        drew a sequence, else of all sequences once, R = 1."""
        each = np.ones((1, len(self.answers.count))) if times is None else times
        loss, count, right = (each @ part for part in self.answers)
        with np.errstate(over="ignore"):
            if kind == "accuracy":
                return 100 * right / count
            return np.exp(loss / count) if kind == "perplexity" else loss / count

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a target, nats."""
        return math.fsum(self.answers.loss) / int(self.answers.count.sum())


def measure(model: Model | IntegerModel, batches: Iterable[Batch]) -> Measured:
    """Runs a model of either kind over batches. Raises SpecError without a target."""
    began = time.perf_counter()
    parts = [answer_batch(model, batch) for batch in batches]
    seconds = time.perf_counter() - began
    whole = Answers(*(np.concatenate(part) for part in zip(*parts, strict=True))) if parts else None
    if whole is None or not whole.count.any():
        raise SpecError("evaluation found no target: the data are empty")
    return Measured(Answers(*(part[whole.count > 0] for part in whole)), seconds)


def compare(kind: str, quantized: Measured, plain: Measured, seed: int) -> tuple[float, tuple[float, float]]:
    """Difference to float, points of accuracy, percent of perplexity or nats of loss, and its interval by a paired
    bootstrap over sequences (Efron and Tibshirani 1993, chapter 13)."""
    count = len(plain.answers.count)
    times = stream(seed, "bootstrap").multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # (R, N)

    def differ(times: np.ndarray | None) -> np.ndarray:
        after, before = quantized.values(kind, times), plain.values(kind, times)
        return 100 * (after / before - 1) if kind == "perplexity" else after - before

    tail = (100 - CONFIDENCE) / 2
    with np.errstate(invalid="ignore"):  # of a row that diverged
        low, high = np.percentile(differ(times), [tail, 100 - tail])
        return float(differ(None)[0]), (float(low), float(high))
