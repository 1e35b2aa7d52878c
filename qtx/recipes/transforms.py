"""Which linears' inputs a recipe transforms, and which transforms no norm takes in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from qtx_ref.quant import rewriting
from qtx_ref.spec import InputTransform, ModelSpec, Recipe, SpecError, Transform, TransformKind

from .sites import linears


def choose_transforms(recipe: Recipe, spec: ModelSpec) -> dict[str, Transform]:
    """The transform of each linear that the recipe gives one. Raises SpecError where `transforms` match no linear."""
    chosen = {site: how for site in linears(spec) if (how := recipe.transform(site)) is not None}
    if recipe.transforms and not chosen:
        raise SpecError(f"recipe {recipe.name} transforms no linear of this model: see `qtx recipes` for site names")
    return chosen


def group_smoothed(chosen: Mapping[str, Transform]) -> Iterator[tuple[float, list[tuple[str, ...]]]]:
    """Each migration strength with the groups of linears that share a divisor under it."""
    smoothed = {
        site: how.strength
        for site, how in chosen.items()
        if how.kind is TransformKind.SMOOTH and how.strength is not None  # which such a transform has
    }
    for strength in sorted(set(smoothed.values())):
        yield strength, rewriting.group_by_input([site for site in smoothed if smoothed[site] == strength])


def list_left_transforms(recipe: Recipe, spec: ModelSpec) -> dict[str, Transform]:
    """The linears at whose input a transform is left: rotations, and divisors that no norm takes in."""
    chosen = choose_transforms(recipe, spec)
    folded = {
        site
        for _, groups in group_smoothed(chosen)
        for group in groups
        if rewriting.feeding_norm(spec, group) is not None
        for site in group
    }
    return {site: how for site, how in chosen.items() if site not in folded}


def make_left_transforms(
    recipe: Recipe, spec: ModelSpec, params: Mapping[str, np.ndarray], divisors: Mapping[str, np.ndarray]
) -> dict[str, InputTransform]:
    """What is done at the sites of `list_left_transforms`.

    Raises SpecError for a block that does not divide a width, and a linear without a weight of its own.
    """
    return {
        site: InputTransform(divisors[site], 0)
        if how.kind is TransformKind.SMOOTH
        else InputTransform(None, rewriting.hadamard_block(rewriting.own_weight(params, site), how.block, site))
        for site, how in list_left_transforms(recipe, spec).items()
    }
