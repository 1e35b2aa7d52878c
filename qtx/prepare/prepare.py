"""`prepare`: from a float model to what a recipe makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qtx_ref.spec import QTX, InputTransform, ModelSpec, Profile, Range, Recipe

from ..engines.machine import Machine
from ..engines.protocols import Batches, Model
from ..recipes.named import resolve
from .calibration import bind, find_ranges
from .rewriting import rewrite
from .transforms import transform


@dataclass
class Prepared:
    """A quantized model: parameters, rewritten where the recipe says so, static ranges, the transforms of linears'
    inputs that no norm has taken in, and the parameters as they were before they were rewritten, where they were."""

    params: Mapping[str, np.ndarray]
    ranges: dict[str, Range]
    transforms: dict[str, InputTransform]
    before: Mapping[str, np.ndarray] | None = None

    def model(self, machine: Machine, spec: ModelSpec, recipe: Recipe, profile: Profile = QTX) -> Model:
        """The model under the recipe's fake quantization by a profile, on a machine. Raises SpecError where that is not
        to be had."""
        model = machine.model(spec, self.params)
        bind(model, recipe, self.ranges, self.transforms, profile)
        return model


def prepare(
    machine: Machine,
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    batches: Batches,
    recipe: Recipe,
    *,
    ranges: Mapping[str, Range] | None = None,
) -> Prepared:
    """From a float model to what a recipe makes of it: transforms, then ranges, then rewritten weights.

    batches: the first n calibration batches, anew each time. ranges: already calibrated, on the transformed model.
    Raises SpecError for what cannot be transformed, calibrated or rewritten, naming the site.
    """
    quants = resolve(recipe, spec)
    transforms: dict[str, InputTransform] = {}
    if recipe.transforms:
        params, transforms = transform(machine, spec, params, batches, recipe)
    if ranges is not None and recipe.rewrite is None:
        return Prepared(params, dict(ranges), transforms)
    model = machine.model(spec, params)
    if ranges is None:
        ranges = find_ranges(model, batches(recipe.batches), recipe, transforms)
    if recipe.rewrite is None:
        return Prepared(params, dict(ranges), transforms)
    model.bind({}, {}, transforms=transforms)
    return Prepared(rewrite(model, params, batches, recipe, quants, ranges), dict(ranges), transforms, params)
