"""What a compiler is told: for a GPU, so that quotients are IEEE's, and for a CPU, so that loops over rows are as fast
as they can be.

Not in the reference: its values are the same.

For a GPU the compiler multiplies by the reciprocal of a divisor that is a constant, and Triton's own quotient of two
float32 may be off by 2 in the last place (4.6875 / 0.9375 is 5.0000005): scales, and codes of numbers near a tie, would
be others.

For a CPU it takes a maximum of floats one vector after another, each waiting for the one before it to be compared with
NaN: 10 cycles. A maximum of integers takes one. So the ends of a range are those of the floats' bits, in their order.
What follows from them, the scale, would be computed again for every vector of a row, unless it is written to memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import is_traced

LANES = 16  # floats of the widest vector; a maximum across the lanes of one is quick of floats alone
DIVISION = ("eager_numerics.division_rounding", "emulate_divison_rounding")  # inductor's names for it: now, and before


def ask_division() -> dict[str, bool]:
    """The compiler's options under which quotients of float32 are IEEE's on a GPU. Before torch 2.10 it has none."""
    from torch._inductor import config  # here, for it takes a second to import

    known = config.get_config_copy()
    return {name: True for name in DIVISION if name in known}


def hide(constant: Tensor, x: Tensor) -> Tensor:
    """A constant that x is to be divided by, in the same dtype and shape, as a graph for a GPU does not see it to be
    one; of NaN it is NaN."""
    if x.device.type == "cpu" or not is_traced():
        return constant
    return torch.where(torch.isnan(x), x, constant)


def is_fused(x: Tensor) -> bool:
    """Whether x is in a graph that is being compiled for a CPU."""
    return x.device.type == "cpu" and is_traced()


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
