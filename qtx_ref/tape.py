"""Reverse-mode differentiation on a tape of NumPy arrays.

An op computes its value and says, for each input, how a gradient of the output becomes a gradient of that input (its
vector-Jacobian product):

    return node(y, (x, lambda g: g * dy_dx))

`backward` walks the graph from a scalar in reverse topological order and adds the products up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Vjp = Callable[[np.ndarray], np.ndarray]


class Var:
    """An array on the tape. `parents` is empty where nothing upstream wants a gradient."""

    __slots__ = ("value", "parents", "wanted")

    def __init__(self, value: np.ndarray, parents: tuple[tuple[Var, Vjp], ...] = (), wanted: bool = False) -> None:
        self.value = value
        self.parents = parents
        self.wanted = wanted

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @staticmethod
    def arranged(move: Callable[..., np.ndarray], inputs: Sequence[Var], *edges: tuple[Var, Vjp]) -> Var:
        """The values of `inputs` in another arrangement: `move` changes none of them. Integer codes take their scale
        along (`integer.model.Code`)."""
        return node(move(*(x.value for x in inputs)), *edges)


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
    stack, seen = [(root, False)], set()
    while stack:
        var, expanded = stack.pop()
        if expanded:
            order.append(var)
        elif id(var) not in seen:
            seen.add(id(var))
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
