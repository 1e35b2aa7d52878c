"""What a compiled model in integers is traced from, and what is proved of it before.

Not in the reference: it says what comes out, not how a machine gets there fast.

`Ready` is `Integer` on products made ready, without a question to the data. `Proof` makes them so in one eager pass,
and proves of accumulators and levels, from constants and for all data, what the eager arithmetic looks at; or it
refuses the model, naming the site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from qtx_ref.spec import (
    Dtype,
    Fixed,
    Granularity,
    HighProduct,
    LeftShift,
    ModelSpec,
    Overflow,
    Profile,
    QuantSpec,
    Rounding,
    SpecError,
    accumulator_bits,
)

from ..quant import affine
from ..sites import SiteModule
from . import batched, carriers, groups, ops
from .carriers import Prepared
from .groups import Grouped
from .model import Code, Constants, Integer, at, code_dtype

LARGEST_SCALE = 2.0**40  # of the data's: times another and an accumulator of 48 bits it is a float32
WIDE = 2**47  # what a requantization takes of 64-bit accumulators
INT32 = 2**31
SCALING = ("multiplier", "shift")


class Ready(Integer):
    """`Integer` with prepared products, and without a question to the data: what a graph is traced from."""

    def __init__(
        self,
        constants: Constants,
        prepared: Mapping[str, Prepared | Grouped],
        quants: Mapping[str, QuantSpec],
        profile: Profile,
    ) -> None:
        super().__init__(constants, quants, profile)
        self.prepared = prepared
        self.largest: Tensor | None = None  # of the scales that came from the data

    def quantize(self, site: str, spec: QuantSpec, real: Tensor) -> Code:
        x = super().quantize(site, spec, real)
        if spec.dynamic:
            most = x.unit.amax()
            self.largest = most if self.largest is None else torch.maximum(self.largest, most)
        return x

    def requantize(self, site: str, spec: QuantSpec, x: Code) -> Code:
        """Without int32 in between, where that would saturate: what it does not hold lies beyond the codes too."""
        right = self.constants.get(f"{site}.right")
        if right is None:
            return super().requantize(site, spec, x)
        total = x.value.long() * self.constants[f"{site}.factor"] + self.constants[f"{site}.offset"]
        return self.clamp(site, spec, total >> right)

    def add(self, module: SiteModule, a: Code, b: Code) -> Code:
        site = module.site
        right = self.constants.get(f"{site}.right")
        if right is None:
            return super().add(module, a, b)
        first, second = self.constants[f"{site}.factor"]
        total = a.value.long() * first + b.value.long() * second + self.constants[f"{site}.offset"]
        return self.clamp(site, self.quants[site], total >> right)

    def clamp(self, site: str, spec: QuantSpec, level: Tensor) -> Code:
        """By way of int32, from which vectors are narrowed in one step."""
        zero = self.constants[f"{site}.zero_point"]
        code = level.clamp(*affine.code_limits(zero, spec)).int().to(code_dtype(spec))
        return Code(code, self.scale_of(site), zero, spec)

    def linear(self, module: SiteModule, x: Code, *, weight: Tensor | None = None, named: bool = True) -> Code:
        """As `Integer.linear`; codes in one pass, where the product can give them."""
        site = module.site
        prepared, spec = self.prepared.get(site), self.quants.get(site)
        if not named or spec is None or spec.granularity is not Granularity.TENSOR or x.measured:
            return super().linear(module, x, weight=weight, named=named)
        if not isinstance(prepared, Prepared) or not carriers.takes_codes(prepared, self.profile.requantize):
            return super().linear(module, x, weight=weight, named=named)
        zero, scaling = self.constants[f"{site}.zero_point"], (self.constants[f"{site}.{k}"] for k in SCALING)
        value = self.operand(f"{site}.input", x).value
        code = carriers.multiply_to_codes(value, prepared, *scaling, zero, spec, code_dtype(spec))
        return self.record_codes(site, Code(code, self.scale_of(site), zero, spec))

    def product(self, site: str, x: Code, w: Code) -> Code:
        bias = self.constants.get(f"{site}.bias")
        beside = bias is not None and bias.is_floating_point()
        grouped = self.has_groups(site)
        if grouped and w.ndim == 3:
            return super().product(site, x, w)
        if grouped:
            acc = groups.multiply(x.value, self.prepared[site])
        elif w.ndim == 3:
            acc = self.heads_product(site, x, w, None if beside else bias)
        else:
            given = x.zero_point if x.spec.dynamic and not x.spec.symmetric else None
            acc = carriers.multiply(x.value, self.prepared[site], given)
        w_unit = w.unit if w.unit.numel() == 1 else w.unit.reshape(*(1,) * (x.ndim - 1), -1)
        x_unit = self.joint_unit(site) if grouped else x.unit
        return Code(acc, self.unit(x_unit, w_unit), measured=x.measured, offset=bias.reshape(-1) if beside else None)

    def heads_product(self, site: str, x: Code, w: Code, bias: Tensor | None) -> Tensor:
        """Accumulators of one matrix (O, I) per head, on the head's own slice of x: (..., H I) -> (..., H O)."""
        heads = w.shape[0]
        rows = x.value.unflatten(-1, (heads, -1)).unsqueeze(-2)  # (..., H, 1, I)
        zero = x.zero_point if x.zero_point.numel() == 1 else x.zero_point[..., None, None]
        w_zero = w.zero_point if w.zero_point.numel() == 1 else w.zero_point.reshape(heads, 1, -1)
        bits = self.width(x, w, bias)
        acc = batched.multiply(rows, w.value.mT, x.spec, w.spec, zero, w_zero, bits, self.profile.matmul)
        acc = acc.squeeze(-2).flatten(-2)
        return acc if bias is None else acc + bias.reshape(-1)

    @staticmethod
    def width(a: Code, b: Code, bias: Tensor | None = None) -> int:
        """Bits of the accumulators of a b."""
        wide = bias is not None and bias.dtype == torch.int64
        return 64 if wide else accumulator_bits(a.spec, b.spec)

    def matmul(self, site: str, a: Code, b: Code, bias: Tensor | None = None) -> Tensor:
        """Of two operands from the data."""
        bits, rule = self.width(a, b), self.profile.matmul
        return batched.multiply(a.value, b.value, a.spec, b.spec, a.zero_point, b.zero_point, bits, rule)


class Proof(Ready):
    """One eager pass that makes products ready and proves of every op what `Integer` looks at in data. Raises SpecError
    with the site that it cannot prove."""

    def __init__(
        self, spec: ModelSpec, constants: Constants, quants: Mapping[str, QuantSpec], profile: Profile
    ) -> None:
        super().__init__(constants, {}, quants, profile)
        self.constants: dict[str, Tensor] = dict(constants)
        self.prepared: dict[str, Prepared | Grouped] = {}
        self.length = spec.length
        self.reaches: dict[str, int] = {}  # the largest |accumulator| by site
        if profile.requantize.dtype is Dtype.FLOAT16:
            raise SpecError(f"profile {profile.name} requantizes in float16, whose overflow shows in data: {EAGER}")
        if any(spec.dynamic for site, spec in quants.items() if not site.endswith(".weight")):
            for name, scale in constants.items():
                if name.endswith(".scale") and float(scale.amax()) > LARGEST_SCALE:
                    refuse(name.removesuffix(".scale"), f"its scale is {float(scale.amax()):.3g}, beyond 2^40")

    def reach(self, site: str, x: Code) -> int:
        """The largest |value - zero point| of what `site` is made of. An accumulator that comes from elsewhere, by way
        of ops that enlarge nothing, is none of those seen so far or smaller than the largest."""
        if x.spec is None:
            return self.reaches.get(site, max(self.reaches.values(), default=0))
        if x.spec.dynamic or x.zero_point.numel() == 0:
            return x.spec.code_max - x.spec.code_min
        return max(x.spec.code_max - int(x.zero_point.min()), int(x.zero_point.max()) - x.spec.code_min)

    def product(self, site: str, x: Code, w: Code) -> Code:
        bias = self.constants.get(f"{site}.bias")
        inside = None if bias is None or bias.is_floating_point() else bias
        if self.has_groups(site):
            return self.grouped_product(site, x, w, inside)
        if w.ndim == 2:
            with at(site):
                self.prepared[site] = carriers.prepare(
                    w.value.T,
                    w.spec,
                    x.spec,
                    w.zero_point.reshape(-1) if w.zero_point.numel() > 1 else w.zero_point,
                    None if x.spec.dynamic else x.zero_point,
                    inside,
                    self.width(x, w, inside),
                    self.profile.matmul,
                )
        most = w.spec.code_max - w.spec.code_min
        factors = int(carriers.add_up(w.subtract_zero().abs().movedim(-1, 0), most).amax())
        self.reaches[site] = factors * self.reach(site, x) + largest(inside)
        if self.width(x, w, inside) == 32 and self.reaches[site] >= INT32 and w.ndim == 3:
            refuse(site, f"its accumulators may reach {self.reaches[site]}")
        return super().product(site, x, w)

    def grouped_product(self, site: str, x: Code, w: Code, bias: Tensor | None) -> Code:
        """Of an input with several scales: ready, and its sum over groups proved."""
        multiplier, shift = (self.constants[f"{site}.channel_{key}"] for key in ("multiplier", "shift"))
        if w.ndim == 2:
            zero = w.zero_point.reshape(-1) if w.zero_point.numel() > 1 else w.zero_point
            channels = x.zero_point.reshape(-1), multiplier.reshape(-1), shift
            with at(site):
                self.prepared[site] = groups.prepare(
                    w.value.T, w.spec, x.spec, zero, *channels, bias, self.profile.matmul, self.profile.add
                )
        weights = w.subtract_zero().double().reshape(multiplier.shape[0], -1, multiplier.shape[-1])  # (H, O, I)
        self.prove_sum(
            site, multiplier * (groups.reach(x.spec, x.zero_point).reshape(multiplier.shape) * weights), bias
        )
        return super().product(site, x, w)

    def prove_sum(self, site: str, terms: Tensor, bias: Tensor | None = None) -> None:
        """That no weighted sum over groups leaves its accumulator. terms: the largest of each, float64, along the last
        axis."""
        most = float(terms.abs().sum(-1).max()) * (1 + 2.0**-20)  # of float64's own rounding
        self.reaches[site] = int(most / 2.0 ** int(self.constants[f"{site}.channel_shift"])) + 2 + largest(bias)
        wide = bias is not None and bias.dtype == torch.int64
        if most >= 2.0**62 or self.reaches[site] >= (WIDE if wide else INT32):
            refuse(site, f"its sum over groups may reach {most:.3g}")

    def scores(self, site: str, q: Code, k: Code) -> Code:
        if self.has_groups(site):
            far = [groups.reach(x.spec, x.zero_point).double() for x in (q, k)]
            self.prove_sum(site, self.constants[f"{site}.channel_multiplier"] * far[0] * far[1])
        return super().scores(site, q, k)

    def matmul(self, site: str, a: Code, b: Code, bias: Tensor | None = None) -> Tensor:
        depth = self.length if site.endswith(".context") else a.shape[-1]
        self.reaches[site] = depth * batched.magnitude(a.spec) * batched.magnitude(b.spec)
        if self.width(a, b) == 32 and self.reaches[site] >= INT32:
            refuse(site, f"its accumulators may reach {self.reaches[site]}")
        with at(site):
            return super().matmul(site, a, b, bias)

    def norm(self, module: SiteModule, x: Code, eps: float) -> Code:
        site, width = module.site, x.shape[-1]
        if (width * self.span(site, x)) ** 2 + 2**60 >= 2**62:
            refuse(site, f"{width} codes of {x.spec.bits} bits: their variance may leave int64")
        bias, gain = self.constants[f"{site}.bias"].long(), self.weight(f"{site}.weight").subtract_zero().long()
        most = (math.isqrt(width) + 1) * 2**ops.NORM_BITS + 1  # |r| <= sqrt(D)
        self.reaches[site] = int((gain.abs() * most + bias.abs()).max())
        wide = self.constants[f"{site}.bias"].dtype == torch.int64
        if not wide and self.profile.matmul.overflow is Overflow.REPORT and self.reaches[site] >= INT32:
            refuse(site, f"its accumulators may reach {self.reaches[site]}")
        return super().norm(module, x, eps)

    def span(self, site: str, x: Code) -> int:
        """How far apart a norm's codes may be, brought to one unit where they have several."""
        if not self.has_groups(site):
            return x.spec.code_max - x.spec.code_min
        multiplier, shift = (self.constants[f"{site}.channel_{key}"].long() for key in ("multiplier", "shift"))
        zero = x.zero_point.reshape(-1).long()
        low, high = affine.code_limits(zero, x.spec)
        return (int(((high - zero) * multiplier).max() - ((low - zero) * multiplier).min()) >> int(shift)) + 2

    def mul(self, module: SiteModule, a: Code, b: Code) -> Code:
        self.reaches[module.site] = self.reach("", a) * self.reach("", b)
        return super().mul(module, a, b)

    def requantize(self, site: str, spec: QuantSpec, x: Code) -> Code:
        rule, most = self.profile.requantize, self.reach(site, x)
        if isinstance(rule, Fixed):
            multiplier, shift = (self.constants[f"{site}.{key}"] for key in ("multiplier", "shift"))
            if x.subtract_zero().dtype is torch.int64 and most >= WIDE:
                refuse(site, f"its accumulators may reach {most}, beyond 48 bits")
            if rule.left is LeftShift.REPORT:
                left = 1 << max(int(shift.max()), 0)
                level = float((multiplier.double() * 2.0 ** (shift.double() - 31)).max())
                if max(most * left, math.ceil(most * level)) >= INT32 - 1:
                    refuse(site, f"its accumulators may reach {most}, which the profile's shift takes beyond int32")
            saturates = rule.product is HighProduct.EXACT and rule.left is LeftShift.SATURATE
            if saturates and rule.rounding is Rounding.HALF_UP and x.subtract_zero().dtype is torch.int32:
                self.gather(site, [x], [multiplier.long()], 31 - shift.long())
        return super().requantize(site, spec, x)

    def add(self, module: SiteModule, a: Code, b: Code) -> Code:
        site, static = module.site, not (self.quants[module.site].dynamic or a.measured or b.measured)
        if static and isinstance(self.profile.requantize, Fixed) and self.profile.add.rounding is Rounding.HALF_UP:
            self.gather(
                site, [a, b], list(self.constants[f"{site}.multiplier"].long()), self.constants[f"{site}.shift"]
            )
        return super().add(module, a, b)

    def gather(self, site: str, parts: list[Code], factors: list[Tensor], right: Tensor) -> None:
        """Makes one constant of what floor(sum_i (x_i - z_i) m_i / 2^right + 1/2) + z adds to the sum of x_i m_i:
        half of 2^right, z 2^right, and the zero points' products; where int64 holds it all."""
        zero = self.constants[f"{site}.zero_point"].long()
        zeros = [x.zero_point.long() if x.spec is not None else x.zero_point.long() * 0 for x in parts]
        fits = 0 <= int(right.min()) <= int(right.max()) <= 60 and largest(zero) << int(right.max()) <= 2**60
        if not fits or any(z.numel() > 1 for z in zeros):
            return
        offset = (torch.ones_like(right) << right >> 1) + (zero << right)
        for z, factor in zip(zeros, factors, strict=True):
            offset = offset - z * factor
        self.constants[f"{site}.factor"] = torch.stack(factors) if len(factors) > 1 else factors[0]
        self.constants[f"{site}.offset"], self.constants[f"{site}.right"] = offset, right


EAGER = "run it without the compiled form"


def refuse(site: str, reason: str) -> NoReturn:
    """Raises SpecError: the site runs in integers, but not compiled."""
    raise SpecError(f"site {site} cannot be compiled: {reason}; {EAGER}")


def largest(x: Tensor | None) -> int:
    """The largest magnitude among integers; 0 without any."""
    return 0 if x is None or not x.numel() else max(-int(x.min()), int(x.max()))
