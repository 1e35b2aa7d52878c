"""Which constants the artifact of a model must hold, and what each may be: whatever a file says, `lower` says first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from math import prod

import numpy as np

from qtx_ref.backend import Model
from qtx_ref.integer.lowering import lower
from qtx_ref.models.initial import shapes
from qtx_ref.quant.affine import code_limits, scale_zero
from qtx_ref.random import stream
from qtx_ref.spec import (
    WIDE_ZERO,
    Granularity,
    ModelSpec,
    Nonlinear,
    Profile,
    QuantSpec,
    Range,
    Recipe,
    SpecError,
)

from ..recipes.named import resolve_integers
from ..recipes.sites import narrow_widths, shorten_inputs

LARGEST = {"channel_multiplier": 2**24, "channel_shift": 62}  # of the largest scale; bits an int64 has to shift out
Constants = Mapping[str, np.ndarray]
SPREADS = (1.0, 4.0, 0.1)  # of the small model's parameters: few bits refuse what is large, many what is small
NOT_NEGATIVE = ("multiplier", "input_multiplier", "channel_multiplier", "channel_shift", "eps", "zeta", "sink_factor")


def check_size(spec: ModelSpec, constants: Constants) -> None:
    """Raises ValueError naming the first parameter that is missing or of another shape, before anything as large as the
    spec says is made. The last axis may be packed, two codes to a byte."""
    layers = len({name.split(".")[1] for name in constants if name.startswith("layer.") and name.count(".") > 1})
    if layers != spec.layers:
        raise ValueError(f"it has the constants of {layers} layers; its model has {spec.layers}")
    for name, shape in shapes(spec).items():
        if name not in constants:
            raise ValueError(f"constant {name} is missing")
        given = constants[name].shape
        if given != shape and given != (*shape[:-1], -(-shape[-1] // 2)):
            raise ValueError(f"constant {name} has shape {given}; this model's is {shape}")


def check_constants(
    spec: ModelSpec, recipe: Recipe, profile: Profile, nonlinear: Nonlinear, constants: Constants
) -> None:
    """Raises ValueError naming the first constant that is missing, unknown, or of another dtype, shape or range than
    this model's can have."""
    expected, axes = list_expected(spec, recipe, profile, nonlinear)
    quants, parameters = resolve_integers(recipe, spec), shapes(spec)
    for name, (dtype, shape) in expected.items():
        if name not in constants:
            raise ValueError(f"constant {name} is missing")
        value = constants[name]
        wide = name.endswith(".bias") and {value.dtype, dtype} == {np.dtype(np.int32), np.dtype(np.int64)}
        if value.dtype != dtype and not wide:  # a bias is int64 where int32 does not hold it
            raise ValueError(f"constant {name} is {value.dtype}; this model's is {dtype}")
        if name in parameters:
            fits = value.shape == parameters[name]
        elif name.endswith(".probs.table"):  # as long as its scores' scale is small
            fits = value.ndim == 1 and value.size > 0
        elif name.endswith(".table") and len(shape) == 2:  # as many rows as combinations of scales
            fits = value.ndim == 2 and value.size > 0 and value.shape[1] == shape[1]
        else:
            single = value.ndim == 0 and not name.endswith(".channel_multiplier")  # stands for a single channel
            fits = single or (
                value.ndim == len(shape)
                and all(now == was or now in axes.get(was, ()) for now, was in zip(value.shape, shape, strict=True))
            )
        if not fits:
            raise ValueError(f"constant {name} has shape {value.shape}, which is none of this model's")
        check_values(name, value, quants, constants)
    for name in constants:
        if name not in expected:
            raise ValueError(f"constant {name} is unknown: this model has none of that name")


def check_values(name: str, value: np.ndarray, quants: Mapping[str, QuantSpec], constants: Constants) -> None:
    """Raises ValueError where floats are not finite, scales not positive, multipliers and other factors negative, or
    codes and zero points not among their quantizer's."""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"constant {name} holds NaN or infinity")
    site, _, kind = name.rpartition(".")
    if kind == "row" and not ((value >= 0) & (value < len(constants[f"{site}.table"]))).all():
        raise ValueError(f"constant {name} holds what is no row of the table")
    if kind in ("scale", "channel_unit") and not (value > 0).all():
        raise ValueError(f"constant {name} is not positive")
    if (kind in NOT_NEGATIVE or name.endswith(".probs.table")) and not (value >= 0).all():
        raise ValueError(f"constant {name} is negative")
    if kind in LARGEST and value.max() > LARGEST[kind]:
        raise ValueError(f"constant {name} is {value.max()}: give 0 to {LARGEST[kind]}")
    if kind == "zero_point" and (own := quants.get(site)) and own.granularity is Granularity.GROUP:
        check_groups(site, value, constants[f"{site}.scale"], own)
    quant = quants.get(name)  # of a weight
    if quant is None and (kind == "zero_point" or (kind == "table" and not site.endswith(".probs"))):
        quant = quants.get(site)
    if quant is None and f"{name}.zero_point" in constants:  # a parameter in the codes of a site's tensor
        quant = quants.get(site)
    if quant is None:
        return
    zero = value if kind == "zero_point" else constants[f"{site if kind == 'table' else name}.zero_point"]
    low, high = code_limits(zero, quant)
    if kind == "table":  # whose rows are of several channels
        low, high = np.min(low), np.max(high)
    if not ((low <= value) & (value <= high)).all():
        raise ValueError(f"constant {name} holds what is no code from {np.min(low)} to {np.max(high)}")


def check_groups(site: str, zero_point: np.ndarray, scale: np.ndarray, quant: QuantSpec) -> None:
    """Raises ValueError where the channels' scales and zero points are not those of as many groups, or wide channels,
    as the quantizer says."""
    zero, unit = np.broadcast_arrays(zero_point.reshape(-1), scale.reshape(-1))
    order = np.lexsort((zero, unit)) if quant.permute else np.arange(zero.size)
    if quant.wide is None:
        count = quant.groups or 1
        parts, what, counted = np.array_split(order, count), f"{count} groups", zero.size % count == 0
    else:
        parts, what = [order[zero == WIDE_ZERO], order[zero != WIDE_ZERO]], f"{quant.wide} wide channels and the others"
        counted = parts[0].size == quant.wide
    if not counted or any(np.unique(x[part]).size > 1 for part in parts for x in (zero, unit)):
        raise ValueError(f"constant {site}.zero_point, or its scale, is not that of {what}")


@cache
def list_expected(
    spec: ModelSpec, recipe: Recipe, profile: Profile, nonlinear: Nonlinear
) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...]]], dict[int, set[int]]]:
    """Dtype and shape of every constant of a small model of the same structure, lowered; and what the lengths of its
    axes may be in this one."""
    small, batch = shorten_inputs(narrow_widths(spec, 8))  # so that no axis but a single head's has length 1
    quants = {site: make_small(quant) for site, quant in resolve_integers(recipe, spec).items()}
    for spread in SPREADS:
        params = {name: draw_parameter(name, shape, spread) for name, shape in shapes(small).items()}
        narrow = Model(small, params).calibrate([batch], quants)
        ranges = {site: widen_to_one(one, quants[site]) for site, one in narrow.items()}
        try:
            constants = lower(small, params, quants, ranges, profile, nonlinear)
            break
        except SpecError:  # of these values, or of any?
            if spread == SPREADS[-1]:
                raise
    axes: dict[int, set[int]] = {small.head_width: {spec.head_width}}
    for was, now in zip(shapes(small).values(), shapes(spec).values(), strict=True):
        for short, long in zip((*was, prod(was[:-1])), (*now, prod(now[:-1])), strict=True):  # axes, and all channels
            axes.setdefault(short, set()).add(long)
    return {name: (value.dtype, value.shape) for name, value in constants.items()}, axes


def make_small(quant: QuantSpec) -> QuantSpec:
    """The quantizer with as few groups or wide channels as a small model has; constants have the same shapes."""
    if quant.granularity is not Granularity.GROUP:
        return quant
    return replace(quant, wide=1) if quant.wide is not None else replace(quant, groups=1, permute=False)


def widen_to_one(narrow: Range, quant: QuantSpec) -> Range:
    """A range that holds 1, so that its scale is not too fine for anything."""
    high = np.maximum(narrow.high, 1).astype(narrow.high.dtype)
    return Range(narrow.low, high, *scale_zero(narrow.low, high, quant))


def draw_parameter(name: str, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """A parameter of the small model."""
    if name.endswith(".sink"):
        return np.zeros(shape, np.float32)
    middle = 1 if name.endswith("norm.weight") else 0
    return stream(0, "pattern", name).normal(middle, spread, shape).astype(np.float32)
