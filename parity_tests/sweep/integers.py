"""From integers to integers: products, requantization, sums whose scales vary along them."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity_tests.subjects import rules
from parity_tests.sweep.configuration import BOTH, F32, Configuration, pick
from qtx_ref.integer import groups
from qtx_ref.random import stream
from qtx_ref.spec import (
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
    ZeroPoint,
)

FIXED = {
    "kind": ("fixed", "fixed", "float"),
    "dtype": (Dtype.FLOAT32, Dtype.FLOAT64, Dtype.BFLOAT16, Dtype.FLOAT16),  # of fixed: the first two
    "rounding": rules.ROUNDINGS,
    "multiplier_bits": (31, 15),
    "product": tuple(HighProduct),
    "left": tuple(LeftShift),
    "scales": (Dtype.FLOAT64, Dtype.FLOAT32),
    "order": tuple(Order),
    "zero_point": (ZeroPoint.AFTER, ZeroPoint.BEFORE),
    "beyond": tuple(Beyond),
    "place": tuple(Bias),
    "add": rules.ROUNDINGS,
    "accumulator": (np.int32, np.int32, np.int64),
    "multiplier": ("tiny", "below one", "above one", "power of two", "zero"),
    "bits": tuple(range(2, 17)),
    "symmetric": BOTH,
    "per_channel": BOTH,
    "too_large": (False,) * 4 + (True,),
}


def make_rule(axes: dict[str, Any]) -> Fixed | FloatProduct:
    """The rule of requantization that the axes draw."""
    if axes["kind"] == "float":
        return FloatProduct(axes["dtype"], axes["order"], axes["zero_point"], axes["rounding"], axes["beyond"])
    dtype = Dtype.FLOAT32 if axes["dtype"] is Dtype.FLOAT32 else Dtype.FLOAT64
    return Fixed(dtype, axes["multiplier_bits"], axes["product"], axes["rounding"], axes["left"], axes["scales"])


def fixed_chain(m, a, b, real, factors, zero, bias, exponent, scales, spec, rule, place, rounding):
    return {
        "codes": m.requantize(a, factors, zero, spec, rule, bias, place),
        "rounded": m.round_by(a, factors, rule),
        "multiplier, shift": m.quantize_multiplier(real),
        "combined": m.real_multiplier(scales[0], scales[1], scales[2], rule),
        "rounding high": m.rounding_doubling_high_multiply(b[0], b[1]),
        "high": m.doubling_high_multiply(b[0], b[1]),
        "divided": m.shift_right(b[0], exponent, rounding),
        "shifted": m.rounding_shift_right(b[1], exponent),
    }


def draw_fixed(index: int, codes: int) -> Configuration:
    rng, axes = stream(0, "fixed_point", index), pick(FIXED, index)
    rule = make_rule(axes)
    floats, half = isinstance(rule, FloatProduct), rule.dtype is Dtype.FLOAT16
    wide = axes["accumulator"] is np.int64 and (floats or rule.product is HighProduct.EXACT)
    columns = 16 if axes["per_channel"] else 1
    exponent = {
        "tiny": (-45, -30),
        "below one": (-20, 0),
        "above one": (0, 7),
        "power of two": (-12, 4),
        "zero": (0, 1),
    }
    real = np.ldexp(rng.uniform(0.5, 1, columns), rng.integers(*exponent[axes["multiplier"]], columns))
    if axes["multiplier"] == "power of two":
        real = np.exp2(np.rint(np.log2(real)))
    real *= axes["multiplier"] != "zero"
    magnitude = 2 ** rng.integers(4, 16 if half else 48 if wide else 32, (max(4, codes // 6 // 16), 1)) - 1
    if not axes["too_large"]:
        magnitude = np.minimum(magnitude, int(2.0**31 / max(1.0, 2 * real.max())) - 1 if not wide else 2**47 - 1)
    a = rng.integers(-magnitude, magnitude + 1, (len(magnitude), 16))
    a[0] = magnitude[0]
    a[1] = -magnitude[1] - 1
    a[2] = rng.integers(-64, 64, 16)  # ties of powers of two
    a = np.clip(a, -65504, 65504) if half else a
    factors = real
    if floats and rule.order.in_steps:
        steps = np.ldexp(rng.uniform(0.5, 1, (2, columns)), rng.integers(-8, 9, (2, columns)))
        last = real / steps[0] / steps[1]
        factors = np.stack([*steps, 1 / np.maximum(last, 1e-30) if rule.order.divides else last])
    bias = (rng.standard_normal(16) * 1000).astype(np.float32) if floats and axes["place"] is not Bias.INT32 else None
    if bias is not None and axes["place"] is Bias.FLOAT_BEFORE_FUSED:
        bias = np.stack([bias, rng.uniform(0.1, 9, 16).astype(np.float32)])  # and 1 / unit
    spec = QuantSpec(axes["bits"], axes["symmetric"])
    b = rng.integers(-(2**31), 2**31, (2, codes // 6))
    b[:, :9] = np.int64([-(2**31), -(2**31), 0, 2**31 - 1, 1, -1, 2**30, -(2**30), 3])
    b[1, 1:9] = np.int64([2**31 - 1, 5, 2**31 - 1, 2**30, 2**30, 1, 1, -(2**30)])
    arrays = {
        "a": a.astype(np.int64 if wide else np.int32),
        "b": b.astype(np.int32),
        "real": real,
        "factors": factors.astype(np.float64 if rule.dtype is Dtype.FLOAT64 else np.float32),
        "bias": bias,
        "zero": np.array(rng.integers(spec.code_min, spec.code_max + 1), np.int32),
        "exponent": rng.integers(0, 32, b.shape[1]).astype(np.int32),
        "scales": rng.uniform(1e-4, 1, (3, 64)).astype(F32),
    }
    settings = {"spec": spec, "rule": rule, "place": axes["place"], "rounding": axes["add"]}
    return Configuration(fixed_chain, arrays, settings, axes)


INTEGER = {
    "bits_a": (4, 8, 8, 8, 9, 16),
    "bits_b": (2, 4, 8, 8, 8, 16),
    "signed_a": BOTH,
    "signed_b": BOTH,
    "depth": (1, 2, 7, 64, 255, 259, 768, 1024, 1025, 2500),  # K: either side of a block's end
    "values": ("random", "random", "lowest", "highest"),
    "accumulator": (32, 64),
    "products": tuple(Products),
    "overflow": tuple(Overflow),
    "zero_a": ("none", "one", "row"),
    "zero_b": ("none", "one", "column"),
    "bias": ("none", "small", "large"),
    "batch": ((), (3,)),
    "integers": (False,) * 5 + (True,),
    "vnni": BOTH,  # torch: byte instructions, or float blocks
    "pairs": (1, 2, 4),
}


def integer_chain(m, a, b, zero_a, zero_b, bias, bytes_a, bytes_b, a_spec, b_spec, pairs, **settings):
    nibbles = a[..., :4, :] & 15
    packed = m.pack_int4(nibbles)
    zero_w = None if zero_b is None else zero_b[:, None] if zero_b.ndim else zero_b
    return {
        "matmul": m.matmul(a, b, a_spec, b_spec, zero_a, zero_b, bias, **settings),
        "linear": m.linear(a, b.T, a_spec, b_spec, zero_a, zero_w, bias, **settings),
        "pairs16": m.matmul_pairs16(bytes_a, bytes_b, pairs),
        "packed": packed,
        "unpacked": m.unpack_int4(packed, a.shape[-1], True),
        "unpacked unsigned": m.unpack_int4(packed, a.shape[-1], False),
    }


def draw_integer(index: int, codes: int) -> Configuration:
    rng, axes = stream(0, "integer", index), pick(INTEGER, index)
    a_spec, b_spec = (QuantSpec(axes[f"bits_{s}"], axes[f"signed_{s}"]) for s in "ab")
    depth = axes["depth"]
    side = max(4, int((codes / 3) ** 0.5))
    rows, columns = side, side

    def draw(spec: QuantSpec, *shape: int) -> np.ndarray:
        kind = np.int8 if spec.bits <= 8 and spec.symmetric else np.uint8 if spec.bits <= 8 else np.int32
        ends = {
            "lowest": (spec.code_min,) * 2,
            "highest": (spec.code_max,) * 2,
            "random": (spec.code_min, spec.code_max),
        }
        low, high = ends[axes["values"]]
        return rng.integers(low, high + 1, shape).astype(kind if index % 3 else np.int32)

    def zero(spec: QuantSpec, choice: str, shape: tuple[int, ...]) -> np.ndarray | None:
        if choice == "none":
            return None
        return rng.integers(spec.code_min, spec.code_max + 1, () if choice == "one" else shape).astype(np.int32)

    size = {"none": 0, "small": 1000, "large": 2**31 - 1}[axes["bias"]]
    arrays = {
        "a": draw(a_spec, *axes["batch"], rows, depth),
        "b": draw(b_spec, depth, columns),
        "zero_a": zero(a_spec, axes["zero_a"], (rows, 1)),
        "zero_b": zero(b_spec, axes["zero_b"], (columns,)),
        "bias": rng.integers(-size, size + 1, columns).astype(np.int32) if size else None,
        "bytes_a": rng.integers(0, 256, (8, depth)).astype(np.uint8),
        "bytes_b": rng.integers(-128, 128, (depth, 16)).astype(np.int8),
    }
    run = axes["pairs"] + 1 if axes["products"] is Products.RUNS16 else 1
    settings = {
        "a_spec": a_spec,
        "b_spec": b_spec,
        "pairs": axes["pairs"],
        "accumulator": axes["accumulator"],
        "rule": MatmulRule(axes["products"], run, axes["overflow"]),
        "integers": axes["integers"],
    }
    return Configuration(integer_chain, arrays, settings, axes)


GROUPS = {
    "a_bits": (2, 8, 8, 15, 16),
    "b_bits": (4, 8, 8, 16),
    "depth": (1, 7, 64, 255, 768, 1500),  # K
    "groups": (1, 2, 4, "all"),
    "spread": (1, 1000, 2**26),  # of the largest scale over the smallest
    "heads": ((), (3,)),
    "shift": (0, 1, 12, 24, 40),
    "rounding": rules.ROUNDINGS,
    "integers": (False,) * 3 + (True,),
    "too_large": (False,) * 5 + (True,),
}


def groups_chain(m, a, b, multiplier, shift, rule, a_bits, b_bits, integers):
    return {
        "product": m.product(a, b, multiplier, shift, rule, a_bits, b_bits, integers),
        "joined": m.join(a, multiplier, shift, rule),
    }


def draw_groups(index: int, codes: int) -> Configuration:
    rng, axes = stream(0, "groups", index), pick(GROUPS, index)
    depth, a_bits, b_bits = axes["depth"], axes["a_bits"], axes["b_bits"]
    rows = max(2, min(64, codes // 3 // depth))
    count = depth if axes["groups"] == "all" else min(axes["groups"], depth)
    scales = np.exp(rng.uniform(0, np.log(axes["spread"]), count))
    unit = rng.permuted(scales[np.arange(depth) * count // depth])
    a = rng.integers(-(2**a_bits), 2**a_bits + 1, (*axes["heads"], rows, depth))
    b = rng.integers(-(2**b_bits), 2**b_bits + 1, (*axes["heads"], depth, 16))
    a[..., 0, :], b[..., 0] = 2**a_bits, 2**b_bits
    multiplier = groups.channel_multiplier(unit)
    if axes["too_large"]:
        multiplier = np.full_like(multiplier, 2**30)
    arrays = {
        "a": a.astype(np.int32),
        "b": b.astype(np.int32),
        "multiplier": multiplier,
        "shift": np.array(axes["shift"], np.int64),
    }
    settings = {"rule": AddRule(axes["rounding"]), "a_bits": a_bits, "b_bits": b_bits, "integers": axes["integers"]}
    return Configuration(groups_chain, arrays, settings, axes)
