"""The integer form: every number after the input's quantizer is an integer, and every rule an operator of integers.

The arithmetic of `qtx_ref.integer`, node by node: MatMulInteger on unsigned codes of 8 bits, which no instruction set
saturates (wider ones: MatMul of int64); requantization as the artifact's profile says; tables as Gather; softmax, norm
and polynomials as `qtx_ref.integer.ops` defines them. A float profile's requantization is the one place with floats.
Bounds are followed along with the values: where int64 could overflow, the site is refused.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from qtx_ref.integer import ops
from qtx_ref.integer.ops import PROBABILITY_BITS
from qtx_ref.ops import merge_heads
from qtx_ref.spec import AttentionSpec, Overflow, Softmax, accumulator_bits

from . import export_functions as functions
from .export_codes import INT64, Codes, largest
from .export_graph import BATCH, Value
from .export_requantize import Target, add_level
from .export_wiring import CENTRE, broadcast, refuse_export


class IntegerGraph(Codes):
    """See the module."""

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
        if x.spec is None or x.measured is not None:
            refuse_export(site, "its input has no one scale: give the tensor before it a quantizer")
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
