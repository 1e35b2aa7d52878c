"""ONNX files in an engine, or node by node in qtx_ref's arithmetic."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from qtx_ref.profiles import profile
from qtx_ref.spec import QTX, Profile, SpecError

from ...engines.paths import find_path, name_profile
from ...files.profiles import read_profile
from ...graphs.operators import OPERATORS
from ...graphs.reading import Graph, Node, read_graph
from ...graphs.running import REFERENCE, check_level, run_engine
from ...graphs.state import State
from ...graphs.walking import compute, walk
from .execution import OURS, Arrays, Trace, convert, describe_words

__all__ = ["OnnxExecution"]


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
