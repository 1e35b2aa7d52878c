"""What can run in integers and what cannot, and which codes an arithmetic holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

from .base import SpecError
from .choices import Dtype, HighProduct
from .profile import Fixed, FloatProduct, Profile
from .quant import WIDE_BITS, FloatQuantSpec, Granularity, Quant, QuantSpec

__all__ = ["accumulator_bits", "check_integer", "check_width", "refuse_integer"]

KEYS = (".scores", ".probs", ".context.lhs")
HEADS = (".query", ".key", ".value", ".scores.lhs", ".scores.rhs", ".context.rhs")  # what products of activations take
TABLES = ("embed.token.weight", "embed.type.weight", "embed.position.weight")


def refuse_integer(site: str, reason: str) -> NoReturn:
    """Raises SpecError: the site cannot run in integers, for that reason."""
    raise SpecError(f"site {site} cannot run in integers: {reason}")


def check_integer(
    quants: Mapping[str, Quant],
    profile: Profile,
    *,
    strict: bool = False,
    transforms: Iterable[str] = (),
) -> None:
    """Raises SpecError naming the first site that cannot run in integers, or under `strict` needs a float.

    transforms: the linears at whose input a transform is left, which no norm has taken in.

    A static scale per channel or group is one accumulator for each scale, and their weighted sum; per block there is
    one for every tensor anew.
    """
    rule = profile.requantize
    if strict and isinstance(rule, FloatProduct):
        raise SpecError(
            f"profile {profile.name} requantizes by {rule.dtype}, a float: strict needs qtx, tflite or gemmlowp"
        )
    for site in transforms:
        refuse_integer(site, "a transform of its input is left, which is computed in float: fold it, or leave it out")
    for site, spec in quants.items():
        weight = site.endswith(".weight")
        if isinstance(spec, FloatQuantSpec):
            refuse_integer(site, f"{spec.format} is a float format")
        if spec.outliers is not None:
            refuse_integer(site, "its outlier channels stay in float")
        if spec.axis is not None:
            refuse_integer(site, f"its channels are named by axis, {spec.axis}: leave it out for the operand's own")
        if spec.granularity is Granularity.BLOCK:
            refuse_integer(site, "a scale per block varies along the axis that is summed over")
        if spec.granularity is Granularity.GROUP and weight:
            refuse_integer(site, "a weight's outputs are in groups: give each a scale of its own, channel")
        if spec.granularity in (Granularity.GROUP, Granularity.CHANNEL) and site.endswith(KEYS):
            refuse_integer(site, f"its last axis is the keys, which have no scale per {spec.granularity}")
        if spec.wide is not None and site.endswith(HEADS):
            refuse_integer(site, "a product of activations takes codes of one width: leave wide out")
        if spec.dynamic and not weight:
            if strict:
                refuse_integer(site, "its scale is taken from the data, in floats: strict needs a static range")
            if spec.granularity is not Granularity.TOKEN:
                refuse_integer(
                    site, f"a dynamic range per {spec.granularity} spans tokens: use a static range, or one per token"
                )
        if strict and spec.granularity is not Granularity.TENSOR and site in TABLES:
            refuse_integer(site, "a scale per row would have to be looked up in floats: strict needs one per tensor")
        if spec.bits > 8 and isinstance(rule, Fixed) and rule.product is not HighProduct.EXACT:
            kind = f"high product, {rule.product},"
            refuse_integer(site, f"{spec.bits} bits need 64-bit accumulators, which {profile.name}'s {kind} has not")


def check_width(spec: QuantSpec, arithmetic: Dtype) -> None:
    """Raises ValueError where the arithmetic cannot hold the codes: float16 ends at 65504."""
    largest = spec.code_max if spec.wide is None else 2**WIDE_BITS - 1
    if arithmetic is Dtype.FLOAT16 and largest > 65504:
        raise ValueError(f"code {largest} is infinite in float16 arithmetic; use 15 bits, or another arithmetic")


def accumulator_bits(*specs: QuantSpec | None) -> int:
    """32, or 64 where a factor has more than 8 bits (an accumulator, of which there is no spec, has 32)."""
    return 64 if any(spec is None or spec.bits > 8 for spec in specs) else 32
