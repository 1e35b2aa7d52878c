"""Post-training quantization, remedies side by side: one model, one data set, a row for each recipe.

Every row's metric, latency and size belong to one thing: the integer artifact where the recipe can run in integers, else
the simulation, float32 parameters with quantizers between them; the row says which.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref import quantizers
from qtx_ref.lowering import lower
from qtx_ref.numerics import is_weight
from qtx_ref.ops import hadamard
from qtx_ref.random import stream
from qtx_ref.spec import (
    QTX,
    FloatQuantSpec,
    Granularity,
    InputTransform,
    ModelSpec,
    Nonlinear,
    ObserverKind,
    Quant,
    Range,
    Recipe,
    check_integer,
    to_dict,
)
from qtx_ref.tape import const

from .artifact import Artifact, stored_bytes
from .backend import backend
from .checkpoint import Checkpoint, save_checkpoint
from .files import CheckpointError, check_writable, write_beside
from .progress import Progress
from .quantization import BATCH, Answers, Prepared, answers, metric, prepare
from .recipes import recipe, resolve
from .training import Machine, difference

RESAMPLES = 2000  # of the bootstrap
CONFIDENCE = 95  # percent, of its interval
PROBED = 4  # calibration sequences on which each quantizer's error is taken
WORST = 3  # sites named in a row
Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]


@dataclass(frozen=True)
class PtqSpec:
    """Everything that a comparison's numbers depend on, beside the files' own hashes."""

    recipes: tuple[str, ...]
    sequences: int  # of the evaluation split
    calibration: int  # batches of BATCH
    seed: int  # of the bootstrap
    machine: Machine = Machine()


@dataclass(frozen=True)
class Measured:
    """One pass over the evaluation batches."""

    answers: Answers
    seconds: float

    def value(self, kind: str, times: np.ndarray | None = None) -> np.ndarray:
        """Accuracy in percent or perplexity; of each resample where `times` (R, N) says how often it drew a sequence."""
        loss, count, right = (part if times is None else times @ part for part in self.answers)
        if kind == "accuracy":
            return 100 * np.sum(right, axis=-1 if times is None else ()) / np.sum(count, axis=-1 if times is None else ())
        with np.errstate(over="ignore"):
            return np.exp(np.sum(loss, axis=-1 if times is None else ()) / np.sum(count, axis=-1 if times is None else ()))


def measure(model: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> Measured:
    began = time.perf_counter()
    parts = [answers(model, batch) for batch in batches]
    whole = Answers(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    return Measured(whole, time.perf_counter() - began)


def compare(kind: str, quantized: Measured, plain: Measured, seed: int) -> tuple[float, tuple[float, float]]:
    """Difference to float and its interval by a paired bootstrap over sequences (Efron and Tibshirani 1993, chapter 13):
    points of accuracy, or percent of perplexity."""
    count = len(plain.answers.count)
    times = stream(seed, "bootstrap").multinomial(count, np.full(count, 1 / count), size=RESAMPLES)  # (R, N)

    def differ(times: np.ndarray | None) -> np.ndarray:
        after, before = quantized.value(kind, times), plain.value(kind, times)
        return after - before if kind == "accuracy" else 100 * (after / before - 1)

    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(differ(times), [tail, 100 - tail])
    return float(differ(None)), (float(low), float(high))
