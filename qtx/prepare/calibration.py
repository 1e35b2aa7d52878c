"""Calibration: static ranges of a recipe from batches of the calibration split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from qtx_ref.quant.quantizer import rescale
from qtx_ref.spec import QTX, InputTransform, ModelSpec, Profile, Range, Recipe, SpecError

from ..data.splits import BATCH
from ..engines.protocols import Arrays, Batch, Batches, Calibration, Model
from ..progress import Progress
from ..recipes.named import resolve

CALIBRATION_SEED = 0  # of calibration batches (BERT's masks are drawn from it), in every command and for every run


def calibration_batches(data: Calibration, spec: ModelSpec) -> Batches:
    """What `prepare` takes: the first n batches of the calibration split, anew each time, the same for every
    command."""
    return lambda count: data.split_batches("calibration", spec, BATCH, CALIBRATION_SEED, limit=count)


def calibrate(model: Model, data: Calibration, recipe: Recipe) -> dict[str, Range]:
    """Static ranges of a recipe, from its number of batches of the calibration split. Raises as `find_ranges`."""
    return find_ranges(model, calibration_batches(data, model.spec)(recipe.batches), recipe, {})


def find_ranges(
    model: Model, batches: Iterable[Batch], recipe: Recipe, transforms: Mapping[str, InputTransform]
) -> dict[str, Range]:
    """Static ranges of a recipe from these batches, under transforms at linears' inputs.

    Raises SpecError: the recipe does not fit the model, or a site has no finite values.
    """
    quants = resolve(recipe, model.spec)
    quantize, masked = recipe.quantize_while_calibrating, recipe.masked_scores
    try:
        return model.calibrate(batches, quants, quantize=quantize, masked_scores=masked, transforms=transforms)
    except ValueError as error:
        raise SpecError(f"recipe {recipe.name} cannot be calibrated: {error}") from None


def bind(
    model: Model,
    recipe: Recipe,
    ranges: Mapping[str, Range],
    transforms: Mapping[str, InputTransform] | None = None,
    profile: Profile = QTX,
) -> None:
    """Puts a model under a recipe's fake quantization by the rules of a profile, its scales included. Raises SpecError
    for a static site without a range."""
    quants = resolve(recipe, model.spec)
    try:
        ranges = {
            site: rescale(ends, quants[site], profile) if site in quants else ends for site, ends in ranges.items()
        }
    except ValueError as error:
        raise SpecError(f"profile {profile.name}: {error}") from None
    model.bind(
        quants,
        ranges,
        masked_scores=recipe.masked_scores,
        transforms=transforms,
        gradients=recipe.gradients,
        profile=profile,
    )


def measure_input_moments(
    model: Model,
    batches: Iterable[Batch],
    sites: Iterable[str],
    names: tuple[str, ...],
    label: str,
    recipe: Recipe,
) -> dict[str, Arrays]:
    """The moments of linears' inputs over all batches, by site: of `names` `count`, `sum`, `absmax`, `gram`.

    label: of the progress bar. Raises SpecError naming a site where they are not finite.
    """
    totals: dict[str, Arrays] = {}
    with Progress(label, recipe.batches) as bar:
        for batch in batches:
            for site, moments in model.input_moments(batch, sites, names).items():
                known = totals.setdefault(site, moments)
                if known is not moments:
                    totals[site] = {name: add_moment(name, known[name], moments[name]) for name in names}
            bar.advance()
    for site, moments in totals.items():
        if not all(np.isfinite(value).all() for value in moments.values()):
            raise SpecError(f"recipe {recipe.name} cannot be prepared: the input of {site} is not finite")
    return totals


def add_moment(name: str, known: np.ndarray, more: np.ndarray) -> np.ndarray:
    """A moment over two sets of inputs, of that over each."""
    return np.maximum(known, more) if name == "absmax" else np.add(known, more)
