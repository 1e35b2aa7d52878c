"""LiteRT files in one of its kernels, or operator by operator in qtx_ref's arithmetic."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from qtx_ref.profiles import profile
from qtx_ref.spec import Profile, SpecError

from ...engines.paths import find_path, name_profile
from ...files.profiles import read_profile
from ...graphs import tflite
from .execution import OURS, Arrays, Trace, convert, describe_words

__all__ = ["TfliteExecution"]


class TfliteExecution:
    """A .tflite file in one of LiteRT's kernels, or operator by operator in qtx_ref's arithmetic."""

    def __init__(self, path: Path, words: list[str]) -> None:
        self.words = describe_words(words, {"engine": (*tflite.KERNELS, OURS)}, ("profile",))
        self.path, self.graph, self.engine = path, tflite.read_graph(path), self.words["engine"]
        self.simulated = False
        self.profile: Profile | None = None
        if self.engine == OURS:
            self.profile = read_profile(self.words.get("profile", "tflite"))
        elif "profile" in self.words:
            raise SpecError(f"profile={self.words['profile']} belongs to {OURS}: {self.engine} has rules of its own")
        self.label = f"{path} ({'qtx_ref, profile ' + self.profile.name if self.profile else 'LiteRT ' + self.engine})"

    def feed(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The file's inputs, of the dtypes that it takes."""
        tensors = self.graph.tensors
        return {name: convert(name, inputs[name], tensors[name].dtype) for name in self.graph.inputs}

    def run(self, inputs: Arrays) -> Trace:
        """Every tensor that an operator makes."""
        for name in self.graph.inputs:
            if name not in inputs:
                raise SpecError(f"input {name} of {self.path} is missing: the inputs are {', '.join(inputs)}")
        fed = self.feed(inputs)
        if self.profile is None:
            made, changed = tflite.run_engine(self.path, fed, self.engine)
            return Trace(made, self.graph.outputs, changed)
        values = dict(fed)
        for op in self.graph.operators:
            try:
                made_here = tflite.compute(self.graph, op, values, self.profile)
            except ValueError as error:  # SpecError is one; shapes that do not go together are others
                raise SpecError(f"operator {op.kind} that makes {op.output} of {self.path}: {error}") from None
            if made_here is None:
                raise SpecError(f"operator {op.kind} of {self.path} is none that qtx_ref has: run it in LiteRT")
            values[op.output] = made_here
        return Trace({name: values[name] for name in values if name not in fed}, self.graph.outputs)

    def replay(
        self, profile: Profile, inputs: Arrays, given: Arrays, target: str | None = None
    ) -> dict[str, np.ndarray]:
        """As `Execution.replay`."""
        values = self.feed(inputs) | dict(given)
        made = {}
        for op in self.graph.operators:
            if target in (None, op.output) and all(n in values or n in self.constants for n in op.inputs if n):
                value = tflite.compute(self.graph, op, values, profile)
                if value is not None:
                    made[op.output] = value
        return made

    def list_kernels(self, target: str) -> list[str]:
        """The operator, where qtx_ref does not have it."""
        return [op.kind for op in self.graph.operators if op.output == target and not tflite.is_known(self.graph, op)]

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        """Tensors that are in the file, and the scales and zero points of all tensors."""
        made = {name: one.data for name, one in self.graph.tensors.items() if one.data is not None}
        for name, one in self.graph.tensors.items():
            made |= {f"{name} scale": one.scale, f"{name} zero point": one.zero_point}
        return made

    def find_stated(self) -> Profile | None:
        """That of the kernels' products, of int16 where the file has them, or of weights with several scales."""
        if self.profile is not None:
            return None
        weights = [self.graph.tensors[op.inputs[1]] for op in self.graph.operators if op.kind == "FULLY_CONNECTED"]
        wide = any(one.dtype == "int16" for one in self.graph.tensors.values())
        end = "-16x8" if wide else "-channel" if any(one.scale.size > 1 for one in weights) else ""
        return profile(name_profile(find_path(f"litert-{self.engine}{end}", "linear")))

    def list_constants(self, target: str, given: Arrays) -> list[str]:
        """Those of the operator, its result's scale and zero point among them."""
        names = {name for op in self.graph.operators if op.output == target for name in (*op.inputs, op.output)}
        return [name for name in self.constants if name.removesuffix(" scale").removesuffix(" zero point") in names]

    def operation(self, target: str) -> str:
        """The operator."""
        return next((op.kind for op in self.graph.operators if op.output == target), "an input")
