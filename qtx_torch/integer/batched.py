"""Exact products of data by data, the two of attention, as compiled models run them.

Not in the reference: as `carriers`, of operands that are both known only as the model runs.

Where bytes are fast, int8 products head by head, and the zero points by sums of rows and columns:

    acc = A B - za colsum(B) - zb rowsum(A) + K za zb      (recentred codes and zero points: see `products`)

Else, and for small heads, float products of code - zero point, exact in blocks.

Floors for T tokens and heads of K: 2 T^2 K operations at the int8 unit's rate, and 4 T^2 + 2 T K bytes; the second is
the larger below K = 128 or so, as accumulators of scores go through memory before they are codes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qtx_ref.spec import QTX, MatmulRule, QuantSpec

from . import machine
from .machine import recentre_bytes
from .products import FLOAT_BITS, SHORTEST, centre, plain_float32, saturates

SMALL = 128 * 128 * 32  # multiplications; fewer are not worth a call for each head
LONG = 256  # elements; more are summed sooner as a product by ones


@torch.library.custom_op("qtx::multiply_heads", mutates_args=(), device_types="cpu")
def multiply_heads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 a (..., M, K) by b (..., K, N), the same leading axes, matrix by matrix: torch has no such product. Also
    the sums over K of a (..., M, 1) and of b (..., 1, N); int32, contiguous: inductor would lay them out as a and b
    are, heads innermost, and what is fused with them would go through memory in that order."""
    total, rows = (a.new_empty(*a.shape[:-1], width, dtype=torch.int32) for width in (b.shape[-1], 1))
    ones = a.new_ones(a.shape[-1], 1) if a.shape[-1] > LONG else None

    def fill(a: Tensor, b: Tensor, total: Tensor, rows: Tensor) -> None:
        if a.ndim > 2:
            for parts in zip(a, b, total, rows, strict=True):
                fill(*parts)
            return
        torch._int_mm(a, b, out=total)
        if ones is not None:
            torch._int_mm(a, ones, out=rows)

    fill(a, b, total, rows)
    if ones is None:
        rows.copy_(a.sum(-1, keepdim=True, dtype=torch.int32))
    return total, rows, b.sum(-2, keepdim=True, dtype=torch.int32).contiguous()


@multiply_heads.register_fake
def _(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape, new = a.shape[:-1], functools.partial(a.new_empty, dtype=torch.int32)
    return new(*shape, b.shape[-1]), new(*shape, 1), new(*shape[:-1], 1, b.shape[-1])


def multiply(
    a: Tensor,
    b: Tensor,
    a_spec: QuantSpec,
    b_spec: QuantSpec,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    accumulator: int = 32,
    rule: MatmulRule = QTX.matmul,
) -> Tensor:
    """Codes a (..., M, K) by b (..., K, N), both from the data -> accumulators (..., M, N), int32 or int64.

    Zero points, in the shapes that `products.matmul` takes, leave the codes before they are multiplied: |a - za| is at
    most 2^bits - 1. Raises ValueError where the specs do not prove the sums to fit, or pairs may saturate.
    """
    if saturates(a_spec, b_spec, rule):
        raise ValueError("pairs of these operands may saturate: the compiled form is exact; leave compiled out")
    product, depth = magnitude(a_spec) * magnitude(b_spec), a.shape[-1]
    if accumulator == 32 and depth * product >= 2**31:
        raise ValueError(
            f"sums of {depth} products of {a_spec.bits} by {b_spec.bits} bits may leave int32: use 64 bits"
        )
    wide = torch.int32 if accumulator == 32 else torch.int64
    if takes_bytes(a, b, a_spec, b_spec):
        return multiply_bytes(a, b, a_spec, b_spec, a_zero, b_zero).to(wide)
    kind, length = float_blocks(product, a.device.type)
    a, b = subtract_zero(a, a_zero, kind), subtract_zero(b, b_zero, kind)
    if depth <= length:
        return (a @ b).to(wide)
    blocks = -(-depth // length)
    missing = blocks * length - depth
    a = torch.nn.functional.pad(a, (0, missing)).unflatten(-1, (blocks, length)).movedim(-2, 0)
    b = torch.nn.functional.pad(b, (0, 0, 0, missing)).unflatten(-2, (blocks, length)).movedim(-3, 0)
    return (a @ b).to(wide).sum(0, dtype=wide)


def multiplies_bytes(device: str) -> bool:
    """`machine.multiplies_bytes`, as a function that `hold_settings` can mark."""
    return machine.multiplies_bytes(device)


def hold_settings() -> None:
    """Tells the compiler what a graph holds as constants: it is made anew when torch's settings change. A call, not
    decorators, for it imports the compiler, which takes a second."""
    for known in (plain_float32, multiplies_bytes):
        torch.compiler.assume_constant_result(known)


def takes_bytes(a: Tensor, b: Tensor, a_spec: QuantSpec, b_spec: QuantSpec) -> bool:
    """Whether int8 products are exact here, and quicker: a call for each head takes 3 us however small it is."""
    size = a.shape[-2] * a.shape[-1] * b.shape[-1]
    narrow = max(a_spec.bits, b_spec.bits) <= 8 and a.ndim == b.ndim and a.shape[:-2] == b.shape[:-2]
    return narrow and a.device.type == "cpu" and size >= SMALL and a.shape[-2] > 1 and multiplies_bytes("cpu")


def multiply_bytes(
    a: Tensor, b: Tensor, a_spec: QuantSpec, b_spec: QuantSpec, a_zero: Tensor | None, b_zero: Tensor | None
) -> Tensor:
    """a b - za colsum(b) - zb rowsum(a) + K za zb, all recentred: int32."""
    a, b = recentre_bytes(a, centre(a_spec)), recentre_bytes(b, centre(b_spec))
    total, rows, columns = multiply_heads(a, b)
    za, zb = zero_less_centre(a_zero, a_spec), zero_less_centre(b_zero, b_spec)
    if za is not None:
        total = total - za * columns
    if zb is not None:
        total = total - zb * (rows if za is None else rows - a.shape[-1] * za)
    return total


def zero_less_centre(zero: Tensor | None, spec: QuantSpec) -> Tensor | int | None:
    """The zero point of recentred codes, int32; None where the spec says that it is 0."""
    if zero is None:
        return -centre(spec) or None
    return None if spec.symmetric else zero.int() - centre(spec)


def float_blocks(product: int, device: str) -> tuple[torch.dtype, int]:
    """The float that carries products of this magnitude, and how many of them it sums exactly."""
    kind = torch.float32 if plain_float32(device) and 2**24 // product >= SHORTEST else torch.float64
    return kind, 2 ** FLOAT_BITS[kind] // product


def magnitude(spec: QuantSpec) -> int:
    """The largest |code - zero point|."""
    return max(-spec.code_min, spec.code_max) if spec.symmetric else spec.code_max - spec.code_min


def subtract_zero(code: Tensor, zero: Tensor | None, kind: torch.dtype) -> Tensor:
    """code - zero, as `kind`."""
    return code.to(kind) if zero is None else (code.int() - zero).to(kind)
