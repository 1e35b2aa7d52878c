"""From float parameters and calibrated ranges to the constants that `Integer` computes with.

`lower` runs the model once under `Lowering`, an `Integer` that makes each op's constants, in float64, just before the
op needs them, those of a site as `constants` does. What cannot run in integers is refused, naming the site and the
reason. `lifting` goes back.

Arrays: parameters float32 in the shapes of `models.initial.shapes`, constants as `model` lists them: codes in the
narrowest dtype that holds them, multipliers and shifts int32 (a sum's shift int64); scales and multipliers one number,
or one per column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from scipy import special

from .. import models
from ..quant import affine, quantizer
from ..spec import (
    QTX,
    AttentionSpec,
    Bias,
    Family,
    FloatProduct,
    Granularity,
    ModelSpec,
    Nonlinear,
    Profile,
    QuantSpec,
    Range,
    Softmax,
    check_integer,
    refuse_integer,
)
from . import fixed_point, groups, ops
from .constants import ConstantMaker, plain
from .model import Code, accumulator_bits, at, code_dtype

__all__ = [
    "Lowering",
    "common_shift",
    "count_scales",
    "lower",
    "make_constants",
    "per_channel",
    "run_lowering",
    "share_rows",
]

GAMMA_LIMIT = 64  # |gamma| that ops.clip_stretch has bits for
ZETA_LIMIT = 64
FACTOR_BITS = 36  # of a sink's factor: its product with an exponential stays below 2^62
SINK_STEPS = 2**20  # codes between the scores' zero and a sink
POLYNOMIAL_LIMIT = 1024.0  # largest argument of the GELU polynomial
EPS_BITS = 60  # of eps in units of ops.normalize


def per_channel(x: np.ndarray) -> np.ndarray:
    """One number as it is; one for each channel as they stand beside a table of codes, (F, 1)."""
    return x if np.size(x) == 1 else np.reshape(x, (-1, 1))


def count_scales(*specs: QuantSpec) -> int:
    """How many combinations of scales channels of these quantizers may have; 0 where each channel has its own."""
    counts = [1, *(0 if s.granularity is Granularity.CHANNEL else 2 if s.wide else s.groups or 1 for s in specs)]
    return int(np.prod(counts))


def share_rows(table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of codes of each channel, (F, codes), without those that others have too, and each channel's row, int32.
    `count` rows, the last one again and again, or F of none or too many: layers made alike have as many."""
    rows, place = np.unique(table, axis=0, return_inverse=True)
    missing = (min(count, len(table)) or len(table)) - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, 0)]), place.reshape(-1).astype(np.int32)


def common_shift(reals: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Multipliers m_i and one shift: real_i = m_i / 2^shift, the largest m in [2^29, 2^30]; int64.

    For a sum that is rounded once. What is 2^31 times smaller than the largest becomes 0.
    """
    largest = np.maximum.reduce(np.broadcast_arrays(*(np.asarray(real, np.float64) for real in reals)))
    _, exponent = np.frexp(np.maximum(largest, 2.0**-32))
    shift = 30 - exponent.astype(np.int64)
    return [np.rint(np.asarray(real, np.float64) * np.exp2(shift)).astype(np.int64) for real in reals], shift


def lower(
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    quants: Mapping[str, QuantSpec],
    ranges: Mapping[str, Range],
    profile: Profile = QTX,
    nonlinear: Nonlinear = Nonlinear.TABLE,
) -> dict[str, np.ndarray]:
    """The constants of an integer model, by the names that `model` lists; and `output.scale`, `output.zero_point`.

    Raises SpecError where a site cannot run in integers, naming it and why.
    """
    check_integer(quants, profile)
    return make_constants(spec, params, quants, ranges, profile, nonlinear)


def make_constants(
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    quants: Mapping[str, QuantSpec],
    ranges: Mapping[str, Range],
    profile: Profile,
    nonlinear: Nonlinear,
) -> dict[str, np.ndarray]:
    """The constants of `lower`, of quantizers that `check_integer` allows under the profile. Raises SpecError as it
    does."""
    return run_lowering(spec, Lowering(params, quants, ranges, profile, nonlinear))


def run_lowering(spec: ModelSpec, nx: Lowering) -> dict[str, np.ndarray]:
    """The constants, by name and in the shapes and dtypes that the module says, of one pass of the model under `nx`,
    with those of its output. Raises SpecError as `lower`."""
    if spec.family is Family.VIT:
        batch: dict[str, np.ndarray] = {
            "images": np.zeros((1, spec.channels, spec.image_size, spec.image_size), np.float32)
        }
    else:
        token = np.zeros((1, 1), np.int64)
        batch = {"tokens": token, "types": token, "mask": token == 0}
    output = cast(Code, models.forward(nx, spec, batch))
    if not output.measured:
        nx.constants["output.scale"] = np.asarray(output.unit, np.float64)
        nx.constants["output.zero_point"] = np.asarray(output.zero_point, np.int32)
    return nx.constants


class Lowering(ConstantMaker):
    """Makes constants, then computes with them. Each op raises SpecError where it cannot run in integers, with its
    site."""

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        quants: Mapping[str, QuantSpec],
        ranges: Mapping[str, Range],
        profile: Profile,
        nonlinear: Nonlinear,
    ) -> None:
        super().__init__(quants, ranges, profile)
        self.params = params
        self.nonlinear = nonlinear
        self.ended: set[str] = set()  # linears whose accumulators are requantized at once

    def named(self, site: str, x: Code) -> Code:
        spec = self.quants.get(site)
        if spec is not None and not spec.dynamic:
            self.target(site, "")
            self.put_requantization(site, x)
        return super().named(site, x)

    def input(self, site: str, value: np.ndarray) -> Code:
        if self.target(site, "it is the model's input").dynamic:
            refuse_integer(site, "the model's input needs a static range")
        return super().input(site, value)

    def parameter(self, site: str) -> Code:
        self.put_own_codes(site, "bias", self.params[f"{site}.bias"])
        return super().parameter(site)

    def put_weight(self, site: str, value: np.ndarray) -> None:
        """The codes of a weight."""
        spec = self.quants.get(site)
        if spec is None:
            refuse_integer(site, "a weight is multiplied as codes, and the recipe leaves it in float")
        if site in self.constants:
            return
        if spec.dynamic:
            low, high = affine.ranges(value, spec, True)
            scale, zero = affine.scale_zero(low, high, spec, self.profile.scale)
            scale = np.where((low == 0) & (high == 0), quantizer.SILENT_SCALE, scale)  # it is all of the tensor
        else:
            scale, zero = self.scale_zero(self.ranges[site], spec)
        self.put_scale(site, scale, zero)
        self.constants[site] = affine.quantize(value, scale, zero, spec, self.profile.quantize).astype(code_dtype(spec))

    def linear(self, site: str, x: Code, *, weight: str | None = None, named: bool = True) -> Code:
        own, name = f"{site}.weight", weight or f"{site}.weight"
        self.put_weight(name, self.params[name])
        if own != name and own in self.quants:
            if self.quants[own] != self.quants[name]:
                refuse_integer(own, f"it is tied to {name}, whose quantizer is another one")
            self.put_scale(own, self.constants[f"{name}.scale"], self.constants[f"{name}.zero_point"])
        if named and site in self.quants:
            self.ended.add(site)
        return super().linear(site, x, weight=weight, named=named)

    def product(self, site: str, x: Code, w: Code) -> Code:
        self.check_codes(site, x)
        grouped, bits = groups.varies(x.unit), accumulator_bits(x.spec, w.spec)
        step, bits = (self.put_linear_channels(site, x, w), 32) if grouped else (x.unit, bits)
        bias = self.params.get(f"{site}.bias")
        beside = self.profile.bias is not Bias.INT32 and site in self.ended
        if bias is not None and (x.measured or beside):
            self.constants[f"{site}.bias"] = bias.astype(np.float32)
        elif bias is not None:
            self.put_bias(site, bias, self.unit(step, w.unit), bits)
        y = super().product(site, x, w)
        several = np.size(w.unit) > 1
        self.factors[site] = step, w.unit.reshape(*(1,) * (x.ndim - 1), -1) if several else plain(w.unit)
        if y.offset is not None and site not in self.quants:
            refuse_integer(site, "its input has a scale per token, so its bias no unit: give its result a quantizer")
        return y

    def embedding(self, site: str, index: np.ndarray) -> Code:
        self.put_weight(f"{site}.weight", self.params[f"{site}.weight"])
        return super().embedding(site, index)

    def norm(self, site: str, x: Code, eps: float) -> Code:
        self.check_codes(site, x)
        self.target(site, "a norm's result")
        self.put_weight(f"{site}.weight", self.params[f"{site}.weight"])
        gain = self.weight(f"{site}.weight")
        if x.measured:
            refuse_integer(site, "its input has a scale per token, so its eps has no unit: use a static range there")
        own = self.put_norm_channels(site, x) if groups.varies(x.unit) else self.unit(x.unit)
        code = np.rint(eps * np.square(x.shape[-1] / own))
        if code >= 2.0**EPS_BITS:
            refuse_integer(site, f"its eps, {eps}, dwarfs values of scale {own}")
        self.constants[f"{site}.eps"] = code.astype(np.int64)
        step = self.unit(gain.unit, 2.0**-ops.NORM_BITS)
        self.put_bias(site, self.params[f"{site}.bias"], step, accumulator_bits(gain.spec))
        return super().norm(site, x, eps)

    def add(self, site: str, a: Code, b: Code) -> Code:
        spec = self.target(site, "a sum is rounded to its codes")
        if spec.dynamic or a.measured or b.measured:
            return super().add(site, a, b)
        step, rule = self.constants[f"{site}.scale"], self.profile.requantize
        if isinstance(rule, FloatProduct):
            rule = replace(rule, order=rule.order.single)
        reals = np.broadcast_arrays(*(fixed_point.real_multiplier(x.unit, 1, step, rule) for x in (a, b)))
        with at(site):
            for real in reals:
                fixed_point.check_real(real)
        if isinstance(rule, FloatProduct):
            self.constants[f"{site}.multiplier"] = np.stack(reals)
            return super().add(site, a, b)
        if any(x.spec is None and x.value.dtype == np.int64 for x in (a, b)):
            refuse_integer(site, "a 64-bit accumulator reaches it: give the tensor before it a quantizer")
        multipliers, self.constants[f"{site}.shift"] = common_shift(reals)
        self.constants[f"{site}.multiplier"] = np.stack(multipliers).astype(np.int32)
        return super().add(site, a, b)

    def mul(self, site: str, a: Code, b: Code) -> Code:
        wide = any(x.spec is not None and x.spec.bits > 8 for x in (a, b))
        if any(x.spec is None and (wide or x.value.dtype == np.int64) for x in (a, b)):
            refuse_integer(
                site, "an accumulator times this takes more than 48 bits: give the tensor before it a quantizer"
            )
        return super().mul(site, a, b)

    def mean(self, site: str, x: Code) -> Code:
        if x.measured:
            refuse_integer(site, "it is a mean over tokens, and each has a scale of its own: use a static range")
        return super().mean(site, x)

    def prepend(self, site: str, x: Code) -> Code:
        self.put_own_codes(site, "weight", self.params[f"{site}.weight"])
        self.put_requantization(site, x)
        return super().prepend(site, x)

    def activation(self, site: str, x: Code, kind: str) -> Code:
        if kind == "relu":
            if x.measured:
                self.target(site, "its input has a scale per token")
            return super().activation(site, x, kind)
        self.check_codes(site, x)
        if x.measured:
            refuse_integer(site, f"{kind} of codes needs one static scale, and its input has one per token")
        if x.spec.wide is not None:
            refuse_integer(site, f"{kind} has a table or polynomial of narrow codes, and its input has wide channels")
        spec, real = self.target(site, f"{kind} is rounded to its codes"), self.decode(x)
        if self.nonlinear is Nonlinear.POLYNOMIAL:
            if np.abs(real).max() > POLYNOMIAL_LIMIT:
                reach = f"{np.abs(real).max():.6g}"
                refuse_integer(
                    site, f"its argument reaches {reach}, beyond {POLYNOMIAL_LIMIT} of the polynomials: use tables"
                )
            if not spec.dynamic and (self.constants[f"{site}.scale"] < 2.0**-ops.INPUT_BITS).any():
                refuse_integer(site, f"its scale is finer than 2^-{ops.INPUT_BITS}, the argument's: use tables")
            self.put_multiplier(site, "input_", self.unit(x.unit, 2.0**ops.INPUT_BITS))
            return super().activation(site, x, kind)
        if spec.dynamic:
            refuse_integer(site, f"{kind} is a table of codes of one scale, which needs a static range")
        scale, zero = (per_channel(self.constants[f"{site}.{key}"]) for key in ("scale", "zero_point"))
        level = np.rint(ACTIVATIONS[kind](real) / scale.astype(np.float64)) + zero
        table = np.clip(level, *affine.code_limits(zero, spec)).astype(code_dtype(spec))
        if table.ndim == 2:
            table, self.constants[f"{site}.row"] = share_rows(table, count_scales(x.spec, spec))
        self.constants[f"{site}.table"] = table
        return super().activation(site, x, kind)

    def decode(self, x: Code) -> np.ndarray:
        """The real value of each code, float64, from the lowest; (F, codes) where each channel has its own scale."""
        codes = np.arange(x.spec.code_min, x.spec.code_max + 1)
        return (codes - per_channel(x.zero_point)) * per_channel(self.unit(x.unit))

    def attention(
        self, site: str, q: Code, k: Code, v: Code, mask: np.ndarray, spec: AttentionSpec, rate: float
    ) -> Code:
        self.check_codes(f"{site}.scores", q, k)
        self.check_codes(f"{site}.context", v)
        if v.measured or self.quants.get(f"{site}.context.rhs", v.spec).dynamic:
            refuse_integer(
                f"{site}.context", "its values have a scale per token, which varies along the sum: use a static range"
            )
        return super().attention(site, q, k, v, mask, spec, rate)

    def scores(self, site: str, q: Code, k: Code) -> Code:
        if groups.varies(q.unit) or groups.varies(k.unit):
            if q.measured or k.measured:
                refuse_integer(site, "one of its factors has a scale per token, the other several along the sum")
            self.check_pairs(site, q, k)
            far = (groups.reach(x.spec, x.zero_point).astype(np.float64) for x in (q, k))
            self.put_channels(site, self.unit(q.unit, k.unit), np.multiply(*far))
        return super().scores(site, q, k)

    def softmax(self, site: str, scores: Code, mask: np.ndarray, spec: AttentionSpec) -> Code:
        self.check_codes(site, scores)
        if scores.measured:
            refuse_integer(site, "a table of exponentials needs one static scale, and its scores have several")
        self.target(site, "probabilities are rounded to its codes")
        self.put_softmax(site, scores, spec)
        return super().softmax(site, scores, mask, spec)

    def put_softmax(self, site: str, scores: Code, spec: AttentionSpec) -> None:
        """Exponentials of the distances between codes; sinks; the clip's numbers."""
        step, zero = float(scores.unit), int(scores.zero_point)
        lowest, highest = scores.spec.code_min, scores.spec.code_max
        if spec.softmax in (Softmax.SINK, Softmax.PLUS_ONE):
            logit = np.asarray(self.params.get(f"{site}.sink", np.zeros(1)), np.float64)
            below = np.floor(logit / step)
            factor = np.rint(np.exp(logit - below * step) * 2.0**ops.SINK_BITS)
            if factor.max() >= 2**FACTOR_BITS or np.abs(below).max() > SINK_STEPS:
                refuse_integer(
                    site, f"its sinks, {logit.min():.6g} to {logit.max():.6g}, do not fit scores of step {step:.6g}"
                )
            code = (below + zero).astype(np.int32)
            lowest, highest = min(lowest, int(code.min())), max(highest, int(code.max()))
            self.constants[f"{site}.sink"] = code
            self.constants[f"{site}.sink_factor"] = factor.astype(np.int64)
        if self.nonlinear is Nonlinear.POLYNOMIAL:
            self.put_multiplier(site, "input_", np.float64(step * 2.0**ops.INPUT_BITS))
        else:  # up to the largest distance, or the first that gives 0
            last = int(min(highest - lowest, np.ceil((ops.EXP_BITS + 2) * np.log(2) / step)))
            table = np.rint(np.exp(-step * np.arange(last + 1)) * 2.0**ops.EXP_BITS)
            self.constants[f"{site}.table"] = table.astype(np.int32)
        if spec.softmax in (Softmax.CLIPPED, Softmax.CLIPPED_ROW):
            row = spec.softmax is Softmax.CLIPPED_ROW
            stretch = spec.alpha if row else spec.gamma
            assert stretch is not None  # clipped_row has alpha
            if abs(stretch) > GAMMA_LIMIT:
                refuse_integer(site, f"its {'alpha' if row else 'gamma'}, {stretch}, is beyond {GAMMA_LIMIT}")
            if spec.zeta > ZETA_LIMIT:
                refuse_integer(site, f"its zeta, {spec.zeta}, is beyond {ZETA_LIMIT}")
            self.constants[f"{site}.zeta"] = np.asarray(np.rint(spec.zeta * 2.0**ops.ZETA_BITS), np.int64)
            name, one = "alpha" if row else "gamma", 2.0**ops.PROBABILITY_BITS
            self.constants[f"{site}.{name}"] = np.asarray(np.rint(stretch * one), np.int64)


ACTIVATIONS = {
    "gelu": lambda x: x * special.ndtr(x),
    "sigmoid": special.expit,
    "tanh": np.tanh,
}
