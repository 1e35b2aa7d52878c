"""What a black box is asked, and what every combination of rules says to it.

A question is one call: arrays by the names of the operation's arguments. A candidate is a tuple of values, one per axis
of the operation. What candidates say to a question is worked out once for all that must say the same, and numbered: two
candidates with one number cannot be told apart by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from qtx_ref.spec import SpecError

from ...engines.process import EngineCrash

RAISES, OUTSIDE = -1, -2  # in place of a number: the rule refuses the input; the rule says nothing of it
UNKNOWN = -3  # not yet worked out
Values = tuple[Any, ...]
Arrays = dict[str, np.ndarray]
Function = Callable[[Arrays], np.ndarray]


@dataclass(frozen=True)
class Raised:
    """A call that ended without an answer."""

    reason: str
    crashed: bool = False  # or hung: no rule says so


@dataclass(eq=False)
class Question:
    """One call. `needs`: what of it a box may refuse whatever its rules are, such as "float16 x"."""

    kind: str
    arrays: Arrays
    size: int  # numbers that are answered
    needs: frozenset[str] = frozenset()
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the reference is told beside the arrays
    outcomes: list[np.ndarray] = field(default_factory=list)  # int32 (1, N) or (2, N): lowest and highest answer
    numbers: dict[Hashable, int] = field(default_factory=dict)
    labels: np.ndarray | None = None  # of every candidate
    places: dict[bytes, int] = field(default_factory=dict)  # of an outcome, by its hash: thousands are kept

    def number(self, outcome: np.ndarray) -> int:
        """Of an outcome among those there are."""
        outcome = outcome.astype(np.int32)
        place = self.places.setdefault(blake2b(outcome.tobytes(), digest_size=16).digest(), len(self.outcomes))
        if place == len(self.outcomes):
            self.outcomes.append(outcome)
        return place


class Operation(ABC):
    """An operation as a search sees it: its axes, every combination of their values, and where to look."""

    name: str
    axes: tuple[str, ...]
    candidates: Sequence[Values]
    fresh = 100_000  # inputs on which candidates are compared before they count as equal

    @abstractmethod
    def evaluate(self, values: Values, question: Question) -> np.ndarray:
        """What the reference answers, whole numbers (1, N), or (2, N) where chance decides. Raises ValueError."""

    @abstractmethod
    def allow(self, values: Values) -> Values:
        """The same rules without those that raise."""

    @abstractmethod
    def key(self, values: Values, question: Question) -> Hashable:
        """What of the values the answer can depend on."""

    @cached_property
    def pool(self) -> tuple[Question, ...]:
        """Where to look, the same each time; the first one parts the most candidates."""
        return tuple(self.make_pool())

    @abstractmethod
    def make_pool(self) -> Sequence[Question]:
        """The questions of `pool`."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Question:
        """Fresh inputs, most of them where rules differ."""

    @abstractmethod
    def describe(self, question: Question, index: int) -> dict[str, Any]:
        """The input of one number of the answer."""

    def show(self, answer: int) -> Any:
        """A number of the answer as people read it."""
        return answer

    def labels(self, places: np.ndarray, question: Question) -> np.ndarray:
        """`label` of the candidates at these places, (n,)."""
        if question.labels is None:
            question.labels = np.full(len(self.candidates), UNKNOWN, np.int32)
        for place in places[question.labels[places] == UNKNOWN].tolist():
            question.labels[place] = self.label(self.candidates[place], question)
        return question.labels[places]

    def label(self, values: Values, question: Question) -> int:
        """The number of what a candidate says; RAISES or OUTSIDE."""
        key = self.key(values, question)
        if key not in question.numbers:
            question.numbers[key] = self.settle(values, question)
        return question.numbers[key]

    def settle(self, values: Values, question: Question) -> int:
        """`label`, worked out. A rule raises where without its policy it would answer."""
        with np.errstate(all="ignore"):  # floats that overflow on their way to a clamp
            try:
                return question.number(self.evaluate(values, question))
            except ValueError:
                allowed = self.allow(values)
            if allowed == values:
                return OUTSIDE
            try:
                self.evaluate(allowed, question)
            except ValueError:
                return OUTSIDE
        return RAISES


def fits(outcome: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Where an answer is what an outcome says."""
    return (outcome[0] <= answer) & (answer <= outcome[-1])


class Box:
    """A black box, its calls counted. `floats`: whether it answers with floats, else with codes."""

    def __init__(self, function: Function, floats: bool) -> None:
        self.function, self.floats = function, floats
        self.calls = self.inputs = 0

    def ask(self, question: Question) -> np.ndarray | Raised:
        """Its answer as whole numbers (N,), or why there is none. Raises SpecError for what is no answer."""
        self.calls += 1
        self.inputs += question.size
        try:
            # copies: a box may write into its arguments, and a question is asked again
            given = {name: None if value is None else value.copy() for name, value in question.arrays.items()}
            answer = np.asarray(self.function(given))
        except (Exception, SystemExit) as error:  # whatever a stranger's code raises is its answer
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return Raised(reason if len(reason) <= 200 else f"{reason[:200]}...", isinstance(error, EngineCrash))
        if answer.size != question.size:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in question.arrays.items())
            raise SpecError(f"the box answers {shapes} with the shape {answer.shape}: give {question.size} numbers")
        answer = answer.reshape(-1)
        if answer.dtype.kind not in ("f" if self.floats else "iu"):
            wanted = "floats" if self.floats else "codes as integers"
            raise SpecError(f"the box answers with {answer.dtype}: give {wanted}")
        return bits_of(answer) if self.floats else answer.astype(np.int64)


def bits_of(x: np.ndarray) -> np.ndarray:
    """Floats as whole numbers: the bits of a float32, every NaN the same one, and both zeros: codes have one."""
    x = np.asarray(x, np.float32) + np.float32(0)
    return np.where(np.isnan(x), np.float32(np.nan), x).view(np.int32).astype(np.int64)


def floats_of(bits: int) -> float:
    """The float32 of `bits_of`."""
    return float(np.int64(bits).astype(np.int32).view(np.float32))
