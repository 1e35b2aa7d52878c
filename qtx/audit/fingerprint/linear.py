"""A linear layer in codes as an operation of the search: products, bias and requantization."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from itertools import product
from typing import Any

import numpy as np

from qtx_ref.integer import fixed_point, float_product, products
from qtx_ref.spec import (
    QTX,
    Beyond,
    Bias,
    Dtype,
    Fixed,
    FloatProduct,
    HighProduct,
    LeftShift,
    MatmulRule,
    Order,
    Overflow,
    Products,
    QuantSpec,
    Rounding,
    SpecError,
    ZeroPoint,
)

from .operands import (
    Scales,
    describe,
    draw_scales,
    draw_targets,
    every_tie,
    make_operands,
    reach,
    saturating_operands,
)
from .questions import Operation, Question, Values

AXES = (
    "matmul.products",
    "matmul.run",
    "matmul.overflow",
    "bias",
    "requantize",
    "requantize.dtype",
    "requantize.scales",
    "requantize.bits",
    "requantize.product",
    "requantize.order",
    "requantize.zero_point",
    "requantize.rounding",
    "requantize.left",
    "requantize.beyond",
)
BITS, LEFT = AXES.index("requantize.bits"), AXES.index("requantize.left")
FIXED, FLOAT = "fixed", "float"  # of the axis requantize: which record it is; the other one's axes are None
FAR = "accumulators beyond int32"
RUNS = (2, 4, 8, 16, 32)  # pairs that an acc16 kernel may add at once
ROUNDINGS = tuple(one for one in Rounding if one is not Rounding.STOCHASTIC)
COUNT, FRESH_COUNT = 192, 2048  # accumulators of a question of the pool, and of a fresh one
BLOCK, BLOCKS = 64, 2200  # of products of one sign: int32 does not hold their sum, in pairs of 16 bits neither
W_SPEC = QuantSpec(bits=8, symmetric=True)


def requantizations() -> Iterator[Values]:
    """Every requantization with the biases that go with it, those that are one by definition once."""
    # the float64 product of two float32, rounded to float32, is the float32 product
    widths = ((Dtype.FLOAT64, Dtype.FLOAT64), (Dtype.FLOAT64, Dtype.FLOAT32), (Dtype.FLOAT32, Dtype.FLOAT32))
    for (dtype, scales), bits, high, rounding, left in product(widths, (31, 15), HighProduct, ROUNDINGS, LeftShift):
        if bits == 31 or high is HighProduct.EXACT:  # a high product is of 32-bit accumulators
            yield Bias.INT32, FIXED, dtype, scales, bits, high, None, None, rounding, left, None
    # of one zero point added after there are two names here
    places = (ZeroPoint.AFTER, ZeroPoint.BEFORE)
    for bias, (width, order, place, nearest, beyond) in product(Bias, product(Dtype, Order, places, ROUNDINGS, Beyond)):
        try:
            replace(QTX, bias=bias, requantize=FloatProduct(width, order, place, nearest, beyond))
        except SpecError:
            continue
        yield bias, FLOAT, width, None, None, None, order, place, nearest, None, beyond


def matmuls() -> Iterator[Values]:
    """Every MatmulRule."""
    runs: list[tuple[Products, int]] = [(kind, 1) for kind in Products if kind is not Products.RUNS16]
    runs += [(Products.RUNS16, run) for run in RUNS]
    for (kind, run), overflow in product(runs, Overflow):
        yield kind, run, overflow


@cache
def list_candidates() -> list[Values]:
    """Every combination."""
    requantized = list(requantizations())
    return [(*a, *b) for a in matmuls() for b in requantized]


@cache
def make_requantize(values: Values) -> Fixed | FloatProduct:
    """The record of a candidate, from its kind on."""
    kind, dtype, scales, bits, high, order, zero_point, rounding, left, beyond = values
    if kind == FIXED:
        return Fixed(dtype, bits, high, rounding, left, scales)
    return FloatProduct(dtype, order, zero_point, rounding, beyond)


@cache
def make_matmul(codes: str, kind: Products, run: int, overflow: Overflow) -> MatmulRule:
    """The record of products, as it multiplies x of `codes`: exactly where they are none of those that it pairs."""
    rule = MatmulRule(kind, run, overflow)
    if kind is Products.EXACT or products.saturates(operand_spec(codes), W_SPEC, rule):
        return rule
    return make_matmul(codes, Products.EXACT, 1, overflow)


class Linear(Operation):
    """Codes of x times codes of w, plus a bias, in the codes of the result, which are of x's dtype."""

    name, axes = "linear", AXES

    def __init__(self, specs: dict[str, QuantSpec]) -> None:
        self.specs = specs
        self.candidates = list_candidates()

    # --- what a candidate says ---

    def accumulate(self, values: Values, question: Question) -> tuple[Hashable, np.ndarray | None]:
        """Accumulators (1, N) by a name that equal ones share; None where the rule refuses them."""
        kind, run, overflow, bias = values[:4]
        inside = question.arrays["bias"] is not None and bias is Bias.INT32
        memo = question.settings["accumulators"]
        rule = make_matmul(
            question.settings["codes"], kind, run, overflow if question.settings["far"] else Overflow.WRAP
        )
        if (key := (id(rule), inside)) not in memo:
            try:
                sums = self.add_products(rule, question, inside)
                memo[key] = blake2b(sums.tobytes(), digest_size=16).digest(), sums
            except ValueError:
                memo[key] = b"", None
        return memo[key]

    def add_products(self, rule: MatmulRule, question: Question, inside: bool) -> np.ndarray:
        """Accumulators (1, N); of equal blocks, each some whole runs of pairs, one is worked out. Raises ValueError."""
        arrays, codes, blocks = question.arrays, str(question.arrays["x_codes"].dtype), question.settings["blocks"]
        x, w = (arrays[name][:, : arrays[name].shape[1] // blocks] for name in ("x_codes", "w_codes"))
        wide = codes == "int16"
        bias = arrays["bias"].astype(np.int64 if wide else np.int32) if inside else None
        zero, bits = arrays["x_zero"].astype(np.int32), 64 if wide else 32
        sums = products.linear(x, w, operand_spec(codes), W_SPEC, zero, None, bias, bits, rule)
        return sums if blocks == 1 else products.fit(sums.astype(np.int64) * blocks, bits, rule)

    def key(self, values: Values, question: Question) -> Hashable:
        name, sums = self.accumulate(values, question)
        if sums is None:
            return (values[2], values[LEFT])
        place = None if question.arrays["bias"] is None else values[3]
        # what int32 does not hold matters where M > 1, or float16 makes infinities; bits where accumulators have 64
        ends = values[LEFT:] if question.settings["ratio"] > 1 or values[5] is Dtype.FLOAT16 else ()
        bits = values[BITS] if sums.dtype == np.int64 or values[BITS] is None else 31
        return (name, place, *values[4:BITS], bits, *values[BITS + 1 : LEFT], *ends)

    def allow(self, values: Values) -> Values:
        overflow = Overflow.SATURATE if values[2] is Overflow.REPORT else values[2]
        left = LeftShift.SATURATE if values[LEFT] is LeftShift.REPORT else values[LEFT]
        return (*values[:2], overflow, *values[3:LEFT], left, *values[LEFT + 1 :])

    def evaluate(self, values: Values, question: Question) -> np.ndarray:
        arrays, rule, place = question.arrays, make_requantize(values[4:]), values[3]
        sums = self.accumulate(values, question)[1]
        if sums is None:
            raise ValueError("accumulators that the rule refuses")
        x, w, y = arrays["x_scale"], arrays["w_scale"], arrays["y_scale"]
        if arrays["bias"] is not None and (arrays["bias"].dtype == np.int32) != (place is Bias.INT32):
            raise ValueError("a bias of another kind, which a box converts in its own way")
        bias = None
        if arrays["bias"] is not None and place is not Bias.INT32:
            assert isinstance(rule, FloatProduct)  # a fixed one has integers
            unit = x.astype(np.float64) * w
            bias = float_product.scale_bias(arrays["bias"].astype(np.float32), unit, y, rule, place)
        real = fixed_point.real_multiplier(x, w, y, rule)
        zero = arrays["y_zero"].astype(np.int32)
        return fixed_point.requantize(sums, real, zero, question.settings["spec"], rule, bias, place)

    # --- where to look ---

    def question(
        self,
        kind: str,
        operands: tuple[np.ndarray, np.ndarray],
        scales: Scales,
        zeros: tuple[int, int],
        codes: str,
        bias: np.ndarray | None = None,
        blocks: int = 1,
    ) -> Question:
        """One call. `blocks`: equal ones that its operands are made of."""
        x, w = operands
        arrays: dict[str, Any] = {
            "x_codes": x,
            "x_scale": scales.x,
            "x_zero": np.asarray(zeros[0], codes),
            "w_codes": w,
            "w_scale": scales.w,
            "y_scale": scales.y,
            "y_zero": np.asarray(zeros[1], codes),
            "bias": bias,
        }
        asked = {f"{codes} codes", *(["a zero point"] if any(zeros) else [])}
        asked |= set() if bias is None else {f"a bias of {bias.dtype}"}
        asked |= {"a multiplier above 1"} if scales.ratio > 1 else set()
        far = kind == FAR and codes != "int16"
        settings = {
            "spec": self.specs[codes],
            "codes": codes,
            "ratio": scales.ratio,
            "blocks": blocks,
            "far": far,
            "accumulators": {},
        }
        return Question(kind, arrays, len(w), frozenset(asked), settings)

    def draw_question(
        self, rng: np.random.Generator, codes: str, kind: str, exponent: int, plain: bool, bias: str, count: int
    ) -> Question:
        """Ties of a requantization by about 2^exponent, and what is beside them."""
        spec = self.specs[codes]
        zeros = (0, 0) if plain else draw_zeros(rng, codes, spec)
        scales, limit = draw_scales(rng, kind, exponent), reach(codes, zeros[0])
        levels = spec.code_min - zeros[1] - 2, spec.code_max - zeros[1] + 2
        added, offset = None, np.zeros(count)
        if bias:
            span = max(abs(one) for one in levels) * float(scales.y)
            most = span / 2 if bias == "float32" else min(limit, span / scales.unit) / 2
            whole = np.rint(rng.uniform(-1, 1, count) * max(most, 3))
            added = whole.astype(bias)
            offset = whole / scales.unit if bias == "float32" else whole
        targets = draw_targets(rng, scales, levels, limit, count, offset)
        return self.question("ties", make_operands(targets, codes, zeros[0]), scales, zeros, codes, added)

    def draw_large(self, rng: np.random.Generator, codes: str, kind: str, count: int) -> Question:
        """Accumulators of 30 bits, made by a bias, between the tie under M in float64 and that under M in float32: what
        M has lost is seen there, and what a high product rounds."""
        spec = self.specs[codes]
        scales = draw_scales(rng, kind, -14 if codes == "int16" else -22)
        tie = rng.integers(spec.code_min - 1, spec.code_max + 1, count) + 0.5
        rounded = float(np.float32(np.float32(scales.x * scales.w) / scales.y))
        part = rng.choice([-0.1, 0.0, 0.0, 0.3, 0.7, 1.0, 1.1], count)
        bias = np.rint(tie / scales.ratio * (1 - part) + tie / rounded * part).astype(np.int32)
        operands = make_operands(np.zeros(count), codes, 0)
        return self.question("ties of 30 bits", operands, scales, (0, 0), codes, bias)

    def make_pool(self) -> Sequence[Question]:
        rng = np.random.default_rng(11)
        asked = []
        for codes in self.specs:
            wide = codes == "int16"
            exponents = (-5, -2, -1, 0) if wide else (-7, -2, 0, -11)
            for exponent, kind, plain in product(exponents, ("short", "any", "power"), (wide, not wide)):
                asked.append(self.draw_question(rng, codes, kind, exponent, plain, "", COUNT))
            for bias, kind in product(("int32", "float32"), ("short", "any")):
                for exponent in exponents[:2]:
                    asked.append(self.draw_question(rng, codes, kind, exponent, True, bias, COUNT))
            asked += [self.draw_large(rng, codes, kind, COUNT) for kind in ("any", "short", "any")]
            asked += [*self.ask_products(rng, codes), *self.ask_limits(codes)]
        return asked

    def ask_products(self, rng: np.random.Generator, codes: str) -> Iterator[Question]:
        """Pairs and runs of them that 16 bits do not hold."""
        scales = Scales(*(np.asarray(one, np.float32) for one in (2.0**-7, 2.0**-6, 1)))
        for _ in range(2):
            yield self.question("large products", saturating_operands(rng, codes, COUNT), scales, (0, 0), codes)

    def ask_limits(self, codes: str) -> Iterator[Question]:
        """Accumulators that int32 does not hold, by a bias and without; levels that it does not hold."""
        small = Scales(*(np.asarray(one, np.float32) for one in (2.0**-12, 2.0**-13, 1)))
        bias = np.array([2**31 - 1, -(2**31), 2**31 - 2**20, 2**31 - 1], np.int32)
        targets = make_operands(np.array([90_000, -90_000, 2**19, -1]), codes, 0)
        yield self.question(FAR, targets, small, (0, 0), codes, bias)
        rows = np.full((4, BLOCK), 127, np.int8) * np.array([[1], [-1], [1], [-1]], np.int8)
        rows[2:, : BLOCK // 8] = 0
        x = np.full((1, BLOCK * BLOCKS), np.iinfo(codes).max, codes)
        large = Scales(*(np.asarray(one, np.float32) for one in (2.0**10, 1.5 * 2.0**5, 2.0**-5)))
        if codes != "int16":
            yield self.question(FAR, (x, np.tile(rows, BLOCKS)), small, (0, 0), codes, blocks=BLOCKS)
        else:
            vast = replace(large, y=np.asarray(2.0**-13, np.float32))
            yield self.question("levels beyond int64", (x, np.tile(rows, BLOCKS)), vast, (0, 0), codes, blocks=BLOCKS)
        targets = make_operands(np.array([300, -300, 1500, -1500, 2500, -2500, 4000, -4000]), codes, 0)
        yield self.question("levels beyond int32", targets, large, (0, 0), codes)

    def draw(self, rng: np.random.Generator) -> Question:
        codes = str(rng.choice(list(self.specs)))
        wide = codes == "int16"
        kind, plain = str(rng.choice(["power", "short", "short", "any"])), bool(rng.random() < 0.4)
        exponent = int(rng.integers(-5, 1) if wide else rng.integers(-11, 1))
        if rng.random() < 0.25:
            zeros = (0, 0) if plain else draw_zeros(rng, codes, self.specs[codes])
            scales, limit = draw_scales(rng, kind, exponent), reach(codes, zeros[0])
            spec = self.specs[codes]
            targets = every_tie(scales, (spec.code_min - zeros[1], spec.code_max - zeros[1]), limit)
            targets = targets[:: max(1, len(targets) // FRESH_COUNT)]
            return self.question("every tie", make_operands(targets, codes, zeros[0]), scales, zeros, codes)
        if (chance := rng.random()) < 0.15:
            return next(self.ask_products(rng, codes))
        if chance < 0.3:
            return self.draw_large(rng, codes, kind, FRESH_COUNT)
        bias = str(rng.choice(["", "", "int32", "float32"]))
        return self.draw_question(rng, codes, kind, exponent, plain, bias, FRESH_COUNT)

    def describe(self, question: Question, index: int) -> dict[str, Any]:
        return describe(question.arrays, index)


@cache
def operand_spec(codes: str) -> QuantSpec:
    """The quantizer of x: all codes of a dtype."""
    return QuantSpec(bits=16 if codes == "int16" else 8, symmetric=False, signed=codes != "uint8")


def draw_zeros(rng: np.random.Generator, codes: str, spec: QuantSpec) -> tuple[int, int]:
    """Odd zero points of x and of the result, not near the ends of x's codes."""
    ends = np.iinfo(codes)
    quarter = (ends.max - ends.min) // 4
    x = int(rng.integers(ends.min + quarter, ends.max - quarter)) | 1
    y = int(rng.integers(spec.code_min, spec.code_max)) | 1
    return x, min(y, spec.code_max)
