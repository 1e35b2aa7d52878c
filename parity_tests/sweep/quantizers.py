"""From floats to codes and back: scales and affine codes, small floats and MX blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from parity_tests.sweep.configuration import BOTH, F32, Configuration, pick
from qtx_ref.quant.formats import values
from qtx_ref.quant.rounding import SMALLEST
from qtx_ref.random import stream
from qtx_ref.spec import (
    QTX,
    Beyond,
    CastRule,
    DequantizeForm,
    DequantizeRule,
    Dtype,
    FakeQuantizeRule,
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    InfinityPolicy,
    NanPolicy,
    Nudging,
    QuantizeRule,
    QuantSpec,
    Rounding,
    ScaleRule,
    SharedScale,
    SymmetricScale,
    ZeroPoint,
)

WIDTHS = (Dtype.FLOAT32, Dtype.FLOAT64, Dtype.BFLOAT16, Dtype.FLOAT16)


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
