"""What the integer arithmetic asks of its arguments: integers, within a range, in a shape that fits.

Under `torch.compile` neither range nor shape is looked at, for a graph has no branch on data: whoever compiles an
artifact proves them of its constants before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import is_traced


def check_integers(what: str, dtype: torch.dtype) -> None:
    """Raises ValueError where a dtype is not an integer's."""
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{what} has dtype {name}: codes are integers, and so is what they make")


def check_range(what: str, value: Tensor | int, low: int, high: int, remedy: str) -> None:
    """Raises ValueError naming the first value outside [low, high]. A dtype that holds no other is not searched."""
    value = torch.as_tensor(value)
    check_integers(what, value.dtype)
    limits = torch.iinfo(value.dtype)
    if is_traced() or (limits.min >= low and limits.max <= high):
        return
    wide = value.long()  # a bound beyond int32 would wrap, and of unsigned integers torch compares bytes alone
    bad = (wide < low) | (wide > high)
    wrapped = 2**64 if value.dtype is torch.uint64 else 0
    bad = bad | (wide < 0) if wrapped else bad
    if bad.any():
        first = wide[bad][0].item()
        raise ValueError(f"{what} {first + wrapped * (first < 0)} is outside {low} to {high}: {remedy}")


def check_shape(what: str, value: Tensor, shape: tuple[int, ...], remedy: str) -> None:
    """Raises ValueError where `value`, broadcast against `shape`, would not leave it as it is."""
    if is_traced():
        return
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == tuple(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{what} of shape {tuple(value.shape)} does not fit shape {tuple(shape)}: {remedy}")
