"""An integer model under another profile: codes, scales and zero points as they are, multipliers and biases anew.

What a profile says of quantizing weights and of making scales is then of no account: they were quantized, and nothing
of the float model is left. Tables and the numbers of softmax and norms follow from scales, and are kept. A bias goes by
the real numbers that it stands for: from codes to floats, and from floats to codes in units of the accumulator.

Arrays: constants by name, as `model` lists them, in the dtypes and shapes that `lowering` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..models.initial import shapes
from ..spec import AttentionSpec, ModelSpec, Nonlinear, Profile, QuantSpec, Range, check_integer
from .lowering import Lowering, run_lowering
from .model import Code

__all__ = ["Converting", "convert", "real_biases"]


def convert(
    spec: ModelSpec,
    constants: Mapping[str, np.ndarray],
    quants: Mapping[str, QuantSpec],
    profile: Profile,
    nonlinear: Nonlinear,
) -> dict[str, np.ndarray]:
    """The constants of the same codes under `profile`. Raises SpecError naming the first site that cannot run under
    it."""
    check_integer(quants, profile)
    return run_lowering(spec, Converting(spec, constants, quants, profile, nonlinear))


def real_biases(spec: ModelSpec, constants: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The biases that are added to accumulators, float64, in the shapes of the model's."""
    biases = {}
    for name, shape in shapes(spec).items():
        if name.endswith(".bias") and f"{name}.zero_point" not in constants:
            scale = np.asarray(constants.get(f"{name}.scale", 1), np.float64)  # floats have none
            biases[name] = (constants[name].astype(np.float64) * scale).reshape(shape)
    return biases


class Converting(Lowering):
    """A lowering that takes codes and scales from a model that was lowered before. Each op raises SpecError where it
    cannot run in integers, with its site."""

    def __init__(
        self,
        spec: ModelSpec,
        constants: Mapping[str, np.ndarray],
        quants: Mapping[str, QuantSpec],
        profile: Profile,
        nonlinear: Nonlinear,
    ) -> None:
        known = {name: constants[name] for name in shapes(spec) if name in constants}
        super().__init__(known | real_biases(spec, constants), quants, {}, profile, nonlinear)
        self.kept = constants

    def keep(self, *names: str) -> None:
        """Takes constants over."""
        self.constants.update({name: self.kept[name] for name in names})

    def target(self, site: str, why: str) -> QuantSpec:
        if f"{site}.scale" in self.kept:
            scale, zero = self.kept[f"{site}.scale"], self.kept[f"{site}.zero_point"]
            self.ranges = {**self.ranges, site: Range(scale, scale, scale, zero)}
        return super().target(site, why)

    def scale_zero(self, calibrated: Range, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
        return calibrated.scale, calibrated.zero_point

    def put_weight(self, site: str, value: np.ndarray) -> None:
        self.keep(f"{site}.scale", f"{site}.zero_point", site)

    def put_own_codes(self, site: str, key: str, value: np.ndarray) -> None:
        self.target(site, "it holds a parameter")
        self.keep(*(f"{site}.{key}{part}" for part in ("", ".scale", ".zero_point")))

    def put_softmax(self, site: str, scores: Code, spec: AttentionSpec) -> None:
        own = ("sink", "sink_factor", "input_multiplier", "input_shift", "table", "zeta", "gamma", "alpha")
        self.keep(*(name for part in own if (name := f"{site}.{part}") in self.kept))
