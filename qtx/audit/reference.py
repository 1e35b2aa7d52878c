"""What a profile says of one call of an engine's path: the same values in, by `qtx_ref`, the same names out.

Names and shapes are those of `engines.paths.OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qtx_ref.integer import fixed_point, float_product, products
from qtx_ref.quant import affine, formats
from qtx_ref.quant.rounding import round_dtype
from qtx_ref.spec import Bias, Dtype, Fixed, FloatFormat, Profile, QuantSpec, SharedScale

from .vectors_numbers import is_float, limits

__all__ = ["EVALUATED", "evaluate", "make_spec"]

Values = Mapping[str, Any]
Results = dict[str, np.ndarray]


def make_spec(code_min: int, code_max: int) -> QuantSpec:
    """The quantizer of codes from code_min to code_max."""
    return QuantSpec((code_max - code_min).bit_length(), symmetric=False, signed=code_min < 0)


def spread(values: Values, name: str, of: str) -> np.ndarray:
    """A scale or zero point in a shape that broadcasts against values[of]: one, or along `axis`."""
    value = np.asarray(values[name])
    if "axis" not in values or value.ndim == 0:
        return value
    shape = [1] * np.ndim(values[of])
    shape[values["axis"]] = -1
    return value.reshape(shape)


def narrow(rule: Any, values: Values) -> Any:
    """A rule that works in the dtype of x: of bfloat16, which NumPy has not, it says so itself."""
    if values.get("x_dtype") == "bfloat16" and rule.arithmetic is Dtype.INPUT:
        return replace(rule, arithmetic=Dtype.BFLOAT16)
    return rule


def quantize(profile: Profile, values: Values) -> Results:
    """Codes, of integers or of a small float."""
    scale, rule = spread(values, "scale", "x"), narrow(profile.quantize, values)
    if is_float(values["dtype"]):
        x = values["x"]
        with np.errstate(all="ignore"):
            level = round_dtype(x.astype(np.float32) / scale, affine.working_dtype(rule.arithmetic, x))
        if values["dtype"] == FloatFormat.E2M1:  # here ONNX adds the zero point, +0, which makes -0 a 0
            level = level + np.float32(0)
        return {"code": formats.encode(level, FloatFormat(values["dtype"]), rule=profile.cast)}
    spec = make_spec(*limits(values["dtype"]))
    return {"code": affine.quantize(values["x"], scale, spread(values, "zero_point", "x"), spec, rule)}


def dequantize(profile: Profile, values: Values) -> Results:
    """Real numbers, of a bfloat16 scale cast to that by a rule that goes by the scale's dtype."""
    scale, zero, rule = spread(values, "scale", "code"), spread(values, "zero_point", "code"), profile.dequantize
    y = affine.dequantize(values["code"], scale, zero, rule)
    cast = values.get("x_dtype") == "bfloat16" and rule.arithmetic is Dtype.INPUT
    return {"y": round_dtype(y, Dtype.BFLOAT16) if cast else y}


def fake_quantize(profile: Profile, values: Values) -> Results:
    """Real numbers in the dtype of x."""
    rule = profile.fake_quantize
    rule = replace(rule, quantize=narrow(rule.quantize, values), dequantize=narrow(rule.dequantize, values))
    spec = make_spec(values["code_min"], values["code_max"])
    scale, zero = spread(values, "scale", "x"), spread(values, "zero_point", "x")
    y = affine.fake_quantize(values["x"], scale, zero, spec, rule)[0]
    return {"y": round_dtype(y, Dtype.BFLOAT16) if values.get("x_dtype") == "bfloat16" else y}


def scale(profile: Profile, values: Values) -> Results:
    """Scale and zero point of each range."""
    spec = make_spec(*limits(values["dtype"]))
    step, zero = affine.scale_zero(values["low"], values["high"], spec, profile.scale)
    return {"scale": step, "zero_point": zero}


def matmul(profile: Profile, values: Values) -> Results:
    """Accumulators."""
    return {"accumulator": accumulate(profile, values, None)}


def accumulate(profile: Profile, values: Values, bias: np.ndarray | None) -> np.ndarray:
    """Accumulators of x (N, I) and w (I, O), of 64 bits where x has 16, with a bias of integers."""
    x, w = values["x"], values["w"]
    x_spec, w_spec = (make_spec(*limits(str(codes.dtype))) for codes in (x, w))
    x_zero, w_zero = (np.asarray(values[name], np.int64) for name in ("x_zero", "w_zero"))
    width = 64 if x.dtype.itemsize > 1 else 32
    return products.matmul(x, w, x_spec, w_spec, x_zero, w_zero, bias, width, profile.matmul)


def linear(profile: Profile, values: Values) -> Results:
    """Codes of y."""
    rule, place, bias = profile.requantize, profile.bias, values.get("bias")
    x_scale, w_scale, y_scale = (np.asarray(values[f"{name}_scale"]) for name in "xwy")
    total = accumulate(profile, values, bias if place is Bias.INT32 else None)
    real = fixed_point.real_multiplier(x_scale, w_scale, y_scale, rule)
    spec = make_spec(*limits(str(np.asarray(values["y_zero"]).dtype)))
    y_zero = np.asarray(values["y_zero"], np.int32)
    if bias is None or place is Bias.INT32:
        return {"y": fixed_point.requantize(total, real, y_zero, spec, rule)}
    if isinstance(rule, Fixed):
        raise ValueError(f"bias is {place}, and a requantization in integers adds none")
    scaled = float_product.scale_bias(bias, x_scale * w_scale, y_scale, rule, place)
    return {"y": fixed_point.requantize(total, real, y_zero, spec, rule, scaled, place)}


def cast(profile: Profile, values: Values) -> Results:
    """Codes of a small float."""
    return {"code": formats.encode(values["x"], FloatFormat(values["format"]), rule=profile.cast)}


def mx(profile: Profile, values: Values) -> Results:
    """Scales and codes of blocks, by the rule for a scale that the path names."""
    scales, code = formats.mx_quantize(
        values["x"], FloatFormat(values["format"]), SharedScale(values["shared"]), cast=profile.cast
    )
    return {"scale": scales, "code": code}


EVALUATED: dict[str, Callable[[Profile, Values], Results]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "fake_quantize": fake_quantize,
    "scale": scale,
    "matmul": matmul,
    "linear": linear,
    "cast": cast,
    "mx": mx,
}


def evaluate(profile: Profile, op: str, values: Values) -> Results:
    """What the profile says. Raises ValueError for what it refuses."""
    return EVALUATED[op](profile, values)
