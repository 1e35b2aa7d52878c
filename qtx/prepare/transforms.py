"""What a recipe does to a float model's parameters before and after its ranges are found: transforms and rewritten weights.

`prepare.prepare` is the way in. The arithmetic is `qtx_ref.quant.rewriting` and `qtx_ref.quant.rounding_choice`,
whichever backend ran the model; this hands them what the calibration batches show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from qtx_ref.quant import rewriting
from qtx_ref.spec import (
    InputTransform,
    ModelSpec,
    Recipe,
    TransformKind,
)

from ..recipes.transforms import choose_transforms, group_smoothed, make_left_transforms
from .calibration import measure_input_moments


def transform(
    machine: Any,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    batches: Callable[[int], Iterable[Mapping[str, Any]]],
    recipe: Recipe,
) -> tuple[dict[str, np.ndarray], dict[str, InputTransform]]:
    """The parameters made for a recipe's transforms, and those that are left to the linears' inputs."""
    chosen = choose_transforms(recipe, spec)
    blocks = {
        site: rewriting.hadamard_block(rewriting.own_weight(params, site), how.block, site)
        for site, how in chosen.items()
        if how.kind is TransformKind.HADAMARD
    }
    smoothed = [site for site in chosen if site not in blocks]
    for site in smoothed:
        rewriting.own_weight(params, site)
    params, divisors = dict(params), {}
    if smoothed:
        label = f"{recipe.name}: smooth"
        shown = measure_input_moments(
            machine.model(spec, params), batches(recipe.batches), smoothed, ("absmax",), label, recipe
        )
        absmax = {site: moments["absmax"] for site, moments in shown.items()}
        for strength, groups in group_smoothed(chosen):
            sites = [site for group in groups for site in group]
            params, found = rewriting.smooth(spec, params, absmax, strength, sites)
            divisors |= found
    return rewriting.rotate(params, blocks), make_left_transforms(recipe, spec, params, divisors)
