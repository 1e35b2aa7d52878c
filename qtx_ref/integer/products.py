"""Matrix products of integer codes: exact, or as kernels that saturate make them.

    acc[m, n] = sum_k (a[m, k] - za) (b[k, n] - zb) [+ bias[n]]

**Through float BLAS.** A float32 holds every integer up to 2^24, so a float32 product of integers is exact, in whatever
order and with whatever fused steps it is summed, while K max|a| max|b| <= 2^24 (float64: 2^53). K is cut into blocks
that long and the blocks are added as integers: 1024 for int8.

**Zero points.** Unsigned codes are recentred, c = 2^(bits - 1) taken from code and zero point, which halves the largest
magnitude. With A = a - c and so on, the sum is A B - za colsum(B) - zb rowsum(A) + K za zb: one pass over the result
instead of wider operands. So za may differ by row of a (shape (M, 1)) and zb by column of b ((N,)), never along k.

**Overflow** is that of the exact sum: an accumulator that wraps and returns holds the right bits. So is saturation.

**Pairs.** PAIRS16 and RUNS16 are of products of uint8 by int8, by codes as they are, not recentred; the zero points are
subtracted afterwards, as above. Products of other operands are exact under them too, as the same engines have them;
but PAIRS16_SHIFTED multiplies int8 by int8 as uint8 by int8, and takes 128 colsum(B) away again.

Arrays: codes a (..., M, K) and b (..., K, N) of any integer dtype, zero points and biases (int32 or int64) in the
shapes that `matmul` states, accumulators (..., M, N), int32 or int64. A carrier is the dtype that holds codes while
they are multiplied: float32, float64 or that of the accumulator.
"""

from __future__ import annotations

import numpy as np

from ..quant.checks import check_integers, check_range, check_shape
from ..spec import QTX, MatmulRule, Overflow, Products, QuantSpec

__all__ = [
    "add_bias",
    "block_length",
    "block_product",
    "centre",
    "check_bias",
    "check_codes",
    "fit",
    "linear",
    "matmul",
    "matmul_pairs16",
    "pack_int4",
    "recentre",
    "recentre_zero",
    "saturates",
    "unpack_int4",
]

FLOAT_BITS = {np.float32: 24, np.float64: 53}
SHORTEST = 256  # float32 blocks shorter than this cost more in additions than float64 does


def centre(spec: QuantSpec) -> int:
    """What is taken from unsigned codes to make them signed."""
    return 0 if spec.has_sign else 2 ** (spec.bits - 1)


def block_length(a_spec: QuantSpec, b_spec: QuantSpec) -> tuple[int, type]:
    """The longest exact block of recentred codes, and the float type that carries it."""
    product = 2 ** (a_spec.bits + b_spec.bits - 2)  # max|A| max|B|
    length = 2 ** FLOAT_BITS[np.float32] // product
    return (length, np.float32) if length >= SHORTEST else (2 ** FLOAT_BITS[np.float64] // product, np.float64)


def check_codes(what: str, code: np.ndarray, spec: QuantSpec) -> None:
    """Raises ValueError where codes are not integers of the spec. A dtype that cannot hold others is not searched."""
    check_integers(what, code.dtype)
    limits = np.iinfo(code.dtype)
    if code.size == 0 or (limits.min >= spec.code_min and limits.max <= spec.code_max):
        return
    low, high = int(code.min()), int(code.max())
    if low < spec.code_min or high > spec.code_max:
        raise ValueError(
            f"{what} runs from {low} to {high}, outside {spec.code_min} to {spec.code_max}: check its spec"
        )


def recentre_zero(zero: np.ndarray | None, spec: QuantSpec, along_k: int) -> np.ndarray | None:
    """A zero point moved with its codes, int64; None where it is 0. Raises ValueError where it is no code, or varies
    along k."""
    if zero is None:
        return None if spec.has_sign else np.array(-centre(spec))
    zero = np.asanyarray(zero)
    check_codes("zero point", zero, spec)
    if zero.ndim >= -along_k and zero.shape[along_k] != 1:
        raise ValueError(f"zero points of shape {tuple(zero.shape)} vary along the sum: give one per row or column")
    moved = zero.astype(np.int64) - centre(spec)
    return moved if moved.any() else None


def block_product(a: np.ndarray, b: np.ndarray, length: int, wide: type) -> np.ndarray:
    """a @ b of integers, whatever type carries them, in blocks of `length` along k; summed in `wide`."""
    total = (a[..., :length] @ b[..., :length, :]).astype(wide)
    for start in range(length, a.shape[-1], length):
        stop = start + length
        total += (a[..., start:stop] @ b[..., start:stop, :]).astype(wide)
    return total


def fit(total: np.ndarray, bits: int, rule: MatmulRule) -> np.ndarray:
    """An int64 sum in an accumulator of `bits`, in its shape. Raises ValueError where it does not fit and the rule
    reports."""
    if bits == 64:
        return total
    if rule.overflow is Overflow.SATURATE:
        total = np.clip(total, -(2**31), 2**31 - 1)
    if rule.overflow is Overflow.REPORT:
        low, high = int(total.min(initial=0)), int(total.max(initial=0))
        if low < -(2**31) or high >= 2**31:
            raise ValueError(f"accumulators run from {low} to {high}, beyond int32: use 64 bits, or smaller scales")
    return total.astype(np.int32)  # keeps the lower 32 bits


def matmul(
    a: np.ndarray,
    b: np.ndarray,
    a_spec: QuantSpec,
    b_spec: QuantSpec,
    a_zero: np.ndarray | None = None,
    b_zero: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    accumulator: int = 32,
    rule: MatmulRule = QTX.matmul,
    integers: bool = False,
) -> np.ndarray:
    """Codes a (..., M, K) and b (..., K, N) -> accumulators (..., M, N), int32 or int64.

    Args:
        a_zero: zero point of a: one, or (..., M, 1); None is 0.
        b_zero: zero point of b: one, or (N,); None is 0.
        bias: integers in units of a's scale times b's, (N,), or (..., 1, N) where there are several products.
        accumulator: 32 or 64 bits. Codes of more than 8 bits want 64.
        integers: multiply in integers, without float carriers: slow, the same result.

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
        ends = bias.min(initial=0), bias.max(initial=0)
        largest_bias = max(-int(ends[0]), int(ends[1]))  # Python's integers: -2^63 has no magnitude in int64
    wide = np.int32 if accumulator == 32 and 4 * bound + largest_bias < 2**31 else np.int64
    length, carrier = (max(depth, 1), wide) if integers else block_length(a_spec, b_spec)
    shift = 128 if a_spec.has_sign else 0  # of bytes: uint8 is what pairs are made of
    bytes_a, bytes_b = ((a.astype(np.int32) + shift).astype(np.uint8), b.astype(np.int8)) if pairs else (a, b)
    a, b = recentre(a, a_spec, carrier), recentre(b, b_spec, carrier)
    if pairs:  # a b = A B + c colsum(B)
        columns = block_product(np.ones((1, depth), carrier), b, length, wide)
        total = matmul_pairs16(bytes_a, bytes_b, rule.run).astype(wide) - (centre(a_spec) + shift) * columns
    else:
        total = block_product(a, b, length, wide)
    for what, value in (("zero point", a_zero), ("zero point", b_zero), ("bias", bias)):
        check_shape(what, 0 if value is None else value, total.shape, "give one per row of a, or per column of b")
    if a_zero is not None:  # sums along k are products with ones, and as exact
        total -= (a_zero * block_product(np.ones((1, depth), carrier), b, length, wide)).astype(wide)
    if b_zero is not None:
        total -= (b_zero * block_product(a, np.ones((depth, 1), carrier), length, wide)).astype(wide)
        total += 0 if a_zero is None else (depth * a_zero * b_zero).astype(wide)
    if bias is not None:
        total = add_bias(total, bias.astype(wide), 4 * bound + largest_bias, rule)
    return total if total.dtype == np.int32 else fit(total, accumulator, rule)


def saturates(a_spec: QuantSpec, b_spec: QuantSpec, rule: MatmulRule) -> bool:
    """Whether the rule multiplies these operands in pairs: uint8 by int8, or int8 moved up."""
    narrow = max(a_spec.bits, b_spec.bits) <= 8
    taken = not a_spec.has_sign or rule.products is Products.PAIRS16_SHIFTED
    return rule.products is not Products.EXACT and narrow and taken and b_spec.has_sign


def check_bias(bias: np.ndarray, columns: int) -> None:
    """Raises ValueError unless a bias is int64 at most and has one number per column."""
    check_range("bias", bias, -(2**63), 2**63 - 1, "an accumulator has 64 bits at most")
    if np.ndim(bias) == 0 or bias.shape[-1] != columns or (bias.ndim > 1 and bias.shape[-2] != 1):
        raise ValueError(f"bias of shape {np.shape(bias)}: give one number per column, ({columns},)")


def add_bias(total: np.ndarray, bias: np.ndarray, bound: int, rule: MatmulRule) -> np.ndarray:
    """total + bias, no magnitude above `bound`; int64 or int32 as they are, in the shape of total. Raises ValueError
    where int64 does not hold it and the rule reports."""
    result = total + bias
    if bound >= 2**63 and rule.overflow is not Overflow.WRAP:
        lost = ((total ^ result) & (bias ^ result)) < 0  # the sum has neither's sign
        if rule.overflow is Overflow.SATURATE:
            return np.where(lost, np.where(bias < 0, -(2**63), 2**63 - 1), result)
        if lost.any():
            exact = int(total[lost][0]) + int(np.broadcast_to(bias, lost.shape)[lost][0])
            raise ValueError(f"accumulators reach {exact}, beyond int64: use a smaller bias, or larger scales")
    return result


def recentre(code: np.ndarray, spec: QuantSpec, carrier: type) -> np.ndarray:
    """Codes less their centre, as `carrier`."""
    code = code.astype(carrier)
    code -= carrier(centre(spec))
    return code


def linear(
    x: np.ndarray,
    weight: np.ndarray,
    x_spec: QuantSpec,
    w_spec: QuantSpec,
    x_zero: np.ndarray | None = None,
    w_zero: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    accumulator: int = 32,
    rule: MatmulRule = QTX.matmul,
    integers: bool = False,
) -> np.ndarray:
    """`matmul` of x (..., I) with a weight (O, I), whose zero points are (O, 1), (O,) or one -> (..., O).

    The bias is (O,); one of shape (O, 1), as a weight's scales are, would be added along the rows: ValueError.
    Everything else as in `matmul`."""
    w_zero = None if w_zero is None else np.asanyarray(w_zero).T
    return matmul(x, weight.T, x_spec, w_spec, x_zero, w_zero, bias, accumulator, rule, integers)


def matmul_pairs16(a: np.ndarray, b: np.ndarray, pairs: int = 1) -> np.ndarray:
    """a @ b as x86 without VNNI computes it: uint8 a (..., M, K) times int8 b (..., K, N) -> int64, saturating.

    `vpmaddubsw` adds the products of neighbours k = 2 j, 2 j + 1 into int16 and saturates: 255 * 127 + 255 * 127 =
    64770 becomes 32767. With `pairs` = 1 (acc32 kernels: fbgemm, oneDNN, MLAS) `vpmaddwd` widens each pair at once and
    is exact; acc16 kernels first add `pairs` of them, in order of k, in saturating int16 (`vpaddsw`). An odd K
    and a last, shorter run are padded with 0, as packed operands are. Raises ValueError for operands of another dtype.
    """
    if a.dtype != np.uint8 or b.dtype != np.int8:
        raise ValueError(f"operands are {a.dtype} and {b.dtype}: the instruction multiplies uint8 by int8")
    missing = -a.shape[-1] % (2 * pairs)
    a = np.concatenate([a, np.zeros((*a.shape[:-1], missing), np.uint8)], -1).astype(np.int32)
    b = np.concatenate([b, np.zeros((*b.shape[:-2], missing, b.shape[-1]), np.int8)], -2).astype(np.int32)
    total: np.ndarray = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), np.int64)
    for start in range(0, a.shape[-1], 2 * pairs):
        run = np.int32(0)
        for k in range(start, start + 2 * pairs, 2):
            pair = a[..., k, None] * b[..., None, k, :] + a[..., k + 1, None] * b[..., None, k + 1, :]  # (..., M, N)
            run = np.clip(run + np.clip(pair, -(2**15), 2**15 - 1), -(2**15), 2**15 - 1)
        total += run
    return total


def pack_int4(code: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, signed or not, two per byte along the last axis, the first in the low half: (..., D) ->
    (..., ceil(D / 2)) uint8. An odd D is padded with 0. Raises ValueError where 4 bits do not hold them."""
    low, high = int(code.min(initial=0)), int(code.max(initial=0))
    if low < -8 or high > 15 or high - low > 15:
        raise ValueError(f"codes run from {low} to {high}: 4 bits hold -8 to 7, or 0 to 15")
    half = (code.astype(np.int32) & 15).astype(np.uint8)
    if half.shape[-1] % 2:
        half = np.concatenate([half, np.zeros((*half.shape[:-1], 1), np.uint8)], -1)
    return half[..., 0::2] | (half[..., 1::2] << 4)


def unpack_int4(packed: np.ndarray, length: int, signed: bool) -> np.ndarray:
    """What `pack_int4` packed: (..., ceil(length / 2)) uint8 -> (..., length), int8 if signed, else uint8. Raises
    ValueError for another dtype or length."""
    if packed.dtype != np.uint8 or packed.shape[-1] != -(-length // 2):
        raise ValueError(f"{packed.shape[-1]} {packed.dtype} do not hold {length} codes of 4 bits: check the shape")
    half = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)[..., :length]
    return ((half ^ 8).astype(np.int8) - np.int8(8)) if signed else half
