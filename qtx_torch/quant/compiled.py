"""What a graph compiled for a CPU is told, so that its loops over rows are as fast as they can be.

Not in the reference: its values are the same.

The compiler takes a maximum of floats one vector after another, each waiting for the one before it to be compared with
NaN: 10 cycles. A maximum of integers takes one. So the ends of a range are those of the floats' bits, in their order.
What follows from them, the scale, would be computed again for every vector of a row, unless it is written to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16  # floats of the widest vector; a maximum across the lanes of one is quick of floats alone


def is_fused(x: Tensor) -> bool:
    """Whether x is in a graph that is being compiled for a CPU."""
    return x.device.type == "cpu" and torch.compiler.is_compiling()


def store_rows(value: Tensor, x: Tensor) -> Tensor:
    """value, written to memory where it is smaller than x, for whose elements it counts. What has strides of its own
    lies there."""
    return value.as_strided(value.shape, value.stride()) if is_fused(x) and value.numel() < x.numel() else value


def order(bits: Tensor) -> Tensor:
    """The bits of floats (int32) as integers in the floats' order, NaN beyond infinity, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def find_ends(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over `axes` (some, counted from the first), kept as length 1; NaN where one is NaN."""
    last = x.ndim - 1
    if is_fused(x) and last in axes and x.shape[last] % LANES == 0 and x.stride(last) == 1:
        lanes = order(x.float().view(torch.int32)).unflatten(last, (-1, LANES))
        low, high = (order(ends(axes, keepdim=True)).view(torch.float32) for ends in (lanes.amin, lanes.amax))
        low, high = low.amin(-1), high.amax(-1)  # NaN is in one of them, by its sign
        return torch.minimum(low, high), torch.maximum(low, high)
    if len(axes) == x.ndim:
        low, high = (end.reshape((1,) * x.ndim) for end in x.aminmax())
        return low, high
    return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
