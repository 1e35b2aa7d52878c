"""`Integer`: a whole model in integer codes, as a device computes it.

Every value is a `Code`, `real = unit * (value - zero_point)`. A matmul of codes gives an int32 accumulator (int64 where
a factor has more than 8 bits), whose unit is the product of its factors' scales; requantization by the profile makes it
the code of the site it is named after. A site that the recipe leaves alone keeps the accumulator, for the next op that
can take one. All constants were made by `lowering` and are stored in the artifact by these names:

    <site>.scale .zero_point     of a static quantizer, and of each weight
    <site>.weight .bias          codes; integers in units of the accumulator, or float32 where the profile adds floats
    <site>.multiplier .shift     real multiplier 2^shift * multiplier / 2^31 of the requantization (a FloatProduct: the
                                 multiplier alone, or its three factors on an axis before); of a sum, one multiplier per
                                 operand in units of 2^-shift
    <site>.channel_multiplier .channel_shift .channel_unit     of an op whose input has several scales along channels:
                                 as `groups` takes them, one multiplier per head and channel; the unit of what comes out
    <site>.table                 gelu, sigmoid, tanh: one code per code, in several rows where channels have scales of
                                 their own, `.row` of each channel; softmax: exponentials, Q24
    <site>.eps .zeta .gamma .alpha .sink .sink_factor     as `ops` takes them
    <site>.input_multiplier .input_shift                  from a code to the argument of a polynomial

Arrays: constants by name, integers but for the scales (float32 or float64) and a float32 profile's multipliers, in the
shapes of the tensors that they belong to.

Floats appear where the design lets them: blocks of a matmul in float BLAS, which are exact; requantization by a float
profile; scales taken from the data (one per token). `strict` leaves no float at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from ..numerics import Numerics
from ..ops import merge_heads
from ..quant import affine
from ..spec import (
    ONE_ROUNDING,
    AttentionSpec,
    FloatProduct,
    Profile,
    QuantSpec,
    Softmax,
    SpecError,
    accumulator_bits,
)
from ..tape import Var, Vjp
from . import fixed_point, float_product, groups, ops, products

__all__ = ["Code", "Constants", "Integer", "Whole", "at", "code_dtype"]

Constants = Mapping[str, np.ndarray]
ZERO = np.zeros((), np.int32)


class Code(Var):
    """Integers with their meaning. `unit` is None under `strict`; `spec` is None for an accumulator, whose zero is 0.

    `measured`: the unit is known only as the model runs (a scale per token, or one looked up with a row). Such an
    accumulator has its bias in `offset`, float32; so has each where the profile adds biases as floats.
    """

    __slots__ = ("unit", "zero_point", "spec", "measured", "offset")

    def __init__(
        self,
        value: np.ndarray,
        unit: np.ndarray | None,
        zero_point: np.ndarray = ZERO,
        spec: QuantSpec | None = None,
        measured: bool = False,
        offset: np.ndarray | None = None,
    ) -> None:
        super().__init__(value)
        # typed as never None: strict asks for no unit, and whoever may meet an accumulator looks at `spec` first
        self.unit: np.ndarray | Any = unit
        self.spec: QuantSpec | Any = spec
        self.zero_point = zero_point
        self.measured = measured
        self.offset = offset

    def arrange(self, move: Callable[..., np.ndarray], *others: Code, edges: Sequence[tuple[Var, Vjp]] = ()) -> Code:
        """The same, with scale and zero point where there is more than one of them; of several inputs, such as the
        tokens before and a new one, only where each has its own."""
        inputs = (self, *others)
        shared = bool(others) and not self.measured

        def follow(parts: list[Any]) -> Any:
            return parts[0] if shared or parts[0] is None or np.ndim(parts[0]) == 0 else move(*parts)

        units, zeros = follow([x.unit for x in inputs]), follow([x.zero_point for x in inputs])
        return Code(move(*(x.value for x in inputs)), units, zeros, self.spec, self.measured)

    def subtract_zero(self) -> np.ndarray:
        """value - zero_point: int32, or int64 for an accumulator of that width."""
        return self.value if self.spec is None else self.value.astype(np.int32) - self.zero_point

    def real(self) -> np.ndarray:
        """unit * (value - zero_point) (+ offset), float32 at each step."""
        y = self.subtract_zero().astype(np.float32) * np.asarray(self.unit, np.float32)
        return y if self.offset is None else y + self.offset


class Whole(np.ndarray):
    """An array of integers that no float can come out of: `strict` makes every constant one, and the input's codes.

    Whatever NumPy computes from it is one too, and is refused with TypeError, in the op that made it, where its dtype
    is neither integer nor boolean.
    """

    def __array_finalize__(self, other: object) -> None:
        if self.dtype.kind not in "biu":
            raise TypeError(f"strict integer arithmetic came upon {self.dtype}")

    def __array_function__(
        self, function: Callable, types: Iterable[type], arguments: Iterable[Any], keywords: Mapping[str, Any]
    ) -> Any:
        result = super().__array_function__(function, types, arguments, keywords)
        return result.view(Whole) if isinstance(result, np.ndarray) else result


def code_dtype(spec: QuantSpec) -> type:
    """The narrowest dtype of a spec's codes that both backends have (torch computes nothing in uint16)."""
    if spec.bits <= 8 and spec.wide is None:
        return np.int8 if spec.has_sign else np.uint8
    return np.int16 if spec.wide is None and (spec.has_sign or spec.bits < 16) else np.int32


@contextmanager
def at(site: str) -> Iterator[None]:
    """A broken contract of the arithmetic, such as an overflow, as SpecError with the site's name."""
    try:
        yield
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(f"site {site}: {error}") from None


class Integer(Numerics[Code]):
    """See the module. `record(name, value)` is shown every site's codes, and each matmul's `<site>.accumulator`."""

    def __init__(
        self,
        constants: Constants,
        quants: Mapping[str, QuantSpec],
        profile: Profile,
        *,
        strict: bool = False,
        record: Callable[[str, np.ndarray], None] | None = None,
    ) -> None:
        self.entry = constants
        if strict:
            constants = {name: c.view(Whole) for name, c in constants.items() if c.dtype.kind in "iu"}
        self.constants = constants
        self.quants = quants
        self.profile = profile
        self.strict = strict
        self.record = record

    def unit(self, *parts: np.ndarray | float) -> np.ndarray | Any:
        """The product of scales, float64: two float32 factors fit exactly. None under strict."""
        if self.strict:
            return None
        product = np.float64(1)
        for part in parts:
            product = product * np.asarray(part, np.float64)
        return product

    # from accumulators to codes ---------------------------------------------------------------------------------------

    def named(self, site: str, x: Code) -> Code:
        """The result of an op, whatever its unit, as the code of its site."""
        spec = self.quants.get(site)
        if spec is None:
            return self.record_codes(site, x)
        whole = not (spec.dynamic or x.measured)
        return self.record_codes(site, self.requantize(site, spec, x) if whole else self.quantize(site, spec, x.real()))

    def record_codes(self, site: str, x: Code) -> Code:
        """Shows a site's codes to whoever asked."""
        if self.record is not None:
            self.record(site, x.value)
        return x

    def operand(self, site: str, x: Code) -> Code:
        """An operand for which the recipe has a quantizer of its own."""
        return self.named(site, x) if site in self.quants else x

    def quantize(self, site: str, spec: QuantSpec, real: np.ndarray) -> Code:
        """Codes of float32 values: with the site's scale, or one taken from them."""
        with at(site):
            if spec.dynamic:
                scale, zero = affine.scale_zero(*affine.ranges(real, spec), spec, self.profile.scale)
            else:
                scale, zero = self.scale_of(site), self.constants[f"{site}.zero_point"]
            code = affine.quantize(real, scale, zero, spec, self.profile.quantize)
        return Code(code.astype(code_dtype(spec)), scale, zero, spec, spec.dynamic)

    def requantize(self, site: str, spec: QuantSpec, x: Code) -> Code:
        """Codes from integers, by the profile's multiplier."""
        rule, multiplier = self.profile.requantize, self.constants[f"{site}.multiplier"]
        with at(site):
            if isinstance(rule, FloatProduct):
                zero, place, bias = self.constants[f"{site}.zero_point"], self.profile.bias, x.offset
                if bias is not None:
                    bias = float_product.scale_bias(bias, x.unit, self.scale_of(site), rule, place)
                level = float_product.multiply(x.subtract_zero(), multiplier, rule, zero, bias, place)
                return self.clamp(site, spec, level)
            level = fixed_point.multiply(x.subtract_zero(), multiplier, self.constants[f"{site}.shift"], rule)
        return self.clamp(site, spec, level + self.constants[f"{site}.zero_point"])

    def clamp(self, site: str, spec: QuantSpec, level: np.ndarray) -> Code:
        """Whole multiples of the site's scale, with its zero point, as its codes."""
        zero = self.constants[f"{site}.zero_point"]
        code = np.clip(level, *affine.code_limits(zero, spec)).astype(code_dtype(spec))
        return Code(code, self.scale_of(site), zero, spec)

    def scale_of(self, site: str) -> np.ndarray | Any:
        """The scale of a static site; None under strict."""
        return self.constants.get(f"{site}.scale")

    def weight(self, site: str) -> Code:
        """The codes of a weight."""
        return Code(self.constants[site], self.scale_of(site), self.constants[f"{site}.zero_point"], self.quants[site])

    def matmul(self, site: str, a: Code, b: Code, bias: np.ndarray | None = None) -> np.ndarray:
        """Accumulators of a b: 64 bits where a factor or the bias needs them."""
        wide = bias is not None and bias.dtype == np.int64
        zeros, bits = (a.zero_point, b.zero_point), 64 if wide else accumulator_bits(a.spec, b.spec)
        with at(site):
            return products.matmul(
                a.value, b.value, a.spec, b.spec, *zeros, bias, bits, self.profile.matmul, self.strict
            )

    def weigh(self, site: str, a: Code, b: Code, bias: np.ndarray | None = None) -> np.ndarray:
        """Accumulators of a b whose units vary along the sum, in the joint unit of `groups`. Their zero points are
        subtracted first: b's is one, or broadcasts against it."""
        multiplier, shift = (self.constants[f"{site}.channel_{key}"] for key in ("multiplier", "shift"))
        wide = bias is not None and bias.dtype == np.int64
        bits = groups.bits_below(a.spec), groups.bits_below(b.spec)
        factors = a.subtract_zero(), b.subtract_zero()
        with at(site):
            acc = groups.product(*factors, multiplier, shift, self.profile.add, *bits, self.strict)
            return products.fit(acc if bias is None else acc + bias, 64 if wide else 32, self.profile.matmul)

    def joint_unit(self, site: str) -> np.ndarray | Any:
        """The unit of `weigh`, without that of weights, and of what goes into a norm. None under strict."""
        return self.constants.get(f"{site}.channel_unit")

    def has_groups(self, site: str) -> bool:
        """Whether the scales of a site's input vary along the sum."""
        return f"{site}.channel_multiplier" in self.constants

    def record_accumulator(self, site: str, acc: np.ndarray) -> np.ndarray:
        """Shows a matmul's accumulators to whoever asked."""
        if self.record is not None:
            self.record(f"{site}.accumulator", acc)
        return acc

    # ops --------------------------------------------------------------------------------------------------------------

    def input(self, site: str, value: np.ndarray) -> Code:
        """Quantized by the profile, on the way in: the one step before the integers."""
        spec, zero = self.quants[site], self.constants[f"{site}.zero_point"]
        with at(site):
            scale = self.entry[f"{site}.scale"]
            code = affine.quantize(value, scale, self.entry[f"{site}.zero_point"], spec, self.profile.quantize)
        return self.record_codes(
            site, Code(code.astype(code_dtype(spec)).view(type(zero)), self.scale_of(site), zero, spec)
        )

    def parameter(self, site: str) -> Code:
        """The codes of `<site>.bias`, made with the site's own scale."""
        zero = self.constants[f"{site}.zero_point"]
        return self.record_codes(
            site, Code(self.constants[f"{site}.bias"], self.scale_of(site), zero, self.quants[site])
        )

    def linear(self, site: str, x: Code, *, weight: str | None = None, named: bool = True) -> Code:
        """x W^T + b: one matrix (O, I), or one per head (H, O, I) on the head's own slice of x."""
        x = self.operand(f"{site}.input", x)
        y = self.product(site, x, self.weight(weight or f"{site}.weight"))
        return self.named(site, y) if named else y

    def product(self, site: str, x: Code, w: Code) -> Code:
        """The accumulators of a linear layer; a bias of floats, as those of a measured unit have it, beside them."""
        heads = w.value.shape[0] if w.value.ndim == 3 else 1

        def split(v: np.ndarray) -> np.ndarray:  # (..., H n) -> (H, N, n)
            return v.reshape(-1, heads, v.shape[-1] // heads).swapaxes(0, 1)

        wt = w.value.reshape(heads, *w.value.shape[-2:]).swapaxes(1, 2)  # (H, I, O)
        w_zero = w.zero_point if np.size(w.zero_point) == 1 else w.zero_point.reshape(heads, 1, -1)
        grouped = self.has_groups(site)
        x_zero = x.zero_point if np.size(x.zero_point) == 1 else x.zero_point.reshape(1, -1, 1)
        x_zero = split(x.zero_point) if grouped else x_zero  # (H, 1, I)
        w_unit = w.unit if np.size(w.unit) == 1 else w.unit.reshape(*(1,) * (x.ndim - 1), -1)
        bias = self.constants.get(f"{site}.bias")
        bias = None if bias is None else bias.reshape(-1)
        beside = bias is not None and bias.dtype.kind == "f"
        inside = None if bias is None or beside else split(bias)  # (H, 1, O)
        multiply, x_unit = (self.weigh, self.joint_unit(site)) if grouped else (self.matmul, x.unit)
        acc = multiply(site, Code(split(x.value), None, x_zero, x.spec), Code(wt, None, w_zero, w.spec), inside)
        acc = self.record_accumulator(site, acc.swapaxes(0, 1).reshape(*x.shape[:-1], -1))  # (H, N, O) -> (..., H O)
        y_unit = self.unit(x_unit, w_unit)
        return Code(acc, y_unit, measured=x.measured, offset=bias if beside else None)

    def embedding(self, site: str, index: np.ndarray) -> Code:
        """Rows of the codes of `<site>.weight`; their own scales, where each row has one."""
        table = self.weight(f"{site}.weight")
        unit, zero = (part if np.size(part) == 1 else part[index] for part in (table.unit, table.zero_point))
        return self.named(site, Code(table.value[index], unit, zero, table.spec, np.size(table.unit) > 1))

    def norm(self, site: str, x: Code, eps: float) -> Code:
        """(x - mean) / sqrt(var + eps) over the last axis, by the gain's codes, plus the bias; eps is a constant."""
        gain, code = self.weight(f"{site}.weight"), x.value
        if self.has_groups(site):
            multiplier, shift = (self.constants[f"{site}.channel_{key}"] for key in ("multiplier", "shift"))
            code = groups.join(x.subtract_zero(), multiplier, shift, self.profile.add).astype(np.int32)
        acc = ops.normalize(code, self.constants[f"{site}.eps"]) * gain.subtract_zero()
        bias = self.constants[f"{site}.bias"]
        with at(site):
            acc = products.fit(acc + bias, 64 if bias.dtype == np.int64 else 32, self.profile.matmul)
        acc = self.record_accumulator(site, acc)
        return self.named(site, Code(acc, self.unit(gain.unit, 2.0**-ops.NORM_BITS)))

    def add(self, site: str, a: Code, b: Code) -> Code:
        """Both operands in one fine unit, their sum rounded once."""
        spec, rule = self.quants[site], self.profile.requantize
        if spec.dynamic or a.measured or b.measured:
            return self.record_codes(site, self.quantize(site, spec, a.real() + b.real()))
        (first, second), zero = self.constants[f"{site}.multiplier"], self.constants[f"{site}.zero_point"]
        if isinstance(rule, FloatProduct):
            level = float_product.add([a.subtract_zero(), b.subtract_zero()], [first, second], rule, zero)
        else:
            parts, shift = [a.subtract_zero(), b.subtract_zero()], self.constants[f"{site}.shift"]
            level = ops.weighted_sum(parts, [first, second], shift, self.profile.add) + zero
        return self.record_codes(site, self.clamp(site, spec, level))

    def mul(self, site: str, a: Code, b: Code) -> Code:
        """The product of two values, element by element, in the product of their units."""
        wide = np.int64 if accumulator_bits(a.spec, b.spec) == 64 else np.int32
        return self.named(
            site,
            Code(
                a.subtract_zero().astype(wide) * b.subtract_zero(),
                self.unit(a.unit, b.unit),
                measured=a.measured or b.measured,
            ),
        )

    def scale(self, x: Code, factor: float) -> Code:
        """Only the unit changes."""
        return Code(x.value, self.unit(x.unit, factor), x.zero_point, x.spec, x.measured)

    def mean(self, site: str, x: Code) -> Code:
        """Mean over the real tokens, (B, T, C) -> (B, 1, C)."""
        total = ops.mean(x.subtract_zero(), self._where(x)).astype(x.subtract_zero().dtype)
        return self.named(site, Code(total, x.unit, measured=x.measured))

    def prepend(self, site: str, x: Code) -> Code:
        """The codes of `<site>.weight`, made with the site's own scale, and x requantized to it."""
        spec = self.quants[site]
        x = self.quantize(site, spec, x.real()) if x.measured else self.requantize(site, spec, x)
        first = np.broadcast_to(self.constants[f"{site}.weight"], (x.shape[0], 1, x.shape[2]))
        return self.record_codes(site, Code(np.concatenate([first, x.value], axis=1), x.unit, x.zero_point, x.spec))

    def dropout(self, site: str, x: Code, rate: float) -> Code:
        """As it is: integers are not trained."""
        return x

    def activation(self, site: str, x: Code, kind: str) -> Code:
        """relu: max(x, 0). Others: a table, or a polynomial of I-BERT."""
        if kind == "relu" and x.measured:
            return self.record_codes(site, self.quantize(site, self.quants[site], np.maximum(x.real(), 0)))
        if kind == "relu":
            return self.named(site, Code(np.maximum(x.subtract_zero(), 0), x.unit))
        table = self.constants.get(f"{site}.table")
        if table is not None:
            place = x.value.astype(np.int32) - x.spec.code_min
            code = table[place] if table.ndim == 1 else table[self.constants[f"{site}.row"], place]
            return self.record_codes(
                site, Code(code, self.scale_of(site), self.constants[f"{site}.zero_point"], self.quants[site])
            )
        polynomial, bits = ops.POLYNOMIALS[kind]
        multiplier, shift = (self.constants[f"{site}.input_{key}"] for key in ("multiplier", "shift"))
        with at(site):
            argument = fixed_point.multiply(x.subtract_zero(), multiplier, shift, ONE_ROUNDING)
        y = np.clip(polynomial(argument), fixed_point.INT32_MIN, fixed_point.INT32_MAX).astype(np.int32)
        return self.named(site, Code(y, self.unit(2.0**-bits)))

    def attention(
        self, site: str, q: Code, k: Code, v: Code, mask: np.ndarray, spec: AttentionSpec, rate: float
    ) -> Code:
        """As `Float.attention`; the scale 1 / sqrt(K) is part of the scores' unit."""
        q, k = self.operand(f"{site}.scores.lhs", q), self.operand(f"{site}.scores.rhs", k)
        scores = self.named(f"{site}.scores", self.scores(f"{site}.scores", q, k))
        probs = self.operand(f"{site}.context.lhs", self.softmax(f"{site}.probs", scores, mask, spec))
        v = self.operand(f"{site}.context.rhs", v)
        acc, step = self.matmul(f"{site}.context", probs, v), self.unit(probs.unit, v.unit)
        step = step if np.ndim(step) == 0 else np.broadcast_to(step, acc.shape)  # per query and head, or per channel
        context = Code(acc, step, measured=probs.measured)
        context = cast(Code, merge_heads(context))  # (B, H, Tq, K) -> (B, Tq, H K)
        self.record_accumulator(f"{site}.context", context.value)
        return self.named(f"{site}.context", context)

    def scores(self, site: str, q: Code, k: Code) -> Code:
        """The accumulators of q k^T."""
        kt = k.arrange(lambda x: x.swapaxes(-1, -2))
        if self.has_groups(site):
            acc, step = self.weigh(site, q, kt), self.joint_unit(site)
        else:
            acc, step = self.matmul(site, q, kt), self.unit(q.unit, kt.unit)
        acc = self.record_accumulator(site, acc)
        return Code(acc, self.unit(step, q.shape[-1] ** -0.5), measured=q.measured or k.measured)

    def softmax(self, site: str, scores: Code, mask: np.ndarray, spec: AttentionSpec) -> Code:
        """Exponentials from a table, or by I-BERT's polynomial; their share of the sum; the clip."""

        def constant(name: str) -> np.ndarray:
            return self.constants[f"{site}.{name}"]

        by_table = f"{site}.table" in self.constants
        exponential = constant("table") if by_table else (constant("input_multiplier"), constant("input_shift"))
        extra = (constant("sink"), constant("sink_factor")) if f"{site}.sink" in self.constants else None
        with at(site):
            p = ops.softmax(scores.value, mask, exponential, extra)
            if spec.softmax in (Softmax.CLIPPED, Softmax.CLIPPED_ROW):
                row = spec.softmax is Softmax.CLIPPED_ROW
                gamma = ops.row_gamma(constant("alpha"), mask) if row else constant("gamma")
                p = ops.clip_stretch(p, constant("zeta"), gamma)
        return self.named(site, Code(p.astype(np.int32), self.unit(2.0**-ops.PROBABILITY_BITS)))
