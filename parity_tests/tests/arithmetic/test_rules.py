"""Every combination of the rules of matmul, bias, requantize and add: literals, exact fractions, both backends."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.subjects import rules
from qtx_ref.integer import fixed_point, float_product, ops, products
from qtx_ref.random import stream
from qtx_ref.spec import (
    QTX,
    AddRule,
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
from qtx_torch.integer import fixed_point as torch_fixed
from qtx_torch.integer import float_product as torch_float
from qtx_torch.integer import ops as torch_ops
from qtx_torch.integer import products as torch_products

I32, I64, F32, F64 = np.int32, np.int64, np.float32, np.float64
S8, U8, I8 = QuantSpec(symmetric=True), QuantSpec(), QuantSpec(symmetric=False, signed=True)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
SEEDS = st.integers(0, 2**32 - 1)


def whole(x: Fraction, rounding: Rounding) -> int:
    """A fraction rounded."""
    down = math.floor(x)
    rest = x - down
    return {
        Rounding.FLOOR: down,
        Rounding.TOWARD_ZERO: math.trunc(x),
        Rounding.HALF_UP: math.floor(x + Fraction(1, 2)),
        Rounding.HALF_AWAY: down + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and x > 0)),
        Rounding.HALF_EVEN: round(x),
    }[rounding]


def held(value: int, left: LeftShift) -> int | None:
    """In int32; None where it is reported."""
    if INT_MIN <= value <= INT_MAX:
        return value
    if left is LeftShift.REPORT:
        return None
    return (value + 2**31) % 2**32 - 2**31 if left is LeftShift.WRAP else max(INT_MIN, min(INT_MAX, value))


def fixed_by_fractions(a: int, multiplier: int, shift: int, rule: Fixed, wide: bool) -> int | None:
    """What the module's first lines say, in fractions; None where it is reported."""
    if rule.product is HighProduct.EXACT:
        if wide and rule.bits == 15:
            multiplier = min((multiplier + 2**15) >> 16, 2**15 - 1) << 16
        exact = Fraction(a * multiplier) * Fraction(2) ** (shift - 31)
        return held(whole(exact, rule.rounding), rule.left)
    right = max(-shift, 1 if rule.product is HighProduct.TRUNCATED else 0)
    raised = held(a << (shift + right), rule.left)
    if raised is None:
        return None
    half = Fraction(1, 2) if rule.product is HighProduct.HALF_UP else Fraction(0)
    high = min(math.floor(Fraction(raised * multiplier, 2**31) + half), INT_MAX)
    return whole(Fraction(high, 2**right), rule.rounding)


def both(module: str, function: str, *given: object, **named: object) -> np.ndarray | str:
    """The result of a function in both backends, which is one; or the name of what both raise."""

    def tensor(x: object) -> object:
        if isinstance(x, list):
            return [tensor(part) for part in x]
        return torch.tensor(x) if isinstance(x, (np.ndarray, np.generic)) else x

    ours, theirs = {
        "fixed": (fixed_point, torch_fixed),
        "float": (float_product, torch_float),
        "ops": (ops, torch_ops),
        "products": (products, torch_products),
    }[module]
    results: list[np.ndarray | str] = []
    for place, convert in ((ours, lambda x: x), (theirs, tensor)):
        try:
            got = getattr(place, function)(*map(convert, given), **{k: convert(v) for k, v in named.items()})
            results.append(np.asarray(got))
        except ValueError as error:
            results.append(str(error).split(" is outside")[0])
    one, other = results
    assert type(one) is type(other), results
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other
    return one


# --- every combination ------------------------------------------------------------------------------------------------


REALS = (0.0, 2.0**-33, 2.0**-31, 0.001234567, 0.25, 0.2999, 0.5, 1 - 2.0**-33, 1.0, 1.5, 3.999, 100.0)
NARROW_A = [INT_MIN, INT_MIN + 1, -(2**30), -12345, -6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6, 10, 2**30, INT_MAX]
WIDE_A = [-(2**47), -(2**40) - 1, *NARROW_A, 2**33 + 1, 2**47 - 1]


@pytest.mark.parametrize("rule", rules.list_fixed(), ids=lambda rule: "-".join(map(str, vars(rule).values())))
def test_integers_are_those_of_fractions(rule: Fixed) -> None:
    rng = stream(0, "rules")
    narrow = NARROW_A + rng.integers(INT_MIN, INT_MAX, 40).tolist() + rng.integers(-300, 300, 20).tolist()
    for wide in (False, True) if rule.product is HighProduct.EXACT else (False,):
        values = WIDE_A + narrow if wide else narrow
        for real in (*REALS, *2.0 ** rng.uniform(-20, 1, 8)):
            multiplier, shift = fixed_point.quantize_multiplier(F64(real))
            want = [fixed_by_fractions(a, int(multiplier), int(shift), rule, wide) for a in values]
            a = np.array(values, I64 if wide else I32)
            if None in want:
                assert isinstance(both("fixed", "multiply", a, multiplier, shift, rule), str)
            kept = [i for i, one in enumerate(want) if one is not None]
            got = both("fixed", "multiply", a[kept], multiplier, shift, rule)
            assert isinstance(got, np.ndarray) and got.tolist() == [want[i] for i in kept]


def rounded(x: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Of float64: a product, sum or quotient of narrower floats may be rounded twice (Figueroa 1995)."""
    if dtype is Dtype.FLOAT64:
        return x
    with np.errstate(over="ignore"):
        y = x.astype(F32)
        half = x.astype(np.float16).astype(F64)
    if dtype is Dtype.FLOAT16:
        return half
    if dtype is Dtype.BFLOAT16:  # by its spacing, 2^(e - 7)
        _, exponent = np.frexp(y.astype(F64))
        y = np.rint(np.ldexp(y.astype(F64), 8 - exponent)) * np.exp2(exponent - 8.0)
    return y.astype(F64)


def nearest(exact: Fraction) -> float:
    """The float32 nearest to a fraction, ties to even."""
    low = F32(float(exact))
    around = [np.nextafter(low, F32(-np.inf)), low, np.nextafter(low, F32(np.inf))]
    return float(min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(I32)) & 1)))


def factors_by_hand(x: np.ndarray, w: np.ndarray, y: np.ndarray, rule: FloatProduct) -> list[np.ndarray]:
    """Of scales in float64, each result rounded."""
    dtype = Dtype.FLOAT32 if rule.order is Order.RATIO32 else rule.dtype

    def to(value: np.ndarray) -> np.ndarray:
        return rounded(np.asarray(value, F64), dtype)

    x, w, y = to(x), to(w), to(y)
    if rule.order.in_steps:
        again = rule.order in (Order.STEPS, Order.STEPS_DIVIDED, Order.STEPS_JOINED)
        x, w = (to(1 / to(1 / x)), to(1 / to(1 / w))) if again else (x, w)
        x, w = (to(x * w), np.ones_like(w)) if rule.order.joins else (x, w)
        last = {Order.STEPS_DIVIDED: to(1 / to(1 / y)), Order.SCALES_DIVIDED: y}.get(rule.order, to(1 / y))
        if rule.order in (Order.STEPS_JOINED, Order.SCALES_JOINED):
            return [to(x * w), np.ones_like(w), last + 0 * w]
        return [x + 0 * w, w, last + 0 * w]
    return [to(to(x * w) * to(1 / y))] if rule.order is Order.RECIPROCAL else [to(to(x * w) / y)]


def convert_by_hand(level: int, zero: int, beyond: Beyond) -> int:
    """A level plus a zero point: as it is, or in the integers that it is converted to first, which wrap."""
    if beyond is Beyond.SATURATE:
        return min(max(level, INT_MIN), -INT_MIN - 1) + zero
    bits = 32 if beyond is Beyond.WRAP32 else 64
    half = 2 ** (bits - 1)
    held = level if -half <= level < half else -half
    return (held + zero + half) % (2 * half) - half


@pytest.mark.parametrize("rule", rules.list_floats(), ids=lambda rule: "-".join(map(str, vars(rule).values())))
def test_floats_are_rounded_at_each_step(rule: FloatProduct) -> None:
    """In float64, each result rounded by hand to the rule's dtype; every place of a bias."""
    rng = stream(1, "rules")
    to = lambda x: rounded(np.asarray(x, F64), rule.dtype)  # noqa: E731
    reach = 60000 if rule.dtype is Dtype.FLOAT16 else 2**26
    for place in [place for place in Bias if place is not Bias.FLOAT_BEFORE_FUSED or rule.dtype is Dtype.FLOAT32]:
        x, w, y = (rng.uniform(0.01, 1, size).astype(F32) for size in ((), (7,), ()))
        a = np.concatenate([rng.integers(-reach, reach, (20, 7)), rng.integers(-40, 40, (20, 7))]).astype(I32)
        zero, bias = I32(rng.integers(0, 256)), rng.normal(0, 20, 7).astype(F32)
        real = both("fixed", "real_multiplier", x, w, y, rule)
        wide = [to(scale) for scale in (x, w, y)]
        steps = factors_by_hand(*(scale.astype(F64) for scale in (x, w, y)), rule)
        np.testing.assert_array_equal(np.asarray(real, F64), np.squeeze(steps))
        level, beside = to(a), None
        if place is not Bias.INT32:
            unit = x.astype(F64) * w
            beside = both("float", "scale_bias", bias, unit, y, rule, place)
            want = to(to(bias) / to(unit)) if place is Bias.FLOAT_BEFORE else to(bias)
            if place is Bias.FLOAT_BEFORE_FUSED:
                want = np.stack([bias.astype(F64), to(1 / to(unit))])
            if place is Bias.FLOAT_AFTER and not rule.order.in_steps:
                reciprocal = rule.order is Order.RECIPROCAL
                want = to(to(bias) * to(1 / wide[2])) if reciprocal else to(to(bias) / wide[2])
            np.testing.assert_array_equal(np.asarray(beside, F64), want)
        if place is Bias.FLOAT_BEFORE:
            level = to(level + beside)
        elif place is Bias.FLOAT_BEFORE_FUSED:
            exact = [
                [Fraction(float(v)) + Fraction(b) * Fraction(u) for v, b, u in zip(row, *want, strict=True)]
                for row in level
            ]
            level = np.array([[nearest(one) for one in row] for row in exact])
        for factor in steps[:2]:
            level = to(level * factor)
        if place is Bias.FLOAT_AFTER:
            level = to(level + beside)
        for factor in steps[2:]:
            level = to(level / factor if rule.order.divides else level * factor)
        before = rule.zero_point is ZeroPoint.BEFORE
        level = to(level + int(zero)) if before else level
        top = [
            whole(Fraction(v), rule.rounding) if math.isfinite(v) else int(math.copysign(2**70, v))
            for v in level.ravel().tolist()
        ]
        code = [convert_by_hand(v, 0 if before else int(zero), rule.beyond) for v in top]
        code = np.clip(np.array(code, F64), 0, 255).reshape(a.shape)
        got = both("fixed", "requantize", a, real, zero, U8, rule, beside, place)
        np.testing.assert_array_equal(got, code)


@pytest.mark.parametrize("rounding", rules.ROUNDINGS)
def test_sums_round_once(rounding: Rounding) -> None:
    rng, rule = stream(2, "rules"), AddRule(rounding)
    for shift in (0, 1, 2, 30, 31, 60):
        m = rng.integers(0, 2**30, 2)
        parts = [np.append(rng.integers(INT_MIN, INT_MAX, 60), [1, -1, 3, -3, 0]).astype(I32) for _ in range(2)]
        for factors in (m, I64([1, 0])):
            got = both("ops", "weighted_sum", parts, [I64(f) for f in factors], I64(shift), rule)
            pairs = zip(*(part.tolist() for part in parts), strict=True)
            exact = [Fraction(p * int(factors[0]) + q * int(factors[1]), 2**shift) for p, q in pairs]
            assert np.asarray(got).tolist() == [whole(x, rounding) for x in exact]


def pairs_by_hand(a: np.ndarray, b: np.ndarray, run: int) -> np.ndarray:
    """vpmaddubsw and vpaddsw, one number at a time."""
    clip = lambda x: max(-(2**15), min(2**15 - 1, x))  # noqa: E731
    total = np.zeros((len(a), b.shape[1]), I64)
    for m, n in np.ndindex(*total.shape):
        terms = [int(x) * int(y) for x, y in zip(a[m], b[:, n], strict=True)]
        pairs = [clip(sum(terms[k : k + 2])) for k in range(0, len(terms), 2)]
        for start in range(0, len(pairs), run):
            acc = pairs[start]
            for pair in pairs[start + 1 : start + run]:
                acc = clip(acc + pair)
            total[m, n] += acc
    return total


@pytest.mark.parametrize("rule", rules.list_matmuls(), ids=lambda rule: "-".join(map(str, vars(rule).values())))
def test_matmuls_by_hand(rule: MatmulRule) -> None:
    """Zero points are subtracted from what the pairs gave; all but uint8 by int8 is exact; overflow is at the end."""
    rng = stream(3, "rules")
    for a_spec, b_spec in ((U8, S8), (U8, I8), (U8, U8), (S8, S8), (I8, S8), (QuantSpec(7), QuantSpec(7, True))):
        a = rng.integers(a_spec.code_min, a_spec.code_max + 1, (4, 11)).astype(I32)
        b = rng.integers(b_spec.code_min, b_spec.code_max + 1, (11, 5)).astype(I32)
        a[0], b[:, 0] = a_spec.code_max, b_spec.code_max
        a_zero = None if a_spec.symmetric else rng.integers(a_spec.code_min, a_spec.code_max, (4, 1)).astype(I32)
        b_zero = None if b_spec.symmetric else rng.integers(b_spec.code_min, b_spec.code_max, 5).astype(I32)
        moved = 128 if a_spec.has_sign and rule.products is Products.PAIRS16_SHIFTED else 0
        paired = (moved or not a_spec.has_sign) and b_spec.has_sign and rule.products is not Products.EXACT
        sums = pairs_by_hand(a + moved, b, rule.run) - moved * b.sum(0) if paired else a.astype(I64) @ b
        za, zb = I64(0) if a_zero is None else a_zero.astype(I64), I64(0) if b_zero is None else b_zero.astype(I64)
        exact = sums - za * b.sum(0) - zb * a.sum(1, keepdims=True) + 11 * za * zb
        for bias in (None, I32([INT_MAX, INT_MIN, 5, 0, -5])):
            total = exact + (0 if bias is None else bias.astype(I64))
            inside = (total >= INT_MIN) & (total <= INT_MAX)
            got = both("products", "matmul", a, b, a_spec, b_spec, a_zero, b_zero, bias, 32, rule)
            if rule.overflow is Overflow.REPORT and not inside.all():
                assert isinstance(got, str) and "beyond int32" in got
                continue
            wrapped = (total + 2**31) % 2**32 - 2**31
            want = wrapped if rule.overflow is Overflow.WRAP else np.clip(total, INT_MIN, INT_MAX)
            np.testing.assert_array_equal(got, want)
            wide = both("products", "matmul", a, b, a_spec, b_spec, a_zero, b_zero, bias, 64, rule)
            np.testing.assert_array_equal(wide, total)


def test_saturation_of_64_bits(call) -> None:
    rule = MatmulRule(Products.EXACT, 1, Overflow.SATURATE)
    a, b = np.int8([[1]]), np.int8([[2]])
    for bias in (2**63 - 1, -(2**63)):
        end, twice = I64([bias]), b * np.sign(bias).astype(np.int8)
        got = call("integer.products.matmul", a, twice, S8, S8, None, None, end, 64, rule)
        assert got.tolist() == [[bias]]


def test_pairs_of_several_matrices(call) -> None:
    rng = stream(4, "rules")
    a, b = rng.integers(0, 256, (2, 3, 4, 10)).astype(np.uint8), rng.integers(-128, 128, (3, 10, 5)).astype(np.int8)
    got = call("integer.products.matmul_pairs16", a, b, 2)
    want = [[pairs_by_hand(a[i, j], b[j], 2) for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(got, np.array(want))


@given(SEEDS)
def test_both_backends_on_anything(seed: int) -> None:
    """A rule of each operation, drawn, on drawn numbers."""
    rng = np.random.default_rng(seed)
    fixed = rules.list_fixed()
    rule = fixed[rng.integers(len(fixed))]
    wide = rule.product is HighProduct.EXACT and rng.uniform() < 0.5
    a = rng.integers(-(2**47), 2**47, 30) if wide else rng.integers(INT_MIN, INT_MAX, 30).astype(I32)
    real = 2.0 ** rng.uniform(-31, 3, 30)
    both("fixed", "requantize", a, real, I32(rng.integers(0, 256)), U8, rule)
    floats = rules.list_floats()
    other = floats[rng.integers(len(floats))]
    both("fixed", "round_by", a, np.stack([real] * 3) ** (1 / 3) if other.order.in_steps else real, other)


# --- what the records refuse ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(rules.ONE, bits=16), "rule bits is 16: a multiplier has 31 bits, or 15"),
        (
            lambda: replace(rules.ONE, dtype=Dtype.BFLOAT16),
            "rule dtype is 'bfloat16': M is computed in float64 or",
        ),
        (lambda: replace(rules.ONE, scales=Dtype.FLOAT16), "rule scales is 'float16': M is computed in float64 or"),
        (lambda: replace(rules.ONE, rounding=Rounding.STOCHASTIC), "rounds the same each time"),
        (lambda: replace(rules.RINT, rounding=Rounding.STOCHASTIC), "rounds the same each time"),
        (lambda: replace(rules.RINT, zero_point=ZeroPoint.FUSED), "rule zero_point is 'fused'"),
        (lambda: replace(rules.RINT, dtype=Dtype.INPUT), "an accumulator has no width of its own"),
        (lambda: AddRule(Rounding.STOCHASTIC), "a sum rounds the same each time"),
        (lambda: MatmulRule(Products.EXACT, 2, Overflow.WRAP), "rule run is 2: products exact add 1"),
        (lambda: MatmulRule(Products.RUNS16, 1, Overflow.WRAP), "rule run is 1: products runs16 add at least 2"),
        (lambda: replace(QTX, bias=Bias.FLOAT_AFTER), "profile bias is 'float_after'"),
        (
            lambda: replace(QTX, bias=Bias.FLOAT_BEFORE_FUSED, requantize=rules.REFERENCE),
            "profile bias is 'float_before_fused': a fused multiply-add is in float32",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(make, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make()


@pytest.mark.parametrize(
    "rule", [replace(rules.ONE, dtype=Dtype.FLOAT32, scales=Dtype.FLOAT32), rules.REFERENCE, rules.ONEDNN]
)
def test_scales_at_the_ends_of_float32_are_refused_without_a_warning(rule):
    """1 / 1e-39 is no float16 and no small factor; 2^-7 / 1.4e-45 is no float32."""
    least = F32(1e-45)
    rule = replace(rule, dtype=Dtype.FLOAT32)
    for module, kind in ((fixed_point, np.asarray), (torch_fixed, torch.from_numpy)):
        given = (kind(np.array(value, F32)) for value in (2**-3, 2**-4, least))
        real = module.real_multiplier(*given, rule)
        with pytest.raises(ValueError, match="outside 0 to"):
            module.round_by(kind(np.array([1], I32)), real, rule)


def test_a_bias_beyond_its_unit_is_infinite_without_a_warning():
    half = replace(rules.REFERENCE, dtype=Dtype.FLOAT16)
    for module, kind in ((float_product, np.asarray), (torch_float, torch.from_numpy)):
        given = (kind(np.array(value, F32)) for value in (1.0, 1e-9, 1.0))
        assert module.scale_bias(*given, half, Bias.FLOAT_BEFORE) == math.inf
