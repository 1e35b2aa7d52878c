"""One execution of a quantized model: what is run, by whom, and its tensors by name in the order they are made.

Written MODEL@WORDS. WORDS, with commas between them, none of them needed:

    MODEL.qtx     ref or torch; integer or fake; profile=NAME|FILE
    MODEL.onnx    reference, disable, basic, extended, all (onnxruntime), or qtx_ref; profile=NAME|FILE; cpu=NAME
    MODEL.tflite  reference, optimized, xnnpack, or qtx_ref; profile=NAME|FILE

Tensors have the names of our sites where the file is ours, also where it is an exported one; else those of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from qtx_ref.integer.model import Code, Integer
from qtx_ref.model import IntegerModel, Model
from qtx_ref.numerics import FakeQuant
from qtx_ref.profiles import profile
from qtx_ref.quant import affine
from qtx_ref.spec import QTX, Profile, SpecError
from qtx_ref.tape import Var, const

from ...engines.backend import backend
from ...engines.machine import Machine
from ...engines.paths import find_path, name_profile
from ...engines.protocols import IntegerModel as AnyIntegerModel
from ...files.artifact import SUFFIX, Artifact, load_artifact
from ...files.profiles import read_profile
from ...graphs import tflite
from ...graphs.operators import OPERATORS
from ...graphs.reading import Graph, Node, read_graph
from ...graphs.running import REFERENCE, check_level, run_engine
from ...graphs.state import State
from ...graphs.walking import compute, walk

__all__ = ["Execution", "Trace", "describe_words", "parse_execution"]

OURS = "qtx_ref"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """Tensors by name in the order that they are made, the model's outputs among them. `changed`: outputs that are
    others when intermediates are shown; `unseen`: tensors of the file that the engine never made."""

    tensors: dict[str, np.ndarray]
    outputs: tuple[str, ...]
    changed: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


class Execution(Protocol):
    """Who runs which file."""

    label: str
    profile: Profile | None  # whose rules it computes by; None: an engine's own
    simulated: bool  # whether codes are those of floats that were quantized, instead of integers all along

    @property
    def constants(self) -> Arrays:
        """What the file holds, by name."""

    def find_stated(self) -> Profile | None:
        """The profile that states an engine's rules; None where qtx computes, or nobody stated them."""

    def run(self, inputs: Arrays) -> Trace:
        """All tensors of one pass."""

    def replay(
        self, profile: Profile, inputs: Arrays, given: Arrays, target: str | None = None
    ) -> dict[str, np.ndarray]:
        """Each tensor by qtx_ref under a profile, each operation fed the tensors `given`; with a target that one alone.
        What qtx_ref does not have is left out. Raises ValueError where the profile refuses the numbers."""

    def operation(self, target: str) -> str:
        """What makes a tensor, in a few words."""

    def list_kernels(self, target: str) -> list[str]:
        """What only an engine has between a tensor and the codes that it is made of."""

    def list_constants(self, target: str, given: Arrays) -> list[str]:
        """The constants that a tensor is made with, of the tensors `given`."""


def parse_execution(text: str) -> Execution:
    """The execution of MODEL@WORDS. Raises SpecError for words that do not belong to the file, FileError for a file
    that cannot be read, MissingExtra."""
    name, _, rest = text.partition("@")
    path, words = Path(name), [word.strip() for word in rest.split(",") if word.strip()]
    kinds: dict[str, Any] = {SUFFIX: ArtifactExecution, ".onnx": OnnxExecution, ".tflite": TfliteExecution}
    if path.suffix not in kinds:
        raise SpecError(f"{name} is none of {', '.join(f'MODEL{suffix}' for suffix in kinds)}")
    return cast(Execution, kinds[path.suffix](path, words))


def describe_words(words: list[str], allowed: Mapping[str, tuple[str, ...]], keys: tuple[str, ...]) -> dict[str, str]:
    """Which of the `allowed` words of each kind was given (else the first), and the values of `keys`. Raises SpecError
    naming a word that is neither, or the second of its kind."""
    chosen, given = {kind: values[0] for kind, values in allowed.items()}, dict[str, str]()
    for word in words:
        key, equals, value = word.partition("=")
        kind = next((kind for kind, values in allowed.items() if word in values), None)
        if kind is not None and kind not in given:
            chosen[kind] = given[kind] = word
        elif equals and key in keys and key not in given:
            chosen[key] = given[key] = value
        elif (earlier := given.get(kind or key)) is not None:
            raise SpecError(f"{word!r} after {earlier!r}: give one of them")
        else:
            known = [*(value for values in allowed.values() for value in values), *(f"{key}=..." for key in keys)]
            raise SpecError(f"{word!r} says nothing of this file: give {', '.join(known)}")
    return chosen


def convert(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """An input in the dtype that a file takes. Raises SpecError for one that is no number."""
    try:
        return value.astype(dtype)
    except (TypeError, ValueError):
        raise SpecError(f"input {name} is {value.dtype}: the file takes {dtype}") from None


# --- artifacts --------------------------------------------------------------------------------------------------------


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


# --- ONNX -------------------------------------------------------------------------------------------------------------


class OnnxExecution:
    """An ONNX file in an engine, or node by node in qtx_ref's arithmetic."""

    def __init__(self, path: Path, words: list[str]) -> None:
        engines = (OURS, REFERENCE, "disable", "basic", "extended", "all")
        self.words = describe_words(words, {"engine": engines}, ("profile", "cpu"))
        self.path, self.graph = path, read_graph(path)
        self.about, self.simulated = read_about(self.graph), False
        self.engine = self.words["engine"]
        self.profile: Profile | None = None
        if self.engine == OURS:
            if "cpu" in self.words:
                raise SpecError(f"cpu={self.words['cpu']} belongs to an engine, not to {OURS}")
            self.profile = read_profile(self.words["profile"]) if "profile" in self.words else QTX
        elif "profile" in self.words:
            raise SpecError(f"profile={self.words['profile']} belongs to {OURS}: {self.engine} has rules of its own")
        else:
            check_level(self.engine)
        who = {OURS: OURS, REFERENCE: "ONNX reference"}.get(self.engine, f"onnxruntime, {self.engine}")
        rest = [f"{key} {self.words[key]}" for key in ("profile", "cpu") if key in self.words]
        self.label = f"{path} ({', '.join([who, *rest])})"

    @cached_property
    def names(self) -> dict[str, str]:
        """Our site of each value that holds one, in a file that qtx exported."""
        return {about["value"]: site for site, about in self.about.get("sites", {}).items()}

    def rename(self, values: Arrays) -> dict[str, np.ndarray]:
        """Values by our names, in the order of the file; what an engine named itself comes last."""
        order = {name: place for place, name in enumerate(self.graph.producers)}
        known = sorted((name for name in values if name in order), key=order.__getitem__)
        return {self.names.get(name, name): np.asarray(values[name]) for name in known}

    def back(self, values: Arrays) -> dict[str, np.ndarray]:
        """Values by the names of the file."""
        own = {site: name for name, site in self.names.items()}
        return {own.get(name, name): value for name, value in values.items()}

    def feed(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """The file's inputs, of the dtypes that it takes. Raises SpecError for one that is missing."""
        taken = {}
        for name, (dtype, _) in self.graph.inputs.items():
            if name not in inputs:
                raise SpecError(f"input {name} of {self.path} is missing: the inputs are {', '.join(inputs)}")
            taken[name] = np.ascontiguousarray(convert(name, inputs[name], dtype) if dtype else inputs[name])
        return taken

    def run(self, inputs: Arrays) -> Trace:
        """Every tensor that is made."""
        fed, outputs = self.feed(inputs), tuple(self.names.get(name, name) for name in self.graph.outputs)
        if self.profile is not None:
            made: dict[str, np.ndarray] = {}
            for node in walk(self.path, fed, self.profile):
                made |= node.outputs
            return Trace(self.rename(made), outputs)
        result = run_engine(self.path, fed, self.engine, expose=True, cpu=self.words.get("cpu"))
        tensors = self.rename(result.values)
        unseen = tuple(self.names.get(n, n) for n in self.graph.producers if self.names.get(n, n) not in tensors)
        return Trace(tensors, outputs, result.changed, unseen)

    def list_needed(self, target: str, given: Arrays) -> list[Node]:
        """The nodes that make a tensor from those given that hold integers, or come from nodes that only an engine
        has."""
        wanted: set[str] = set()
        stack = [target]
        while stack:
            node = self.graph.producers.get(stack.pop())
            if node is None or node.name in wanted:
                continue
            wanted.add(node.name)
            stack += [name for name in node.inputs if name and not self.is_start(name, given)]
        return [node for node in self.graph.nodes if node.name in wanted]

    def is_start(self, name: str, given: Arrays) -> bool:
        """Whether a replay takes a tensor as it is given, instead of making it."""
        if name not in given:
            return False
        node = self.graph.producers.get(name)
        return node is None or given[name].dtype.kind in "iub" or (node.domain, node.op) not in OPERATORS

    def replay(
        self, profile: Profile, inputs: Arrays, given: Arrays, target: str | None = None
    ) -> dict[str, np.ndarray]:
        """As `Execution.replay`."""
        values, fed, made = self.back(given), self.feed(inputs), {}
        targets = [self.back({target: np.zeros(0)}).popitem()[0]] if target else list(self.graph.producers)
        for name in targets:
            earlier = {key: value for key, value in values.items() if key != name}
            nodes = self.list_needed(name, earlier)
            if any((node.domain, node.op) not in OPERATORS for node in nodes):
                continue
            state = State(self.graph, profile, "disable")
            state.values |= fed | earlier
            if all(compute(state, node).by == OURS for node in nodes) and name in state.values:
                made[self.names.get(name, name)] = state.values[name]
        return made

    def list_kernels(self, target: str) -> list[str]:
        """Nodes that qtx_ref does not have, from the tensor back to integers."""
        found, seen = [], set()
        stack = [self.back({target: np.zeros(0)}).popitem()[0]]
        while stack:
            node = self.graph.producers.get(stack.pop())
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            if (node.domain, node.op) not in OPERATORS:
                found.append(f"{node.op} {node.name}")
            else:
                types = ((name, self.graph.types.get(name, ("", None))[0]) for name in node.inputs if name)
                stack += [name for name, dtype in types if not dtype.startswith(("int", "uint", "bool"))]
        return found

    @property
    def constants(self) -> Arrays:
        """As `Execution.constants`."""
        return self.graph.constants

    def find_stated(self) -> Profile | None:
        """That of the engine's products."""
        if self.profile is not None:
            return None
        name = "onnx-reference" if self.engine == REFERENCE else f"onnxruntime-{self.engine}"
        return profile(name_profile(find_path(name, "linear"), self.words.get("cpu")))

    def list_constants(self, target: str, given: Arrays) -> list[str]:
        """Those of the nodes that a replay of the tensor runs."""
        name = self.back({target: np.zeros(0)}).popitem()[0]
        earlier = {key: value for key, value in self.back(given).items() if key != name}
        used = [n for node in self.list_needed(name, earlier) for n in node.inputs]
        return [n for n in dict.fromkeys(used) if n in self.constants]

    def operation(self, target: str) -> str:
        """The node."""
        name = self.back({target: np.zeros(0)}).popitem()[0]
        node = self.graph.producers.get(name)
        return "an input" if node is None else f"{node.op} {node.name}"


def read_about(graph: Graph) -> dict[str, Any]:
    """What a file that qtx exported says of itself; empty for one of other tools."""
    for entry in graph.model.metadata_props:
        if entry.key == "qtx":
            return cast(dict[str, Any], json.loads(entry.value))
    return {}


# --- LiteRT -----------------------------------------------------------------------------------------------------------


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
