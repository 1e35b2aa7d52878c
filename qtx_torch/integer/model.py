"""`Integer`: a whole model in integer codes, as a device computes it.

Differs from the reference: site, module, attn: a site's module knows its site and holds its parameters.
Differs from the reference: Integer.dropout, Code.arrange, Whole: there is no tape, and torch forbids floats in another
way.

Every value is a `Code`, `real = unit * (value - zero_point)`. A matmul of codes gives an int32 accumulator (int64 where
a factor has more than 8 bits), whose unit is the product of its factors' scales; requantization by the profile makes it
the code of the site it is named after. A site that the recipe leaves alone keeps the accumulator, for the next op that
can take one. All constants were made by the reference's `lowering`, whose counterpart of this module names them.

Floats appear where the design lets them: blocks of a matmul in float BLAS, which are exact; requantization by a float
profile; scales taken from the data (one per token). `strict` leaves no float at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtx_ref.spec import (
    ONE_ROUNDING,
    AttentionSpec,
    FloatProduct,
    Profile,
    QuantSpec,
    Softmax,
    SpecError,
    accumulator_bits,
)

from ..attention import Mask
from ..numerics import Float
from ..ops import arrange, merge_heads
from ..quant import affine
from ..sites import SiteModule
from . import fixed_point, float_product, groups, ops, products

Constants = Mapping[str, Tensor]
ZERO = torch.zeros((), dtype=torch.int32)


class Code:
    """Integers with their meaning. `unit` is None under `strict`; `spec` is None for an accumulator, whose zero is 0.

    `measured`: the unit is known only as the model runs (a scale per token, or one looked up with a row). Such an
    accumulator has its bias in `offset`, float32; so has each where the profile adds biases as floats.
    """

    __slots__ = ("value", "unit", "zero_point", "spec", "measured", "offset")

    def __init__(
        self,
        value: Tensor,
        unit: Tensor | None,
        zero_point: Tensor | None = None,
        spec: QuantSpec | None = None,
        measured: bool = False,
        offset: Tensor | None = None,
    ) -> None:
        self.value = value
        self.unit = unit
        self.zero_point = ZERO if zero_point is None else zero_point  # a tensor as a default does not compile
        self.spec = spec
        self.measured = measured
        self.offset = offset

    # what the wiring asks of a tensor
    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    device = property(lambda self: self.value.device)
    dtype = property(lambda self: self.value.dtype)

    @staticmethod
    def arrange(move: Callable[..., Tensor], parts: tuple[Code, ...]) -> Code:
        """`ops.arrange`: scale and zero point move too, where there is more than one of them; of several parts, such as
        the tokens before and a new one, only where each has its own."""
        first = parts[0]
        shared = len(parts) > 1 and not first.measured

        def follow(sides: list[Tensor | None]) -> Tensor | None:
            return sides[0] if shared or sides[0] is None or sides[0].ndim == 0 else move(*sides)

        units, zeros = follow([x.unit for x in parts]), follow([x.zero_point for x in parts])
        return Code(move(*(x.value for x in parts)), units, zeros, first.spec, first.measured)

    def subtract_zero(self) -> Tensor:
        """value - zero_point: int32, or int64 for an accumulator of that width."""
        return self.value if self.spec is None else self.value.int() - self.zero_point

    def real(self) -> Tensor:
        """unit * (value - zero_point) (+ offset), float32 at each step."""
        y = self.subtract_zero().float() * self.unit.float()
        return y if self.offset is None else y + self.offset


class Whole(TorchDispatchMode):
    """While it is entered and `on`, no op takes a float or gives one: TypeError, in the op that would."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on
        self.fault = ""

    def __torch_dispatch__(
        self, function: Callable, types: object, arguments: tuple = (), keywords: dict | None = None
    ) -> object:
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        for x in tree_leaves((arguments, keywords, result)) if self.on else ():
            if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
                self.fault = f"strict integer arithmetic came upon {products.name(x.dtype)} in {function}"
                raise TypeError(self.fault)
        return result

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if self.fault:  # Python's operators take a TypeError for one of theirs, and lose its words
            raise TypeError(self.fault) from error


def code_dtype(spec: QuantSpec) -> torch.dtype:
    """The narrowest dtype of a spec's codes that both backends have (torch computes nothing in uint16)."""
    if spec.bits <= 8 and spec.wide is None:
        return torch.int8 if spec.has_sign else torch.uint8
    return torch.int16 if spec.wide is None and (spec.has_sign or spec.bits < 16) else torch.int32


@contextmanager
def at(site: str) -> Iterator[None]:
    """A broken contract of the arithmetic, such as an overflow, as SpecError with the site's name."""
    try:
        yield
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(f"site {site}: {error}") from None


class Integer(Float):
    """See the module. `record(name, value)` is shown every site's codes, and each matmul's `<site>.accumulator`."""

    def __init__(
        self,
        constants: Constants,
        quants: Mapping[str, QuantSpec],
        profile: Profile,
        *,
        strict: bool = False,
        record: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.entry = constants
        if strict:
            constants = {name: c for name, c in constants.items() if not c.is_floating_point()}
        self.constants = constants
        self.quants = quants
        self.profile = profile
        self.strict = strict
        self.record = record
        self.whole: Whole | None = None  # turned on once the input is in codes

    def unit(self, *parts: Tensor | float | None) -> Tensor | None:
        """The product of scales, float64: two float32 factors fit exactly. None under strict."""
        if self.strict:
            return None
        product = torch.ones((), dtype=torch.float64)
        for part in parts:
            product = product * (part.double() if isinstance(part, Tensor) else part)
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
        if self.record is not None:
            self.record(site, x.value)
        return x

    def operand(self, site: str, x: Code) -> Code:
        """An operand for which the recipe has a quantizer of its own."""
        return self.named(site, x) if site in self.quants else x

    def quantize(self, site: str, spec: QuantSpec, real: Tensor) -> Code:
        """Codes of float32 values: with the site's scale, or one taken from them."""
        with at(site):
            if spec.dynamic:
                scale, zero = affine.scale_zero(*affine.ranges(real, spec), spec, self.profile.scale)
            else:
                scale, zero = self.scale_of(site), self.constants[f"{site}.zero_point"]
            code = affine.quantize(real, scale, zero, spec, self.profile.quantize)
        return Code(code.to(code_dtype(spec)), scale, zero, spec, spec.dynamic)

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

    def clamp(self, site: str, spec: QuantSpec, level: Tensor) -> Code:
        """Whole multiples of the site's scale, with its zero point, as its codes."""
        zero = self.constants[f"{site}.zero_point"]
        code = level.clamp(*affine.code_limits(zero, spec)).to(code_dtype(spec))
        return Code(code, self.scale_of(site), zero, spec)

    def scale_of(self, site: str) -> Tensor | None:
        """The scale of a static site; None under strict."""
        return self.constants.get(f"{site}.scale")

    def weight(self, site: str) -> Code:
        """The codes of a weight."""
        return Code(self.constants[site], self.scale_of(site), self.constants[f"{site}.zero_point"], self.quants[site])

    def matmul(self, site: str, a: Code, b: Code, bias: Tensor | None = None) -> Tensor:
        """Accumulators of a b: 64 bits where a factor or the bias needs them."""
        wide = bias is not None and bias.dtype == torch.int64
        zeros, bits = (a.zero_point, b.zero_point), 64 if wide else accumulator_bits(a.spec, b.spec)
        with at(site):
            return products.matmul(
                a.value, b.value, a.spec, b.spec, *zeros, bias, bits, self.profile.matmul, self.strict
            )

    def weigh(self, site: str, a: Code, b: Code, bias: Tensor | None = None) -> Tensor:
        """Accumulators of a b whose units vary along the sum, in the joint unit of `groups`. Their zero points are
        subtracted first: b's is one, or broadcasts against it."""
        multiplier, shift = (self.constants[f"{site}.channel_{key}"] for key in ("multiplier", "shift"))
        wide = bias is not None and bias.dtype == torch.int64
        bits = groups.bits_below(a.spec), groups.bits_below(b.spec)
        factors = a.subtract_zero(), b.subtract_zero()
        with at(site):
            acc = groups.product(*factors, multiplier, shift, self.profile.add, *bits, self.strict)
            return products.fit(acc if bias is None else acc + bias, 64 if wide else 32, self.profile.matmul)

    def joint_unit(self, site: str) -> Tensor | None:
        """The unit of `weigh`, without that of weights, and of what goes into a norm. None under strict."""
        return self.constants.get(f"{site}.channel_unit")

    def has_groups(self, site: str) -> bool:
        """Whether the scales of a site's input vary along the sum."""
        return f"{site}.channel_multiplier" in self.constants

    def record_accumulator(self, site: str, acc: Tensor) -> Tensor:
        if self.record is not None:
            self.record(f"{site}.accumulator", acc)
        return acc

    # ops --------------------------------------------------------------------------------------------------------------

    def input(self, module: SiteModule, value: Tensor) -> Code:
        """Quantized by the profile, on the way in: the one step before the integers."""
        site, spec = module.site, self.quants[module.site]
        zero = self.constants[f"{site}.zero_point"]
        with at(site):
            code = affine.quantize(value, self.entry[f"{site}.scale"], zero, spec, self.profile.quantize).to(
                code_dtype(spec)
            )
        if self.whole is not None:
            self.whole.on = True
        return self.record_codes(site, Code(code, self.scale_of(site), zero, spec))

    def parameter(self, module: SiteModule) -> Code:
        """The codes of the site's bias, made with its own scale."""
        site = module.site
        zero = self.constants[f"{site}.zero_point"]
        return self.record_codes(
            site, Code(self.constants[f"{site}.bias"], self.scale_of(site), zero, self.quants[site])
        )

    def linear(self, module: SiteModule, x: Code, *, weight: Tensor | None = None, named: bool = True) -> Code:
        """x W^T + b: one matrix (O, I), or one per head (H, O, I) on the head's own slice of x."""
        site = module.site
        x = self.operand(f"{site}.input", x)
        y = self.product(site, x, self.weight(module.tied or f"{site}.weight"))
        return self.named(site, y) if named else y

    def product(self, site: str, x: Code, w: Code) -> Code:
        """The accumulators of a linear layer; a bias of floats, as those of a measured unit have it, beside them."""
        heads = w.shape[0] if w.ndim == 3 else 1

        def split(v: Tensor) -> Tensor:  # (..., H n) -> (H, N, n)
            return v.reshape(-1, heads, v.shape[-1] // heads).transpose(0, 1)

        wt = w.value.reshape(heads, *w.shape[-2:]).mT  # (H, I, O)
        w_zero = w.zero_point if w.zero_point.numel() == 1 else w.zero_point.reshape(heads, 1, -1)
        grouped = self.has_groups(site)
        x_zero = x.zero_point if x.zero_point.numel() == 1 else x.zero_point.reshape(1, -1, 1)
        x_zero = split(x.zero_point) if grouped else x_zero  # (H, 1, I)
        w_unit = w.unit if w.unit is None or w.unit.numel() == 1 else w.unit.reshape(*(1,) * (x.ndim - 1), -1)
        bias = self.constants.get(f"{site}.bias")
        bias = None if bias is None else bias.reshape(-1)
        beside = bias is not None and bias.is_floating_point()
        inside = None if bias is None or beside else split(bias)  # (H, 1, O)
        rows = split(x.value)
        if heads == 1:  # one matrix, without an axis of heads
            rows, wt, inside = rows[0], wt[0], None if inside is None else inside[0]
            w_zero, x_zero = (z[0] if z.ndim == 3 else z for z in (w_zero, x_zero))
        multiply, x_unit = (self.weigh, self.joint_unit(site)) if grouped else (self.matmul, x.unit)
        acc = multiply(site, Code(rows, None, x_zero, x.spec), Code(wt, None, w_zero, w.spec), inside)
        acc = acc if heads > 1 else acc[None]
        acc = self.record_accumulator(site, acc.transpose(0, 1).reshape(*x.shape[:-1], -1))  # (H, N, O) -> (..., H O)
        y_unit = self.unit(x_unit, w_unit)
        return Code(acc, y_unit, measured=x.measured, offset=bias if beside else None)

    def embedding(self, module: SiteModule, index: Tensor) -> Code:
        """Rows of the codes of the site's weight; their own scales, where each row has one."""
        table = self.weight(f"{module.site}.weight")
        several = table.unit is not None and table.unit.numel() > 1
        step, zero = (x if x is None or x.numel() == 1 else x[index] for x in (table.unit, table.zero_point))
        return self.named(module.site, Code(table.value[index], step, zero, table.spec, several))

    def norm(self, module: SiteModule, x: Code, eps: float) -> Code:
        site = module.site
        gain, code = self.weight(f"{site}.weight"), x.value
        if self.has_groups(site):
            multiplier, shift = (self.constants[f"{site}.channel_{key}"] for key in ("multiplier", "shift"))
            code = groups.join(x.subtract_zero(), multiplier, shift, self.profile.add).int()
        acc = ops.normalize(code, self.constants[f"{site}.eps"]) * gain.subtract_zero()
        bias = self.constants[f"{site}.bias"]
        with at(site):
            acc = products.fit(acc + bias, 64 if bias.dtype == torch.int64 else 32, self.profile.matmul)
        acc = self.record_accumulator(site, acc)
        return self.named(site, Code(acc, self.unit(gain.unit, 2.0**-ops.NORM_BITS)))

    def add(self, module: SiteModule, a: Code, b: Code) -> Code:
        """Both operands in one fine unit, their sum rounded once."""
        site, rule = module.site, self.profile.requantize
        spec = self.quants[site]
        if spec.dynamic or a.measured or b.measured:
            return self.record_codes(site, self.quantize(site, spec, a.real() + b.real()))
        (first, second), zero = self.constants[f"{site}.multiplier"], self.constants[f"{site}.zero_point"]
        if isinstance(rule, FloatProduct):
            level = float_product.add([a.subtract_zero(), b.subtract_zero()], [first, second], rule, zero)
        else:
            parts, shift = [a.subtract_zero(), b.subtract_zero()], self.constants[f"{site}.shift"]
            level = ops.weighted_sum(parts, [first, second], shift, self.profile.add) + zero
        return self.record_codes(site, self.clamp(site, spec, level))

    def mul(self, module: SiteModule, a: Code, b: Code) -> Code:
        wide = torch.int64 if accumulator_bits(a.spec, b.spec) == 64 else torch.int32
        product = a.subtract_zero().to(wide) * b.subtract_zero().to(wide)
        return self.named(module.site, Code(product, self.unit(a.unit, b.unit), measured=a.measured or b.measured))

    def scale(self, x: Code, factor: float) -> Code:
        """Only the unit changes."""
        return Code(x.value, self.unit(x.unit, factor), x.zero_point, x.spec, x.measured)

    def mean(self, module: SiteModule, x: Code) -> Code:
        """Mean over the real tokens, (B, T, C) -> (B, 1, C)."""
        total = ops.mean(x.subtract_zero(), self._where(x)).to(x.subtract_zero().dtype)
        return self.named(module.site, Code(total, x.unit, measured=x.measured))

    def prepend(self, module: SiteModule, x: Code) -> Code:
        """The codes of the site's weight, made with its own scale, and x requantized to it."""
        site, spec = module.site, self.quants[module.site]
        x = self.quantize(site, spec, x.real()) if x.measured else self.requantize(site, spec, x)
        first = self.constants[f"{module.site}.weight"].expand(x.shape[0], 1, x.shape[2])
        return self.record_codes(module.site, Code(torch.cat([first, x.value], dim=1), x.unit, x.zero_point, x.spec))

    def activation(self, module: SiteModule, x: Code, kind: str) -> Code:
        """relu: max(x, 0). Others: a table, or a polynomial of I-BERT."""
        site = module.site
        if kind == "relu" and x.measured:
            return self.record_codes(site, self.quantize(site, self.quants[site], x.real().clamp(min=0)))
        if kind == "relu":
            return self.named(site, Code(x.subtract_zero().clamp(min=0), x.unit))
        table = self.constants.get(f"{site}.table")
        if table is not None:
            place = x.value.long() - x.spec.code_min
            code = table[place] if table.ndim == 1 else table[self.constants[f"{site}.row"].long(), place]
            zero = self.constants[f"{site}.zero_point"]
            return self.record_codes(site, Code(code, self.scale_of(site), zero, self.quants[site]))
        polynomial, bits = ops.POLYNOMIALS[kind]
        scaling = (self.constants[f"{site}.input_{key}"] for key in ("multiplier", "shift"))
        with at(site):
            argument = fixed_point.multiply(x.subtract_zero(), *scaling, ONE_ROUNDING)
        y = polynomial(argument).clamp(fixed_point.INT32_MIN, fixed_point.INT32_MAX).int()
        return self.named(site, Code(y, self.unit(2.0**-bits)))

    def attention(
        self, attn: nn.Module, q: Code, k: Code, v: Code, mask: Mask, spec: AttentionSpec, rate: float
    ) -> Code:
        """As `Float.attention`; the scale 1 / sqrt(K) is part of the scores' unit."""
        scores_site, context_site = attn.scores.site, attn.context.site
        q, k = self.operand(f"{scores_site}.lhs", q), self.operand(f"{scores_site}.rhs", k)
        scores = self.named(scores_site, self.scores(scores_site, q, k))
        probs = self.operand(f"{context_site}.lhs", self.softmax(attn.probs, scores, mask, spec))
        v = self.operand(f"{context_site}.rhs", v)
        acc, step = self.matmul(context_site, probs, v), self.unit(probs.unit, v.unit)
        step = step if step is None or step.ndim == 0 else step.expand(acc.shape)  # per query and head, or per channel
        context = Code(acc, step, measured=probs.measured)
        context = merge_heads(context)  # (B, H, Tq, K) -> (B, Tq, H K)
        self.record_accumulator(context_site, context.value)
        return self.named(context_site, context)

    def scores(self, site: str, q: Code, k: Code) -> Code:
        """The accumulators of q k^T."""
        kt = arrange(lambda x: x.transpose(-1, -2), k)
        if self.has_groups(site):
            step = self.joint_unit(site)
            acc = self.weigh(site, q, kt)
        else:
            acc, step = self.matmul(site, q, kt), self.unit(q.unit, kt.unit)
        acc = self.record_accumulator(site, acc)
        return Code(acc, self.unit(step, q.shape[-1] ** -0.5), measured=q.measured or k.measured)

    def softmax(self, module: SiteModule, scores: Code, mask: Mask, spec: AttentionSpec) -> Code:
        site, find = module.site, self.constants.get
        exponential = find(f"{site}.table")
        if exponential is None:
            exponential = tuple(self.constants[f"{site}.input_{key}"] for key in ("multiplier", "shift"))
        extra = (find(f"{site}.sink"), find(f"{site}.sink_factor")) if f"{site}.sink" in self.constants else None
        with at(site):
            p = ops.softmax(scores.value, mask.allowed, exponential, extra)
            if spec.softmax in (Softmax.CLIPPED, Softmax.CLIPPED_ROW):
                row = spec.softmax is Softmax.CLIPPED_ROW
                gamma = ops.row_gamma(find(f"{site}.alpha"), mask.allowed) if row else find(f"{site}.gamma")
                p = ops.clip_stretch(p, find(f"{site}.zeta"), gamma)
        return self.named(site, Code(p.int(), self.unit(2.0**-ops.PROBABILITY_BITS)))
