"""Random configurations of the integer arithmetic, and the chain of calls that each puts through a backend.

A chain takes the backend's module (`qtx_ref.quant.affine` or `qtx_torch.quant.affine`, ...): functions and parameters
have the same names. `DRAWS[module](index, codes)` draws configuration `index`: each axis goes through all its values,
in an order of its own, before it repeats one, so n configurations meet every value of every axis with at most n values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parity_tests.subjects import rules
from qtx_ref.integer import groups
from qtx_ref.quant.formats import values
from qtx_ref.quant.rounding import SMALLEST
from qtx_ref.random import stream
from qtx_ref.spec import (
    QTX,
    AddRule,
    Beyond,
    Bias,
    CastRule,
    DequantizeForm,
    DequantizeRule,
    Dtype,
    FakeQuantizeRule,
    Fixed,
    FloatFormat,
    FloatProduct,
    FloatQuantSpec,
    Granularity,
    HighProduct,
    InfinityPolicy,
    LeftShift,
    MatmulRule,
    NanPolicy,
    Nudging,
    Order,
    Overflow,
    Products,
    QuantizeRule,
    QuantSpec,
    Rounding,
    ScaleRule,
    SharedScale,
    SymmetricScale,
    ZeroPoint,
)

BOTH = (False, True)
F32 = np.float32
WIDTHS = (Dtype.FLOAT32, Dtype.FLOAT64, Dtype.BFLOAT16, Dtype.FLOAT16)


@dataclass(frozen=True)
class Configuration:
    """chain(module, **arrays, **settings) -> named results. `axes` says what was drawn."""

    chain: Callable[..., dict[str, Any]]
    arrays: dict[str, np.ndarray | None]
    settings: dict[str, Any]
    axes: dict[str, Any]


def pick(axes: dict[str, tuple], index: int) -> dict[str, Any]:
    """One value per axis for configuration `index`."""
    return {
        name: values[stream(0, "axis", name, index // len(values)).permutation(len(values))[index % len(values)]]
        for name, values in axes.items()
    }


def neighbours(x: np.ndarray) -> np.ndarray:
    """x and the next float32 on either side."""
    x = x.astype(F32).ravel()
    return np.concatenate([x, np.nextafter(x, F32(np.inf)), np.nextafter(x, F32(-np.inf))])


def powers_of_two() -> np.ndarray:
    """Every power of two in float32, subnormal ones too, both signs."""
    power = np.ldexp(F32(1), np.arange(-149, 128)).astype(F32)
    return np.concatenate([power, -power])


AFFINE = {
    "rounding": tuple(Rounding),
    "zero_point": tuple(ZeroPoint),
    "reciprocal": BOTH,
    "scale_rule": tuple(SymmetricScale),
    "nudging": tuple(Nudging),
    "zero_point_rounding": tuple(r for r in Rounding if r is not Rounding.STOCHASTIC),
    "scale_dtype": WIDTHS,
    "scale_arithmetic": WIDTHS,
    "arithmetic": tuple(Dtype),
    "input": (np.float32, np.float32, np.float16),
    "floor": ("smallest", "subnormal", "eps"),
    "empty": (1.0, 1 / 255),
    "form": tuple(DequantizeForm),
    "dequantized": tuple(Dtype),
    "nan": tuple(NanPolicy),
    "infinity": tuple(InfinityPolicy),
    "beyond": tuple(Beyond),
    "bits": tuple(range(2, 17)),
    "symmetric": BOTH,
    "signed": BOTH,
    "narrow": BOTH,
    "granularity": (*Granularity, "permuted", "wide"),
    "axis": (None, None, 0, 1, -1, -2),  # of channels and blocks
    "weight": BOTH,
    "size": (1e-3, 1.0, 30.0),  # standard deviation
    "broken": (False,) * 9 + (True,),  # NaN and infinity even where the profile raises
}


def affine_chain(m, x, special, scale, zero, words, special_words, spec, profile, weight):
    """Dynamic: range, scale, codes and values of x. Static: `special`, by a scale it holds ties of."""
    low, high = m.ranges(x, spec, weight)
    got, point = m.scale_zero(low, high, spec, profile.scale)
    codes = m.quantize(x, got, point, spec, profile.quantize, words)
    fake, inside = m.fake_quantize(x, got, point, spec, profile.fake_quantize, words)
    static = m.quantize(special, scale, zero, spec, profile.quantize, special_words)
    fake_static, inside_static = m.fake_quantize(special, scale, zero, spec, profile.fake_quantize, special_words)
    return {
        "low": low + 0.0,  # the sign of a zero end is that of whichever zero came last, and nothing reads it
        "high": high + 0.0,
        "scale": got,
        "zero_point": point,
        "codes": codes,
        "reported": m.quantize_reporting(special, scale, zero, spec, profile.quantize, special_words),
        "dequantized": m.dequantize(codes, got, point, profile.dequantize),
        "fake": fake,
        "inside": inside,
        "static": static,
        "fake_static": fake_static,
        "inside_static": inside_static,
    }


def draw_affine(index: int, codes: int) -> Configuration:
    rng, axes = stream(0, "affine", index), pick(AFFINE, index)
    fields = {k: v for k, v in axes.items() if k in QTX.quantize.__dataclass_fields__}
    if axes["zero_point"] is ZeroPoint.FUSED:
        fields |= {"reciprocal": True, "arithmetic": Dtype.FLOAT32}
    quantize, dequantize = QuantizeRule(**fields), DequantizeRule(axes["form"], axes["dequantized"])
    half = axes["input"] is np.float16 and quantize.arithmetic is Dtype.INPUT
    widths = [axes["scale_dtype"], axes["scale_arithmetic"], quantize.arithmetic, dequantize.arithmetic]
    smallest = max(SMALLEST.get(one, SMALLEST[Dtype.FLOAT16 if half else Dtype.FLOAT32]) for one in widths)
    subnormal = set(widths) <= {Dtype.FLOAT32, Dtype.FLOAT64} and not quantize.reciprocal
    floors = {"smallest": smallest, "subnormal": 2.0**-149 if subnormal else smallest, "eps": max(2.0**-23, smallest)}
    made = ScaleRule(
        axes["scale_rule"],
        axes["nudging"],
        axes["zero_point_rounding"],
        axes["scale_dtype"],
        axes["scale_arithmetic"],
        floor=floors[axes["floor"]],
        empty=axes["empty"],
    )
    fake = FakeQuantizeRule(quantize, dequantize)
    profile = replace(QTX, name="drawn", scale=made, quantize=quantize, fake_quantize=fake, dequantize=dequantize)
    permuted, wide = (axes["granularity"] == name for name in ("permuted", "wide"))
    kind = Granularity.GROUP if permuted or wide else axes["granularity"]
    groups, block = (4 if kind is Granularity.GROUP and not wide else None), (4 if kind is Granularity.BLOCK else None)
    spec = QuantSpec(
        min(axes["bits"], 8) if wide else axes["bits"],
        axes["symmetric"],
        kind,
        dynamic=kind in (Granularity.TOKEN, Granularity.BLOCK),
        narrow=axes["narrow"],
        groups=groups,
        permute=permuted,
        block=block,
        signed=True if axes["symmetric"] else axes["signed"],
        axis=axes["axis"] if kind in (Granularity.CHANNEL, Granularity.BLOCK) else None,
        wide=3 if wide else None,
    )
    width = 64
    x = (rng.standard_normal((max(8, codes // 8 // width // 4 * 4), width)) * axes["size"]).astype(F32)
    x[1], x[2] = 0, x[2] * F32(2.0**-140)  # an all-zero row, a subnormal one
    x[:, 5] *= 50  # an outlier channel
    x[3] = np.abs(x[3])
    scale = F32(2.0 ** rng.integers(-6, 3)) if index % 2 else F32(rng.uniform(0.01, 1))
    if half or Dtype.FLOAT16 in widths:
        scale = np.float16(scale).astype(F32)
    zero = np.int32(0 if spec.symmetric else rng.integers(spec.code_min, spec.code_max + 1))
    steps = rng.integers(-spec.code_max, spec.code_max + 1, 300)
    special = np.concatenate([neighbours((steps + 0.5) * scale), neighbours(powers_of_two()), x.ravel()[:64]])
    limits = F32([0, -0.0, 3.4028235e38, -3.4028235e38])
    if axes["broken"] or (quantize.nan is not NanPolicy.RAISE and quantize.infinity is not InfinityPolicy.RAISE):
        limits = np.append(limits, F32([np.inf, -np.inf, np.nan]))
    special = np.concatenate([special, limits])
    draw = {"words": rng.integers(0, 2**32, x.shape), "special_words": rng.integers(0, 2**32, special.shape)}
    if axes["input"] is np.float16:  # its own infinity for infinity alone
        special = np.where(np.isfinite(special), np.clip(special, -65504, 65504), special)
    x, special = x.astype(axes["input"]), special.astype(axes["input"])
    arrays = {"x": x, "special": special, "scale": np.array(scale), "zero": np.array(zero), **draw}
    return Configuration(affine_chain, arrays, {"spec": spec, "profile": profile, "weight": axes["weight"]}, axes)


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


FORMATS = {
    "kind": tuple(FloatFormat),
    "saturate": BOTH,
    "rule": tuple(SharedScale),
    "block": (1, 8, 16, 32),
    "data": ("bits", "ties", "normal", "zero blocks"),
    "broken": (False, False, True),
    "e5m2_nan": (0x7F, 0x7E),
    "e2m1_nan": (None, 8, 8, 3),
    "negative_zero": BOTH,
    "e4m3_saturates": BOTH,
    "e5m2_saturates": BOTH,
}


def formats_chain(m, x, given, ends, kind, saturate, rule, block, cast):
    code = m.encode(x, kind, None, None, cast)
    scale, elements = m.mx_quantize(x, kind, rule, block, cast)
    return {
        "codes": code,
        "saturated": m.encode(x, kind, saturate, None, cast),
        "decoded": m.decode(code, kind),
        "fake": m.fake_quantize(x, kind, saturate, None, cast),
        "scale": m.scale_zero(ends[0], ends[1], FloatQuantSpec(kind)),
        "scaled": m.fake_quantize(x, kind, saturate, given, cast),
        "mx scale": scale,
        "mx codes": elements,
        "mx decoded": m.mx_dequantize(scale, elements, kind),
        "mx fake": m.mx_fake_quantize(x, kind, rule, block, cast),
    }


def draw_formats(index: int, codes: int) -> Configuration:
    rng, axes = stream(0, "formats", index), pick(FORMATS, index)
    count = max(4, codes // 9 // 64)
    x = (rng.standard_normal((count, 64)) * 2.0 ** rng.integers(-20, 20, (count, 1))).astype(F32)
    if axes["data"] == "bits":
        x = rng.integers(0, 2**32, x.shape, dtype=np.uint32).view(F32)
    elif axes["data"] == "ties":
        known = np.sort(values(axes["kind"])[np.isfinite(values(axes["kind"]))])
        pool = np.concatenate(
            [neighbours(known), neighbours((known[1:] + known[:-1]) / 2), neighbours(powers_of_two())]
        )
        x = rng.choice(pool, x.shape)
    elif axes["data"] == "zero blocks":
        x[::2] = rng.choice(F32([0, -0.0]), x[::2].shape)
    if axes["broken"]:
        x.ravel()[rng.integers(0, x.size, 9)] = rng.choice(F32([np.inf, -np.inf, np.nan]), 9)
    else:
        x = np.where(np.isfinite(x), x, F32(1))
    settings = {key: axes[key] for key in ("kind", "saturate", "rule", "block")}
    settings["cast"] = CastRule(**{field: axes[field] for field in QTX.cast.__dataclass_fields__})
    given = F32(2.0 ** rng.integers(-140, 120, (count, 1))) if index % 2 else F32(rng.uniform(0.01, 1, (count, 1)))
    ends = np.sort(rng.standard_normal((2, count)) * 2.0 ** rng.integers(-150, 100, count), axis=0).astype(F32)
    ends[:, 0] = 0
    return Configuration(formats_chain, {"x": x, "given": given, "ends": ends}, settings, axes)


# where each module is, in either backend
MODULES = {
    "affine": "quant.affine",
    "fixed_point": "integer.fixed_point",
    "integer": "integer.products",
    "formats": "quant.formats",
    "groups": "integer.groups",
    "rounding": "quant.rounding",
}
DRAWS = {
    "affine": draw_affine,
    "fixed_point": draw_fixed,
    "integer": draw_integer,
    "formats": draw_formats,
    "groups": draw_groups,
}
