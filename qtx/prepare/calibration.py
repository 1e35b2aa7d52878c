"""Calibration: static ranges of a recipe from batches of the calibration_batches split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from qtx.progress import Progress
from qtx.recipes.named import resolve
from qtx_ref.spec import (
    InputTransform,
    ModelSpec,
    Range,
    Recipe,
    SpecError,
)

from ..data.splits import BATCH

CALIBRATION_SEED = (
    0  # of calibration_batches batches (BERT's masks are drawn from it), in every command and for every run
)


def calibration_batches(data: Any, spec: ModelSpec) -> Callable[[int], Iterable[Mapping[str, Any]]]:
    """What `prepare` takes: the first n batches of the calibration split, anew each time, the same for every command."""
    return lambda count: data.split_batches("calibration", spec, BATCH, CALIBRATION_SEED, limit=count)


def calibrate(model: Any, data: Any, recipe: Recipe) -> dict[str, Range]:
    """Static ranges of a recipe, from its number of batches of the calibration_batches split."""
    return find_ranges(model, calibration_batches(data, model.spec)(recipe.batches), recipe, {})


def find_ranges(
    model: Any, batches: Iterable[Mapping[str, Any]], recipe: Recipe, transforms: Mapping[str, InputTransform]
) -> dict[str, Range]:
    quants = resolve(recipe, model.spec)
    quantize, masked = recipe.quantize_while_calibrating, recipe.masked_scores
    try:
        return model.calibrate(batches, quants, quantize=quantize, masked_scores=masked, transforms=transforms)
    except ValueError as error:
        raise SpecError(f"recipe {recipe.name} cannot be calibrated: {error}") from None


def bind(
    model: Any, recipe: Recipe, ranges: Mapping[str, Range], transforms: Mapping[str, InputTransform] | None = None
) -> None:
    """Puts a model under a recipe's fake quantization."""
    quants = resolve(recipe, model.spec)
    model.bind(quants, ranges, masked_scores=recipe.masked_scores, transforms=transforms)


def measure_input_moments(
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
