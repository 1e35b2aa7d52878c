"""What a recipe does to a float model's parameters before and after its ranges are found: transforms and rewritten weights.

`quantization.prepare` is the way in. The arithmetic is `qtx_ref.quant.rewriting` and `qtx_ref.quant.rounding_choice`,
whichever backend ran the model; this hands them what the calibration batches show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qtx_ref.quant import rewriting, rounding_choice
from qtx_ref.spec import (
    InputTransform,
    ModelSpec,
    Quant,
    Range,
    Recipe,
    Rewrite,
    SpecError,
    Transform,
    TransformKind,
)

from ..progress import Progress
from ..recipes.sites import linears

GRAM_ELEMENTS = 2**26  # of Gram matrices held at a time, 8 bytes each


def chosen_transforms(recipe: Recipe, spec: ModelSpec) -> dict[str, Transform]:
    """The transform of each linear that the recipe gives one. Raises SpecError where `transforms` match no linear."""
    found = {site: how for site in linears(spec) if (how := recipe.transform(site)) is not None}
    if recipe.transforms and not found:
        raise SpecError(f"recipe {recipe.name} transforms no linear of this model: see `qtx recipes` for site names")
    return found


def smoothed_groups(chosen: Mapping[str, Transform]) -> Iterator[tuple[float, list[tuple[str, ...]]]]:
    """Each migration strength with the groups of linears that share a divisor under it."""
    smoothed = {site: how.strength for site, how in chosen.items() if how.kind is TransformKind.SMOOTH}
    for strength in sorted(set(smoothed.values())):
        yield strength, rewriting.fed_together([site for site in smoothed if smoothed[site] == strength])


def left_sites(recipe: Recipe, spec: ModelSpec) -> dict[str, Transform]:
    """The linears at whose input a transform is left: rotations, and divisors that no norm takes in."""
    chosen = chosen_transforms(recipe, spec)
    folded = {
        site
        for _, groups in smoothed_groups(chosen)
        for group in groups
        if rewriting.feeding_norm(spec, group) is not None
        for site in group
    }
    return {site: how for site, how in chosen.items() if site not in folded}


def left_transforms(
    recipe: Recipe, spec: ModelSpec, params: Mapping[str, np.ndarray], divisors: Mapping[str, np.ndarray]
) -> dict[str, InputTransform]:
    """What is done at the sites of `left_sites`.

    Raises SpecError for a block that does not divide a width, and a linear without a weight of its own.
    """
    return {
        site: InputTransform(divisors[site], 0)
        if how.kind is TransformKind.SMOOTH
        else InputTransform(None, rewriting.hadamard_block(rewriting.own_weight(params, site), how.block, site))
        for site, how in left_sites(recipe, spec).items()
    }


def transform(
    machine: Any,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    batches: Callable[[int], Iterable[Mapping[str, Any]]],
    recipe: Recipe,
) -> tuple[dict[str, np.ndarray], dict[str, InputTransform]]:
    """The parameters made for a recipe's transforms, and those that are left to the linears' inputs."""
    chosen = chosen_transforms(recipe, spec)
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
        shown = input_moments(
            machine.model(spec, params), batches(recipe.batches), smoothed, ("absmax",), label, recipe
        )
        absmax = {site: moments["absmax"] for site, moments in shown.items()}
        for strength, groups in smoothed_groups(chosen):
            sites = [site for group in groups for site in group]
            params, found = rewriting.smooth(spec, params, absmax, strength, sites)
            divisors |= found
    return rewriting.rotate(params, blocks), left_transforms(recipe, spec, params, divisors)


def input_moments(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    sites: Iterable[str],
    names: tuple[str, ...],
    label: str,
    recipe: Recipe,
) -> dict[str, dict[str, np.ndarray]]:
    """The moments of linears' inputs over all batches. Raises SpecError naming a site where they are not finite."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with Progress(label, recipe.batches) as bar:
        for batch in batches:
            for site, moments in model.input_moments(batch, sites, names).items():
                known = found.setdefault(site, moments)
                if known is not moments:
                    found[site] = {
                        name: (np.maximum if name == "absmax" else np.add)(known[name], moments[name]) for name in names
                    }
            bar.advance()
    for site, moments in found.items():
        if not all(np.isfinite(value).all() for value in moments.values()):
            raise SpecError(f"recipe {recipe.name} cannot be prepared: the input of {site} is not finite")
    return found


def rewrite(
    model: Any,
    params: Mapping[str, np.ndarray],
    batches: Callable[[int], Iterable[Mapping[str, Any]]],
    recipe: Recipe,
    quants: Mapping[str, Quant],
    ranges: Mapping[str, Range],
) -> dict[str, np.ndarray]:
    """The parameters as the recipe's `rewrite` makes them for these ranges, from the inputs of a float forward pass. Every
    linear with a quantized weight of its own is rewritten."""
    sites = [site for site in linears(model.spec) if f"{site}.weight" in params and f"{site}.weight" in quants]
    if not sites:
        raise SpecError(
            f"recipe {recipe.name} has rewrite {recipe.rewrite} and quantizes no linear's weight: leave it out"
        )
    label = f"{recipe.name}: inputs"
    if recipe.rewrite is Rewrite.BIAS:
        found = input_moments(model, batches(recipe.batches), sites, ("count", "sum"), label, recipe)
        means = {site: moments["sum"] / moments["count"] for site, moments in found.items()}
        return rewriting.correct_bias(params, quants, ranges, means)
    for site in sites:
        rounding_choice.check_grid(quants[f"{site}.weight"], f"{site}.weight")
    choose = rounding_choice.gptq if recipe.rewrite is Rewrite.GPTQ else rounding_choice.adaround
    made = dict(params)
    with Progress(f"{recipe.name}: {recipe.rewrite}", len(sites)) as bar:
        for some in held_together(sites, params):
            found = input_moments(model, batches(recipe.batches), some, ("gram",), label, recipe)
            for site in some:
                name, gram = f"{site}.weight", found.pop(site)["gram"]
                scale, zero = ranges[name].scale, ranges[name].zero_point
                made[name] = choose(params[name], gram, quants[name], scale, zero)
                bar.advance(note=site)
    return made


def held_together(sites: Sequence[str], params: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
    """`sites` in runs whose Gram matrices fit into memory together; each run takes a pass over the data."""
    run: list[str] = []
    held = 0
    for site in sites:
        weight = params[f"{site}.weight"]
        size = (weight.shape[-1] * (len(weight) if weight.ndim == 3 else 1)) ** 2
        if run and held + size > GRAM_ELEMENTS:
            yield run
            run, held = [], 0
        run.append(site)
        held += size
    yield run
