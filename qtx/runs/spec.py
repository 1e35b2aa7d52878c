"""What a run does beside its steps: it evaluates, saves its state and writes down its course."""

from __future__ import annotations

from dataclasses import dataclass

from qtx_ref.spec import Spec


@dataclass(frozen=True)
class EvaluationSpec(Spec):
    """The held-out loss while a run trains."""

    every: int | None = None  # steps; None: never
    batches: int = 8  # of the evaluation split, the first ones
    recipes: tuple[str, ...] = ()  # also under fake quantization by these
    integers: bool = False  # and in integers, where a recipe has them


@dataclass(frozen=True)
class SavingSpec(Spec):
    """When a run's state is saved, and how many earlier ones are kept beside the last."""

    every: int | None = None  # steps; None: by time alone
    seconds: float = 30.0  # a kill loses at most this much
    keep: int = 0  # of the numbered checkpoints that `every` makes; 0: the last state alone


@dataclass(frozen=True)
class LogSpec(Spec):
    """What a run writes down of its course."""

    every: int = 1  # steps between lines of log.jsonl
    tensorboard: bool = False
    sites: tuple[str, ...] = ()  # tensors whose inf norm and kurtosis stand in each line, of the step's own batch
