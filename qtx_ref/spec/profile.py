"""Profiles: all that two engines may do differently with the same quantizer, as one closed record per operation.

A record is passed whole to the one function that reads it, as in `affine.quantize(x, scale, zero_point, spec, rule)`:
no field can be ignored. No field has a default: engines differ in every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .base import Name, Spec, refuse

__all__ = [
    "AddRule",
    "Beyond",
    "Bias",
    "CastRule",
    "DequantizeForm",
    "DequantizeRule",
    "Dtype",
    "FakeQuantizeRule",
    "Fixed",
    "FloatProduct",
    "HighProduct",
    "InfinityPolicy",
    "LeftShift",
    "MatmulRule",
    "NanPolicy",
    "Nonlinear",
    "Nudging",
    "ONE_ROUNDING",
    "OPERATIONS",
    "Order",
    "Overflow",
    "Products",
    "Profile",
    "QTX",
    "QuantizeRule",
    "Rounding",
    "ScaleRule",
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


@dataclass(frozen=True)
class ScaleRule(Spec):
    """From a range to a scale and a zero point."""

    symmetric: SymmetricScale
    nudging: Nudging
    zero_point_rounding: Rounding
    dtype: Dtype  # what a scale is stored in
    arithmetic: Dtype
    floor: float  # no scale is below it
    empty: float  # the scale of a range without a span

    def check(self) -> None:
        if self.zero_point_rounding is Rounding.STOCHASTIC:
            refuse("rule zero_point_rounding", "stochastic", "a zero point is rounded the same each time")
        if Dtype.INPUT in (self.dtype, self.arithmetic):
            refuse("rule dtype", "input", "a scale is of no tensor: give a width")
        for name in ("floor", "empty"):
            if getattr(self, name) <= 0:
                refuse(f"rule {name}", getattr(self, name), "a scale is above 0")


@dataclass(frozen=True)
class QuantizeRule(Spec):
    """From a real number to a code."""

    rounding: Rounding  # of x / scale
    zero_point: ZeroPoint
    reciprocal: bool  # x * (1 / scale) instead of x / scale
    arithmetic: Dtype
    nan: NanPolicy
    infinity: InfinityPolicy
    beyond: Beyond

    def check(self) -> None:
        if self.zero_point is ZeroPoint.FUSED and (not self.reciprocal or self.arithmetic is not Dtype.FLOAT32):
            refuse("rule zero_point", "fused", "a fused multiply-add has a reciprocal and is in float32")


@dataclass(frozen=True)
class DequantizeRule(Spec):
    """From a code to a real number."""

    form: DequantizeForm
    arithmetic: Dtype  # INPUT: float32, its result cast to the type of the scale


@dataclass(frozen=True)
class FakeQuantizeRule(Spec):
    """Quantized and dequantized at once, in training or simulation: engines have kernels of their own for it."""

    quantize: QuantizeRule
    dequantize: DequantizeRule


@dataclass(frozen=True)
class MatmulRule(Spec):
    """From two tensors of codes to accumulators."""

    products: Products
    run: int  # pairs that RUNS16 adds in int16; 1 otherwise
    overflow: Overflow

    def check(self) -> None:
        if (self.run < 2) if self.products is Products.RUNS16 else (self.run != 1):
            refuse(
                "rule run", self.run, f"products {self.products} add {'at least 2' if self.run < 2 else '1'} at once"
            )


@dataclass(frozen=True)
class Fixed(Spec):
    """Requantization in integers: a times M = 2^shift * multiplier / 2^31."""

    dtype: Dtype  # of M = (x w) / y, before it becomes multiplier and shift: float64 or float32
    bits: int  # of the multiplier of a 64-bit accumulator: 31 or 15; of a 32-bit one it has 31
    product: HighProduct
    rounding: Rounding  # of the last shift
    left: LeftShift
    scales: Dtype  # of the product x w: float64 or float32

    def check(self) -> None:
        for name in ("dtype", "scales"):
            if (dtype := getattr(self, name)) not in (Dtype.FLOAT64, Dtype.FLOAT32):
                refuse(f"rule {name}", str(dtype), "M is computed in float64 or float32")
        if self.bits not in (15, 31):
            refuse("rule bits", self.bits, "a multiplier has 31 bits, or 15")
        if self.rounding is Rounding.STOCHASTIC:
            refuse("rule rounding", "stochastic", "a requantization rounds the same each time")


@dataclass(frozen=True)
class FloatProduct(Spec):
    """Requantization in floats."""

    dtype: Dtype
    order: Order
    zero_point: ZeroPoint
    rounding: Rounding
    beyond: Beyond  # of a level that int32 does not hold

    def check(self) -> None:
        if self.rounding is Rounding.STOCHASTIC:
            refuse("rule rounding", "stochastic", "a requantization rounds the same each time")
        if self.dtype is Dtype.INPUT:
            refuse("rule dtype", "input", "an accumulator has no width of its own: give one")
        if self.zero_point not in (ZeroPoint.AFTER, ZeroPoint.BEFORE):
            refuse("rule zero_point", str(self.zero_point), "of a requantization give before or after")


@dataclass(frozen=True)
class AddRule(Spec):
    """The sum of two tensors of codes, each rescaled, in the codes of a third."""

    rounding: Rounding  # of the one last shift; floats round as the profile's FloatProduct

    def check(self) -> None:
        if self.rounding is Rounding.STOCHASTIC:
            refuse("rule rounding", "stochastic", "a sum rounds the same each time")


@dataclass(frozen=True)
class CastRule(Spec):
    """To float formats of 8 bits and less."""

    e5m2_nan: int  # the code of NaN, without its sign: 0x7F, or 0x7E
    e2m1_nan: int | None  # of a NaN without sign in a format that has none (with one: the sign bit the other way);
    # None: ValueError
    negative_zero: bool  # -0.0 keeps its sign in E2M1, and does not become code 0; wider formats always keep it
    e4m3_saturates: bool  # beyond the largest value, infinity too, that value; False: NaN
    e5m2_saturates: bool  # False: infinity

    def check(self) -> None:
        if self.e5m2_nan not in (0x7D, 0x7E, 0x7F):
            refuse("rule e5m2_nan", self.e5m2_nan, "E5M2's NaNs are 125, 126 and 127")
        if self.e2m1_nan is not None and not 0 <= self.e2m1_nan < 16:
            refuse("rule e2m1_nan", self.e2m1_nan, "give one of the 16 codes, or None")


@dataclass(frozen=True)
class Profile(Spec):
    """What an engine's numbers mean."""

    name: str
    version: int  # raised whenever a field changes
    engine: str  # whose numbers, and of which version
    path: str  # the kernels or CPU features it states
    scale: ScaleRule
    quantize: QuantizeRule
    fake_quantize: FakeQuantizeRule
    dequantize: DequantizeRule
    matmul: MatmulRule
    bias: Bias
    requantize: Fixed | FloatProduct
    add: AddRule
    cast: CastRule
    unseen: tuple[str, ...]  # operations whose rule is the project's own because nobody has seen the engine's

    def check(self) -> None:
        if self.version < 1:
            refuse("profile version", self.version, "give a whole number, at least 1")
        for name in self.unseen:
            if name not in OPERATIONS:
                refuse("profile unseen", name, f"known operations are {', '.join(OPERATIONS)}")
        if self.bias is not Bias.INT32 and isinstance(self.requantize, Fixed):
            refuse("profile bias", str(self.bias), "a requantization in integers takes a bias of int32")
        if self.bias is Bias.FLOAT_BEFORE_FUSED and self.requantize.dtype is not Dtype.FLOAT32:
            refuse("profile bias", str(self.bias), "a fused multiply-add is in float32, and so is its requantization")

    def simulated(self) -> Profile:
        """The same, fake quantizing as it quantizes and dequantizes where nobody has seen a kernel of the engine's for
        it."""
        if "fake_quantize" not in self.unseen:
            return self
        unseen = tuple(name for name in self.unseen if name != "fake_quantize")
        return replace(self, fake_quantize=FakeQuantizeRule(self.quantize, self.dequantize), unseen=unseen)


OPERATIONS = ("scale", "quantize", "fake_quantize", "dequantize", "matmul", "bias", "requantize", "add", "cast")
QUANTIZE = QuantizeRule(
    rounding=Rounding.HALF_EVEN,
    zero_point=ZeroPoint.AFTER,
    reciprocal=False,
    arithmetic=Dtype.FLOAT32,
    nan=NanPolicy.RAISE,
    infinity=InfinityPolicy.SATURATE,
    beyond=Beyond.SATURATE,
)
ONE_ROUNDING = Fixed(
    dtype=Dtype.FLOAT64,
    bits=31,
    product=HighProduct.EXACT,
    rounding=Rounding.HALF_UP,
    left=LeftShift.SATURATE,
    scales=Dtype.FLOAT64,
)
DEQUANTIZE = DequantizeRule(form=DequantizeForm.DIFFERENCE, arithmetic=Dtype.FLOAT32)
QTX = Profile(
    name="qtx",
    version=2,
    engine="qtx",
    path="qtx_ref",
    scale=ScaleRule(
        symmetric=SymmetricScale.ABSMAX,
        nudging=Nudging.FROM_LOW,
        zero_point_rounding=Rounding.HALF_EVEN,
        dtype=Dtype.FLOAT32,
        arithmetic=Dtype.FLOAT32,
        floor=2.0**-126,
        empty=1.0,
    ),
    quantize=QUANTIZE,
    fake_quantize=FakeQuantizeRule(QUANTIZE, DEQUANTIZE),
    dequantize=DEQUANTIZE,
    matmul=MatmulRule(products=Products.EXACT, run=1, overflow=Overflow.REPORT),
    bias=Bias.INT32,
    requantize=ONE_ROUNDING,
    add=AddRule(rounding=Rounding.HALF_UP),
    cast=CastRule(
        e5m2_nan=0x7F,
        e2m1_nan=None,
        negative_zero=True,
        e4m3_saturates=True,
        e5m2_saturates=True,
    ),
    unseen=(),
)
