"""Quantize, dequantize and fake quantize as operations of the search."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from qtx_ref.quant import affine
from qtx_ref.spec import (
    Beyond,
    DequantizeForm,
    DequantizeRule,
    Dtype,
    FakeQuantizeRule,
    InfinityPolicy,
    NanPolicy,
    QuantizeRule,
    QuantSpec,
    Rounding,
    SpecError,
    ZeroPoint,
)

from .inputs import SCALES, all_ties, draw_scale, near_ties, odd_zeros
from .questions import Operation, Question, Values, bits_of, floats_of

COUNT, FRESH_COUNT = 384, 4096  # inputs of a question of the pool, and of a fresh one
QUANTIZE_AXES = ("rounding", "zero_point", "reciprocal", "arithmetic", "nan", "infinity", "beyond")
DEQUANTIZE_AXES = ("form", "arithmetic")
FAR = 2.0**15  # levels from which on an arithmetic's or an integer's end may matter
WORDS = (0, 2**32 - 1)  # of chance: always up, never up


def possible(kind: type, *axes: Any) -> Iterator[Values]:
    """Every combination that a record of rules can have."""
    for values in product(*axes):
        try:
            kind(*values)
        except SpecError:
            continue
        yield values


def quantize_values(stochastic: bool) -> list[Values]:
    """Every combination of QuantizeRule that is stochastic, or that is not."""
    roundings = [one for one in Rounding if (one is Rounding.STOCHASTIC) == stochastic]
    return list(possible(QuantizeRule, roundings, ZeroPoint, (False, True), Dtype, NanPolicy, InfinityPolicy, Beyond))


def reduce(values: Values, question: Question) -> Values:
    """Of a QuantizeRule's values those that an answer can depend on."""
    has = question.settings
    return (*values[:4], has["nan"] and values[4], has["infinite"] and values[5], has["far"] and values[6])


class Quantizer(Operation):
    """What quantize and fake quantize share: their inputs."""

    def __init__(self, specs: dict[str, QuantSpec]) -> None:
        self.specs = specs

    def more(self, spec: QuantSpec) -> dict[str, np.ndarray]:
        """What a call has beside."""
        return {}

    def question(self, kind: str, x: np.ndarray, scale: np.ndarray, zero: int, codes: str) -> Question:
        """One call with codes of the dtype `codes`."""
        needs = [f"{codes} codes"]
        needs += [f"{x.dtype} x"] if x.dtype != np.float32 else []
        needs += ["a zero point"] if zero else []
        with np.errstate(over="ignore"):
            level = np.abs(x.astype(np.float64)) / scale.astype(np.float64)
        settings = {
            "spec": self.specs[codes],
            "nan": bool(np.isnan(x).any()),
            "infinite": bool(np.isinf(x).any()),
            "far": bool((level > FAR).any()),
        }
        arrays = {"x": x, "scale": scale, "zero_point": np.asarray(zero, codes), **self.more(self.specs[codes])}
        return Question(kind, arrays, x.size, frozenset(needs), settings)

    def make_pool(self) -> Sequence[Question]:
        """Ordinary inputs first, the widest net."""
        rng = np.random.default_rng(11)
        asked = []
        for codes, spec in self.specs.items():
            zeros = odd_zeros(spec)
            for zero, kind in product(zeros, ("short", "any", "power")):
                scale = draw_scale(rng, kind)
                asked.append(self.question("near ties", near_ties(rng, spec, scale, zero, COUNT), scale, zero, codes))
            for zero, kind in product(zeros[:2], ("short", "any")):
                scale = draw_scale(rng, kind, np.float16)
                x = near_ties(rng, spec, scale, zero, COUNT, np.float16)
                asked.append(self.question("near ties in float16", x, scale, zero, codes))
            one, few = np.float32(1), np.array([1e-30, -1e-30, 1e-45, -1e-45, 0.0, -0.0], np.float32)
            for zero in zeros:
                asked += [
                    self.question("beside 0", few, np.asarray(one), zero, codes),
                    self.question("beyond 2^31 and 2^63", far_inputs(), np.asarray(one), zero, codes),
                    self.question("NaN", np.array([np.nan], np.float32), np.asarray(one), zero, codes),
                    self.question("infinities", np.array([np.inf, -np.inf], np.float32), np.asarray(one), zero, codes),
                ]
        return asked

    def draw(self, rng: np.random.Generator) -> Question:
        """Near ties, or every tie of the codes, in float32 or float16; now and then what lies far out."""
        codes = str(rng.choice(list(self.specs)))
        spec = self.specs[codes]
        zero = int(rng.integers(spec.code_min, spec.code_max + 1)) if rng.random() < 0.8 else 0
        zero = zero if spec.code_min <= zero <= spec.code_max else spec.code_min
        dtype = np.float16 if rng.random() < 0.2 else np.float32
        scale = draw_scale(rng, str(rng.choice(SCALES)), dtype)
        if rng.random() < 0.3:
            return self.question("every tie", all_ties(spec, scale, zero, dtype), scale, zero, codes)
        x = near_ties(rng, spec, scale, zero, FRESH_COUNT, dtype)
        if rng.random() < 0.3:
            far = far_inputs()[np.abs(far_inputs()) < np.finfo(dtype).max].astype(dtype)
            x[::16] = rng.choice(far, x[::16].size)
        return self.question("near ties", x, scale, zero, codes)

    def describe(self, question: Question, index: int) -> dict[str, Any]:
        arrays = question.arrays
        described = {
            "x": float(arrays["x"][index]),
            "scale": float(arrays["scale"]),
            "zero_point": int(arrays["zero_point"]),
            "codes": str(arrays["zero_point"].dtype),
        }
        return described if arrays["x"].dtype == np.float32 else {**described, "dtype": str(arrays["x"].dtype)}


def far_inputs() -> np.ndarray:
    """What int32 and int64 do not hold, and their ends."""
    ends = [2.0**15, 2.0**24 + 2, 2.0**31 - 128, 2.0**31, 3e9, 2.0**32, 2.0**63 - 2.0**39, 2.0**63, 1e19, 3e38]
    return np.array([*ends, *(-end for end in ends)], np.float32)


class Quantize(Quantizer):
    """From a real number to a code."""

    name, axes = "quantize", QUANTIZE_AXES

    def __init__(self, specs: dict[str, QuantSpec], stochastic: bool) -> None:
        super().__init__(specs)
        self.candidates = quantize_values(stochastic)
        if stochastic:  # chance hides most of the rest, and hundreds of candidates stay
            self.fresh = FRESH_COUNT

    def key(self, values: Values, question: Question) -> Hashable:
        return reduce(values, question)

    def allow(self, values: Values) -> Values:
        nan = NanPolicy.ZERO if values[4] is NanPolicy.RAISE else values[4]
        return (*values[:4], nan, InfinityPolicy.SATURATE, values[6])

    def evaluate(self, values: Values, question: Question) -> np.ndarray:
        rule, arrays = QuantizeRule(*values), question.arrays
        x, zero, spec = arrays["x"], arrays["zero_point"].astype(np.int32), question.settings["spec"]
        if rule.rounding is not Rounding.STOCHASTIC:
            return affine.quantize(x, arrays["scale"], zero, spec, rule)[None]
        ends = [
            affine.quantize(x, arrays["scale"], zero, spec, rule, np.full(x.shape, word, np.uint32)) for word in WORDS
        ]
        return np.sort(np.stack(ends), axis=0)


class FakeQuantize(Quantizer):
    """Quantized and dequantized at once."""

    name = "fake_quantize"
    axes = (*(f"quantize.{axis}" for axis in QUANTIZE_AXES), *(f"dequantize.{axis}" for axis in DEQUANTIZE_AXES))

    def __init__(self, specs: dict[str, QuantSpec]) -> None:
        super().__init__(specs)
        dequantizing = list(possible(DequantizeRule, DequantizeForm, Dtype))
        self.candidates = [(*a, *b) for a in quantize_values(False) for b in dequantizing]

    def more(self, spec: QuantSpec) -> dict[str, np.ndarray]:
        return {"code_min": np.asarray(spec.code_min, np.int32), "code_max": np.asarray(spec.code_max, np.int32)}

    def key(self, values: Values, question: Question) -> Hashable:
        return (*reduce(values[:7], question), *values[7:])

    def allow(self, values: Values) -> Values:
        return (*values[:5], InfinityPolicy.SATURATE, *values[6:])

    def evaluate(self, values: Values, question: Question) -> np.ndarray:
        rule = FakeQuantizeRule(QuantizeRule(*values[:7]), DequantizeRule(*values[7:]))
        arrays, spec = question.arrays, question.settings["spec"]
        y, _ = affine.fake_quantize(arrays["x"], arrays["scale"], arrays["zero_point"].astype(np.int32), spec, rule)
        return bits_of(y)[None]

    def show(self, answer: int) -> Any:
        return floats_of(answer)


class Dequantize(Operation):
    """From a code to a real number."""

    name, axes = "dequantize", DEQUANTIZE_AXES

    def __init__(self, codes: Sequence[str]) -> None:
        self.codes = codes
        self.candidates = list(possible(DequantizeRule, DequantizeForm, Dtype))

    def key(self, values: Values, question: Question) -> Hashable:
        return values

    def allow(self, values: Values) -> Values:
        return values

    def evaluate(self, values: Values, question: Question) -> np.ndarray:
        arrays = question.arrays
        y = affine.dequantize(
            arrays["code"], arrays["scale"], arrays["zero_point"].astype(np.int32), DequantizeRule(*values)
        )
        return bits_of(y)[None]

    def show(self, answer: int) -> Any:
        return floats_of(answer)

    def question(self, rng: np.random.Generator, codes: str, dtype: type, count: int, moved: bool) -> Question:
        """Any codes under any scale, with any zero point or with 0."""
        ends = np.iinfo(codes)
        code = rng.integers(ends.min, ends.max, count, endpoint=True).astype(codes)
        zero = np.asarray(rng.integers(ends.min, ends.max, endpoint=True) if moved else 0, codes)
        scale = draw_scale(rng, "any", dtype)
        needs = [f"{codes} codes"]
        needs += [f"{np.dtype(dtype)} scale"] if dtype is not np.float32 else []
        needs += ["a zero point"] if zero else []
        arrays = {"code": code, "scale": scale, "zero_point": zero}
        return Question("codes", arrays, count, frozenset(needs))

    def make_pool(self) -> Sequence[Question]:
        rng = np.random.default_rng(11)
        return [
            self.question(rng, codes, dtype, COUNT, moved)
            for codes, dtype, moved in product(self.codes, (np.float32, np.float16), (True, True, False))
        ]

    def draw(self, rng: np.random.Generator) -> Question:
        dtype = np.float16 if rng.random() < 0.2 else np.float32
        return self.question(rng, str(rng.choice(list(self.codes))), dtype, FRESH_COUNT, bool(rng.random() < 0.8))

    def describe(self, question: Question, index: int) -> dict[str, Any]:
        arrays = question.arrays
        return {
            "code": int(arrays["code"][index]),
            "scale": float(arrays["scale"]),
            "zero_point": int(arrays["zero_point"]),
            "codes": str(arrays["code"].dtype),
        }
