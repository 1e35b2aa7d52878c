"""What the integer arithmetic asks of its arguments: integers, within a range, in a shape that fits.

Arrays: of any shape and dtype; they are looked at and not changed. A number stands for an array of shape ().
"""

from __future__ import annotations

import numpy as np

__all__ = ["check_integers", "check_range", "check_shape"]


def check_integers(what: str, dtype: np.dtype) -> None:
    """Raises ValueError where a dtype is not an integer's."""
    if dtype.kind not in "iu":
        raise ValueError(f"{what} has dtype {dtype}: codes are integers, and so is what they make")


def check_range(what: str, value: np.ndarray | int, low: int, high: int, remedy: str) -> None:
    """Raises ValueError naming the first value outside [low, high]. A dtype that holds no other is not searched."""
    value = np.asanyarray(value)
    check_integers(what, value.dtype)
    limits = np.iinfo(value.dtype)
    if limits.min >= low and limits.max <= high:
        return
    bad = (value < low) | (value > high)
    if bad.any():
        raise ValueError(f"{what} {value[bad][0]} is outside {low} to {high}: {remedy}")


def check_shape(what: str, value: np.ndarray | int, shape: tuple[int, ...], remedy: str) -> None:
    """Raises ValueError where `value`, broadcast against `shape`, would not leave it as it is."""
    try:
        fits = np.broadcast_shapes(np.shape(value), shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{what} of shape {tuple(np.shape(value))} does not fit shape {tuple(shape)}: {remedy}")
