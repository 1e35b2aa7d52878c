"""Attention heads: where their probability goes, how spread it is, and how much they change the residual stream.

Bondarenko et al. 2023, section 3: a head that has nothing to add does a "no-op". It hands on a product of probabilities
and values so small that the residual stream stays as it is. A plain softmax cannot give zeros, so such a head gives
almost all probability to tokens that say little ([SEP], the first token, punctuation; background patches of an image),
whose values it keeps small; clipped softmax lets it give zeros (section 4.1), a gate lets it close (section 4.2). A
head does nothing here whichever of these it does, if what it adds, W_h (g * P V)_h, is at most UPDATE of the norm of
what it is added to, as a mean over tokens. `HeadStatistics.reason` says by what means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qtx_ref.spec import ModelSpec

UPDATE = 0.1  # the head's part of the attention's output against the residual's L2 norm, at most: 1% of its energy
OPEN = 0.1  # mean probability of a gate, at most, that counts as closed
KEPT = 0.1  # probability on all keys together, at most, that counts as none
MASS = 0.6  # of the probability on marked keys: most of it, and more than a query's own surroundings can take
EXCESS = 2.0  # times what even attention would give them: short texts and plain images are full of marked keys
RULE = {
    "update_at_most": UPDATE,
    "gate_at_most": OPEN,
    "kept_at_most": KEPT,
    "mass_at_least": MASS,
    "times_even_at_least": EXCESS,
}


@dataclass(frozen=True)
class HeadStatistics:
    """One head over all batches. Sizes are mean L2 norms over tokens: of `all`, and of those of each mark."""

    layer: int
    head: int
    mass: dict[str, float]  # probability by mark
    marked: float  # on all marks together
    even: float  # what even attention would give all marks
    entropy: float  # nats
    relative_entropy: float  # of its largest, log(number of keys)
    update: float  # L2 norm of the head's part of the output over that of the residual stream
    kept: float = 1.0  # probability on all keys
    gate: float | None = None  # mean opening probability; None without a gate
    value: dict[str, float] = field(default_factory=dict)  # size of V at those tokens
    product: dict[str, float] = field(default_factory=dict)  # size of P V at those tokens, before a gate

    @property
    def idle(self) -> bool:
        """Whether it does nothing, by the rule of this module."""
        return self.update <= UPDATE

    @property
    def reason(self) -> str | None:
        """By what means it does nothing, the first that holds: its gate is closed, it gives no probability, it gives it
        to marked keys, or what it collects is small. None where it does something."""
        if not self.idle:
            return None
        if self.gate is not None and self.gate <= OPEN:
            return "gate closed"
        if self.kept <= KEPT:
            return "no probability"
        if self.marked >= MASS and self.marked >= EXCESS * self.even:
            return "marked keys"
        return "small values"


class HeadSums:
    """What is kept of the heads: its size does not depend on the number of batches."""

    def __init__(self, spec: ModelSpec) -> None:
        self.layers: list[dict[str, np.ndarray]] = [{} for _ in range(spec.layers)]

    def add(self, sums: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Takes one batch's sums by layer, (H,) each."""
        for into, part in zip(self.layers, sums, strict=True):
            for name, value in part.items():
                into[name] = into[name] + value if name in into else value

    def result(self) -> list[HeadStatistics]:
        """Every head, the smallest update first."""
        heads = [head for layer, sums in enumerate(self.layers) for head in average_heads(layer, sums)]
        return sorted(heads, key=lambda head: head.update)


def average_heads(layer: int, sums: Mapping[str, np.ndarray]) -> list[HeadStatistics]:
    """The heads of a layer, from the sums that a model's `attention` gives."""
    queries, choices, tokens = (np.maximum(sums[name], 1) for name in ("queries", "choices", "tokens"))
    marks = [name.removeprefix("mass.") for name in sums if name.startswith("mass.")]
    heads = []
    for h in range(len(queries)):
        mass = {mark: float(sums[f"mass.{mark}"][h] / queries[h]) for mark in marks}
        value, product = (
            {
                name: float(sums[f"{kind}.{name}"][h] / max(sums[f"{kind}.count.{name}"][h], 1))
                for name in ("all", *marks)
            }
            for kind in ("value", "product")
        )
        heads.append(
            HeadStatistics(
                layer,
                h,
                mass,
                marked=sum(mass.values()),
                even=float(sum(sums[f"even.{mark}"][h] for mark in marks) / queries[h]),
                entropy=float(sums["entropy"][h] / queries[h]),
                relative_entropy=float(sums["relative"][h] / choices[h]),
                update=float(sums["update"][h] / tokens[h]),
                kept=float(sums["kept"][h] / queries[h]),
                gate=float(sums["gate"][h] / max(sums["gates"][h], 1)) if "gate" in sums else None,
                value=value,
                product=product,
            )
        )
    return heads
