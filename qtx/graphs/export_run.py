"""A graph run by engines: as it is, with sites as outputs too, or with each site given to whoever reads it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..engines.backend import need
from ..engines.onnx_reference import NAME as REFERENCE
from ..engines.onnx_runtime import LEVELS
from ..engines.onnx_runtime import NAME as RUNTIME
from .export_graph import Graph, Value

GIVEN = "given:"
Arrays = Mapping[str, np.ndarray]


def list_engines() -> tuple[str, ...]:
    """onnxruntime at each level, and ONNX's evaluator."""
    return (*(f"{RUNTIME}-{level}" for level in LEVELS), REFERENCE)


def expose(graph: Graph, model: Any, values: Iterable[Value]) -> Any:
    """The model with values as outputs too."""
    helper = graph.onnx.helper
    changed = copy.deepcopy(model)
    known = {value.name for value in changed.graph.output}
    for value in {value.name: value for value in values}.values():
        if value.name not in known:
            changed.graph.output.append(
                helper.make_tensor_value_info(value.name, graph.kind(value.dtype), list(value.axes))
            )
    return changed


def force(graph: Graph, model: Any, values: Iterable[Value]) -> Any:
    """The model in which every node that reads one of the values is given it from outside."""
    helper = graph.onnx.helper
    changed = copy.deepcopy(model)
    held = {value.name: value for value in values}
    constant = {tensor.name for tensor in changed.graph.initializer}
    read = set()
    for node in changed.graph.node:
        for i, name in enumerate(node.input):
            if name in held and name not in constant:
                node.input[i] = GIVEN + name
                read.add(name)
    for name in sorted(read):
        axes = [None] * len(held[name].axes)
        changed.graph.input.append(helper.make_tensor_value_info(GIVEN + name, graph.kind(held[name].dtype), axes))
    return changed


def run_engine(
    engine: str, model: Any, inputs: Arrays, session: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Every output of a model, by name; `session`: entries of an onnxruntime session."""
    names = [value.name for value in model.graph.output]
    if engine == REFERENCE:
        reference = need("onnx.reference", "engines", f"engine {REFERENCE}")
        results = reference.ReferenceEvaluator(model).run(names, dict(inputs))
    else:
        runtime = need(RUNTIME, "engines", f"engine {RUNTIME}")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for key, entry in (session or {}).items():
            options.add_session_config_entry(key, entry)
        level = getattr(runtime.GraphOptimizationLevel, LEVELS[engine.removeprefix(f"{RUNTIME}-")])
        options.graph_optimization_level = level
        engine_session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results = engine_session.run(names, dict(inputs))
    return dict(zip(names, map(np.asarray, results), strict=True))
