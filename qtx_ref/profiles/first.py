"""Profiles as qtx 0.1 and 0.2.0 wrote them, flat: what they say, in records."""

from __future__ import annotations

from typing import Any

from ..spec import SpecError

__all__ = ["fixed", "upgrade"]

FIELDS = (
    "name",
    "version",
    "rounding",
    "zero_point_before_rounding",
    "reciprocal",
    "scale_rule",
    "nudging",
    "zero_point_rounding",
    "scale_dtype",
    "arithmetic",
    "nan",
    "infinity",
    "requantization",
    "overflow",
)
SMALLEST = {"float32": 2.0**-126, "float64": 2.0**-1022, "bfloat16": 2.0**-126, "float16": 2.0**-14}


def fixed(product: str, rounding: str, *, dtype: str = "float64", bits: int = 31, left: str = "saturate") -> dict:
    """A `Fixed` as JSON."""
    return {"dtype": dtype, "bits": bits, "product": product, "rounding": rounding, "left": left, "scales": dtype}


FLOAT = {"dtype": "float32", "order": "ratio", "zero_point": "after", "beyond": "saturate"}
REQUANTIZATIONS = {
    "float32": FLOAT | {"rounding": "half_even"},
    "float_half_away": FLOAT | {"rounding": "half_away"},
    "fixed_one": fixed("exact", "half_up"),
    "fixed_two": fixed("half_up", "half_away", left="report"),
    "high_half_up": fixed("truncated", "half_up", dtype="float32"),
    "fixed_one_narrow": fixed("exact", "half_up", bits=15),
}


def upgrade(first: dict[str, Any]) -> dict[str, Any]:
    """A flat profile as a tree of records, the same arithmetic. Raises SpecError naming the first key that is missing,
    unknown or of another value than it had."""
    if not isinstance(first, dict):
        raise SpecError("a profile is an object with keys")
    for key in FIELDS:
        if key not in first:
            raise SpecError(f"missing key in Profile is {key!r}: add it")
    for key in first:
        if key not in FIELDS:
            raise SpecError(f"unknown key in Profile is {key!r}: known keys are {', '.join(FIELDS)}")
    for key, known in (("requantization", REQUANTIZATIONS), ("arithmetic", SMALLEST), ("scale_dtype", SMALLEST)):
        if not isinstance(first[key], str) or first[key] not in known:
            raise SpecError(f"Profile.{key} is {first[key]!r}: known values are {', '.join(known)}")
    after = "after_float" if first["arithmetic"] in ("bfloat16", "float16") else "after"  # elsewhere the same codes
    quantize = {
        "rounding": first["rounding"],
        "zero_point": "before" if first["zero_point_before_rounding"] else after,
        "reciprocal": first["reciprocal"],
        "arithmetic": first["arithmetic"],
        "nan": first["nan"],
        "infinity": first["infinity"],
        "beyond": "saturate",
    }
    dequantize = {"form": "difference", "arithmetic": first["arithmetic"]}
    return {
        "name": first["name"],
        "version": 2,
        "engine": first["name"],
        "path": "as its profile of version 1 has it",
        "scale": {
            "symmetric": first["scale_rule"],
            "nudging": first["nudging"],
            "zero_point_rounding": first["zero_point_rounding"],
            "dtype": first["scale_dtype"],
            "arithmetic": first["arithmetic"],
            "floor": max(SMALLEST[first["arithmetic"]], SMALLEST[first["scale_dtype"]]),
            "empty": 1.0,
        },
        "quantize": quantize,
        "fake_quantize": {"quantize": quantize, "dequantize": dequantize},
        "dequantize": dequantize,
        "matmul": {"products": "exact", "run": 1, "overflow": first["overflow"]},
        "bias": "int32",
        "requantize": REQUANTIZATIONS[first["requantization"]],
        "add": {"rounding": "half_away" if first["requantization"] == "fixed_two" else "half_up"},
        "cast": {
            "e5m2_nan": 0x7F,
            "e2m1_nan": None,
            "negative_zero": True,
            "e4m3_saturates": True,
            "e5m2_saturates": True,
        },
        "unseen": [],
    }
