"""Attention heads: where their probability goes, how spread it is, and how much they change the residual stream.

Bondarenko et al. 2023, section 3: heads that have nothing to add give almost all probability to tokens that say little
([SEP], the first token, punctuation; background patches of an image), whose values they keep small: a "no-op". A head
is named here as idle by three thresholds, all of them means over queries or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qtx_ref.spec import ModelSpec

MASS = 0.6  # of the probability on marked keys: most of it, and more than a query's own surroundings can take
EXCESS = 2.0  # times what even attention would give them: short texts and plain images are full of marked keys
UPDATE = 0.1  # the head's part of the attention's output against the residual's L2 norm, at most: 1% of its energy
RULE = {"mass_at_least": MASS, "times_even_at_least": EXCESS, "update_at_most": UPDATE}


@dataclass(frozen=True)
class Head:
    """One head over all batches."""

    layer: int
    head: int
    mass: dict[str, float]  # probability by mark
    marked: float  # on all marks together
    even: float  # what even attention would give all marks
    entropy: float  # nats
    relative_entropy: float  # of its largest, log(number of keys)
    update: float  # L2 norm of the head's part of the output over that of the residual stream

    @property
    def idle(self) -> bool:
        """Whether it does nothing, by the rule of this module."""
        return self.marked >= MASS and self.marked >= EXCESS * self.even and self.update <= UPDATE


class HeadSums:
    """What is kept of the heads: its size does not depend on the number of batches."""

    def __init__(self, spec: ModelSpec) -> None:
        self.layers: list[dict[str, np.ndarray]] = [{} for _ in range(spec.layers)]

    def add(self, found: Sequence[dict[str, np.ndarray]]) -> None:
        """Takes one batch's sums by layer, (H,) each."""
        for into, part in zip(self.layers, found, strict=True):
            for name, value in part.items():
                into[name] = into.get(name, 0) + value

    def result(self) -> list[Head]:
        """Every head, the idlest first: by marked probability less the update."""
        found = []
        for layer, sums in enumerate(self.layers):
            queries, choices, tokens = (np.maximum(sums[name], 1) for name in ("queries", "choices", "tokens"))
            mass = {k.removeprefix("mass."): v / queries for k, v in sums.items() if k.startswith("mass.")}
            even = sum(v for k, v in sums.items() if k.startswith("even.")) / queries
            entropy, relative, update = sums["entropy"] / queries, sums["relative"] / choices, sums["update"] / tokens
            for h in range(len(queries)):
                by_mark = {name: float(value[h]) for name, value in mass.items()}
                numbers = (sum(by_mark.values()), even[h], entropy[h], relative[h], update[h])
                found.append(Head(layer, h, by_mark, *map(float, numbers)))
        return sorted(found, key=lambda head: (not head.idle, head.update - head.marked))
