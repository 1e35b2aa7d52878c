"""Quantizers: what codes they have, where a range reaches, how it is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .base import Name, Spec, refuse
from .formats import FloatFormat, SharedScale

__all__ = [
    "FloatQuantSpec",
    "Granularity",
    "ObserverKind",
    "ObserverSpec",
    "Output",
    "Quant",
    "QuantSpec",
    "Range",
    "WIDE_BITS",
    "WIDE_ZERO",
    "check_axes",
    "check_axis",
    "is_local",
    "range_axes",
    "refuse_static",
]


WIDE_BITS = 16  # of a channel that is coded wide
WIDE_ZERO = 2 ** (WIDE_BITS - 1)  # its zero point, by which it is known


class Granularity(Name):
    """Which elements of a tensor share a scale and a zero point."""

    TENSOR = "tensor"  # one scale
    CHANNEL = "channel"  # one per channel: the last axis of an activation, the output axis of a weight, or `axis`
    TOKEN = "token"  # one per row: every axis but the last
    # `groups` groups of channels (per-embedding-group, Bondarenko et al. 2021), each of one scale; or two, by `wide`
    GROUP = "group"
    BLOCK = "block"  # one per `block` neighbours along the last axis, or `axis`


class ObserverKind(Name):
    """How the ranges of calibration batches become one."""

    CURRENT = "current"  # the last batch's minimum and maximum
    RUNNING = "running"  # momentum * old + (1 - momentum) * new minimum and maximum
    PERCENTILE = "percentile"  # two-sided, linear interpolation, over every value of all batches
    RUNNING_PERCENTILE = "running_percentile"  # each batch's two-sided percentile, with momentum
    MSE_GRID = "mse_grid"  # the range of least squared error among fractions of the extremes
    MSE_GOLDEN = "mse_golden"  # the same, the fraction in [0.01, 1] by golden section search


@dataclass(frozen=True)
class ObserverSpec(Spec):
    """How a static range is found from calibration batches."""

    kind: ObserverKind = ObserverKind.CURRENT
    momentum: float = 0.9  # weight of the old range, in [0, 1)
    percentile: float = 99.999  # in (50, 100]; the lower end is 100 minus it
    candidates: int = 100  # fractions i / candidates of the range tried by the grid
    margin: float = 0.0  # the grid's range reaches this far beyond the extremes; the published simulator has 0.5

    def check(self) -> None:
        if not 0 <= self.momentum < 1:
            refuse("observer momentum", self.momentum, "give the weight of the old range, in [0, 1)")
        if not 50 < self.percentile <= 100:
            refuse("observer percentile", self.percentile, "give a percentage in (50, 100]; the lower end mirrors it")
        if self.candidates < 2:
            refuse("observer candidates", self.candidates, "give at least 2")
        if self.margin < 0:
            refuse("observer margin", self.margin, "give a number >= 0")


def refuse_static(granularity: Granularity, dynamic: bool) -> None:
    """Raises SpecError for a static range per token or block: their number differs from one tensor to the next."""
    if granularity in (Granularity.TOKEN, Granularity.BLOCK) and not dynamic:
        refuse("quantizer granularity", str(granularity), f"a range per {granularity} is dynamic; set dynamic")


def check_axis(what: str, axis: int | None, granularity: Granularity) -> None:
    """Raises SpecError for an axis of a granularity that has none of its own."""
    if axis is not None and granularity not in (Granularity.CHANNEL, Granularity.BLOCK):
        refuse(f"{what} axis", axis, "it belongs to granularity channel or block")


@dataclass(frozen=True)
class QuantSpec(Spec):
    """A uniform quantizer: `real = scale * (code - zero_point)`.

    Codes of a symmetric quantizer are signed with zero point 0 and scale absmax / (2^(bits-1) - 1); those of an
    asymmetric one run from 0 to 2^bits - 1, or where `signed` from -2^(bits-1) to 2^(bits-1) - 1, with scale
    (high - low) / (2^bits - 1), where low <= 0 <= high. Quantizing
    divides by the scale (IEEE), rounds half to even, adds the zero point and clamps, in float32. That is profile `QTX`;
    another `Profile` may choose otherwise. A mirrored quantizer has, where low < 0, the values of a symmetric one under
    codes moved up by 2^(bits-1), and else zero point 0 and scale high / (2^bits - 1).
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Granularity = Granularity.TENSOR
    dynamic: bool = False  # the range is taken from the tensor itself, each time
    observer: ObserverSpec = ObserverSpec()  # of a static range
    learned: bool = False  # scale (and zero point) trained, Esser et al. 2020; starts from the observed range
    narrow: bool = False  # the lowest code is not used: -127..127, 1..255
    groups: int | None = None  # of GROUP; it divides the number of channels
    permute: bool = False  # GROUP: channels are sorted by high - low before they are grouped
    block: int | None = None  # elements per block of BLOCK; it divides the last axis
    outliers: float | None = None  # TOKEN: channels (last axis) with an element of this magnitude or more stay in float
    # asymmetric codes for the published simulator's symmetric quantizer, which turns unsigned where nothing is negative
    mirrored: bool = False
    axis: int | None = None  # of CHANNEL: the channels' own; of BLOCK: along which they lie; from the end if negative
    # codes from -2^(bits-1); None: those of a symmetric quantizer alone. int8 with a zero point: asymmetric and True
    signed: bool | None = None
    # GROUP, in place of groups: the channels of the largest magnitude, so many, have symmetric codes of 16 bits beside
    # the others: 0 to 65535 about WIDE_ZERO, which is no code of theirs
    wide: int | None = None

    def check(self) -> None:
        if not 2 <= self.bits <= 16:
            refuse("quantizer bits", self.bits, "give a whole number from 2 to 16")
        refuse_static(self.granularity, self.dynamic)
        grouping = "groups" if self.wide is None else "wide"
        for key, owner in ((grouping, Granularity.GROUP), ("block", Granularity.BLOCK)):
            value, needed = getattr(self, key), self.granularity is owner
            if needed and (value is None or value < 1):
                refuse(f"quantizer {key}", value, f"granularity {owner} needs a whole number, at least 1")
            if not needed and value is not None:
                refuse(f"quantizer {key}", value, f"it belongs to granularity {owner}")
        check_axis("quantizer", self.axis, self.granularity)
        if self.permute and self.granularity is not Granularity.GROUP:
            refuse("quantizer permute", True, "it belongs to granularity group")
        if self.wide is not None and self.groups is not None:
            refuse("quantizer wide", self.wide, "it stands in place of groups; give one of them")
        if self.wide is not None and (self.bits > 8 or self.permute or self.dynamic or self.mirrored):
            refuse("quantizer wide", self.wide, "its other channels have static codes of at most 8 bits, unpermuted")
        if self.learned and self.granularity is Granularity.GROUP:
            refuse("quantizer learned", True, "the channels of a group share a scale, and learning would part them")
        if self.outliers is not None and self.outliers <= 0:
            refuse("quantizer outliers", self.outliers, "give the magnitude, above 0, that makes a channel an outlier")
        if self.outliers is not None and self.granularity is not Granularity.TOKEN:
            refuse(
                "quantizer outliers", self.outliers, "channels stay in float beside dynamic ranges per token; use token"
            )
        if self.learned and self.dynamic:
            refuse("quantizer learned", True, "a dynamic range cannot be learned; choose one")
        if self.mirrored and (self.symmetric or self.narrow or self.learned):
            refuse("quantizer mirrored", True, "it belongs to an asymmetric quantizer, neither narrow nor learned")
        if self.symmetric and self.signed is False:
            refuse("quantizer signed", False, "a symmetric quantizer's codes are signed; mirrored moves them up")
        if self.mirrored and self.signed:
            refuse("quantizer signed", True, "mirrored moves a symmetric quantizer's codes up; use symmetric")

    @property
    def code_min(self) -> int:
        """The lowest code."""
        return (-(2 ** (self.bits - 1)) if self.has_sign else 0) + self.narrow

    @property
    def code_max(self) -> int:
        """The highest code."""
        return 2 ** (self.bits - 1) - 1 if self.has_sign else 2**self.bits - 1

    @property
    def has_sign(self) -> bool:
        """Whether codes may be negative."""
        return self.symmetric if self.signed is None else self.signed


@dataclass(frozen=True)
class FloatQuantSpec(Spec):
    """A quantizer to a small float: `real = scale * value`, the value nearest to x / scale, ties to even.

    A scale is float32, absmax / the format's largest finite value (1 where absmax is 0). With BLOCK it is the power of
    two of an MX block (OCP microscaling formats, 2023), by the rule `shared`.
    """

    format: FloatFormat
    saturate: bool = True  # beyond the largest value: that value; False: infinity, or NaN where there is none
    granularity: Granularity = Granularity.TENSOR
    dynamic: bool = False
    observer: ObserverSpec = ObserverSpec()
    block: int | None = None  # elements per block of BLOCK, 32 unless said otherwise; it divides the last axis
    shared: SharedScale | None = None  # of BLOCK, FLOOR unless said otherwise
    axis: int | None = None  # as in QuantSpec

    def check(self) -> None:
        blocks = self.granularity is Granularity.BLOCK
        if self.granularity is Granularity.GROUP:
            refuse("float quantizer granularity", "group", "a small float has tensor, channel, token or block")
        refuse_static(self.granularity, self.dynamic)
        check_axis("float quantizer", self.axis, self.granularity)
        if blocks and self.block is None:
            object.__setattr__(self, "block", 32)
        if blocks and self.shared is None:
            object.__setattr__(self, "shared", SharedScale.FLOOR)
        if not blocks and (self.block, self.shared) != (None, None):
            value = str(self.shared) if self.block is None else self.block
            refuse("float quantizer block or shared", value, "they belong to granularity block")
        if self.block is not None and self.block < 1:
            refuse("float quantizer block", self.block, "give a whole number, at least 1")
        if not self.saturate and (blocks or self.format is FloatFormat.E2M1):
            refuse("float quantizer saturate", False, "MX blocks and e2m1 always saturate")

    @property
    def symmetric(self) -> bool:
        """There is no zero point."""
        return True

    @property
    def learned(self) -> bool:
        """No scale of a small float is trained."""
        return False

    @property
    def outliers(self) -> None:
        """No channel stays apart."""
        return None

    @property
    def mirrored(self) -> bool:
        """Small floats have a sign."""
        return False

    @property
    def code_min(self) -> int:
        """Of the zero point, which is 0."""
        return 0

    @property
    def code_max(self) -> int:
        """Of the zero point, which is 0."""
        return 0

    @property
    def wide(self) -> None:
        """No channel has more bits than the others."""
        return None


Quant = QuantSpec | FloatQuantSpec


def check_axes(spec: Quant, ndim: int) -> None:
    """Raises ValueError where a range per part of a tensor is asked of a number, which has no axis, and for an axis
    that the tensor has not."""
    if spec.axis is not None and not -ndim <= spec.axis < ndim:
        raise ValueError(f"axis {spec.axis} of a tensor of {ndim} axes: give one from {-ndim} to {ndim - 1}")
    if ndim == 0 and spec.granularity is not Granularity.TENSOR:
        raise ValueError(f"a range per {spec.granularity} needs an axis, and the tensor is one number")


def is_local(spec: Quant) -> bool:
    """Whether no range reaches beyond a row across the last axis: per token, or per block along that axis."""
    return spec.granularity is Granularity.TOKEN or (spec.granularity is Granularity.BLOCK and spec.axis in (None, -1))


def range_axes(spec: Quant, ndim: int, weight: bool) -> tuple[int, ...]:
    """The axes that one range spans: all (tensor), all but the last (channel of an activation), the last (channel of a
    weight (..., O, I), token), or all but the spec's own. A group starts from its channels' ranges;
    `affine.scale_zero` unites them.

    Raises ValueError for blocks, and as `check_axes`.
    """
    if spec.granularity is Granularity.BLOCK:
        raise ValueError("a block spans a part of an axis; take its range with ranges()")
    check_axes(spec, ndim)
    if spec.granularity is Granularity.TENSOR:
        return tuple(range(ndim))
    if spec.axis is not None:
        return tuple(i for i in range(ndim) if i != spec.axis % ndim)
    if spec.granularity in (Granularity.CHANNEL, Granularity.GROUP) and not weight:
        return tuple(range(ndim - 1))
    return (ndim - 1,)


class Range(NamedTuple):
    """A static quantizer's state: arrays of either backend that broadcast against the tensor."""

    low: Any  # float32
    high: Any  # float32
    scale: Any  # float32
    zero_point: Any  # int32


class Output(NamedTuple):
    """What an integer model answers: real = scale * (value - zero_point), logits or hidden states."""

    value: Any  # integers
    scale: Any  # float64
    zero_point: Any
