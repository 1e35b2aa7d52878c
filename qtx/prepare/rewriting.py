"""Weights and biases made anew for their quantizers: bias correction, GPTQ, AdaRound, from calibration batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from qtx_ref.quant import rewriting, rounding_choice
from qtx_ref.spec import Quant, QuantSpec, Range, Recipe, Rewrite, SpecError

from ..engines.protocols import Batches, Model
from ..progress import Progress
from ..recipes.sites import linears
from .calibration import measure_input_moments

GRAM_ELEMENTS = 2**26  # of Gram matrices held at a time, 8 bytes each


def rewrite(
    model: Model,
    params: Mapping[str, np.ndarray],
    batches: Batches,
    recipe: Recipe,
    quants: Mapping[str, Quant],
    ranges: Mapping[str, Range],
) -> dict[str, np.ndarray]:
    """The parameters as the recipe's `rewrite` makes them for these ranges, from the inputs of a float forward pass.
    Every linear with a quantized weight of its own is rewritten.

    Raises SpecError where there is none, or its weight has a quantizer that the method does not know.
    """
    sites = [site for site in linears(model.spec) if f"{site}.weight" in params and f"{site}.weight" in quants]
    if not sites:
        raise SpecError(
            f"recipe {recipe.name} has rewrite {recipe.rewrite} and quantizes no linear's weight: leave it out"
        )
    label = f"{recipe.name}: inputs"
    if recipe.rewrite is Rewrite.BIAS:
        sums = measure_input_moments(model, batches(recipe.batches), sites, ("count", "sum"), label, recipe)
        means = {site: moments["sum"] / moments["count"] for site, moments in sums.items()}
        return rewriting.correct_bias(params, quants, ranges, means)
    for site in sites:
        rounding_choice.check_grid(quants[f"{site}.weight"], f"{site}.weight")
    choose = rounding_choice.gptq if recipe.rewrite is Rewrite.GPTQ else rounding_choice.adaround
    made = dict(params)
    with Progress(f"{recipe.name}: {recipe.rewrite}", len(sites)) as bar:
        for some in group_by_memory(sites, params):
            grams = measure_input_moments(model, batches(recipe.batches), some, ("gram",), label, recipe)
            for site in some:
                name, gram = f"{site}.weight", grams.pop(site)["gram"]
                scale, zero = ranges[name].scale, ranges[name].zero_point
                made[name] = choose(params[name], gram, cast(QuantSpec, quants[name]), scale, zero)
                bar.advance(note=site)
    return made


def group_by_memory(sites: Sequence[str], params: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
    """The sites in runs whose Gram matrices fit into memory together; each run takes a pass over the data."""
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
