"""The constants of one site: scales, multipliers, codes of parameters, biases, channels of several scales.

`lowering` makes them in the order in which a model needs them. What does not fit is refused, naming the site.

Arrays: parameters float32 in the shapes of `models.initial.shapes`, constants in the dtypes and shapes that `lowering`
says; scales, zero points and multipliers one number, or one per column or channel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..quant import affine, quantizer
from ..spec import (
    Fixed,
    FloatProduct,
    HighProduct,
    Profile,
    QuantSpec,
    Range,
    refuse_integer,
)
from . import fixed_point, float_product, groups, products
from .model import Code, Integer, at, code_dtype

__all__ = ["ConstantMaker", "plain", "takes_wide"]

SUM_BITS = 62  # of a weighted sum over groups
GROUP_BITS = 30  # of that sum as an accumulator, with or without a bias an int32
NORM_SPAN_BITS = 30  # of D times the span of a norm's codes: its square beside eps stays below 2^62


def takes_wide(rule: Fixed | FloatProduct) -> bool:
    """Whether it is defined for 64-bit accumulators."""
    return isinstance(rule, FloatProduct) or rule.product is HighProduct.EXACT


def plain(x: np.ndarray) -> np.ndarray:
    """One number without axes; several as they are."""
    return np.reshape(x, ()) if np.size(x) == 1 else np.asarray(x)


class ConstantMaker(Integer):
    """Puts constants of a site beside those that are there. Each method raises SpecError where they do not fit, naming
    the site."""

    constants: dict[str, np.ndarray]

    def __init__(self, quants: Mapping[str, QuantSpec], ranges: Mapping[str, Range], profile: Profile) -> None:
        super().__init__({}, quants, profile)
        self.ranges = ranges
        self.factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the units of linears' accumulators

    def target(self, site: str, why: str) -> QuantSpec:
        """The quantizer of a site that must have one; its scale and zero point, if static, become constants."""
        spec = self.quants.get(site)
        if spec is None:
            refuse_integer(site, f"{why}, and the recipe leaves it in float")
        if not spec.dynamic and f"{site}.scale" not in self.constants:
            self.put_scale(site, *self.scale_zero(self.ranges[site], spec))
        return spec

    def scale_zero(self, calibrated: Range, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
        """Of a static range under the profile."""
        made = quantizer.rescale(calibrated, spec, self.profile)
        return made.scale, made.zero_point

    def put_scale(self, site: str, scale: np.ndarray, zero: np.ndarray) -> None:
        """Scale and zero point of a site or weight, as constants."""
        self.constants[f"{site}.scale"], self.constants[f"{site}.zero_point"] = plain(scale), plain(zero)

    def put_multiplier(self, site: str, name: str, real: np.ndarray) -> None:
        """A real multiplier in fixed point, as `<site>.<name>multiplier` and `.<name>shift`."""
        try:
            multiplier, shift = fixed_point.quantize_multiplier(real)
        except ValueError as error:
            refuse_integer(site, str(error))
        self.constants[f"{site}.{name}multiplier"], self.constants[f"{site}.{name}shift"] = multiplier, shift

    def put_requantization(self, site: str, x: Code) -> None:
        """The multiplier that makes codes of `site` from x; x of a measured unit goes through float32 instead."""
        if x.measured:
            return
        rule, step = self.profile.requantize, self.constants[f"{site}.scale"]
        if isinstance(rule, FloatProduct):
            x_scale, w_scale = self.factors.pop(site, (x.unit, np.float32(1)))
            real = float_product.make_factors(x_scale, w_scale, step, rule.order, rule.dtype)
            with at(site):
                float_product.check_factors(real, rule)
            self.constants[f"{site}.multiplier"] = real
            return
        real = fixed_point.real_multiplier(x.unit, 1, step, rule)
        if x.subtract_zero().dtype == np.int64:
            if not takes_wide(rule):
                what = f"the high product of profile {self.profile.name}"
                refuse_integer(site, f"its accumulator has 64 bits, and {what} takes 32")
            if np.any((real < 2.0**-31) | (real >= 2.0**7)):
                refuse_integer(site, f"its multiplier, {real}, is outside 2^-31 to 2^7 of a 64-bit accumulator")
        self.put_multiplier(site, "", real)

    def put_own_codes(self, site: str, key: str, value: np.ndarray) -> None:
        """A parameter that is part of a site's tensor, in the codes of that site."""
        spec = self.target(site, "it holds a parameter")
        if spec.dynamic:
            refuse_integer(site, "its parameter is quantized once, which needs a static range")
        scale, zero = (self.constants[f"{site}.{k}"] for k in ("scale", "zero_point"))
        scale, zero = (part if np.size(part) == 1 else np.reshape(part, value.shape) for part in (scale, zero))
        code = affine.quantize(value, scale, zero, spec, self.profile.quantize)
        self.constants[f"{site}.{key}"] = code.astype(code_dtype(spec))
        self.put_scale(f"{site}.{key}", scale, zero)

    def put_bias(self, site: str, bias: np.ndarray, step: np.ndarray, bits: int) -> None:
        """In units of the accumulator, which are its scale; int64, as the accumulator then is, where int32 would not
        do: beside a bias that large, what the accumulator adds is small."""
        step = plain(step) if np.size(step) == 1 else np.reshape(step, bias.shape)
        code = np.rint(bias.astype(np.float64) / step)
        largest = np.abs(code).max(initial=0)
        bits = 64 if largest >= 2**30 and takes_wide(self.profile.requantize) else bits
        if largest >= (2**30 if bits == 32 else 2**46):  # requantization takes 48 bits
            refuse_integer(site, f"its bias, {np.abs(bias).max()}, is {largest:.3g} units of a {bits}-bit accumulator")
        self.constants[f"{site}.bias"] = code.astype(np.int32 if bits == 32 else np.int64)
        self.constants[f"{site}.bias.scale"] = step

    def put_channels(self, site: str, unit: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """Multipliers of channels whose units vary, and the shift that keeps sums below 2^30.

        bound: the largest magnitude of what is multiplied by each channel's multiplier, float64, broadcast against unit
        and summed over the last axis. Returns the unit of the sums."""
        multiplier = groups.channel_multiplier(unit)
        largest = (np.float64(multiplier) * bound).sum(axis=-1).max() * (1 + 2.0**-20)  # of float64's own rounding
        reach = int(np.frexp(largest)[1])
        if reach > SUM_BITS:
            refuse_integer(site, f"its weighted sum over groups takes {reach} bits of {SUM_BITS}: use fewer bits")
        return self.put_shift(site, unit, multiplier, max(reach - GROUP_BITS, 0))

    def put_shift(self, site: str, unit: np.ndarray, multiplier: np.ndarray, shift: int) -> np.ndarray:
        """The constants of `groups`; returns the joint unit."""
        self.constants[f"{site}.channel_multiplier"] = multiplier
        self.constants[f"{site}.channel_shift"] = np.asarray(shift, np.int64)
        self.constants[f"{site}.channel_unit"] = groups.joint_unit(unit, self.constants[f"{site}.channel_shift"])
        return self.constants[f"{site}.channel_unit"]

    def put_linear_channels(self, site: str, x: Code, w: Code) -> np.ndarray:
        """`put_channels` of a linear layer's input; returns its unit in the accumulator."""
        self.check_pairs(site, x, w)
        heads, inputs = (w.shape[0] if w.ndim == 3 else 1), w.shape[-1]
        weights = np.abs(w.subtract_zero().astype(np.float64)).reshape(heads, -1, inputs)  # (H, O, I)
        far = groups.reach(x.spec, x.zero_point).astype(np.float64).reshape(heads, 1, inputs)
        unit = self.unit(x.unit).reshape(heads, 1, inputs)
        return self.put_channels(site, unit, far * weights)

    def put_norm_channels(self, site: str, x: Code) -> np.ndarray:
        """The constants that bring a norm's input to one unit, which is returned: codes that span less than 2^30 / D,
        so that `ops.normalize` holds their squares."""
        unit = self.unit(x.unit).reshape(-1)
        multiplier, (low, high) = groups.channel_multiplier(unit), affine.code_limits(x.zero_point, x.spec)
        ends = [np.ravel(end - x.zero_point.astype(np.int64)) * multiplier.astype(np.int64) for end in (low, high)]
        span, shift = int(ends[1].max() - ends[0].min()), 0
        while x.shape[-1] * ((span >> shift) + 2) > 2**NORM_SPAN_BITS:
            shift += 1
        return self.put_shift(site, unit, multiplier, shift)

    def check_pairs(self, site: str, *operands: Code) -> None:
        """Refuses several scales along a sum whose products the profile adds in saturating pairs."""
        a, b = operands
        if products.saturates(a.spec, b.spec, self.profile.matmul):
            refuse_integer(site, f"its scales vary along a sum that profile {self.profile.name} saturates in pairs")

    def check_codes(self, site: str, *operands: Code) -> None:
        """Refuses accumulators where only codes can be taken."""
        for x in operands:
            if x.spec is None:
                refuse_integer(site, "an accumulator reaches it: give the tensor before it a quantizer")
