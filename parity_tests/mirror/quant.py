"""torch's quantizers and observers against the reference's, to the bit: codes, ranges, gradient masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch

from parity_tests.proof.case import Case, Context
from parity_tests.proof.evaluate_torch import array, tensor
from parity_tests.proof.verdict import Verdict, equal, exact
from qtx_ref.profiles import NAMES, profile
from qtx_ref.quant import affine as ref_affine
from qtx_ref.quant import observers as ref_observers
from qtx_ref.quant import quantizer as ref_quantizer
from qtx_ref.random import stream
from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    InfinityPolicy,
    NanPolicy,
    ObserverKind,
    ObserverSpec,
    Quant,
    QuantSpec,
    SharedScale,
)
from qtx_torch.quant import affine, observers, quantizer

BITS = (2, 3, 4, 6, 8, 12, 16)
REACH: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"granularity": Granularity.CHANNEL},
    "token": {"granularity": Granularity.TOKEN},
    "group": {"granularity": Granularity.GROUP, "groups": 2},
    "permuted": {"granularity": Granularity.GROUP, "groups": 2, "permute": True},
    "block": {"granularity": Granularity.BLOCK, "block": 2},
}


def compare_twins(names: tuple[str, ...], got: tuple, want: tuple) -> list[Verdict]:
    """What torch gave and what the reference gave, one by one, to the bit."""
    got = tuple(array(value) if isinstance(value, torch.Tensor) else value for value in got)
    return [exact(*three) for three in zip(names, got, map(np.asarray, want), strict=True)]


def _ties(rng: np.random.Generator) -> np.ndarray:
    """Halves of a scale of 1 or a power of two, the numbers just above and below them, and the limits themselves."""
    halves = np.arange(-140, 140, dtype=np.float32).reshape(2, 10, 14) + np.float32(0.5)
    near = [
        halves,
        np.nextafter(halves, np.float32(np.inf)),
        np.nextafter(halves, np.float32(-np.inf)),
        np.rint(halves),
    ]
    return np.concatenate(near, axis=1)


def _extremes(rng: np.random.Generator) -> np.ndarray:
    """Around every power of two that float32 has, both zeros, subnormal numbers and the largest."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 126)).astype(np.float32)
    ends = np.float32([0.0, -0.0, 1e-45, 1.7e38, -1.7e38])
    below, above = np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))
    x = np.concatenate([powers, below, -powers, -above, ends])
    return np.resize(x, (2, 40, 14)).astype(np.float32)


DATA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(size=(2, 40, 14)),
    "tails": lambda rng: rng.standard_t(1.5, size=(2, 40, 14)),
    "positive": lambda rng: rng.gamma(0.5, size=(2, 40, 14)),
    "negative": lambda rng: -1 - rng.gamma(0.5, size=(2, 40, 14)),
    "zeros": lambda rng: np.zeros((2, 40, 14)),
    "ties": _ties,
    "extremes": _extremes,
}


def chain(m: Any, x: Any, where: Any, spec: QuantSpec, weight: bool) -> tuple:
    """From a tensor to its range, scale, zero point, codes, dequantized values and gradient mask, by module `m`."""
    low, high = m.ranges(x, spec, weight, where)
    scale, zero = m.scale_zero(low, high, spec)
    codes = m.quantize(x, scale, zero, spec)
    low, high = low + 0.0, high + 0.0  # the sign of a zero end is that of whichever zero came last; nothing reads it
    return low, high, scale, zero, codes, m.dequantize(codes, scale, zero), *m.fake_quantize(x, scale, zero, spec)


CHAIN = ("low", "high", "scale", "zero point", "codes", "dequantized", "fake-quantized", "gradient passes")


def check_affine(data: str, reach: str, context: Context) -> list[Verdict]:
    rng = stream(0, "affine", data, reach)
    x = DATA[data](rng).astype(np.float32)
    where = rng.uniform(size=(*x.shape[:-1], 1)) < 0.8
    given = tensor(x, context), tensor(where, context)
    verdicts = []
    for bits, symmetric, kind in product(BITS, (False, True), ("all", "masked", "weight")):
        if kind == "weight" and reach == "token":
            continue
        spec, masked, weight = (
            QuantSpec(bits, symmetric, dynamic=True, **REACH[reach]),
            kind == "masked",
            kind == "weight",
        )
        names = tuple(f"{bits} bits, symmetric {symmetric}, {kind}: {name}" for name in CHAIN)
        got = chain(affine, given[0], given[1] if masked else None, spec, weight)
        verdicts += compare_twins(names, got, chain(ref_affine, x, where if masked else None, spec, weight))
    return verdicts


def check_profile(name: str, context: Context) -> list[Verdict]:
    """Scales, codes, values and gradient masks under an engine's rules, of float32 and float16; where its rules have a
    code for it, NaN, infinities and what lies beyond 2^31 and 2^63 too."""
    rules, verdicts = profile(name), []
    beyond = np.float32([np.nan, np.inf, -np.inf, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 1e30])
    refuses = rules.quantize.nan is NanPolicy.RAISE or rules.quantize.infinity is InfinityPolicy.RAISE
    specs = (QuantSpec(), QuantSpec(signed=True), QuantSpec(symmetric=True), QuantSpec(12, signed=True))
    for spec, data, half in product(specs, ("normal", "tails", "ties"), (False, True)):
        x = DATA[data](stream(0, "profile", name, data)).astype(np.float16 if half else np.float32).ravel()
        ends = np.float32(x.min()), np.float32(x.max())
        scale, zero = ref_affine.scale_zero(*ends, spec, rules.scale)
        pair = affine.scale_zero(*(tensor(end, context) for end in ends), spec, rules.scale)
        x = x if refuses or half else np.concatenate([x, beyond])
        given, moved = (x, scale, zero), (torch.tensor(x, device=context.device), *pair)  # float16 as such
        want = ref_affine.quantize(*given, spec, rules.quantize)
        got = affine.quantize(*moved, spec, rules.quantize)
        more = (
            ref_affine.dequantize(want, scale, zero, rules.dequantize),
            *ref_affine.fake_quantize(*given, spec, rules.simulated().fake_quantize),
        )
        ours = (
            affine.dequantize(got, *pair, rules.dequantize),
            *affine.fake_quantize(*moved, spec, rules.simulated().fake_quantize),
        )
        names = tuple(f"{data}, {x.dtype}, {spec}: {what}" for what in CHAIN[2:])
        verdicts += compare_twins(
            names, (*pair, got, *map(mark_nans, ours)), (scale, zero, want, *map(mark_nans, more))
        )
    return verdicts


def check_axes(context: Context) -> list[Verdict]:
    """Channels and blocks along each axis, masked and not; blocks of small floats too."""
    verdicts: list[Verdict] = []
    specs: list[Quant] = [QuantSpec(dynamic=True, **REACH[reach]) for reach in ("channel", "block")]
    specs.append(FloatQuantSpec(FloatFormat.E4M3, granularity=Granularity.BLOCK, dynamic=True, block=2))
    rng = stream(0, "axes")
    x = rng.standard_normal((4, 6, 8)).astype(np.float32)
    for spec, axis, masked in product(specs, (0, 1, 2, -2), (False, True)):
        where = rng.uniform(size=(4, 6, 1)) < 0.7 if masked else None
        one = replace(spec, axis=axis)
        kept = None if where is None else tensor(where, context)
        given, moved = (x, one, where, False), (tensor(x, context), one, kept, False)
        scale, zero = ref_quantizer.dynamic_scale(*given)
        pair = quantizer.dynamic_scale(*moved)
        want = ref_quantizer.fake_quantize(x, scale, zero, one)
        got = quantizer.fake_quantize(moved[0], *pair, one)
        names = tuple(f"{one}, masked {masked}: {what}" for what in (*CHAIN[2:4], *CHAIN[6:]))
        verdicts += compare_twins(names, (*pair, *got), (scale, zero, *want))
    return verdicts


def check_float(form: FloatFormat, context: Context) -> list[Verdict]:
    """Small floats from a tensor to its scale, codes, values and gradient mask; and beyond the scale, where it
    saturates."""
    specs = [
        FloatQuantSpec(form, form is FloatFormat.E2M1, dynamic=True, **REACH[reach]) for reach in ("tensor", "token")
    ]
    specs.append(FloatQuantSpec(form, granularity=Granularity.CHANNEL, dynamic=True))
    specs += [
        FloatQuantSpec(form, granularity=Granularity.BLOCK, dynamic=True, block=7, shared=rule) for rule in SharedScale
    ]
    verdicts = []
    for (data, make), spec, factor in product(DATA.items(), specs, (1, 1.5)):
        x = make(stream(0, "float", form, data)).astype(np.float32)
        scale, zero = ref_quantizer.dynamic_scale(x, spec, None, False)
        pair = quantizer.dynamic_scale(tensor(x, context), spec, None, False)
        with np.errstate(over="ignore"):
            x = x * np.float32(factor)
        want = ref_quantizer.quantize(x, scale, zero, spec), *ref_quantizer.fake_quantize(x, scale, zero, spec)
        moved = tensor(x, context), *pair
        got = quantizer.quantize(*moved, spec), *quantizer.fake_quantize(*moved, spec)
        names = tuple(f"{data} times {factor}, {spec}: {name}" for name in (*CHAIN[2:5], *CHAIN[6:]))
        verdicts += compare_twins(names, (*pair, *map(mark_nans, got)), (scale, zero, *map(mark_nans, want)))
    return verdicts


def check_outliers(context: Context) -> list[Verdict]:
    """LLM.int8: scales of the channels without outliers, values, codes and gradient masks; padding makes no outlier."""
    verdicts = []
    for (data, make), symmetric, masked in product(DATA.items(), (False, True), (False, True)):
        rng = stream(0, "outliers", data)
        x = make(rng).astype(np.float32)
        where = rng.uniform(size=(*x.shape[:-1], 1)) < 0.6 if masked else None
        for threshold in (2.0, float(np.abs(x).max(initial=1e-3)) / 2):
            spec = QuantSpec(8, symmetric, granularity=Granularity.TOKEN, dynamic=True, outliers=threshold)
            scale, zero = ref_quantizer.dynamic_scale(x, spec, where, False)
            kept = None if where is None else tensor(where, context)
            pair = quantizer.dynamic_scale(tensor(x, context), spec, kept, False)
            moved = tensor(x, context), *pair
            want = ref_quantizer.quantize(x, scale, zero, spec), *ref_quantizer.fake_quantize(x, scale, zero, spec)
            got = quantizer.quantize(*moved, spec), *quantizer.fake_quantize(*moved, spec)
            kind = f"{data}, symmetric {symmetric}, masked {masked}, from {threshold:.3g}"
            names = tuple(f"{kind}: {name}" for name in (*CHAIN[2:5], *CHAIN[6:]))
            verdicts += compare_twins(names, (*pair, *got), (scale, zero, *want))
    return verdicts


def mark_nans(values: Any) -> np.ndarray:
    """NaN, which equals nothing, as a number that no format has."""
    values = array(values) if isinstance(values, torch.Tensor) else values
    return np.where(np.isnan(values), 0.123, values).astype(values.dtype)


def check_ties(context: Context) -> list[Verdict]:
    """Ties and their neighbours, with zero points at both ends and in the middle.

    Where the scale is a power of two, x / scale is a tie to the bit; elsewhere x is the float nearest to one, and
    multiplying by the reciprocal, which rounds twice, ends on the other side.
    """
    x, verdicts = _ties(stream(0)), []
    scales = [np.ldexp(np.float32(1), power) for power in (-126, -8, 0, 8, 100)]
    scales += list(stream(0, "scales").uniform(0.01, 0.1, 8).astype(np.float32))
    for bits, symmetric, scale in product(BITS, (False, True), scales):
        spec = QuantSpec(bits, symmetric)
        for zero in (0,) if symmetric else (0, spec.code_max // 2, spec.code_max):
            given = x * scale, scale, np.int32(zero)
            moved = [tensor(value, context) for value in given]
            got = affine.quantize(*moved, spec), *affine.fake_quantize(*moved, spec)
            want = ref_affine.quantize(*given, spec), *ref_affine.fake_quantize(*given, spec)
            kind = f"{bits} bits, scale {scale:.4g}, zero point {zero}"
            verdicts += compare_twins(tuple(f"{kind}: {name}" for name in (CHAIN[4], *CHAIN[6:])), got, want)
    return verdicts


def check_refusals(context: Context) -> list[Verdict]:
    """NaN has no code; infinity saturates but makes no range."""
    one, zero = torch.ones((), device=context.device), torch.zeros((), dtype=torch.int32, device=context.device)
    spec = QuantSpec(symmetric=True)
    ends = torch.tensor([torch.inf, -torch.inf], device=context.device)
    verdicts = [exact("infinity", array(affine.quantize(ends, one, zero, spec)), np.int32([127, -128]))]
    attempts = {
        "NaN": lambda: affine.quantize(one * torch.nan, one, zero, spec),
        "infinite range": lambda: affine.scale_zero(-one, one * torch.inf, spec),
        "NaN range": lambda: affine.scale_zero(-one, one * torch.nan, spec),
        "NaN observed": lambda: observers.Observer(spec).update(ends * torch.nan),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except ValueError:
            verdicts.append(equal(f"{what} is refused", True, True))
        else:
            verdicts.append(equal(f"{what} is refused", False, True))
    return verdicts


def observe(m: Any, batches: Any, where: Any, spec: Quant, weight: bool) -> tuple:
    """Low, high, scale and zero point after each batch."""
    observer, ends = m.Observer(spec, weight), []
    for batch, keep in zip(batches, where, strict=True):
        observer.update(batch, keep)
        ends += [*observer.range(), *m.scale_zero(*observer.range(), spec)]
    return tuple(ends)


def check_observer(kind: ObserverKind, context: Context) -> list[Verdict]:
    """The range after each of three batches, masked and not, of activations and weights: of tensors, channels and
    groups in uniform codes, of tensors and channels in small floats."""
    observer = ObserverSpec(kind, percentile=97.0, candidates=40, margin=0.25)
    static = [REACH[reach] for reach in ("tensor", "channel", "group", "permuted")]
    specs: list[Quant] = [
        QuantSpec(4, symmetric, observer=observer, **reach) for symmetric, reach in product((False, True), static)
    ]
    specs += [FloatQuantSpec(form, observer=observer, **reach) for form, reach in product(FloatFormat, static[:2])]
    verdicts = []
    for (index, spec), part in product(enumerate(specs), ("all", "masked", "weight")):
        rng = stream(0, "observer", kind, index, part)
        batches = rng.standard_t(3, size=(3, 2, 8, 6)).astype(np.float32)
        where = rng.uniform(size=(3, 2, 8, 1)) < 0.7
        keep = (where, tensor(where, context)) if part == "masked" else ([None] * 3, [None] * 3)
        want = observe(ref_observers, batches, keep[0], spec, part == "weight")
        got = observe(observers, tensor(batches, context), keep[1], spec, part == "weight")
        ends = tuple(f"{spec}, {part}: {end} after {n}" for n in (1, 2, 3) for end in CHAIN[:4])
        verdicts += compare_twins(ends, got, want)
    return verdicts


def list_cases() -> list[Case]:
    rows = [
        Case("quant", f"{data}_{reach}", "torch", partial(check_affine, data, reach))
        for data, reach in product(DATA, REACH)
    ]
    rows += [Case("quant", f"float_{form}", "torch", partial(check_float, form)) for form in FloatFormat]
    rows += [
        Case("quant", "outliers", "torch", check_outliers),
        Case("quant", "axes", "torch", check_axes),
        Case("quant", "ties", "torch", check_ties),
        Case("quant", "refusals", "torch", check_refusals),
    ]
    rows += [Case("quant", f"profile_{name}", "torch", partial(check_profile, name)) for name in NAMES]
    return rows + [Case("quant", f"observer_{kind}", "torch", partial(check_observer, kind)) for kind in ObserverKind]
