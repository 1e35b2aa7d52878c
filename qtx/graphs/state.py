"""What a walk through an ONNX file knows on its way: values, the codes behind floats, the accumulators behind sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from qtx_ref.integer import products
from qtx_ref.spec import Profile, QuantSpec, SpecError, accumulator_bits

from .reading import Graph, Node, spec_of

__all__ = ["Codes", "Operator", "Outputs", "State", "Sum", "take", "zero_of"]


class Codes(NamedTuple):
    """Codes and what they mean: scale and zero point are one, or one for each position of `axis`."""

    value: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    spec: QuantSpec
    axis: int | None = None


class Sum(NamedTuple):
    """Accumulators of a product, in units of x_scale times w_scale; w_scale is one, or one per column. `bias`: float32,
    beside them where the profile adds floats."""

    value: np.ndarray
    x_scale: np.ndarray
    w_scale: np.ndarray
    bias: np.ndarray | None = None

    def unit(self) -> np.ndarray:
        """What an accumulator of 1 stands for, float64."""
        return np.asarray(self.x_scale, np.float64) * np.asarray(self.w_scale, np.float64)

    def real(self) -> np.ndarray:
        """The values, float32 at each step."""
        y = self.value.astype(np.float32) * self.unit().astype(np.float32)
        return y if self.bias is None else y + self.bias


class State:
    """Values by name; the codes that a float tensor stands for; the accumulators that it came from; biases in integers.

    `given`: tensors that are taken from elsewhere instead of what the walk made of them, so that every node sees
    another execution's inputs.
    """

    def __init__(
        self, graph: Graph, profile: Profile, level: str, given: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self.graph = graph
        self.profile = profile
        self.level = level
        self.given = given or {}
        self.values: dict[str, np.ndarray] = dict(graph.constants)
        self.codes: dict[str, Codes] = {}
        self.sums: dict[str, Sum] = {}
        self.biases: dict[str, np.ndarray] = {}

    def feed(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Takes the file's inputs. Raises SpecError for one that is missing or unknown, or of another dtype."""
        for name, (dtype, _) in self.graph.inputs.items():
            if name not in inputs:
                raise SpecError(f"input {name} of {self.graph.path} is missing: give {', '.join(self.graph.inputs)}")
            if dtype and dtype != str(inputs[name].dtype):
                raise SpecError(f"input {name} is {inputs[name].dtype}; {self.graph.path} takes {dtype}")
        for name in inputs:
            if name not in self.graph.inputs:
                raise SpecError(f"input {name} is unknown: {self.graph.path} takes {', '.join(self.graph.inputs)}")
        self.values |= inputs

    def spec(self, name: str) -> QuantSpec | None:
        """The quantizer of the codes in a tensor, by its declared dtype, else by its value's."""
        declared = self.graph.types.get(name, ("", None))[0]
        return spec_of(declared or self.values[name].dtype)

    def multiply(self, node: Node, a: Codes, b: Codes) -> np.ndarray:
        """The accumulators of a product, a (..., M, K) and b (..., K, N): one scale for a, for b one or one per
        column."""
        bits = accumulator_bits(a.spec, b.spec)
        a_zero = a.zero_point if np.size(a.zero_point) == 1 else np.reshape(a.zero_point, (-1, 1))
        zeros = (np.squeeze(zero) if np.size(zero) == 1 else zero for zero in (a_zero, b.zero_point))
        a_zero, b_zero = (np.asarray(zero, np.int32) for zero in zeros)
        return products.matmul(
            a.value, b.value, a.spec, b.spec, a_zero, b_zero, accumulator=bits, rule=self.profile.matmul
        )


Outputs = tuple[np.ndarray, ...] | None  # of a node; None where an engine is to run it
Operator = Callable[[State, Node], Outputs]


def take(state: State, node: Node, index: int) -> Any:
    """An input's value; None where it is left out."""
    name = node.inputs[index] if index < len(node.inputs) else ""
    return state.values[name] if name else None


def zero_of(state: State, node: Node, index: int) -> np.ndarray:
    """A zero point, int32; 0 where it is left out."""
    value = take(state, node, index)
    return np.zeros((), np.int32) if value is None else np.asarray(value).astype(np.int32)
