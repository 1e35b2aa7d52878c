"""Reverse-mode differentiation on a tape of NumPy arrays.

An op computes its value and says, for each input, how a gradient of the output becomes a gradient of that input (its
vector-Jacobian product):

    return node(y, (x, lambda g: g * dy_dx))

`backward` walks the graph from a scalar in reverse topological order and adds the products up.

Arrays: of any shape; float32 or float64 where a gradient is wanted, any dtype elsewhere. A gradient has the shape and
the dtype of what it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = [
    "V",
    "Var",
    "Vjp",
    "backward",
    "const",
    "leaf",
    "node",
    "unbroadcast",
]

Vjp = Callable[[np.ndarray], np.ndarray]
V = TypeVar("V", bound="Var")


@dataclass(eq=False, repr=False, slots=True)
class Var:
    """An array on the tape, of any shape and dtype. `parents` are the inputs that want a gradient, each with its
    vector-Jacobian product: none where nothing upstream wants one. `wanted`: a gradient of it is."""

    value: np.ndarray
    parents: tuple[tuple[Var, Vjp], ...] = ()
    wanted: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """How many axes the value has."""
        return self.value.ndim

    def arrange(self: V, move: Callable[..., np.ndarray], *others: V, edges: Sequence[tuple[Var, Vjp]]) -> V:
        """The values of this and `others` in another arrangement: `move` changes none of them. Integer codes take their
        scale along (`integer.model.Code`)."""
        moved = node(move(self.value, *(x.value for x in others)), *edges)
        return moved  # type: ignore[return-value]  # of a Var alone: a Code has an `arrange` of its own


def leaf(value: np.ndarray) -> Var:
    """A variable whose gradient is wanted."""
    return Var(np.asarray(value), wanted=True)


def const(value: np.ndarray | Var) -> Var:
    """A variable without gradient; a `Var` passes through."""
    return value if isinstance(value, Var) else Var(np.asarray(value))


def node(value: np.ndarray, *edges: tuple[Var, Vjp]) -> Var:
    """The result of an op, linked to those of its inputs that want a gradient."""
    kept = tuple((parent, vjp) for parent, vjp in edges if parent.wanted)
    return Var(value, kept, wanted=bool(kept))


def backward(root: Var, leaves: Iterable[Var]) -> list[np.ndarray]:
    """d root / d leaf for each leaf, in the leaf's dtype; zeros where root does not depend on it.

    Raises:
        ValueError: root is not a scalar.
    """
    if root.value.size != 1:
        raise ValueError(f"backward starts from a scalar, not from shape {root.shape}")
    order: list[Var] = []
    stack, reached = [(root, False)], set()
    while stack:
        var, expanded = stack.pop()
        if expanded:
            order.append(var)
        elif id(var) not in reached:
            reached.add(id(var))
            stack.append((var, True))
            stack.extend((parent, False) for parent, _ in var.parents)
    grads = {id(root): np.ones_like(root.value)}
    for var in reversed(order):
        gradient = grads.get(id(var)) if not var.parents else grads.pop(id(var), None)
        if gradient is None:
            continue
        for parent, vjp in var.parents:
            product = vjp(gradient).astype(parent.value.dtype, copy=False)
            known = grads.get(id(parent))
            grads[id(parent)] = product if known is None else known + product
    return [grads.get(id(var), np.zeros_like(var.value)) for var in leaves]


def unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums a gradient over the axes along which an input of `shape` was broadcast."""
    extra = gradient.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(
        i + extra for i, n in enumerate(shape) if n == 1 and gradient.shape[i + extra] != 1
    )
    return gradient.sum(axis=axes, dtype=np.float64).reshape(shape).astype(gradient.dtype) if axes else gradient
