"""The damage of quantization, and how much of it belongs to some tokens, such as the one that idle heads look at.

The damage is the mean loss under a recipe's fake quantization less that in float. Of it belongs to some tokens what is
gained by sparing them: their activations stay in float at every quantizer and are kept out of calibration; weights are
quantized all the same. Both are differences of means over the same sequences, with paired bootstrap intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qtx_ref.spec import Family, ModelSpec, Recipe, SpecError

from ..engines.machine import Machine
from ..engines.protocols import Batch, Batches
from ..prepare.prepare import prepare
from .marks import Kinds
from .paired import Measured, compare, measure

SPARED = ("first", "[SEP]", "punctuation")  # kinds of tokens
DESTROYED = 10.0  # times the perplexity in float: past that, what would be left of a difference says nothing


@dataclass(frozen=True)
class Difference:
    """Of two mean losses, nats, with the ends of its interval."""

    nats: float
    low: float
    high: float


@dataclass(frozen=True)
class Damage:
    """What quantization adds to the mean loss, and the part of it that belongs to the spared tokens; None where the
    model is destroyed, its quantized perplexity more than DESTROYED times that in float, or not finite."""

    whole: Difference | None
    part: Difference | None

    @property
    def destroyed(self) -> bool:
        """Whether there is no part to give."""
        return self.part is None


def check_spared(spec: ModelSpec, names: Sequence[str]) -> None:
    """Raises SpecError for a kind of tokens that does not exist, one named twice, or one that images do not have."""
    known = SPARED[:1] if spec.family is Family.VIT else SPARED
    if strange := [name for name in names if name not in known]:
        raise SpecError(f"spared tokens are {strange[0]!r}: choose of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise SpecError(f"spared tokens are {','.join(names)!r}: name each once")


def find_spared(spec: ModelSpec, batch: Batch, names: Sequence[str], kinds: Kinds | None = None) -> np.ndarray:
    """The tokens of these kinds, (B, T) boolean. `first` is a sequence's first real token ([BOS], [CLS] or whatever
    stands there; of an image the class token); the others are `Kinds.marks`, for which kinds is needed."""
    if spec.family is Family.VIT:
        return np.arange(spec.length) == np.zeros((len(batch["images"]), 1))
    mask = np.asarray(batch["mask"], bool)
    parts = []
    if "first" in names:
        parts.append(mask & (np.arange(mask.shape[1]) == mask.argmax(axis=1)[:, None]))
    if (others := [name for name in names if name != "first"]) and kinds is not None:
        marks = kinds.marks(batch)
        parts += [marks[name] for name in others]
    return np.logical_or.reduce(parts)


def spare(batches: Iterable[Batch], find: Callable[[Batch], np.ndarray]) -> Iterator[Batch]:
    """The batches with the tokens that `find` names spared."""
    for batch in batches:
        yield {**batch, "spared": find(batch)}


def measure_spared(
    machine: Machine,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    chosen: Recipe,
    calibration: Batches,
    evaluation: Callable[[], Iterable[Batch]],
    find: Callable[[Batch], np.ndarray],
) -> Measured:
    """The model under a recipe's fake quantization with the tokens spared that `find` names, in calibration too.
    Raises SpecError as `prepare`, and where calibration finds no other token."""
    prepared = prepare(machine, spec, params, lambda count: spare(calibration(count), find), chosen)
    return measure(prepared.model(machine, spec, chosen), spare(evaluation(), find))


def measure_damage(
    machine: Machine,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    chosen: Recipe,
    calibration: Batches,
    evaluation: Callable[[], Iterable[Batch]],
    find: Callable[[Batch], np.ndarray],
    seed: int = 0,
) -> Damage:
    """The damage that a recipe does to a float model, and the part of it that belongs to the tokens that `find` names
    in a batch, (B, T). calibration: the first n batches, anew each time; evaluation: all batches, anew each time; seed:
    of the bootstrap. Raises SpecError as `prepare`."""
    plain = measure(machine.model(spec, params), evaluation())
    quantized = measure(prepare(machine, spec, params, calibration, chosen).model(machine, spec, chosen), evaluation())
    spared = measure_spared(machine, spec, params, chosen, calibration, evaluation, find)
    return compare_damage(plain, quantized, spared, seed)


def compare_damage(plain: Measured, quantized: Measured, spared: Measured, seed: int) -> Damage:
    """The damage of three passes over the same sequences: in float, quantized, and quantized with tokens spared."""
    whole = take_difference(quantized, plain, seed)
    if whole is None or whole.nats > math.log(DESTROYED):
        return Damage(whole, None)
    return Damage(whole, take_difference(quantized, spared, seed))


def take_difference(after: Measured, before: Measured, seed: int) -> Difference | None:
    """How much higher the loss is after; None where it is not finite."""
    nats, (low, high) = compare("loss", after, before, seed)
    return Difference(nats, low, high) if math.isfinite(nats) else None
