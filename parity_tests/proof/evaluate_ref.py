"""Running the reference: values and gradients of functions of leaves, and central differences to hold them to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qtx_ref import ops
from qtx_ref.random import stream
from qtx_ref.tape import Var, backward, const, leaf

Leaves = dict[str, np.ndarray]
Function = Callable[[dict[str, Var]], Var]


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """The gradient that is sent back through a tensor of `shape`: normal, cut to bfloat16 and so exact in every
    dtype."""
    words = np.asarray(stream(0, "cotangent", *shape).normal(size=shape), np.float32).view(np.uint32)
    return np.asarray((words & np.uint32(0xFFFF0000)).view(np.float32), np.float64)


def value_and_gradients(function: Function, leaves: Leaves, dtype: str = "float64") -> tuple[np.ndarray, Leaves]:
    """function(leaves), and the gradient of sum(cotangent * value) by each leaf."""
    held = {name: leaf(np.asarray(value, dtype)) for name, value in leaves.items()}
    y = function(held)
    weighted = ops.total(ops.mul(y, const(cotangent(y.shape).astype(y.value.dtype))))
    return y.value, dict(zip(held, backward(weighted, held.values()), strict=True))


def central_differences(function: Function, leaves: Leaves, step: float = 1e-5) -> Leaves:
    """The same gradients, element by element: (f(x + h) - f(x - h)) / 2h in float64.

    With h = 1e-5 the neglected term h^2 f''' / 6 and the rounding eps f / h are both about 1e-10.
    """

    def weigh(values: Leaves) -> float:
        y = function({name: const(value) for name, value in values.items()}).value
        return float((y * cotangent(y.shape)).sum())

    slopes = {}
    for name, value in leaves.items():
        slope = np.empty(value.shape)
        for index in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.astype(np.float64)
                moved[index] += sign * step
                ends.append(weigh(leaves | {name: moved}))
            slope[index] = (ends[0] - ends[1]) / (2 * step)
        slopes[name] = slope
    return slopes
