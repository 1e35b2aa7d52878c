"""The search: ask what parts the combinations that are left, until nothing does; then hold the last one to fresh
inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import ne
from typing import Any

import numpy as np

from .questions import OUTSIDE, RAISES, Box, Operation, Question, Raised, Values, fits

VERIFIED = 6  # calls with fresh inputs that the last combination must explain
Advance = Callable[[str], None]


@dataclass(frozen=True)
class Witness:
    """An input, what the box answered, and what other rules would have."""

    input: dict[str, Any]
    answer: Any
    others: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One axis: its value, the inputs that decided it, and the values that nothing tells from it."""

    axis: str
    value: Any
    witnesses: tuple[Witness, ...]
    equal: tuple[Any, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """What was found of a box."""

    operation: str
    axes: tuple[str, ...]
    alike: tuple[Values, ...]  # the combinations that explain every answer; the first one is given
    verdicts: tuple[Verdict, ...]
    deciding: int  # calls
    calls: int  # those and the ones that verified
    inputs: int  # numbers answered in all
    verified: int  # fresh inputs that the combination explains
    refusals: tuple[str, ...]
    uncovered: tuple[str, ...]  # answers of which the rules say nothing
    unexplained: Witness | None = None
    note: str = ""
    nearest: dict[str, str] = field(default_factory=dict)  # where nothing explains the box: the rules that miss least

    @property
    def values(self) -> Values:
        return self.alike[0]


class Search:
    """A search under way."""

    def __init__(self, operation: Operation, box: Box, seed: int = 0, advance: Advance = lambda kind: None) -> None:
        self.operation, self.box, self.advance = operation, box, advance
        self.rng = np.random.default_rng(seed)
        self.places = np.arange(len(operation.candidates))  # of the candidates that are left
        self.asked: list[tuple[Question, np.ndarray | Raised]] = []
        self.refused: list[tuple[Question, str]] = []
        self.known: set[str] = set()  # what the box has answered before
        self.barred: list[frozenset[str]] = []  # what it refuses together
        self.unexplained: Witness | None = None
        self.note = ""
        self.compared = self.hunted = 0  # fresh inputs, and of how many candidates

    @property
    def alive(self) -> list[Values]:
        """The candidates that are left."""
        return [self.operation.candidates[place] for place in self.places.tolist()]

    def run(self) -> Fingerprint:
        """The whole search."""
        pool = list(self.operation.pool)
        question: Question | None = pool[0]
        while question is not None and self.unexplained is None:
            if question in pool:
                pool.remove(question)
            self.ask(question)
            pool = [one for one in pool if not self.is_refused(one)]
            question = self.choose(pool)
            if question is None:
                self.drop_silent()
                question = self.choose(pool) or self.break_silence(pool) or self.hunt()
        deciding, before = self.box.calls, len(self.asked)
        for _ in range(VERIFIED):
            if self.unexplained is None:
                self.ask(self.draw())
        return self.report(deciding, sum(question.size for question, _ in self.asked[before:]))

    def ask(self, question: Question) -> None:
        """Asks, and keeps the candidates that said so. A box that raises where none would has refused."""
        self.advance(question.kind)
        answer = self.box.ask(question)
        labels = self.operation.labels(self.places, question)
        kept = labels == OUTSIDE
        if isinstance(answer, Raised):
            if not (labels == RAISES).any() or answer.crashed:
                self.refuse(question, answer.reason, bool(kept.any()))
                return
            kept |= labels == RAISES
        else:
            good = [label for label in np.unique(labels[labels >= 0]) if fits(question.outcomes[label], answer).all()]
            kept |= np.isin(labels, good)
            self.known |= question.needs
        if not kept.any():
            self.unexplained = self.find_first(question, answer)
            again = self.box.ask(question)
            if isinstance(again, Raised) or isinstance(answer, Raised) or not np.array_equal(again, answer):
                self.note = "the box answers the same input differently from one call to the next"
        self.asked.append((question, answer))
        self.places = self.places[kept] if kept.any() else self.places

    def find_first(self, question: Question, answer: np.ndarray | Raised) -> Witness:
        """The first input of an answer that none of those left explains with all before it."""
        assert isinstance(answer, np.ndarray)  # an answer that is none always has an explanation
        labels = np.unique(self.operation.labels(self.places, question))
        if not (labels := labels[labels != RAISES]).size:
            return Witness(self.operation.describe(question, 0), self.operation.show(int(answer[0])), {"all": "raises"})
        until = np.array([np.argmin(fits(question.outcomes[label], answer)) for label in labels])
        index = int(until.max())  # the longest that one of them explains
        told = Counter(int(question.outcomes[label][0, index]) for label in labels)
        others = {"every combination left": [self.operation.show(code) for code, _ in told.most_common(3)]}
        return Witness(self.operation.describe(question, index), self.operation.show(int(answer[index])), others)

    def refuse(self, question: Question, reason: str, silent: bool) -> None:
        """Keeps in mind what the box does not take: that of a question which it never answered. Where some rules are
        silent, it may refuse for their reason: the second time it counts."""
        guilty = question.needs - self.known
        if guilty and (not silent or any(one.needs - self.known == guilty for one, _ in self.refused)):
            self.barred.append(guilty)
        self.refused.append((question, reason))

    def is_refused(self, question: Question) -> bool:
        """Whether it has all that the box refuses together."""
        return any(guilty <= question.needs for guilty in self.barred)

    def choose(self, pool: Sequence[Question]) -> Question | None:
        """The question of the pool that leaves the fewest candidates, by the mean; None where none parts them. Where a
        rule would raise, the box must have answered its like before: else one that no rule refuses comes first."""
        least, best = float(len(self.places) ** 2), None
        for question in pool:
            if least > len(self.places):  # not yet one that parts all of them
                cost = self.cost(question)
                least, best = (cost, question) if cost < least else (least, best)
        if best is None:
            return None
        unknown = best.needs - self.known
        if unknown and self.may_raise(best):
            return next((one for one in pool if unknown <= one.needs and not self.may_raise(one)), best)
        return best

    def drop_silent(self) -> None:
        """Of candidates that contradict no answer, those that say something to the most of them."""
        answered = [question for question, answer in self.asked if isinstance(answer, np.ndarray)]
        silences = np.zeros(len(self.places), int)
        for question in answered:
            silences += self.operation.labels(self.places, question) == OUTSIDE
        self.places = self.places[silences == silences.min()]

    def break_silence(self, pool: Sequence[Question]) -> Question | None:
        """A question of a kind that the box has not been asked, of which some of those left say nothing."""
        for question in pool:
            if question.needs - self.known:
                silent = self.operation.labels(self.places, question) == OUTSIDE
                if silent.any() and not silent.all():
                    return question
        return None

    def may_raise(self, question: Question) -> bool:
        """Whether a candidate that is left would."""
        return bool((self.operation.labels(self.places, question) == RAISES).any())

    def cost(self, question: Question) -> float:
        """The sum of squares of the groups that it makes; what says nothing stays in each."""
        total = len(self.places)
        if total < 2:
            return float(total**2)
        labels, counts = np.unique(self.operation.labels(self.places, question), return_counts=True)
        silent = int(counts[labels == OUTSIDE].sum())
        if silent == total:
            return float(total**2)
        counts = counts[labels != OUTSIDE].astype(float)
        return float((counts * (counts + silent)).sum()) + silent * total

    def hunt(self) -> Question | None:
        """Fresh inputs that still part the candidates; None where `fresh` of them do not, or the box refuses them."""
        if self.hunted != len(self.places):
            self.hunted, self.compared = len(self.places), 0
        while len(self.places) > 1 and self.compared < self.operation.fresh:
            question = self.draw()
            self.compared += question.size
            if self.cost(question) < len(self.places) ** 2:
                return question
        return None

    def draw(self) -> Question:
        """A fresh question that the box does not refuse, or the last of 100."""
        for _ in range(100):
            question = self.operation.draw(self.rng)
            if not self.is_refused(question):
                break
        return question

    def report(self, deciding: int, verified: int) -> Fingerprint:
        """What the search has found."""
        alive = self.alive
        chosen = alive[0]
        explained = self.unexplained is None
        by_distance = sorted(self.operation.candidates, key=lambda one: distance(one, chosen))
        return Fingerprint(
            self.operation.name,
            self.operation.axes,
            tuple(alive) if explained else (),
            tuple(self.judge(i, by_distance) for i in range(len(chosen))) if explained else (),
            deciding,
            self.box.calls,
            self.box.inputs,
            verified,
            tuple(dict.fromkeys(f"{tell(one)}: {reason}" for one, reason in self.refused)),
            tuple(
                dict.fromkeys(
                    question.kind
                    for question, answer in self.asked
                    if isinstance(answer, np.ndarray) and self.operation.label(chosen, question) == OUTSIDE
                )
            ),
            self.unexplained,
            self.note,
            {} if explained else self.find_nearest(),
        )

    def judge(self, i: int, by_distance: Sequence[Values]) -> Verdict:
        """One axis of the chosen candidate, the first of all by their distance from it."""
        chosen = by_distance[0]
        rivals: dict[Any, Values] = {}
        for one in by_distance:
            rivals.setdefault(one[i], one)
        equal = {one[i]: one for one in sorted(self.alive, key=lambda one: -distance(one, chosen))}
        del rivals[chosen[i]], equal[chosen[i]]
        left = {value: one for value, one in rivals.items() if value not in equal}
        witnesses = []
        for question, answer in self.asked:
            masks = {value: self.contradicts(one, question, answer) for value, one in left.items()}
            while masks:
                counts = np.sum(list(masks.values()), axis=0)
                index = int(np.argmax(counts))
                if counts[index] == 0:
                    break
                said = {value: self.say(left[value], question, index) for value, mask in masks.items() if mask[index]}
                shown = "raises" if isinstance(answer, Raised) else self.operation.show(int(answer[index]))
                witnesses.append(
                    Witness(
                        self.operation.describe(question, index), shown, {str(key): one for key, one in said.items()}
                    )
                )
                masks = {value: mask for value, mask in masks.items() if value not in said}
                left = {value: one for value, one in left.items() if value not in said}
        reasons = dict.fromkeys(self.excuse(chosen, one, i) for one in equal.values())
        return Verdict(self.operation.axes[i], chosen[i], tuple(witnesses), tuple(equal), "; ".join(reasons))

    def contradicts(self, values: Values, question: Question, answer: np.ndarray | Raised) -> np.ndarray:
        """Where the box answered otherwise than a candidate."""
        label = self.operation.label(values, question)
        if label in (OUTSIDE, RAISES) or isinstance(answer, Raised):
            differs = label != OUTSIDE and isinstance(answer, Raised) != (label == RAISES)
            return np.full(question.size, differs)
        return ~fits(question.outcomes[label], answer)

    def say(self, values: Values, question: Question, index: int) -> Any:
        """What a candidate says to one input."""
        label = self.operation.label(values, question)
        return "raises" if label == RAISES else self.operation.show(int(question.outcomes[label][0, index]))

    def excuse(self, chosen: Values, other: Values, i: int) -> str:
        """Why two candidates are not told apart, which differ in axis i and perhaps others."""
        named = zip(self.operation.axes, chosen, other, strict=True)
        beside = [f"{axis} {b}" for j, (axis, a, b) in enumerate(named) if j != i and a != b and b is not None]
        which = f"{other[i]} with {' and '.join(beside)}" if beside else str(other[i])
        for question, reason in self.refused:
            if self.operation.label(chosen, question) != self.operation.label(other, question):
                return f"{which} differs only where the box refuses {tell(question)} ({reason})"
        return f"{which} is equal on every input that was asked and on {self.compared:,} fresh ones"

    def find_nearest(self) -> dict[str, str]:
        """Of those that explain all before it, the candidate that misses the fewest answers, by axis."""
        answered = [(question, answer) for question, answer in self.asked if isinstance(answer, np.ndarray)]

        def misses(values: Values) -> int:
            return sum(int(self.contradicts(values, question, answer).sum()) for question, answer in answered)

        best = min(self.alive, key=misses)
        named = {axis: str(value) for axis, value in zip(self.operation.axes, best, strict=True)}
        total = sum(question.size for question, _ in answered)
        return {**named, "misses": f"{misses(best)} of {total}"}


def distance(a: Values, b: Values) -> int:
    """Axes in which two candidates differ."""
    return sum(map(ne, a, b))


def tell(question: Question) -> str:
    """What of a question may have been refused."""
    return " with ".join(sorted(question.needs)) or question.kind
