"""The integer form: every number after the input's quantizer is an integer, and every rule an operator of integers.

The arithmetic of `qtx_ref.integer`, node by node: MatMulInteger on unsigned codes of 8 bits, which no instruction set
saturates (wider ones: MatMul of int64); requantization as the artifact's profile says; tables as Gather; softmax, norm
and polynomials as `qtx_ref.integer.ops` defines them. A float profile's requantization is the one place with floats.
Bounds are followed along with the values: where int64 could overflow, the site is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np

from qtx_ref.integer import float_product, ops, products
from qtx_ref.integer.model import code_dtype
from qtx_ref.integer.ops import PROBABILITY_BITS
from qtx_ref.ops import merge_heads
from qtx_ref.spec import AttentionSpec, FloatProduct, Overflow, QuantSpec, Softmax, SpecError, accumulator_bits

from . import export_functions as functions
from .export_graph import BATCH, Value
from .export_requantize import Target, add_level, check_quantize, is_linear, quantize_level, round_level
from .export_wiring import CENTRE, Wiring, broadcast, refuse_export

INT64 = "int64"


def largest(spec: QuantSpec, zero: Any) -> int:
    """The largest magnitude of code less zero point."""
    return int(max(spec.code_max - np.min(zero), np.max(zero) - spec.code_min))


class IntegerGraph(Wiring):
    """See the module."""

    @contextmanager
    def at(self, site: str) -> Iterator[None]:
        """New nodes are the site's; a bound that does not hold is refused with its name."""
        self.graph.place = site
        try:
            yield
        except SpecError:
            raise
        except ValueError as error:
            refuse_export(site, str(error))

    # codes and accumulators -------------------------------------------------------------------------------------------

    def scale_zero(self, site: str) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of a site or weight."""
        scale, zero = self.constants[f"{site}.scale"], self.constants[f"{site}.zero_point"]
        return scale, (zero.reshape(-1)[0] if (zero == zero.reshape(-1)[0]).all() else zero)

    def codes(self, site: str, spec: QuantSpec, name: str, axes: Any) -> Value:
        """A tensor of codes of a site."""
        scale, zero = self.scale_zero(site)
        dtype = np.dtype(code_dtype(spec)).name
        return Value(self.graph, name, axes, dtype, scale, zero, spec, largest(spec, zero))

    def accumulators(self, name: str, axes: Any, dtype: str, unit: Any, bound: int) -> Value:
        """A tensor of accumulators."""
        return Value(self.graph, name, axes, dtype, unit, 0, None, min(bound, 2**31) if dtype == "int32" else bound)

    def subtract_zero(self, x: Value, dtype: str = "int32") -> str:
        """code - zero_point as `dtype`, or an accumulator as it is."""
        name = x.name if x.dtype == dtype else self.graph.cast(x.name, dtype)
        if x.spec is None or not np.any(x.zero_point):
            return name
        return self.graph.node("Sub", name, np.asarray(x.zero_point, dtype))

    def named(self, site: str, x: Value) -> Value:
        """The result of an op, whatever its unit, as the code of its site."""
        spec = self.quants.get(site)
        if spec is None:
            return self.record(site, x)
        return self.record(site, self.requantize(site, spec, x) if x.measured is None else self.quantize(site, x))

    def operand(self, site: str, x: Value) -> Value:
        """An operand for which the recipe has a quantizer of its own."""
        return self.named(site, x) if site in self.quants else x

    def requantize(self, site: str, spec: QuantSpec, x: Value, name: str | None = None) -> Value:
        """Codes from integers, by the profile's rule."""
        wide, rule = x.spec is None and x.dtype == INT64, self.profile.requantize
        with self.at(site):
            multiplier, shift = self.constants[f"{site}.multiplier"], self.constants.get(f"{site}.shift")
            (scale, zero), bias = self.scale_zero(site), x.offset
            if bias is not None:
                assert isinstance(rule, FloatProduct)  # lowering has no other bias of floats
                bias = float_product.scale_bias(bias, x.unit, scale, rule, self.profile.bias)
            target = Target(multiplier, shift, zero, bias, self.profile.bias)
            level = round_level(self.graph, self.subtract_zero(x, INT64), x.bound, target, rule, wide)
            return self.clamp(site, spec, level, x.axes, name or site)

    def clamp(self, site: str, spec: QuantSpec, level: str, axes: Any, name: str) -> Value:
        """Whole multiples of the site's scale with its zero point, int64, as its codes."""
        level = self.graph.node("Clip", level, np.int64(spec.code_min), np.int64(spec.code_max))
        return self.codes(site, spec, self.graph.cast(level, np.dtype(code_dtype(spec)).name, name), axes)

    def real(self, x: Value) -> str:
        """unit * (code - zero_point), float32 at each step."""
        if x.measured is not None:
            return x.measured
        return self.graph.node("Mul", self.graph.cast(self.subtract_zero(x), "float32"), np.float32(x.unit))

    def quantize(self, site: str, x: Value) -> Value:
        """Codes of float32 values, by the profile's rule."""
        spec, (scale, zero) = self.quants[site], self.scale_zero(site)
        with self.at(site):
            check_quantize(self.profile.quantize)
            dtype = np.dtype(code_dtype(spec)).name
            if spec.bits == 8 and is_linear(self.profile.quantize):
                zero = np.asarray(zero).astype(dtype)
                code = self.graph.node("QuantizeLinear", x.measured, np.asarray(scale, np.float32), zero, name=site)
                return self.codes(site, spec, code, x.axes)
            level = quantize_level(self.graph, x.measured, scale, zero, self.profile.quantize)
            return self.clamp(site, spec, level, x.axes, site)

    def unsigned(self, x: Value) -> tuple[str, np.ndarray]:
        """Codes of at most 8 bits as uint8, and their zero point, int32: u8 x s8 saturates on some CPUs."""
        if x.dtype == "uint8":
            return x.name, np.asarray(x.zero_point, np.int32)
        g = self.graph
        moved = g.node("Add", g.cast(x.name, "int32"), np.int32(CENTRE))
        return g.cast(moved, "uint8"), np.asarray(x.zero_point, np.int32) + CENTRE

    def matmul(self, a: Value, b: Value, depth: int, bits: int) -> tuple[str, int]:
        """Accumulators of a b, int32 or int64, and their bound."""
        g, bound, rule = self.graph, depth * a.bound * b.bound, self.profile.matmul
        if products.saturates(a.spec, b.spec, rule):
            raise ValueError(f"its products are {rule.products}, and a graph's are exact")
        if bits == 64 or max(a.spec.bits, b.spec.bits) > 8:
            name = g.node("MatMul", self.subtract_zero(a, INT64), self.subtract_zero(b, INT64))
            return name, bound
        (left, left_zero), (right, right_zero) = self.unsigned(a), self.unsigned(b)
        own = right_zero if np.ndim(right_zero) == 0 else np.int32(0)
        name = g.node("MatMulInteger", left, right, left_zero.astype(np.uint8), own.astype(np.uint8))
        if np.ndim(right_zero):  # one per column, taken off as zero times the sum of the row
            rows = g.node("Sub", g.cast(left, "int32"), left_zero)
            total = g.node("ReduceSum", rows, np.array([-1], np.int64), keepdims=1)
            name = g.node("Sub", name, g.node("Mul", total, right_zero.astype(np.int32)))
        return name, bound

    # ops --------------------------------------------------------------------------------------------------------------

    def input(self, site: str, value: np.ndarray) -> Value:
        """Quantized on the way in: the one step before the integers."""
        self.graph.place = site
        x, axes = self.take_patches()
        image = Value(self.graph, x, axes, "float32")
        image.measured = x
        return self.record(site, self.quantize(site, image))

    def parameter(self, site: str) -> Value:
        """The codes of `<site>.bias`, made with the site's own scale."""
        with self.at(site):
            value = self.constants[f"{site}.bias"]
            name = self.graph.constant(value, f"{site}.bias")
            return self.record(site, self.codes(site, self.quants[site], name, value.shape))

    def linear(self, site: str, x: Value, *, weight: str | None = None, named: bool = True) -> Value:
        x = self.operand(f"{site}.input", x)
        with self.at(site):
            y = self.product(site, x, weight)
        return self.named(site, y) if named else y

    def weight_value(self, site: str, tied: str | None) -> tuple[Value, int]:
        """The weight of a linear as the right operand, (I, O) or (H, I, O), and the largest sum of a column's
        magnitudes."""
        g, name = self.graph, tied or f"{site}.weight"
        code, spec = self.weight(name)
        scale, zero = self.scale_zero(name)
        heads = code.shape[0] if code.ndim == 3 else None
        column = zero if np.ndim(zero) == 0 else zero.reshape((heads, 1, -1) if heads else (-1,))
        turned = np.swapaxes(code, -1, -2)
        reach = int(np.abs(turned.astype(np.int64) - column).sum(axis=-2).max())
        if tied:
            held = Value(g, self.table(name), code.shape, code.dtype.name, scale, 0, spec, largest(spec, zero))
            held.zero_point = column
            held = held.transpose(1, 0)
            return held, reach
        if spec.bits <= 8 and code.dtype == np.int8:
            turned, column = (turned.astype(np.int16) + CENTRE).astype(np.uint8), column + CENTRE
        stored = g.constant(np.ascontiguousarray(turned), name)
        value = Value(g, stored, turned.shape, turned.dtype.name, scale, column, spec, largest(spec, zero))
        return value, reach

    def table(self, name: str) -> str:
        """The codes of a weight as the artifact has them, stored once."""
        if name not in self.graph.constants:
            self.graph.constant(self.constants[name], name)
        return name

    def product(self, site: str, x: Value, tied: str | None) -> Value:
        """The accumulators of a linear layer, bias added."""
        g = self.graph
        if x.spec is None:
            refuse_export(site, "an accumulator reaches it")
        w, reach = self.weight_value(site, tied)
        bias = self.constants.get(f"{site}.bias")
        wide = bias is not None and bias.dtype == np.int64
        heads = w.axes[0] if len(w.axes) == 3 else None
        bits = 64 if wide else accumulator_bits(x.spec, w.spec)
        if heads:  # (B, T, H I) -> (B, H, T, I)
            x = x.reshape(*x.axes[:-1], heads, -1).transpose(0, 2, 1, 3)
        acc, _ = self.matmul(x, w, w.axes[-2], bits)
        bound, axes = reach * x.bound, (*x.axes[:-1], w.axes[-1])
        if heads:  # (B, H, T, O) -> (B, T, H O)
            moved = Value(g, acc, axes, "int64" if bits == 64 else "int32").transpose(0, 2, 1, 3)
            acc, axes = (y := moved.reshape(*moved.axes[:2], -1)).name, y.axes
        dtype = "int64" if bits == 64 else "int32"
        beside = bias is not None and bias.dtype.kind == "f"
        if bias is not None and not beside:
            acc = g.node("Add", acc, bias.reshape(-1).astype(dtype))
            bound += int(np.abs(bias.astype(np.int64)).max())
        if dtype == "int32" and bound >= 2**31 and self.profile.matmul.overflow is Overflow.SATURATE:
            raise ValueError(f"accumulators up to {bound} may saturate, and a graph's wrap")
        unit = np.float64(1) * np.asarray(x.unit, np.float64) * np.asarray(w.unit, np.float64).reshape(-1)
        y = self.accumulators(acc, axes, dtype, unit if unit.size > 1 else unit.reshape(()), bound)
        y.offset = bias.reshape(-1) if bias is not None and beside else None
        return self.record(f"{site}.accumulator", y)

    def embedding(self, site: str, index: np.ndarray) -> Value:
        g, name = self.graph, f"{site}.weight"
        with self.at(site):
            code, spec = self.weight(name)
            scale, zero = self.scale_zero(name)
            rows, axes = self.index(site)
            row = g.node("Gather", self.table(name), rows, axis=0)
            y = Value(g, row, (*axes, code.shape[1]), code.dtype.name, scale, zero, spec, largest(spec, zero))
            if np.size(scale) > 1:  # each row has its own, which is looked up with it
                if np.size(zero) > 1:
                    raise ValueError("each of its rows has a zero point of its own: use symmetric codes")
                own = g.node("Gather", g.constant(scale.reshape(-1, 1), f"{name}.scale"), rows, axis=0)
                y.unit, y.measured = None, g.node("Mul", g.cast(self.subtract_zero(y), "float32"), own)
        return self.named(site, y)

    def norm(self, site: str, x: Value, eps: float) -> Value:
        g = self.graph
        with self.at(site):
            gain, spec = self.weight(f"{site}.weight")
            scale, zero = self.scale_zero(f"{site}.weight")
            factor, bias = gain.astype(np.int64) - zero, self.constants[f"{site}.bias"]
            if x.spec is None:
                raise ValueError("an accumulator reaches it")
            eps_code = self.constants[f"{site}.eps"]
            r, bound = functions.normalize(g, self.subtract_zero(x, INT64), x.axes[-1], x.bound, eps_code)
            acc = g.node("Add", g.node("Mul", r, factor), bias.astype(np.int64))
            bound = bound * int(np.abs(factor).max()) + int(np.abs(bias.astype(np.int64)).max())
            dtype = bias.dtype.name
            if dtype == "int32" and bound >= 2**31:
                refuse_export(site, f"its accumulators may reach {bound}, beyond int32")
            acc = acc if dtype == INT64 else g.cast(acc, dtype)
            unit = np.asarray(scale, np.float64) * 2.0**-ops.NORM_BITS
            y = self.record(f"{site}.accumulator", self.accumulators(acc, x.axes, dtype, unit, bound))
        return self.named(site, y)

    def add(self, site: str, a: Value, b: Value) -> Value:
        """Both operands in one fine unit, their sum rounded once."""
        spec, axes = self.quants[site], broadcast(a.axes, b.axes)
        if a.measured or b.measured:
            with self.at(site):
                total = Value(self.graph, self.graph.node("Add", self.real(a), self.real(b)), axes, "float32")
            total.measured = total.name
            return self.record(site, self.quantize(site, total))
        with self.at(site):
            parts = [(self.subtract_zero(x, INT64), x.bound) for x in (a, b)]
            multipliers, shift = self.constants[f"{site}.multiplier"], self.constants.get(f"{site}.shift")
            level = add_level(self.graph, parts, Target(multipliers, shift, self.scale_zero(site)[1]), self.profile)
            return self.record(site, self.clamp(site, spec, level, axes, site))

    def mul(self, site: str, a: Value, b: Value) -> Value:
        """The product of two values, element by element, in the product of their units."""
        with self.at(site):
            dtype = "int64" if accumulator_bits(a.spec, b.spec) == 64 else "int32"
            product = self.graph.node("Mul", self.subtract_zero(a, dtype), self.subtract_zero(b, dtype))
            unit = np.asarray(a.unit, np.float64) * b.unit
            y = self.accumulators(product, broadcast(a.axes, b.axes), dtype, unit, a.bound * b.bound)
        return self.named(site, y)

    def scale(self, x: Value, factor: float) -> Value:
        """Only the unit changes."""
        y = x.like(x.name, x.axes)
        y.unit = np.asarray(x.unit, np.float64) * factor
        return y

    def mean(self, site: str, x: Value) -> Value:
        """Mean over the real tokens, (B, T, C) -> (B, 1, C), half up."""
        g, axis = self.graph, np.array([1], np.int64)
        with self.at(site):
            code = self.subtract_zero(x, INT64)
            if x.bound * self.spec.length >= 2**58:
                raise ValueError(f"the sum of {self.spec.length} values up to {x.bound} would leave int64")
            if self.mask is None:
                count = g.node("Gather", g.node("Shape", x.name), axis, axis=0)
            else:
                where = g.node("Unsqueeze", g.cast(self.inputs["mask"].name, INT64), np.array([2], np.int64))
                count = g.node("Max", g.node("ReduceSum", where, axis, keepdims=1), np.int64(1))
                code = g.node("Mul", code, where)
            total = g.half_up(g.node("ReduceSum", code, axis, keepdims=1), count, x.bound)
            wide = x.spec is None and x.dtype == INT64
            axes = (x.axes[0], 1, x.axes[2])
            y = self.accumulators(
                total if wide else g.cast(total, "int32"), axes, INT64 if wide else "int32", x.unit, x.bound
            )
        return self.named(site, y)

    def prepend(self, site: str, x: Value) -> Value:
        """The codes of `<site>.weight`, made with the site's own scale, and x requantized to it."""
        g, spec = self.graph, self.quants[site]
        y = self.requantize(site, spec, x, f"{site}/codes")
        with self.at(site):
            first = self.constants[f"{site}.weight"].reshape(1, 1, -1)
            size = g.node("Gather", g.node("Shape", y.name), np.array([0], np.int64), axis=0)
            shape = g.node("Concat", size, np.array([1, first.shape[2]], np.int64), axis=0)
            wide = g.node("Expand", g.constant(first, f"{site}.weight"), shape)
            name = g.node("Concat", wide, y.name, name=site, axis=1)
            return self.record(site, self.codes(site, spec, name, (BATCH, x.axes[1] + 1, x.axes[2])))

    def activation(self, site: str, x: Value, kind: str) -> Value:
        """relu: max(x, 0). Others: a table, or a polynomial of I-BERT."""
        g = self.graph
        with self.at(site):
            if kind == "relu":
                dtype = x.dtype if x.spec is None else "int32"
                name = g.node("Max", self.subtract_zero(x, dtype), np.zeros((), dtype))
                y = self.accumulators(name, x.axes, dtype, x.unit, x.bound)
            elif (table := self.constants.get(f"{site}.table")) is not None:
                index = g.cast(x.name, "int32")
                if x.spec.code_min:
                    index = g.node("Sub", index, np.int32(x.spec.code_min))
                name = g.node("Gather", g.constant(table, f"{site}.table"), index, name=site, axis=0)
                return self.record(site, self.codes(site, self.quants[site], name, x.axes))
            else:
                y = self.polynomial(site, x, kind)
        return self.named(site, y)

    def polynomial(self, site: str, x: Value, kind: str) -> Value:
        """GELU, sigmoid or tanh by I-BERT's polynomials."""
        make, bits, bound = functions.POLYNOMIALS[kind]
        y = make(
            self.graph, functions.to_argument(self.graph, site, self.subtract_zero(x, INT64), x.bound, self.constants)
        )
        return self.accumulators(self.graph.cast(y, "int32"), x.axes, "int32", np.float64(2.0**-bits), bound)

    def attention(
        self, site: str, q: Value, k: Value, v: Value, mask: np.ndarray, spec: AttentionSpec, rate: float
    ) -> Value:
        """As the reference's; the scale 1 / sqrt(K) is part of the scores' multiplier."""
        q, k = self.operand(f"{site}.scores.lhs", q), self.operand(f"{site}.scores.rhs", k)
        with self.at(f"{site}.scores"):
            kt = k.arrange(lambda x: x.transpose(0, 1, 3, 2))
            bits, width = accumulator_bits(q.spec, k.spec), q.axes[-1]
            acc, bound = self.matmul(q, kt, width, bits)
            unit = np.asarray(q.unit, np.float64) * k.unit * width**-0.5
            axes = (*q.axes[:-1], kt.axes[-1])
            scores = self.accumulators(acc, axes, f"int{bits}", unit, bound)
            self.record(f"{site}.scores.accumulator", scores)
        scores = self.named(f"{site}.scores", scores)
        probs = self.operand(f"{site}.context.lhs", self.softmax(f"{site}.probs", scores, spec))
        v = self.operand(f"{site}.context.rhs", v)
        with self.at(f"{site}.context"):
            bits = accumulator_bits(probs.spec, v.spec)
            acc, bound = self.matmul(probs, v, self.spec.length, bits)
            unit = np.asarray(probs.unit, np.float64) * v.unit
            context = self.accumulators(acc, v.axes, f"int{bits}", unit, bound)
            context = cast(Value, merge_heads(context))  # (B, H, Tq, K) -> (B, Tq, H K)
            self.record(f"{site}.context.accumulator", context)
        return self.named(f"{site}.context", context)

    def softmax(self, site: str, scores: Value, spec: AttentionSpec) -> Value:
        """Exponentials, their share of the sum; the clip."""
        g = self.graph
        with self.at(site):
            if scores.spec is None:
                raise ValueError("its scores are accumulators: give them a quantizer")
            sink = self.constants.get(f"{site}.sink", np.int32(0))
            span = scores.spec.code_max - scores.spec.code_min + int(np.abs(sink).max())
            p = functions.softmax(g, site, g.cast(scores.name, INT64), span, self.mask, self.constants)
            if spec.softmax is Softmax.CLIPPED:
                gamma = self.constants[f"{site}.gamma"].astype(np.int64)
                reach = int(np.abs(gamma).max())
                p = functions.clip_stretch(g, p, self.constants[f"{site}.zeta"], g.constant(gamma), reach)
            elif spec.softmax is Softmax.CLIPPED_ROW:
                alpha = self.constants[f"{site}.alpha"]
                row = functions.row_gamma(g, alpha, self.count_keys())
                p = functions.clip_stretch(g, p, self.constants[f"{site}.zeta"], row, int(alpha.max()) + 1)
            unit = np.float64(2.0**-PROBABILITY_BITS)
            y = self.accumulators(g.cast(p, "int32"), scores.axes, "int32", unit, 1 << PROBABILITY_BITS)
        return self.named(site, y)

    def count_keys(self) -> str:
        """How many keys each row may attend to, at least 1."""
        g = self.graph
        if self.mask is None:
            return g.constant(np.int64(self.spec.length))
        count = g.node("ReduceSum", g.cast(self.mask, INT64), functions.LAST, keepdims=1)
        return g.node("Max", count, np.int64(1))
