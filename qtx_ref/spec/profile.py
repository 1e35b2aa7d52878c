"""Profiles: all that two engines may do differently with the same quantizer."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Name, Spec, refuse

__all__ = [
    "Dtype",
    "InfinityPolicy",
    "NanPolicy",
    "Nonlinear",
    "Nudging",
    "Overflow",
    "Profile",
    "QTX",
    "Requantization",
    "Rounding",
    "ScaleRule",
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


class ScaleRule(Name):
    """Scale of a symmetric quantizer. An asymmetric one has (high - low) / (code_max - code_min)."""

    ABSMAX = "absmax"  # absmax / code_max: 127 for 8 bits
    ABSMAX_HALF = "absmax_half"  # absmax / ((2^bits - 1) / 2): 127.5 for 8 bits
    TWO_SIDED = "two_sided"  # max(|low| / |code_min|, high / code_max): 128 and 127 for 8 bits


class Nudging(Name):
    """Which real zero point is rounded to a code; the rounding moves the range so that 0 stays exact."""

    FROM_LOW = "from_low"  # code_min - low / scale
    CLOSER_END = "closer_end"  # that, or code_max - high / scale where |code_max| + |high / scale| is not larger


class NanPolicy(Name):
    """The code of NaN."""

    RAISE = "raise"  # ValueError; fake quantization lets NaN through
    ZERO = "zero"  # the code of real 0
    CODE_MIN = "code_min"  # what x86's float-to-integer conversion ends in


class InfinityPolicy(Name):
    """The code of an infinity."""

    SATURATE = "saturate"
    RAISE = "raise"


class Requantization(Name):
    """From accumulator a to a real multiple M a, rounded to an integer. M = 2^shift * multiplier / 2^31."""

    FLOAT32 = "float32"  # float32(a) * float32(M), half to even
    FLOAT_HALF_AWAY = "float_half_away"  # the same product, ties away from zero
    FIXED_ONE = "fixed_one"  # 64-bit product, one rounding shift, half up: ruy, TFLite with single rounding
    FIXED_TWO = "fixed_two"  # rounding doubling high multiply, then rounding shift, half away: gemmlowp, TFLite
    HIGH_HALF_UP = "high_half_up"  # truncating doubling high multiply, then rounding shift, half up: XNNPACK rndnu
    # fixed_one; for 64-bit accumulators by a multiplier of 15 bits: TFLite's 16x8
    FIXED_ONE_NARROW = "fixed_one_narrow"


class Overflow(Name):
    """An accumulator that does not fit its width."""

    REPORT = "report"  # ValueError naming the value
    WRAP = "wrap"  # two's complement, as the hardware adds


class Nonlinear(Name):
    """How an integer model computes exponentials, GELU, sigmoid and tanh."""

    TABLE = "table"  # one entry per input code, made in float64
    POLYNOMIAL = "polynomial"  # I-BERT's polynomials (Kim et al. 2021), in integers


@dataclass(frozen=True)
class Profile(Spec):
    """What an engine's numbers mean. No field has a default: engines differ in every one of them."""

    name: str
    version: int  # raised whenever a field changes
    rounding: Rounding  # of x / scale
    zero_point_before_rounding: bool  # round(x / scale + zero_point) instead of round(x / scale) + zero_point
    reciprocal: bool  # x * (1 / scale) instead of x / scale
    scale_rule: ScaleRule
    nudging: Nudging
    zero_point_rounding: Rounding
    scale_dtype: Dtype  # what a scale is stored in
    arithmetic: Dtype  # of every operation of quantizing and dequantizing
    nan: NanPolicy
    infinity: InfinityPolicy
    requantization: Requantization
    overflow: Overflow

    def check(self) -> None:
        if self.zero_point_rounding is Rounding.STOCHASTIC:
            refuse("profile zero_point_rounding", "stochastic", "a zero point is rounded the same each time")
        if self.version < 1:
            refuse("profile version", self.version, "give a whole number, at least 1")


QTX = Profile(
    name="qtx",
    version=1,
    rounding=Rounding.HALF_EVEN,
    zero_point_before_rounding=False,
    reciprocal=False,
    scale_rule=ScaleRule.ABSMAX,
    nudging=Nudging.FROM_LOW,
    zero_point_rounding=Rounding.HALF_EVEN,
    scale_dtype=Dtype.FLOAT32,
    arithmetic=Dtype.FLOAT32,
    nan=NanPolicy.RAISE,
    infinity=InfinityPolicy.SATURATE,
    requantization=Requantization.FIXED_ONE,
    overflow=Overflow.REPORT,
)
