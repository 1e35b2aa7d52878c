"""The products of groups: where scales vary along a sum, each of them has channels and an accumulator of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qtx_ref.integer.model import Code
from qtx_ref.spec import WIDE_BITS, WIDE_ZERO, QuantSpec

__all__ = ["split_groups"]


def split_groups(a: Code, b: Code, multiplier: np.ndarray) -> Iterator[tuple[Code, Code]]:
    """The operands of each group of channels, (..., H, M, K) and (..., H, K, N): of one multiplier, (..., H, 1, K),
    and of one zero point on either side, in their order.

    The channels of a group lie elsewhere in each head: where a head has fewer than another, codes at the zero points,
    which add nothing, stand for the rest."""
    heads, depth = multiplier.shape[-3], a.shape[-1]
    both = a.ndim == 4  # scores: keys have zero points along the sum, weights have not
    sides = [
        multiplier,
        a.zero_point,
        *([np.swapaxes(b.zero_point, -1, -2) if np.ndim(b.zero_point) else b.zero_point] * both),
    ]
    keys = np.stack([np.broadcast_to(x, (1, heads, 1, depth)).reshape(heads, depth).astype(np.int64) for x in sides])
    for own in np.unique(keys.reshape(len(keys), -1), axis=1).T:
        member = (keys == own[:, None, None]).all(axis=0)  # (H, K)
        order = np.argsort(~member, axis=-1, kind="stable")[:, : member.sum(axis=-1).max()]
        there = np.take_along_axis(member, order, axis=-1)
        lead = (1,) * (a.ndim - 3)
        left = np.take_along_axis(a.value, order.reshape(*lead, heads, 1, -1), axis=-1)
        right = np.take_along_axis(b.value, order.reshape(*lead, heads, -1, 1), axis=-2)
        zero = own[2].astype(np.int32) if both else b.zero_point
        left = np.where(there[:, None, :], left, own[1]).astype(a.value.dtype)
        right = np.where(there[:, :, None], right, zero).astype(b.value.dtype)
        spec = group_spec(a.spec, own[1])
        yield Code(left, None, own[1].astype(np.int32), spec), Code(right, None, zero, b.spec)


def group_spec(spec: QuantSpec, zero_point: int) -> QuantSpec:
    """The quantizer of the channels of one group, wide ones or others."""
    if spec.wide is not None and zero_point == WIDE_ZERO:
        return QuantSpec(WIDE_BITS)
    return QuantSpec(spec.bits, spec.symmetric, narrow=spec.narrow, mirrored=spec.mirrored, signed=spec.signed)
