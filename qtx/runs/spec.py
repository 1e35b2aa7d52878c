"""What a run does beside its steps: it evaluates, saves its state and writes down its course."""

from __future__ import annotations

from dataclasses import dataclass

from qtx_ref.spec import Spec
from qtx_ref.spec.base import refuse


@dataclass(frozen=True)
class EvaluationSpec(Spec):
    """What is measured of a model while it trains: before the first step, every so many steps and after the last of
    the schedule."""

    every: int | None = None  # steps; None: never
    batches: int = 8  # the first ones of the evaluation split, and as many of the calibration split for ranges
    recipes: tuple[str, ...] = ()  # its loss also under fake quantization by these
    integers: tuple[str, ...] = ()  # and in integers by these; a study also runs each trained model so
    limit: int | None = None  # evaluation batches that a study scores trained models on; None: the whole split

    def check(self) -> None:
        check_count("evaluation every", self.every)
        check_count("evaluation batches", self.batches)
        check_count("evaluation limit", self.limit)
        if self.recipes and self.every is None:
            refuse("evaluation recipes", self.recipes, "give evaluation every too: then they are measured")


@dataclass(frozen=True)
class SavingSpec(Spec):
    """When a run's state is saved, and how many earlier ones are kept beside the last."""

    every: int | None = None  # steps; None: by time alone
    seconds: float = 30.0  # a kill loses at most this much
    keep: int = 0  # of the numbered checkpoints that `every` makes; 0: the last state alone

    def check(self) -> None:
        check_count("saving every", self.every)
        if self.seconds < 0:
            refuse("saving seconds", self.seconds, "give a number >= 0")
        if self.keep < 0:
            refuse("saving keep", self.keep, "give a whole number >= 0")
        if self.keep and self.every is None:
            refuse("saving keep", self.keep, "give saving every too: those are kept")


@dataclass(frozen=True)
class LogSpec(Spec):
    """What a run writes down of its course."""

    every: int = 1  # steps between lines of log.jsonl
    tensorboard: bool = False
    sites: tuple[
        str, ...
    ] = ()  # tensors whose inf norm and kurtosis stand in each line, of the step's first 16 sequences

    def check(self) -> None:
        check_count("log every", self.every)


def check_count(what: str, value: int | None) -> None:
    """Raises SpecError for a number of steps or batches below 1; None is none."""
    if value is not None and value < 1:
        refuse(what, value, "give a whole number, at least 1")
