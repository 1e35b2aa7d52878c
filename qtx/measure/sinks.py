"""Attention sinks: how much probability each head puts on the tokens that say little, how many heads add nothing, and
how much of the residual stream's energy lies in a few channels.

The same sums as `qtx analyze` makes, kept small enough to be taken while a model trains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtx_ref.stats import top_share

from ..engines.protocols import Batch, Data, Model
from ..recipes.sites import layer_inputs, residual_stream
from .heads import HeadStatistics, HeadSums
from .marks import find_marks, make_kinds

# the marks of `find_marks`, by what a sink is called: the token that begins, delimiters, an image's plain patches
SINKS = {
    "first": ("first", "[CLS]", "CLS"),
    "separator": ("[SEP]", "punctuation"),
    "background": ("background",),
}
TOP = 0.01  # the share of the channels whose part of the energy is taken
DIGITS = 4  # of a head's numbers in a file


@dataclass(frozen=True)
class Sinks:
    """Of a model over some batches. Arrays are by layer and head, (L, H)."""

    mass: dict[str, np.ndarray]  # mean probability on the tokens of each name of SINKS that the batches have
    reasons: list[list[str | None]]  # by what means a head adds nothing, see `HeadStatistics.reason`; None: it does
    energy: float  # of the top 1% of channels (at least one) in the residual stream: the largest share over its sites
    energy_site: str

    @property
    def idle(self) -> int:
        """Number of heads that add nothing."""
        return sum(reason is not None for layer in self.reasons for reason in layer)

    @property
    def heads(self) -> int:
        """Number of heads."""
        return sum(map(len, self.reasons))

    def values(self) -> dict[str, float]:
        """The numbers that make curves: `sink.first`, `.separator` and `.background` the largest over heads."""
        largest = {f"sink.{name}": float(mass.max()) for name, mass in self.mass.items()}
        return largest | {"heads.idle": float(self.idle), "energy": self.energy}

    def list_heads(self) -> dict[str, list[list[float]]]:
        """`mass` as JSON values, a list of heads for each layer."""
        return {name: np.round(mass, DIGITS).tolist() for name, mass in self.mass.items()}

    def to_json_values(self) -> dict[str, Any]:
        """What a study keeps of it."""
        causes = Counter(reason for layer in self.reasons for reason in layer if reason is not None)
        return {
            "mass": self.list_heads(),
            "reasons": self.reasons,
            "heads": self.heads,
            "idle": self.idle,
            "causes": dict(sorted(causes.items())),
            "energy": self.energy,
            "energy_site": self.energy_site,
        }


def measure_sinks(model: Model, data: Data, batches: Iterable[Batch]) -> Sinks:
    """The sinks of a float model, over batches of `data`, whose tokenizer says what its tokens are.

    Raises ValueError where a number is not finite.
    """
    spec, kinds = model.spec, make_kinds(model.spec, data)
    sums, stream = HeadSums(spec), dict.fromkeys(residual_stream(spec), "sequence")
    energy: dict[str, np.ndarray] = {}  # by site (D,)
    found: set[str] = set()
    for batch in batches:
        marks = find_marks(spec, kinds, batch)
        found |= {name for name, marked in marks.items() if marked.any()}
        sums.add(model.attention(batch, marks, layer_inputs(spec)))
        for site, part in model.statistics(batch, stream, ("energy",)).items():
            energy[site] = energy[site] + part["energy"] if site in energy else part["energy"]
    heads, shares = sums.result(), {site: top_share(part, TOP) for site, part in energy.items()}
    if not np.isfinite([(head.marked, head.update) for head in heads]).all():
        raise ValueError("the probabilities of the heads are not finite")
    largest = max(shares, key=shares.__getitem__)

    def shape(value: Callable[[HeadStatistics], Any]) -> list[list[Any]]:
        ordered = sorted(heads, key=lambda head: (head.layer, head.head))
        return [[value(head) for head in ordered if head.layer == layer] for layer in range(spec.layers)]

    def add_mass(names: Sequence[str]) -> np.ndarray:
        return np.array(shape(lambda head: sum(head.mass.get(name, 0.0) for name in names)))

    mass = {name: add_mass(marks) for name, marks in SINKS.items() if found.intersection(marks)}
    return Sinks(mass, shape(lambda head: head.reason), shares[largest], largest)
