"""Artifacts in a backend's integers, or under its fake quantization."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np

from qtx_ref.integer.model import Code, Integer
from qtx_ref.model import IntegerModel, Model
from qtx_ref.numerics import FakeQuant
from qtx_ref.quant import affine
from qtx_ref.spec import Profile
from qtx_ref.tape import Var, const

from ...engines.backend import backend
from ...engines.machine import Machine
from ...engines.protocols import IntegerModel as AnyIntegerModel
from ...files.artifact import Artifact, load_artifact
from ...files.profiles import read_profile
from .execution import Arrays, Trace, describe_words

__all__ = ["ArtifactExecution"]


class Reached(Exception):
    """A replay has what it is for."""


class Fed(Integer):
    """Integers in which every operation is fed the tensors that are given; what each makes of them is kept."""

    def __init__(self, artifact: Artifact, given: Arrays, target: str | None) -> None:
        super().__init__(artifact.constants, artifact.quants, artifact.profile)
        self.given, self.target = given, target
        self.made: dict[str, np.ndarray] = {}

    def meet(self, name: str, value: np.ndarray) -> np.ndarray:
        """The given tensor of that name, in the dtype of what was made. Raises Reached at the target."""
        self.made[name] = np.array(value)
        if name == self.target:
            raise Reached
        if name not in self.given:
            return value
        return np.asarray(self.given[name]).astype(np.asarray(value).dtype).reshape(np.shape(value))

    def record_codes(self, site: str, x: Code) -> Code:
        x.value = self.meet(site, x.value)
        return x

    def record_accumulator(self, site: str, acc: np.ndarray) -> np.ndarray:
        return self.meet(f"{site}.accumulator", acc)


class FedSimulation(FakeQuant):
    """Fake quantization in which every operation is fed the codes that are given; what each quantizer makes of it is
    kept."""

    def __init__(self, execution: ArtifactExecution, profile: Profile, given: Arrays) -> None:
        artifact = execution.artifact
        masked = artifact.recipe.masked_scores
        super().__init__(artifact.quants, artifact.ranges(), masked_scores=masked, profile=profile)
        self.execution, self.given = execution, given
        self.made: dict[str, np.ndarray] = {}

    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        y = self.quantize(site, x, where)
        if not self.execution.has_codes(site):
            return y
        self.made[site] = self.execution.encode(site, y.value)
        if site not in self.given:
            return y
        scale, zero = (self.execution.artifact.constants[f"{site}.{key}"] for key in ("scale", "zero_point"))
        return const(affine.dequantize(self.given[site], np.asarray(scale), np.asarray(zero), self.profile.dequantize))

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The codes that each quantizer makes."""
        model = Model(self.execution.artifact.spec, self.execution.artifact.float_params())
        model.compute(self, model.accept(inputs))
        return self.made


class ArtifactExecution:
    """A .qtx in a backend's integers, or under its fake quantization."""

    def __init__(self, path: Path, words: list[str]) -> None:
        kinds = {"backend": ("ref", "torch"), "numerics": ("integer", "fake")}
        self.words = describe_words(words, kinds, ("profile",))
        self.artifact = load_artifact(path)
        if "profile" in self.words:
            self.artifact = self.artifact.under(read_profile(self.words["profile"]))
        self.profile: Profile | None = self.artifact.profile
        self.simulated = self.words["numerics"] == "fake"
        self.label = f"{path} ({self.words['backend']}, {self.words['numerics']}, profile {self.artifact.profile.name})"

    def run(self, inputs: Arrays) -> Trace:
        """Every site's codes, of integers the accumulators too, and the output."""
        Machine(backend=self.words["backend"]).check()
        if self.simulated:
            return self.run_fake(inputs)
        make = backend(self.words["backend"]).IntegerModel
        model: AnyIntegerModel = make(
            self.artifact.spec, self.artifact.constants, self.artifact.quants, self.artifact.profile
        )
        tensors: dict[str, np.ndarray] = {}
        output = model.run(dict(inputs), lambda site, value: tensors.__setitem__(site, np.array(value)))
        return Trace(tensors | {"output": np.asarray(output.value)}, ("output",))

    def run_fake(self, inputs: Arrays) -> Trace:
        """The codes that the simulated tensors stand for."""
        model = backend(self.words["backend"]).Model(self.artifact.spec, self.artifact.float_params())
        model.bind(
            self.artifact.quants,
            self.artifact.ranges(),
            masked_scores=self.artifact.recipe.masked_scores,
            profile=self.artifact.profile,
        )
        made = model.simulate(inputs)
        codes = {name: self.encode(name, y) for name, y in made.items() if self.has_codes(name)}
        return Trace(codes | {"output": model.forward(inputs)}, ("output",))

    def has_codes(self, site: str) -> bool:
        """Whether a site's simulated values are those of codes with a scale that stays: a weight's stay as well, and
        differ nowhere."""
        return not site.endswith(".weight") and f"{site}.scale" in self.artifact.constants

    def encode(self, site: str, y: np.ndarray) -> np.ndarray:
        """The codes of simulated values. A value is within an ulp of a whole number of scales; NaN is no code."""
        scale, zero = (self.artifact.constants[f"{site}.{key}"] for key in ("scale", "zero_point"))
        return (np.rint(y / np.asarray(scale, np.float64)) + zero).astype(np.int32)

    def replay(
        self, profile: Profile, inputs: Arrays, given: Arrays, target: str | None = None
    ) -> dict[str, np.ndarray]:
        """As `Execution.replay`."""
        if self.simulated:
            return FedSimulation(self, profile, given).run(inputs)
        artifact = self.artifact if profile == self.artifact.profile else self.artifact.under(profile)
        model = IntegerModel(artifact.spec, artifact.constants, artifact.quants, artifact.profile)
        numerics = Fed(artifact, given, target)
        with suppress(Reached):
            model.compute(numerics, model.accept(inputs))
        return (
            numerics.made if target is None else {name: numerics.made[name] for name in numerics.made if name == target}
        )

    def list_kernels(self, target: str) -> list[str]:
        """None: all is in integers."""
        return []

    @property
    def constants(self) -> Arrays:
        """As `Execution.constants`."""
        return self.artifact.constants

    def find_stated(self) -> Profile | None:
        """None: qtx computes."""
        return None

    def list_constants(self, target: str, given: Arrays) -> list[str]:
        """Those of the site."""
        site = target.removesuffix(".accumulator")
        return [name for name in self.constants if name.startswith(f"{site}.")]

    def operation(self, target: str) -> str:
        """The site's kind, as its name says."""
        return "integer product" if target.endswith(".accumulator") else f"operation of site {target}"
