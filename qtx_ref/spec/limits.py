"""What can run in integers and what cannot, and which codes an arithmetic holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NoReturn

from .base import SpecError
from .choices import Dtype, HighProduct
from .profile import Fixed, FloatProduct, Profile
from .quant import FloatQuantSpec, Granularity, Quant, QuantSpec

__all__ = ["accumulator_bits", "check_integer", "check_width", "refuse_integer"]

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

    Scales along the sum: activations per channel (but those of `value`, whose channels P V does not sum), group or
    block.
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
        if spec.granularity in (Granularity.GROUP, Granularity.BLOCK):
            refuse_integer(site, f"a scale per {spec.granularity} varies along the axis that is summed over")
        if spec.granularity is Granularity.CHANNEL and not weight and not site.endswith((".value", ".context.rhs")):
            refuse_integer(site, "a scale per channel varies along the axis that the next product sums over")
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
    if arithmetic is Dtype.FLOAT16 and spec.code_max > 65504:
        raise ValueError(f"code {spec.code_max} is infinite in float16 arithmetic; use 15 bits, or another arithmetic")


def accumulator_bits(*specs: QuantSpec | None) -> int:
    """32, or 64 where a factor has more than 8 bits (an accumulator, of which there is no spec, has 32)."""
    return 64 if any(spec is None or spec.bits > 8 for spec in specs) else 32
