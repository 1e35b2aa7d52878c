"""A walk through an ONNX file, node by node: supported operators in `qtx_ref`'s arithmetic, the rest by an engine.

A MatMul or Gemm of two dequantized tensors is the product of their codes, and a QuantizeLinear of its result, with a
bias, a factor or a ReLU between or none, is the requantization of its accumulators: so a QDQ file has the integers that
its authors meant, under the rules of any profile. Their real values, for whoever else takes them, are accumulator times
unit in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtx_ref.spec import QTX, Profile, SpecError

from .operators import OPERATORS
from .reading import Node, read_graph
from .running import choose_level, run_node
from .state import State

__all__ = ["NodeResult", "compute", "walk"]


@dataclass(frozen=True)
class NodeResult:
    """What a node made. `by`: "qtx_ref", or "engine" for an operator that qtx_ref does not have."""

    name: str
    op: str
    outputs: dict[str, np.ndarray]
    by: str


def compute(state: State, node: Node) -> NodeResult:
    """Runs a node on the values so far, and adds what it made to them. Raises SpecError, or EngineRefusal, naming the
    node."""
    operator = OPERATORS.get((node.domain, node.op))
    made = None
    if operator is not None:
        try:
            made = operator(state, node)
        except ValueError as error:
            raise SpecError(f"node {node.name} ({node.op}): {error}") from None
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # of a node that lacks what it must have
            raise SpecError(f"node {node.name} ({node.op}) is not as ONNX has it: {error!r}") from None
    outputs = run_node(state.graph, node, state.values, state.level) if made is None else made
    named = {name: value for name, value in zip(node.outputs, outputs, strict=False) if name}
    state.values |= named
    state.values |= {name: state.given[name] for name in named if name in state.given}
    return NodeResult(node.name, node.op, named, "engine" if made is None else "qtx_ref")


def walk(
    path: Path,
    inputs: Mapping[str, np.ndarray],
    profile: Profile = QTX,
    level: str | None = None,
    given: Mapping[str, np.ndarray] | None = None,
) -> Iterator[NodeResult]:
    """Each node of a file and what it made, in order.

    level: of the engine that runs what qtx_ref does not have, as `running.run_engine` takes it; None: whichever is
    installed. given: as `State` takes it.

    Raises FileError for a file that is none, MissingExtra without onnx, SpecError or EngineRefusal naming a node.
    """
    graph = read_graph(path)
    state = State(graph, profile, choose_level(level), given)
    state.feed(inputs)
    for node in graph.nodes:
        yield compute(state, node)
