"""Fake quantization under QTX in blocks of rows that stay in a CPU's cache: a tensor is read once, for its ranges and
its values, and written once. Every bit is that of `affine.simulate`.

Not in the reference: its values are the same.

Floors for an element: a division and five cheaper operations, 16 elements at a time with AVX-512 (about 0.1 ns, where
a division takes 5 cycles), and 8 bytes through memory (0.8 ns at 10 GB/s; the larger once a tensor leaves the cache).
Eager torch adds a call of about 1 us for each operation and block, wherefore blocks are as large as a cache allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from qtx_ref.spec import QTX, Granularity, Quant, QuantSpec, range_axes

from ..tracing import is_traced
from . import affine, rounding
from .compiled import is_fused, store_rows

RANGED = 2**21  # elements whose ranges are found in one go: they stay in the last cache until they are quantized
BLOCK = 2**17  # elements that take every operation in turn: with their values half a megabyte


def is_large(x: Tensor) -> bool:
    """Whether x is worth dividing: on a CPU, not compiled, more than a block."""
    return x.device.type == "cpu" and not is_traced() and x.numel() > BLOCK


def find_kernels(x: Tensor) -> ModuleType | None:
    """Triton's, on a GPU where it is installed; a compiled graph fuses its own."""
    if x.device.type != "cuda" or is_traced() or x.dtype is torch.float64 or x.numel() > 2**30:
        return None
    return _load_kernels(x.device)


@cache
def _load_kernels(device: torch.device) -> ModuleType | None:
    try:
        kernels = import_module("qtx_torch.kernels.fake_quantize")
        kernels.quantize_rows(torch.zeros(1, 1, device=device), QuantSpec(), QTX.scale.floor, QTX.scale.empty)
    except (ImportError, RuntimeError):  # no Triton, as on Windows, or no C compiler, which Triton needs
        return None
    return kernels


def simulate_fused(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """What the codes of x stand for, in one loop of a compiled graph for a CPU, zero in float32: codes less the zero
    point are clamped, so that it is added to none of them. 0 is added, which a -0 becomes, and is no constant."""
    level = torch.round(x.float() / store_rows(scale, x)) + store_rows(zero - zero, x)
    low, high = store_rows(spec.code_min - zero, x), store_rows(spec.code_max - zero, x)
    return torch.minimum(torch.maximum(level, low), high).mul(scale).to(x.dtype)


def as_rows(x: Tensor, *others: Tensor) -> list[Tensor] | None:
    """x as (N, C), the last axis being memory's, and what broadcasts to it as (N, C), (N, 1), (1, C) or (1, 1); views,
    or None where there are none."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)  # heads that were split lie behind each other
    if x.ndim == 0 or not x.permute(order).is_contiguous():
        return None
    lead, views = [x.shape[i] for i in order[:-1]], []
    for value in (x, *others):
        turned = value.reshape((1,) * (x.ndim - value.ndim) + value.shape).permute(order)
        if list(turned.shape[:-1]) != lead and turned.shape[:-1].numel() != 1:
            return None
        views.append(turned.flatten(0, -2) if x.ndim > 1 else turned[None])
    return views


def split(size: int, views: list[Tensor]) -> Iterator[list[Tensor]]:
    """About `size` elements of the first view at a time, and what belongs to them of the others."""
    rows = max(1, size // views[0].shape[1])
    for start in range(0, len(views[0]), rows):
        yield [view if len(view) == 1 else view[start : start + rows] for view in views]


def find_level(x: Tensor, scale: Tensor, zero: Tensor, memory: Tensor) -> Tensor:
    """`rounding.round_level` in memory that is there; zero is float32."""
    return torch.div(x.float(), scale, out=memory).round_().add_(zero)


def spare_block(x: Tensor) -> Tensor:
    """Memory for the levels of a block of x (N, C)."""
    return x.new_empty(max(BLOCK, x.shape[1]), dtype=torch.float32)


def take(memory: Tensor, x: Tensor) -> Tensor:
    return memory[: x.numel()].view(x.shape)


def write_values(x: Tensor, scale: Tensor, zero: Tensor, y: Tensor, spec: QuantSpec, whole: bool = False) -> None:
    """Into y, in its dtype, what the codes of x stand for; views as of `as_rows`, zero in float32. whole: zero is 0,
    and no level beyond the codes."""
    memory = None if y.dtype is torch.float32 else spare_block(x)
    for part, step, offset, out in split(BLOCK, [x, scale, zero, y]):
        level = find_level(part, step, offset, out if memory is None else take(memory, part))
        if not whole:
            level.clamp_(spec.code_min, spec.code_max).sub_(offset)
        torch.mul(level, step, out=out)


def simulate(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """What the codes of x stand for, in its dtype."""
    kernels = find_kernels(x)
    if kernels and (views := as_rows(x, scale.float(), zero_point.float())):
        return kernels.quantize(*(view.contiguous() for view in views), spec).as_strided(x.shape, x.stride())
    if is_large(x):
        y = torch.empty_like(x)
        if views := as_rows(x, scale, zero_point.float(), y):
            write_values(*views, spec)
            return y
    if is_fused(x):
        return simulate_fused(x, scale, zero_point.float(), spec)
    code = rounding.round_level(x, scale, zero_point).clamp(spec.code_min, spec.code_max)  # a float: NaN stays NaN
    return code.sub_(zero_point).mul_(scale).to(x.dtype)


def pass_gradient(g: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """g where the code of x was not clamped, else 0."""
    ends = (spec.code_min - 0.5, spec.code_max + 0.5)  # the kernel excludes its limits, and levels are whole
    kernels = find_kernels(x)
    if kernels and (views := as_rows(x, scale.float(), zero_point.float(), g)):
        dx = kernels.quantize(*(view.contiguous() for view in views[:3]), spec, views[3].contiguous())
        return dx.as_strided(x.shape, x.stride())
    if is_large(x) and g.dtype is torch.float32:
        dx = torch.empty_like(x, dtype=g.dtype)
        if views := as_rows(x, scale, zero_point.float(), g, dx):
            memory = spare_block(views[0])
            for part, step, zero, given, out in split(BLOCK, views):
                level = find_level(part, step, zero, take(memory, part))
                torch.ops.aten.hardtanh_backward.grad_input(given, level, *ends, grad_input=out)
            return dx
    level = rounding.round_level(x, scale, zero_point)
    wide = torch.promote_types(g.dtype, level.dtype)  # bfloat16 cannot tell 32767 from 32768
    return torch.ops.aten.hardtanh_backward(g.to(wide), level.to(wide), *ends).to(g.dtype)


# --- a range per row --------------------------------------------------------------------------------------------------


def has_rows(x: Tensor, spec: Quant, weight: bool) -> bool:
    """Whether each range is that of one row across the last axis, and x is worth dividing, or there is a kernel."""
    if not isinstance(spec, QuantSpec) or spec.outliers is not None or spec.wide is not None or not x.numel():
        return False
    if not is_large(x) and (spec.mirrored or find_kernels(x) is None):
        return False
    plain = spec.granularity in (Granularity.TOKEN, Granularity.CHANNEL)
    return plain and range_axes(spec, x.ndim, weight) == (x.ndim - 1,) and x.is_contiguous()


def simulate_rows(x: Tensor, spec: QuantSpec, y: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Of x (..., C), each row by its own minimum and maximum: what the codes stand for, in x's dtype (in y, if it is
    given), the scales and zero points (..., 1), and whether any code was clamped.

    A row's codes rise with its elements: so a clamped one is found at its ends. On a GPU it may be said though none
    was: the answer would have to be waited for. Raises ValueError for a range that is not finite, as
    `affine.scale_zero`; on a GPU such a row is NaN throughout.
    """
    if kernels := find_kernels(x):
        values, scale, zero = kernels.quantize_rows(x, spec, QTX.scale.floor, QTX.scale.empty)
        return values, scale, zero, not spec.symmetric
    y = torch.empty_like(x) if y is None else y
    rows, values = (part.view(-1, x.shape[-1]) for part in (x, y))
    scales, zeros, clamped = [], [], False
    for part, out in split(RANGED, [rows, values]):
        found = [affine.min_max(block, (1,)) for (block,) in split(BLOCK, [part])]
        low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
        try:
            scale, zero_point = affine.scale_zero(low, high, spec)
        except ValueError:  # that of these rows; who called has the tensor
            affine.scale_zero(*affine.min_max(rows, (1,)), spec)
            raise
        # no quotient of a largest magnitude rounds to more than the largest code
        write_values(part, scale, zero_point.float(), out, spec, whole=spec.symmetric)
        if not spec.symmetric:
            levels = rounding.round_level(torch.cat((low, high), 1), scale, zero_point)
            clamped |= bool(((levels < spec.code_min) | (levels > spec.code_max)).any())
        scales.append(scale)
        zeros.append(zero_point)
    shape = (*x.shape[:-1], 1)
    return y, torch.cat(scales).view(shape), torch.cat(zeros).view(shape), clamped
