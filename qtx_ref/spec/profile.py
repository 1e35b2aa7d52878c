"""Profiles: all that two engines may do differently with the same quantizer, as one closed record per operation.

A record is passed whole to the one function that reads it, as in `affine.quantize(x, scale, zero_point, spec, rule)`:
no field can be ignored. No field has a default: engines differ in every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .base import Spec, refuse
from .choices import (
    Beyond,
    Bias,
    DequantizeForm,
    Dtype,
    HighProduct,
    InfinityPolicy,
    LeftShift,
    NanPolicy,
    Nudging,
    Order,
    Overflow,
    Products,
    Rounding,
    SymmetricScale,
    ZeroPoint,
)

__all__ = [
    "AddRule",
    "CastRule",
    "DequantizeRule",
    "FakeQuantizeRule",
    "Fixed",
    "FloatProduct",
    "MatmulRule",
    "ONE_ROUNDING",
    "OPERATIONS",
    "Profile",
    "QTX",
    "QuantizeRule",
    "ScaleRule",
]


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
