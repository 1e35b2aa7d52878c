"""Matrix products of integer codes: exact, or as kernels that saturate make them.

Differs from the reference: plain_float32, name, byte_product, carrier: a device multiplies bytes in ways of its own.

    acc[m, n] = sum_k (a[m, k] - za) (b[k, n] - zb) [+ bias[n]]

**Through float BLAS.** A float32 holds every integer up to 2^24, so a float32 product of integers is exact, in whatever
order and with whatever fused steps it is summed, while K max|a| max|b| <= 2^24 (float64: 2^53). K is cut into blocks
that long and the blocks are added as integers: 1024 for int8. Never float32 on CUDA, which may round to TF32 first;
float64 there. A CPU with byte instructions multiplies int8 itself.

**Zero points.** Unsigned codes are recentred, c = 2^(bits - 1) taken from code and zero point, which halves the largest
magnitude. With A = a - c and so on, the sum is A B - za colsum(B) - zb rowsum(A) + K za zb: one pass over the result
instead of wider operands. So za may differ by row of a (shape (M, 1)) and zb by column of b ((N,)), never along k.

**Overflow** is that of the exact sum: an accumulator that wraps and returns holds the right bits. So is saturation.

**Pairs.** PAIRS16 and RUNS16 are of products of uint8 by int8, by codes as they are, not recentred; the zero points are
subtracted afterwards, as above. Products of other operands are exact under them too, as the same engines have them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qtx_ref.spec import QTX, MatmulRule, Overflow, Products, QuantSpec

from ..quant.checks import check_integers, check_range, check_shape
from ..tracing import is_traced
from . import machine

FLOAT_BITS = {torch.float32: 24, torch.float64: 53}
SHORTEST = 256  # float32 blocks shorter than this cost more in additions than float64 does


@functools.cache
def byte_instructions(device: str) -> bool:
    """Whether `torch._int_mm` is fast and exact: with VNNI it took a tenth of the time of a float32 product of 512 x
    768 x 3072 (benchmarks/integer_matmul.py); without, torch's own loop took 50 times as much, and oneDNN told to use
    AVX2 (ONEDNN_MAX_CPU_ISA) saturates pairs in int16, wherefore it is tried."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return device == "cpu" and has_vnni() and machine.exact_bytes(device, 127)


def plain_float32(device: str) -> bool:
    """Whether a float32 product keeps 24 bits. TF32, reduced matmul precision and autocast do not; then float64
    carries."""
    return (
        device == "cpu" and torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
    )


def centre(spec: QuantSpec) -> int:
    """What is taken from unsigned codes to make them signed."""
    return 0 if spec.has_sign else 2 ** (spec.bits - 1)


def block_length(a_spec: QuantSpec, b_spec: QuantSpec) -> tuple[int, torch.dtype]:
    """The longest exact block of recentred codes, and the float type that carries it."""
    product = 2 ** (a_spec.bits + b_spec.bits - 2)  # max|A| max|B|
    length = 2 ** FLOAT_BITS[torch.float32] // product
    return (length, torch.float32) if length >= SHORTEST else (2 ** FLOAT_BITS[torch.float64] // product, torch.float64)


def name(dtype: torch.dtype) -> str:
    """As NumPy calls it."""
    return str(dtype).removeprefix("torch.")


def check_codes(what: str, code: Tensor, spec: QuantSpec) -> None:
    """Raises ValueError where codes are not integers of the spec. A dtype that cannot hold others is not searched."""
    check_integers(what, code.dtype)
    limits = torch.iinfo(code.dtype)
    if code.numel() == 0 or (limits.min >= spec.code_min and limits.max <= spec.code_max):
        return
    if code.dtype is torch.uint64:
        check_range(what, code, spec.code_min, spec.code_max, "check its spec")
    low, high = code.long().min().item(), code.long().max().item()  # torch has no minimum of uint16 and wider
    if low < spec.code_min or high > spec.code_max:
        raise ValueError(
            f"{what} runs from {low} to {high}, outside {spec.code_min} to {spec.code_max}: check its spec"
        )


def recentre_zero(zero: Tensor | None, spec: QuantSpec, along_k: int) -> Tensor | None:
    """A zero point moved with its codes, int64; None where it is 0. Raises ValueError where it is no code, or varies
    along k."""
    if zero is None:
        return None if spec.has_sign else torch.tensor(-centre(spec))
    check_codes("zero point", zero, spec)
    if zero.ndim >= -along_k and zero.shape[along_k] != 1:
        raise ValueError(f"zero points of shape {tuple(zero.shape)} vary along the sum: give one per row or column")
    moved = zero.long() - centre(spec)
    return moved if moved.any() else None


def block_product(a: Tensor, b: Tensor, length: int, wide: torch.dtype) -> Tensor:
    """a @ b of integers, whatever type carries them, in blocks of `length` along k; summed in `wide`."""
    total = (a[..., :length] @ b[..., :length, :]).to(wide)
    for start in range(length, a.shape[-1], length):
        stop = start + length
        total += (a[..., start:stop] @ b[..., start:stop, :]).to(wide)
    return total


def byte_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b of int8, b (K, N), K above 1, summed in int32 by byte instructions."""
    rows = a.reshape(-1, a.shape[-1])
    if (
        rows.shape[0] == 1
    ):  # _int_mm (torch 2.13) misreads one row whose strides are (1, 1), as a column's transpose has
        rows = rows.contiguous().as_strided(rows.shape, (rows.shape[1], 1))
    return torch._int_mm(rows, b).reshape(*a.shape[:-1], b.shape[-1]).to(wide)


def carrier(a: Tensor, b: Tensor, a_spec: QuantSpec, b_spec: QuantSpec) -> torch.dtype:
    """What carries the products of `matmul`: int8 for byte instructions, or the float of the blocks."""
    depth, bits = a.shape[-1], a_spec.bits + b_spec.bits
    narrow = max(a_spec.bits, b_spec.bits) <= 8 and b.ndim == 2 and depth * 2 ** (bits - 2) < 2**31
    if narrow and depth > 1 and a.numel() > 0 and byte_instructions(a.device.type):
        return torch.int8
    kind = block_length(a_spec, b_spec)[1]
    return torch.float64 if kind is torch.float32 and not plain_float32(a.device.type) else kind


def fit(total: Tensor, bits: int, rule: MatmulRule) -> Tensor:
    """An int64 sum in an accumulator of `bits`, in its shape. Raises ValueError where it does not fit and the rule
    reports; a compiled graph does not look, as who compiles proves that it fits."""
    if bits == 64:
        return total
    if rule.overflow is Overflow.SATURATE:
        total = total.clamp(-(2**31), 2**31 - 1)
    if rule.overflow is Overflow.REPORT and not is_traced():
        low, high = (min(int(total.min()), 0), max(int(total.max()), 0)) if total.numel() else (0, 0)
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"accumulators run from {low} to {high}, beyond int32: use 64 bits, or smaller scales")
    return total.to(torch.int32)  # keeps the lower 32 bits


def matmul(
    a: Tensor,
    b: Tensor,
    a_spec: QuantSpec,
    b_spec: QuantSpec,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
    accumulator: int = 32,
    rule: MatmulRule = QTX.matmul,
    integers: bool = False,
) -> Tensor:
    """Codes a (..., M, K) and b (..., K, N) -> accumulators (..., M, N), int32 or int64.

    Args:
        a_zero: zero point of a: one, or (..., M, 1); None is 0.
        b_zero: zero point of b: one, or (N,); None is 0.
        bias: integers in units of a's scale times b's, (N,), or (..., 1, N) where there are several products.
        accumulator: 32 or 64 bits. Codes of more than 8 bits want 64.
        integers: multiply in integers, without float carriers: slow, the same result, CPU only.

    Raises:
        ValueError: codes outside their spec, zero points or a bias that vary along another axis, or accumulators beyond
            their width where the rule reports.
    """
    check_codes("left operand", a, a_spec)
    check_codes("right operand", b, b_spec)
    if accumulator not in (32, 64):
        raise ValueError(f"accumulator is {accumulator}: give 32 or 64 bits")
    depth, pairs = a.shape[-1], saturates(a_spec, b_spec, rule)
    a_zero, b_zero = recentre_zero(a_zero, a_spec, -1), recentre_zero(b_zero, b_spec, -2)
    # |each of the four terms| <= depth max|A| max|B|, and pairs add one: below 2^28 they and their sum stay in int32
    bound = (2 if pairs else 1) * depth * 2 ** (a_spec.bits + b_spec.bits - 2)
    largest_bias = 0
    if bias is not None:
        check_bias(bias, b.shape[-1])
        ends = (bias.long().min(), bias.long().max()) if bias.numel() else (0, 0)
        largest_bias = max(-int(ends[0]), int(ends[1]), 0)  # Python's integers: -2^63 has no magnitude in int64
    wide = torch.int32 if accumulator == 32 and 4 * bound + largest_bias < 2**31 else torch.int64
    length, kind = (max(depth, 1), wide) if integers else block_length(a_spec, b_spec)
    product = functools.partial(block_product, length=length, wide=wide)
    if not integers:
        kind = carrier(a, b, a_spec, b_spec)
        if kind is torch.int8:
            product = functools.partial(byte_product, wide=wide)
    shift = 128 if a_spec.has_sign else 0  # of bytes: uint8 is what pairs are made of
    bytes_a, bytes_b = ((a.int() + shift).to(torch.uint8), b.to(torch.int8)) if pairs else (a, b)
    a, b = recentre(a, a_spec, kind), recentre(b, b_spec, kind)
    if pairs:  # a b = A B + c colsum(B)
        columns = product(torch.ones(1, depth, dtype=kind, device=b.device), b)
        total = matmul_pairs16(bytes_a, bytes_b, rule.run).to(wide) - (centre(a_spec) + shift) * columns
    else:
        total = product(a, b)
    for what, value in (("zero point", a_zero), ("zero point", b_zero), ("bias", bias)):
        if value is not None:
            check_shape(what, value, total.shape, "give one per row of a, or per column of b")
    if a_zero is not None:  # sums along k are products with ones, and as exact
        total -= (a_zero * product(torch.ones(1, depth, dtype=kind, device=b.device), b)).to(wide)
    if b_zero is not None:
        total -= (b_zero * product(a, torch.ones(depth, 1, dtype=kind, device=b.device))).to(wide)
        total += 0 if a_zero is None else (depth * a_zero * b_zero).to(wide)
    if bias is not None:
        total = add_bias(total, bias.to(wide), 4 * bound + largest_bias, rule)
    return total if total.dtype == torch.int32 else fit(total, accumulator, rule)


def saturates(a_spec: QuantSpec, b_spec: QuantSpec, rule: MatmulRule) -> bool:
    """Whether the rule multiplies these operands in pairs: uint8 by int8, or int8 moved up."""
    narrow = max(a_spec.bits, b_spec.bits) <= 8
    taken = not a_spec.has_sign or rule.products is Products.PAIRS16_SHIFTED
    return rule.products is not Products.EXACT and narrow and taken and b_spec.has_sign


def check_bias(bias: Tensor, columns: int) -> None:
    """Raises ValueError unless a bias is int64 at most and has one number per column."""
    check_range("bias", bias, -(2**63), 2**63 - 1, "an accumulator has 64 bits at most")
    if bias.ndim == 0 or bias.shape[-1] != columns or (bias.ndim > 1 and bias.shape[-2] != 1):
        raise ValueError(f"bias of shape {tuple(bias.shape)}: give one number per column, ({columns},)")


def add_bias(total: Tensor, bias: Tensor, bound: int, rule: MatmulRule) -> Tensor:
    """total + bias, no magnitude above `bound`; int64 or int32 as they are, in the shape of total. Raises ValueError
    where int64 does not hold it and the rule reports."""
    result = total + bias
    if bound >= 2**63 and rule.overflow is not Overflow.WRAP:
        lost = ((total ^ result) & (bias ^ result)) < 0  # the sum has neither's sign
        if rule.overflow is Overflow.SATURATE:
            return torch.where(lost, torch.where(bias < 0, -(2**63), 2**63 - 1), result)
        if lost.any():
            exact = int(total[lost][0]) + int(bias.expand(lost.shape)[lost][0])
            raise ValueError(f"accumulators reach {exact}, beyond int64: use a smaller bias, or larger scales")
    return result


def recentre(code: Tensor, spec: QuantSpec, carrier: torch.dtype) -> Tensor:
    """Codes less their centre, as `carrier`. In int8, 128 less is the top bit flipped."""
    code = code.to(carrier)
    if centre(spec) == 0:
        return code
    return code ^ -128 if carrier is torch.int8 and spec.bits == 8 else code - centre(spec)


def linear(
    x: Tensor,
    weight: Tensor,
    x_spec: QuantSpec,
    w_spec: QuantSpec,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    bias: Tensor | None = None,
    accumulator: int = 32,
    rule: MatmulRule = QTX.matmul,
    integers: bool = False,
) -> Tensor:
    """`matmul` of x (..., I) with a weight (O, I), whose zero points are (O, 1), (O,) or one -> (..., O).

    The bias is (O,); one of shape (O, 1), as a weight's scales are, would be added along the rows: ValueError.
    Everything else as in `matmul`."""
    w_zero = None if w_zero is None else w_zero.mT if w_zero.ndim > 1 else w_zero
    return matmul(x, weight.T, x_spec, w_spec, x_zero, w_zero, bias, accumulator, rule, integers)


def matmul_pairs16(a: Tensor, b: Tensor, pairs: int = 1) -> Tensor:
    """a @ b as x86 without VNNI computes it: uint8 a (..., M, K) times int8 b (..., K, N) -> int64, saturating.

    `vpmaddubsw` adds the products of neighbours k = 2 j, 2 j + 1 into int16 and saturates: 255 * 127 + 255 * 127 =
    64770 becomes 32767. With `pairs` = 1 (acc32 kernels: fbgemm, oneDNN, MLAS) `vpmaddwd` widens each pair at once and
    is exact; acc16 kernels first add `pairs` of them, in order of k, in saturating int16 (`vpaddsw`). An odd K
    and a last, shorter run are padded with 0, as packed operands are. Raises ValueError for operands of another dtype.
    """
    if a.dtype != torch.uint8 or b.dtype != torch.int8:
        raise ValueError(f"operands are {name(a.dtype)} and {name(b.dtype)}: the instruction multiplies uint8 by int8")
    missing = -a.shape[-1] % (2 * pairs)
    a = torch.nn.functional.pad(a.int(), (0, missing))
    b = torch.nn.functional.pad(b.int(), (0, 0, 0, missing))
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    total = torch.zeros(shape, dtype=torch.int64, device=a.device)
    for start in range(0, a.shape[-1], 2 * pairs):
        run = torch.zeros((), dtype=torch.int32, device=a.device)
        for k in range(start, start + 2 * pairs, 2):
            pair = a[..., k, None] * b[..., None, k, :] + a[..., k + 1, None] * b[..., None, k + 1, :]  # (..., M, N)
            run = (run + pair.clamp(-(2**15), 2**15 - 1)).clamp(-(2**15), 2**15 - 1)
        total += run
    return total


def pack_int4(code: Tensor) -> Tensor:
    """Codes of 4 bits, signed or not, two per byte along the last axis, the first in the low half: (..., D) ->
    (..., ceil(D / 2)) uint8. An odd D is padded with 0. Raises ValueError where 4 bits do not hold them."""
    low, high = (min(int(code.min()), 0), max(int(code.max()), 0)) if code.numel() else (0, 0)
    if low < -8 or high > 15 or high - low > 15:
        raise ValueError(f"codes run from {low} to {high}: 4 bits hold -8 to 7, or 0 to 15")
    half = (code.int() & 15).to(torch.uint8)
    if half.shape[-1] % 2:
        half = torch.nn.functional.pad(half, (0, 1))
    return half[..., 0::2] | (half[..., 1::2] << 4)


def unpack_int4(packed: Tensor, length: int, signed: bool) -> Tensor:
    """What `pack_int4` packed: (..., ceil(length / 2)) uint8 -> (..., length), int8 if signed, else uint8. Raises
    ValueError for another dtype or length."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-length // 2):
        raise ValueError(
            f"{packed.shape[-1]} {name(packed.dtype)} do not hold {length} codes of 4 bits: check the shape"
        )
    half = torch.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)[..., :length]
    return ((half ^ 8).to(torch.int8) - 8) if signed else half
