"""Codes and accumulators of the integer form: between float32, codes of a site and accumulators, and their products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from qtx_ref.integer import float_product, products
from qtx_ref.integer.model import code_dtype
from qtx_ref.spec import FloatProduct, QuantSpec, SpecError

from .export_graph import Value
from .export_requantize import Target, check_quantize, is_linear, quantize_level, round_level
from .export_wiring import CENTRE, Wiring, refuse_export

INT64 = "int64"


def largest(spec: QuantSpec, zero: Any) -> int:
    """The largest magnitude of code less zero point."""
    return int(max(spec.code_max - np.min(zero), np.max(zero) - spec.code_min))


class Codes(Wiring):
    """Values of a graph of integers."""

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
            if bias is not None and isinstance(rule, FloatProduct):  # lowering has no other bias of floats
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
