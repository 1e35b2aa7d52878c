"""What `qtx evaluate` does: one model's score on its evaluation split."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qtx_ref.spec import ModelSpec, SpecError

from ..data.splits import BATCH
from ..engines.machine import Machine
from ..engines.protocols import Batch
from ..measure import scores
from ..measure.scores import Score
from .opening import need_head, open_model


@dataclass(frozen=True)
class EvaluateRequest:
    """A model's file, what it runs as, and on which data."""

    model: Path  # a checkpoint, or an artifact
    recipe: str | None = None  # of a checkpoint: float, or one to calibrate and apply; None: its own
    numerics: str | None = None  # of an artifact: integer or fake; None: integer
    strict: bool = False  # of an artifact: integer dtypes only, in every op
    batches: int | None = None  # at most so many; None: the whole split
    data: str | None = None  # None: the model's own
    tokenizer: Path | None = None
    machine: Machine = Machine()
    profile: str | None = None  # a name, or a .json file; None: an artifact's own, qtx for a checkpoint
    compiled: bool = False  # of an artifact, on torch: the same codes, faster


@dataclass(frozen=True)
class Words:
    """What a score is of: the numerics that the model ran under, and what is to be known of them."""

    numerics: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.numerics}; {self.note}" if self.note else self.numerics


def evaluate(request: EvaluateRequest) -> tuple[Score, Words]:
    """Runs a model on the evaluation split of its data.

    Returns its score (loss in nats, perplexity, accuracy in percent), and in words what was scored.

    Raises:
        SpecError: an option that the file has no use for, a model without a head, or one whose loss or metric is not
        finite. DataError: data that cannot be had, do not fit, or trained or calibrated the model.
        FileError: the file cannot be read, or its training diverged.
        MissingExtra: a backend or tokenizer whose package is not installed.
    """
    request.machine.check()
    opened = open_model(
        request.model,
        request.machine,
        request.data,
        request.tokenizer,
        recipe_name=request.recipe,
        numerics=request.numerics,
        strict=request.strict,
        compiled=request.compiled,
        profile_name=request.profile,
        split="evaluation",
        check=lambda stored: need_head(request.model, stored.spec),
    )
    spec = opened.stored.spec

    def read() -> Iterable[Batch]:
        return opened.data.split_batches("evaluation", spec, BATCH, 0, limit=request.batches)

    score = scores.evaluate(opened.scored, read(), f"evaluate {opened.numerics}", sum(1 for _ in read()))
    check_finite(str(request.model), score, spec)
    return score, Words(opened.numerics, opened.note)


def check_finite(what: str, score: Score, spec: ModelSpec) -> None:
    """Raises SpecError where a model's loss or its metric is no finite number."""
    for name in ("loss", scores.metric(spec)):
        if not math.isfinite(value := getattr(score, name)):
            raise SpecError(
                f"{what} diverges: {name} is {value} over {score.targets} targets; take another model or recipe"
            )
