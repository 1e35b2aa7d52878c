"""What a field of an engine's rule may say, each value with its meaning."""

from __future__ import annotations

from .base import Name

__all__ = [
    "Beyond",
    "Bias",
    "DequantizeForm",
    "Dtype",
    "HighProduct",
    "InfinityPolicy",
    "LeftShift",
    "NanPolicy",
    "Nonlinear",
    "Nudging",
    "Order",
    "Overflow",
    "Products",
    "Rounding",
    "SymmetricScale",
    "ZeroPoint",
]


class Rounding(Name):
    """From a real number to an integer."""

    HALF_EVEN = "half_even"  # nearest, ties to even: IEEE 754, NumPy's rint
    HALF_AWAY = "half_away"  # nearest, ties away from zero: C's round
    HALF_UP = "half_up"  # floor(x + 1/2)
    TOWARD_ZERO = "toward_zero"
    FLOOR = "floor"
    STOCHASTIC = "stochastic"  # up with the probability of the fraction, by a Philox word per element


class Dtype(Name):
    """bfloat16 and float16 are emulated: each operation in float32, its result rounded to nearest even."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INPUT = "input"  # that of the tensor: float16 and bfloat16 are worked with as such, all others in float32


class SymmetricScale(Name):
    """Scale of a symmetric quantizer. An asymmetric one has (high - low) / (code_max - code_min)."""

    ABSMAX = "absmax"  # absmax / code_max: 127 for 8 bits
    ABSMAX_HALF = "absmax_half"  # absmax / ((2^bits - 1) / 2): 127.5 for 8 bits
    TWO_SIDED = "two_sided"  # max(|low| / |code_min|, high / code_max): 128 and 127 for 8 bits


class Nudging(Name):
    """Which real zero point is rounded to a code; the rounding moves the range so that 0 stays exact."""

    FROM_LOW = "from_low"  # code_min - low / scale
    LOW_ROUNDED = "low_rounded"  # code_min - round(low / scale): the same but for ties
    CLOSER_END = "closer_end"  # that, or code_max - high / scale where |code_max| + |high / scale| is not larger


class ZeroPoint(Name):
    """When the zero point is added."""

    AFTER = "after"  # round(x / scale) + zero_point, the sum in integers
    AFTER_FLOAT = "after_float"  # the same in floats, the sum rounded to the arithmetic's dtype
    BEFORE = "before"  # round(x / scale + zero_point), the sum rounded to the arithmetic's dtype first
    FUSED = "fused"  # round(x (1 / scale) + zero_point), product and sum one fused multiply-add in float32


class NanPolicy(Name):
    """The code of NaN."""

    RAISE = "raise"  # ValueError; fake quantization lets NaN through
    ZERO = "zero"  # the code of real 0: the zero point
    RAW_ZERO = "raw_zero"  # the code 0, clamped to the quantizer's codes
    CODE_MIN = "code_min"
    CODE_MAX = "code_max"
    CONVERTED = "converted"  # INT_MIN, as x86 converts it; a zero point added after that wraps; then clamped


class InfinityPolicy(Name):
    """The code of an infinity."""

    SATURATE = "saturate"  # that of a number beyond every code, as `Beyond` has it
    RAISE = "raise"


class Beyond(Name):
    """A rounded level that an int32 does not hold. A zero point that is added after is added to the integer."""

    SATURATE = "saturate"  # clamped as a float, or as a wider integer
    WRAP32 = "wrap32"  # converted to int32 (x86: INT_MIN), then the zero point is added and wraps, then clamped
    INT64 = "int64"  # the same in int64: beyond 2^63 INT64_MIN


class DequantizeForm(Name):
    """scale * (code - zero_point), and what it may be computed as."""

    DIFFERENCE = "difference"  # scale * (code - zero_point), the difference in integers
    EXPANDED = "expanded"  # scale * code + (-zero_point * scale), each rounded


class Products(Name):
    """How the products of codes are added up."""

    EXACT = "exact"
    PAIRS16 = "pairs16"  # neighbours along the sum in saturating int16 first: vpmaddubsw, x86 without VNNI
    PAIRS16_SHIFTED = "pairs16_shifted"  # the same, int8 operands moved up by 128 for it: oneDNN
    RUNS16 = "runs16"  # and runs of `run` pairs in saturating int16 after that: acc16 kernels


class Overflow(Name):
    """An accumulator that does not fit its width."""

    REPORT = "report"  # ValueError naming the value
    WRAP = "wrap"  # two's complement, as the hardware adds
    SATURATE = "saturate"


class Bias(Name):
    """What a bias is and when it is added. A float one belongs to a requantization in floats; where accumulators go on
    without one, a bias is INT32 under every rule."""

    INT32 = "int32"  # codes in units of the accumulator, added to it
    FLOAT_BEFORE = "float_before"  # float32, divided by the accumulator's unit and added to it before it is scaled
    FLOAT_BEFORE_FUSED = "float_before_fused"  # times 1 / unit instead, product and sum one fused multiply-add, float32
    FLOAT_AFTER = "float_after"  # float32, added to real numbers (Order.STEPS), or where M is one factor in units of y


class HighProduct(Name):
    """The high half of a 64-bit product of accumulator and multiplier, before the last shift."""

    EXACT = "exact"  # the whole product is kept: the last shift alone rounds
    HALF_UP = "half_up"  # rounding doubling high multiply: ARM's SQRDMULH
    TRUNCATED = "truncated"  # doubling high multiply: ARM's SQDMULH


class LeftShift(Name):
    """What int32 does not hold where M > 1: the accumulator shifted left before a high product, or the level that an
    exact product makes."""

    REPORT = "report"  # ValueError
    SATURATE = "saturate"
    WRAP = "wrap"


class Order(Name):
    """The factors that a float requantization multiplies an accumulator by, in turn; of the last, it may be divided. x,
    w, y: scales of the operands and of the result."""

    RATIO = "ratio"  # M = x w / y
    RATIO32 = "ratio32"  # the same, M itself rounded to float32 whatever the dtype of the product
    RECIPROCAL = "reciprocal"  # M = (x w) (1 / y)
    STEPS = "steps"  # x', w', then 1 / y, where s' = 1 / (1 / s)
    STEPS_DIVIDED = "steps_divided"  # x', w', then divided by y'
    STEPS_JOINED = "steps_joined"  # x' w', then 1 / y
    SCALES = "scales"  # x, w, then 1 / y
    SCALES_JOINED = "scales_joined"  # x w, then 1 / y
    SCALES_DIVIDED = "scales_divided"  # x, w, then divided by y

    @property
    def in_steps(self) -> bool:
        """Whether there are real numbers before the last of three factors, of which the second of two joined is 1."""
        return self.value.startswith(("steps", "scales"))

    @property
    def divides(self) -> bool:
        """Whether the last of the three divides."""
        return self in (Order.STEPS_DIVIDED, Order.SCALES_DIVIDED)

    @property
    def joins(self) -> bool:
        """Whether the scales of the operands are one factor."""
        return self in (Order.STEPS_JOINED, Order.SCALES_JOINED)

    @property
    def single(self) -> Order:
        """That of a sum's operands, each of which has one scale and one factor."""
        return self if not self.in_steps else Order.RATIO if self.divides else Order.RECIPROCAL


class Nonlinear(Name):
    """How an integer model computes exponentials, GELU, sigmoid and tanh."""

    TABLE = "table"  # one entry per input code, made in float64
    POLYNOMIAL = "polynomial"  # I-BERT's polynomials (Kim et al. 2021), in integers
