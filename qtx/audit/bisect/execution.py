"""What an execution of a model is: its tensors, and any of them made again by qtx_ref under a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qtx_ref.spec import Profile, SpecError

__all__ = ["OURS", "Arrays", "Execution", "Trace", "convert", "describe_words"]

OURS = "qtx_ref"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """Tensors by name in the order that they are made, the model's outputs among them. `changed`: outputs that are
    others when intermediates are shown; `unseen`: tensors of the file that the engine never made."""

    tensors: dict[str, np.ndarray]
    outputs: tuple[str, ...]
    changed: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


class Execution(Protocol):
    """Who runs which file."""

    label: str
    profile: Profile | None  # whose rules it computes by; None: an engine's own
    simulated: bool  # whether codes are those of floats that were quantized, instead of integers all along

    @property
    def constants(self) -> Arrays:
        """What the file holds, by name."""

    def find_stated(self) -> Profile | None:
        """The profile that states an engine's rules; None where qtx computes, or nobody stated them."""

    def run(self, inputs: Arrays) -> Trace:
        """All tensors of one pass."""

    def replay(
        self, profile: Profile, inputs: Arrays, given: Arrays, target: str | None = None
    ) -> dict[str, np.ndarray]:
        """Each tensor by qtx_ref under a profile, each operation fed the tensors `given`; with a target that one alone.
        What qtx_ref does not have is left out. Raises ValueError where the profile refuses the numbers."""

    def operation(self, target: str) -> str:
        """What makes a tensor, in a few words."""

    def list_kernels(self, target: str) -> list[str]:
        """What only an engine has between a tensor and the codes that it is made of."""

    def list_constants(self, target: str, given: Arrays) -> list[str]:
        """The constants that a tensor is made with, of the tensors `given`."""


def describe_words(words: list[str], allowed: Mapping[str, tuple[str, ...]], keys: tuple[str, ...]) -> dict[str, str]:
    """Which of the `allowed` words of each kind was given (else the first), and the values of `keys`. Raises SpecError
    naming a word that is neither, or the second of its kind."""
    chosen, given = {kind: values[0] for kind, values in allowed.items()}, dict[str, str]()
    for word in words:
        key, equals, value = word.partition("=")
        kind = next((kind for kind, values in allowed.items() if word in values), None)
        if kind is not None and kind not in given:
            chosen[kind] = given[kind] = word
        elif equals and key in keys and key not in given:
            chosen[key] = given[key] = value
        elif (earlier := given.get(kind or key)) is not None:
            raise SpecError(f"{word!r} after {earlier!r}: give one of them")
        else:
            known = [*(value for values in allowed.values() for value in values), *(f"{key}=..." for key in keys)]
            raise SpecError(f"{word!r} says nothing of this file: give {', '.join(known)}")
    return chosen


def convert(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """An input in the dtype that a file takes. Raises SpecError for one that is no number."""
    try:
        return value.astype(dtype)
    except (TypeError, ValueError):
        raise SpecError(f"input {name} is {value.dtype}: the file takes {dtype}") from None
