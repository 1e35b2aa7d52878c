"""The form that deployment tools expect: float operators between QuantizeLinear and DequantizeLinear.

A linear layer is Gemm on DequantizeLinear of codes, weight codes and an int32 bias in units of their product, then
QuantizeLinear: onnxruntime makes one integer kernel of it (QGemm), and of a product of two activations another
(QLinearMatMul). The scale 1 / sqrt(K) is part of the scale with which the query enters the scores, so that nothing
stands between product and quantizer; one linear map per head is one Gemm whose weight is 0 outside its blocks. Softmax,
norm, GELU and sums are the engine's float kernels.

What such a kernel computes is `PROFILE`: int32 accumulators, and requantization by one float32 factor per column.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qtx_ref.integer.lifting import sink_logits
from qtx_ref.integer.model import code_dtype
from qtx_ref.profiles import profile
from qtx_ref.spec import AttentionSpec, Profile, QuantSpec, Softmax

from ..files.artifact import Artifact
from .export_graph import BATCH, Graph, Value
from .export_wiring import Wiring, broadcast, refuse_export

BASE = "onnx"
SIGNED = {"session.x64quantprecision": "1"}  # products of uint8 by int8 saturate in pairs on x86 without VNNI
WIDE = {"session.qdq_matmulnbits_accuracy_level": "1"}  # else activations of 16 bits are rounded to 8 before a product
LOWEST = np.finfo(np.float32).min  # of a masked score; its probability is made 0
OPERATORS = {"gelu": "Gelu", "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def qdq_profile(own: Profile) -> Profile:
    """What the form computes by, on the artifact's own scales."""
    return replace(profile(BASE), scale=own.scale)


class QdqGraph(Wiring):
    """See the module.

    `multipliers`: of each product's site, the float32 factor of its requantization; `operands`: its two values.
    `pairs`: of each site that is codes read and quantized again, and nothing else, the value that is read.
    """

    def __init__(self, graph: Graph, artifact: Artifact) -> None:
        super().__init__(graph, artifact.under(qdq_profile(artifact.profile)))
        self.multipliers: dict[str, np.ndarray] = {}
        self.operands: dict[str, tuple[Value, Value]] = {}
        self.pairs: dict[str, Value] = {}

    # between codes and real numbers -----------------------------------------------------------------------------------

    def session(self) -> dict[str, str]:
        """The entries of an onnxruntime session under which products are exact."""
        wide = any(spec.bits > 8 for site, spec in self.quants.items() if not site.endswith(".weight"))
        return SIGNED | (WIDE if wide else {})

    def kind(self, site: str, spec: QuantSpec) -> str:
        """The dtype that QuantizeLinear gives of a site."""
        if spec.bits > 16:
            refuse_export(site, f"QuantizeLinear has no codes of {spec.bits} bits")
        unsigned = np.issubdtype(code_dtype(spec), np.unsignedinteger) or spec.code_max > 2**15 - 1
        return f"{'u' * unsigned}int{8 if spec.bits <= 8 else 16}"

    def real(self, x: Value) -> str:
        """The float32 tensor that a value stands for."""
        if x.measured is not None:
            return x.measured
        if np.ndim(x.unit) or np.ndim(x.zero_point):
            refuse_export(
                self.graph.place, f"{x.name} has a scale per channel, which DequantizeLinear takes on no heads"
            )
        zero = np.asarray(x.zero_point).astype(x.dtype)
        return self.graph.node("DequantizeLinear", x.name, np.float32(x.unit), zero)

    def floats(self, name: str, axes: Any) -> Value:
        """A float32 tensor."""
        value = Value(self.graph, name, axes, "float32")
        value.measured = name
        return value

    def scale_zero(self, site: str) -> tuple[Any, Any]:
        """Scale, float32, and zero point of a site or weight, one number where all are equal."""
        scale, zero = (self.constants[f"{site}.{key}"].reshape(-1) for key in ("scale", "zero_point"))
        zero = zero[0] if (zero == zero[0]).all() else zero
        return np.float32(scale if scale.size > 1 else scale[0]), zero

    def codes(self, site: str, spec: QuantSpec, name: str, axes: Any) -> Value:
        """Codes of a site."""
        scale, zero = self.scale_zero(site)
        if np.ndim(scale):
            refuse_export(site, "it has a scale per channel, which the next product's fused kernel does not take")
        return Value(self.graph, name, axes, self.kind(site, spec), scale, zero, spec)

    def quantize(self, site: str, spec: QuantSpec, x: str, axes: Any, name: str | None = None) -> Value:
        """Codes of a float32 tensor."""
        g, (scale, zero) = self.graph, self.scale_zero(site)
        dtype = self.kind(site, spec)
        if spec.bits not in (8, 16):  # codes end before their dtype does
            ends = [np.float32((limit - np.int64(zero)) * scale) for limit in (spec.code_min, spec.code_max)]
            x = g.node("Clip", x, *ends)
        code = g.node("QuantizeLinear", x, scale, np.asarray(zero).astype(dtype), name=name)
        return self.codes(site, spec, code, axes)

    def named(self, site: str, x: Value) -> Value:
        """The result of an op as the code of its site."""
        spec = self.quants.get(site)
        if spec is None:
            return x
        self.graph.place = site
        if x.measured is None:
            self.pairs[site] = x
        return self.record(site, self.quantize(site, spec, self.real(x), x.axes, site))

    def operand(self, site: str, x: Value) -> Value:
        """An operand for which the recipe has a quantizer of its own."""
        return self.named(site, x) if site in self.quants else x

    # ops --------------------------------------------------------------------------------------------------------------

    def input(self, site: str, value: np.ndarray) -> Value:
        self.graph.place = site
        return self.named(site, self.floats(*self.take_patches()))

    def parameter(self, site: str) -> Value:
        value = self.constants[f"{site}.bias"]
        spec = self.quants[site]
        name = self.graph.constant(value.astype(self.kind(site, spec)), f"{site}.bias")
        return self.record(site, self.codes(site, spec, name, value.shape))

    def weight_codes(self, site: str, tied: str | None) -> Value:
        """The weight of a linear, (I, O), or (O, I) where it is tied."""
        g, name = self.graph, tied or f"{site}.weight"
        code, spec = self.constants[name], self.quants[name]
        scale, zero = self.scale_zero(name)
        if np.ndim(zero):
            refuse_export(site, "its weight has a zero point per channel")
        code = code.astype(self.kind(name, spec))
        if code.ndim == 3:  # (H, O, I) -> (H O, H I), each head on its own slice
            heads, outputs, inputs = code.shape
            blocks = np.full((heads * outputs, heads * inputs), zero, code.dtype)
            for h in range(heads):
                blocks[h * outputs : (h + 1) * outputs, h * inputs : (h + 1) * inputs] = code[h]
            code = blocks
        stored = code if tied else np.ascontiguousarray(code.T)
        if name not in g.constants:
            g.constant(stored, name)
        return Value(g, name, stored.shape, stored.dtype.name, scale, zero, spec)

    def linear(self, site: str, x: Value, *, weight: str | None = None, named: bool = True) -> Value:
        """Gemm on all tokens as rows."""
        g, x = self.graph, self.operand(f"{site}.input", x)
        g.place = site
        if x.spec is None:
            refuse_export(site, "no quantizer stands before it")
        w, tied = self.weight_codes(site, weight), weight is not None
        rows = x if x.ndim == 2 else x.like(g.node("Reshape", x.name, np.array([-1, x.axes[-1]], np.int64)), ())
        inputs = [self.real(rows), self.dequantize(w.name, w.unit, w.zero_point, w.dtype, 0 if tied else 1)]
        unit = np.float32(x.unit) * w.unit
        bias = self.constants.get(f"{site}.bias")
        if bias is not None and bias.dtype == np.int32:
            held = g.constant(bias.reshape(-1), f"{site}.bias")
            inputs.append(self.dequantize(held, unit, np.int32(0), "int32", 0))
        elif bias is not None:
            real = bias.reshape(-1) * self.constants[f"{site}.bias.scale"]
            inputs.append(g.constant(real.astype(np.float32), f"{site}.bias"))
        y = g.node("Gemm", *inputs, transB=int(tied))
        axes = (*x.axes[:-1], w.axes[0 if tied else 1])
        spec = self.quants.get(site) if named else None
        if spec is None:
            return self.floats(self.restore(y, x, axes), axes)
        code = self.quantize(site, spec, y, (), None if x.ndim > 2 else site)
        self.multipliers[site], self.operands[site] = unit / code.unit, (x, w)
        return self.record(site, code.like(self.restore(code.name, x, axes, site), axes))

    def dequantize(self, name: str, scale: Any, zero: Any, dtype: str, axis: int) -> str:
        """Constant codes as float32, with one scale, or one for each place along an axis."""
        g, zeros = self.graph, np.broadcast_to(zero, np.shape(scale)).astype(dtype)
        along: dict[str, Any] = {"axis": axis} if np.ndim(scale) else {}
        # onnxruntime, when it makes weights unsigned, changes a zero point in place: each has its own
        own = [g.constant(np.asarray(part), f"{name}.{key}") for key, part in (("scale", scale), ("zero_point", zeros))]
        return g.node("DequantizeLinear", name, *own, **along)

    def restore(self, rows: str, x: Value, axes: Any, name: str | None = None) -> str:
        """Rows of all tokens back in the shape of x but for the last axis."""
        if x.ndim == 2:
            return rows
        g = self.graph
        front = g.node("Shape", x.name, start=0, end=x.ndim - 1)
        return g.node("Reshape", rows, g.node("Concat", front, np.array(axes[-1:], np.int64), axis=0), name=name)

    def embedding(self, site: str, index: np.ndarray) -> Value:
        g, name = self.graph, f"{site}.weight"
        g.place = site
        rows, axes = self.index(site)
        table, spec = self.constants[name], self.quants[name]
        scale, zero = self.scale_zero(name)
        axes = (*axes, table.shape[1])
        if name not in g.constants:
            g.constant(table.astype(self.kind(name, spec)), name)
        if np.ndim(scale):  # each row has its own, which is looked up with it
            if np.any(zero):
                refuse_export(site, "its rows have zero points of their own: use symmetric codes")
            code = g.cast(g.node("Gather", name, rows, axis=0), "float32")
            own = g.node("Gather", g.constant(scale.reshape(-1, 1), f"{name}.row_scale"), rows, axis=0)
            return self.named(site, self.floats(g.node("Mul", code, own), axes))
        y = Value(g, g.node("Gather", name, rows, axis=0), axes, self.kind(name, spec), scale, zero, spec)
        return self.named(site, y) if site in self.quants else self.record(site, y)

    def norm(self, site: str, x: Value, eps: float) -> Value:
        """LayerNormalization; the bias as a float."""
        g = self.graph
        g.place = site
        code, spec = self.constants[f"{site}.weight"], self.quants[f"{site}.weight"]
        scale, zero = self.scale_zero(f"{site}.weight")
        stored = g.constant(code.astype(self.kind(f"{site}.weight", spec)), f"{site}.weight")
        gain = self.dequantize(stored, scale, zero, self.kind(f"{site}.weight", spec), 0)
        bias = self.constants[f"{site}.bias"] * self.constants[f"{site}.bias.scale"]
        real = g.constant(bias.astype(np.float32), f"{site}.bias")
        y = g.node("LayerNormalization", self.real(x), gain, real, axis=-1, epsilon=eps)
        return self.named(site, self.floats(y, x.axes))

    def add(self, site: str, a: Value, b: Value) -> Value:
        self.graph.place = site
        total = self.graph.node("Add", self.real(a), self.real(b))
        return self.named(site, self.floats(total, broadcast(a.axes, b.axes)))

    def mul(self, site: str, a: Value, b: Value) -> Value:
        self.graph.place = site
        product = self.graph.node("Mul", self.real(a), self.real(b))
        return self.named(site, self.floats(product, broadcast(a.axes, b.axes)))

    def scale(self, x: Value, factor: float) -> Value:
        """Part of the scale that the codes are read with."""
        if x.measured is not None:
            return self.floats(self.graph.node("Mul", x.measured, np.float32(factor)), x.axes)
        y = x.like(x.name, x.axes)
        y.unit = np.float32(x.unit * factor)
        return y

    def mean(self, site: str, x: Value) -> Value:
        """Mean over the real tokens, (B, T, C) -> (B, 1, C)."""
        g, axis, axes = self.graph, np.array([1], np.int64), (x.axes[0], 1, x.axes[2])
        g.place = site
        real = self.real(x)
        if self.mask is None:
            return self.named(site, self.floats(g.node("ReduceMean", real, axis, keepdims=1), axes))
        where = g.node("Unsqueeze", g.cast(self.inputs["mask"].name, "float32"), np.array([2], np.int64))
        count = g.node("Max", g.node("ReduceSum", where, axis, keepdims=1), np.float32(1))
        total = g.node("ReduceSum", g.node("Mul", real, where), axis, keepdims=1)
        return self.named(site, self.floats(g.node("Div", total, count), axes))

    def prepend(self, site: str, x: Value) -> Value:
        """The codes of `<site>.weight`, and behind them x quantized with the same scale."""
        g, spec = self.graph, self.quants[site]
        g.place = site
        if x.measured is None:
            self.pairs[site] = x
        y = self.quantize(site, spec, self.real(x), x.axes)
        first = self.constants[f"{site}.weight"].reshape(1, 1, -1).astype(y.dtype)
        size = g.node("Shape", y.name, start=0, end=1)
        shape = g.node("Concat", size, np.array([1, first.shape[2]], np.int64), axis=0)
        wide = g.node("Expand", g.constant(first, f"{site}.weight"), shape)
        name = g.node("Concat", wide, y.name, name=site, axis=1)
        return self.record(site, self.codes(site, spec, name, (BATCH, x.axes[1] + 1, x.axes[2])))

    def activation(self, site: str, x: Value, kind: str) -> Value:
        self.graph.place = site
        return self.named(site, self.floats(self.graph.node(OPERATORS[kind], self.real(x)), x.axes))

    def attention(
        self, site: str, q: Value, k: Value, v: Value, mask: np.ndarray, spec: AttentionSpec, rate: float
    ) -> Value:
        """As the reference's, products without a node before their quantizers."""
        q, k = self.operand(f"{site}.scores.lhs", q), self.operand(f"{site}.scores.rhs", k)
        self.graph.place = f"{site}.scores"
        kt = k.arrange(lambda x: x.transpose(0, 1, 3, 2))
        scores = self.product(f"{site}.scores", self.scale(q, q.axes[-1] ** -0.5), kt, (*q.axes[:-1], kt.axes[-1]))
        probs = self.operand(f"{site}.context.lhs", self.softmax(f"{site}.probs", scores, spec))
        v = self.operand(f"{site}.context.rhs", v)
        self.graph.place = f"{site}.context"
        context = self.product(f"{site}.context", probs, v, v.axes)  # (B, H, T, K)
        context = context.transpose(0, 2, 1, 3).reshape(v.axes[0], v.axes[2], -1)  # (B, H, T, K) -> (B, T, H K)
        return self.record(f"{site}.context", context) if context.spec is not None else context

    def product(self, site: str, a: Value, b: Value, axes: Any) -> Value:
        """a b of activations, quantized where the site is."""
        y = self.graph.node("MatMul", self.real(a), self.real(b))
        spec = self.quants.get(site)
        if spec is None:
            return self.floats(y, axes)
        code = self.quantize(site, spec, y, axes, site if site.endswith("scores") else None)
        self.multipliers[site] = np.float32(np.float32(a.unit) * np.float32(b.unit)) / np.float32(code.unit)
        self.operands[site] = a, b
        return self.record(site, code)

    def softmax(self, site: str, scores: Value, spec: AttentionSpec) -> Value:
        """Softmax of the scores that the mask leaves, with a sink beside them where there is one; the clip."""
        g = self.graph
        g.place = site
        x = self.real(scores)
        if self.mask is not None:
            x = g.node("Where", self.mask, x, LOWEST)
        if spec.softmax in (Softmax.SINK, Softmax.PLUS_ONE):
            logit = sink_logits(self.constants, site).astype(np.float32).reshape(1, -1, 1, 1)
            top = g.node("ReduceMax", x, np.array([-1], np.int64), keepdims=1)
            beside = g.node("Expand", logit, g.node("Shape", top))
            wide = g.node("Softmax", g.node("Concat", x, beside, axis=-1), axis=-1)
            p = g.node("Slice", wide, np.array([0], np.int64), np.array([-1], np.int64), np.array([-1], np.int64))
        else:
            p = g.node("Softmax", x, axis=-1)
        if spec.softmax is Softmax.CLIPPED:
            p = self.clip(p, np.float32(spec.gamma), np.float32(spec.zeta - spec.gamma))
        elif spec.softmax is Softmax.CLIPPED_ROW:
            assert spec.alpha is not None  # the spec has checked it
            gamma = g.node("Div", np.float32(-spec.alpha), self.count_keys())
            p = self.clip(p, gamma, g.node("Sub", np.float32(spec.zeta), gamma))
        if self.mask is not None:
            p = g.node("Where", self.mask, p, np.float32(0))
        return self.named(site, self.floats(p, scores.axes))

    def clip(self, p: str, gamma: Any, stretch: Any) -> str:
        """clip((zeta - gamma) p + gamma, 0, 1)."""
        g = self.graph
        return g.node("Clip", g.node("Add", g.node("Mul", p, stretch), gamma), np.float32(0), np.float32(1))

    def count_keys(self) -> str:
        """How many keys each row may attend to, at least 1, float32."""
        g = self.graph
        if self.mask is None:
            return g.constant(np.float32(self.spec.length))
        count = g.node("ReduceSum", g.cast(self.mask, "float32"), np.array([-1], np.int64), keepdims=1)
        return g.node("Max", count, np.float32(1))
