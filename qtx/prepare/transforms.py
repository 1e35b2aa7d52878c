"""What a recipe does to a float model's parameters before and after its ranges are found: transforms and rewritten
weights.

`prepare.prepare` is the way in. The arithmetic is `qtx_ref.quant.rewriting` and `qtx_ref.quant.rounding_choice`,
whichever backend ran the model; this hands them what the calibration batches show.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qtx_ref.quant import rewriting
from qtx_ref.spec import InputTransform, ModelSpec, Recipe, TransformKind

from ..engines.machine import Machine
from ..engines.protocols import Arrays, Batches
from ..recipes.transforms import choose_transforms, group_smoothed, make_left_transforms
from .calibration import measure_input_moments


def transform(
    machine: Machine,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    batches: Batches,
    recipe: Recipe,
) -> tuple[Arrays, dict[str, InputTransform]]:
    """The parameters made for a recipe's transforms, and those that are left to the linears' inputs.

    Raises SpecError for a block that does not divide a width, a linear without a weight of its own, and inputs that are
    not finite.
    """
    chosen = choose_transforms(recipe, spec)
    blocks = {
        site: rewriting.hadamard_block(rewriting.own_weight(params, site), how.block, site)
        for site, how in chosen.items()
        if how.kind is TransformKind.HADAMARD
    }
    smoothed = [site for site in chosen if site not in blocks]
    for site in smoothed:
        rewriting.own_weight(params, site)
    made = dict(params)
    divisors: Arrays = {}
    if smoothed:
        label = f"{recipe.name}: smooth"
        model = machine.model(spec, made)
        inputs = measure_input_moments(model, batches(recipe.batches), smoothed, ("absmax",), label, recipe)
        absmax = {site: moments["absmax"] for site, moments in inputs.items()}
        for strength, groups in group_smoothed(chosen):
            sites = [site for group in groups for site in group]
            made, more = rewriting.smooth(spec, made, absmax, strength, sites)
            divisors |= more
    return rewriting.rotate(made, blocks), make_left_transforms(recipe, spec, made, divisors)
