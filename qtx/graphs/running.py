"""An ONNX file, or one node of it, run by an engine: onnxruntime at a level, or the ONNX reference.

A whole file runs in a worker process, on another CPU where one is named. Its intermediates are those that the engine
has: onnxruntime is given the graph that it made of the file, which it then leaves alone, with every tensor an output.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.spec import SpecError

from ..engines.backend import MissingExtra, need
from ..engines.onnx_runtime import LEVELS, open_session
from ..engines.paths import SWITCHED, SWITCHES, emulate
from ..engines.process import EngineRefusal, Tell, Values, Worker, make_environment, serve
from .reading import CODES, Graph, Node, list_captured

__all__ = ["REFERENCE", "EngineRun", "check_level", "choose_level", "run_engine", "run_file", "run_node"]

REFERENCE = "reference"  # beside onnxruntime's levels
SECONDS = 600.0


@dataclass(frozen=True)
class EngineRun:
    """What an engine computed. `values`: its outputs, then every intermediate that it materialised, by the names of the
    file (and the engine's own, of what it made itself). `changed`: outputs that are others when intermediates are
    shown."""

    values: dict[str, np.ndarray]
    changed: tuple[str, ...] = ()


def check_level(level: str) -> None:
    """Raises SpecError for a level that no engine has."""
    if level != REFERENCE and level not in LEVELS:
        raise SpecError(f"level is {level!r}: give {REFERENCE}, or of onnxruntime {', '.join(LEVELS)}")


def choose_level(level: str | None) -> str:
    """The level that was asked for; else onnxruntime without optimisations, else the ONNX reference."""
    if level is None:
        try:
            need("onnxruntime", "engines", "onnxruntime")
        except MissingExtra:
            return REFERENCE
        return "disable"
    check_level(level)
    return level


def run_engine(
    path: Path, inputs: Mapping[str, np.ndarray], level: str, expose: bool = True, cpu: str | None = None
) -> EngineRun:
    """What an engine makes of a file and its inputs, in a worker process.

    cpu: None is this machine's own, else one of qemu-user's. Raises SpecError for a level or a CPU that is not known,
    MissingExtra, EngineRefusal for what the engine refuses, EngineCrash.
    """
    check_level(level)
    command = [sys.executable, "-m", "qtx.graphs.running"]
    if cpu in SWITCHES:
        raise SpecError(f"CPU {cpu} is a switch of {', '.join(SWITCHED)}: name one of qemu-user's, such as Haswell")
    if cpu is not None:
        command = [*emulate(cpu), *command]
    task = {"path": str(path), "level": level, "expose": expose}
    with Worker(command, make_environment()) as worker:
        head, values = worker.call(task, dict(inputs), SECONDS)
    return EngineRun({name: values[key] for key, name in head["names"].items()}, tuple(head["changed"]))


def run_file(path: Path, inputs: Mapping[str, np.ndarray], level: str, expose: bool) -> EngineRun:
    """`run_engine` in this process."""
    onnx = need("onnx", "engines", "an ONNX file")
    if level == REFERENCE:
        evaluator = need("onnx.reference", "engines", "the ONNX reference").ReferenceEvaluator(str(path))
        outputs = dict(zip(evaluator.output_names, evaluator.run(None, dict(inputs)), strict=True))
        if not expose:
            return EngineRun(outputs)
        shown = evaluator.run(None, dict(inputs), intermediate=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            session = open_session(str(path), level, str(optimized) if expose else None)
            names = [one.name for one in session.get_outputs()]
            outputs = dict(zip(names, session.run(None, dict(inputs)), strict=True))
            if not expose:
                return EngineRun(outputs)
            model = onnx.load(str(optimized))
            made = [name for node in model.graph.node for name in node.output if name and name not in outputs]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
            onnx.save(model, str(optimized))
            session = open_session(str(optimized), "disable")
            shown = dict(zip([*names, *made], session.run([*names, *made], dict(inputs)), strict=True))
    changed = [name for name, value in outputs.items() if not same_bits(value, shown[name])]
    kept = {name: value for name, value in shown.items() if isinstance(value, np.ndarray) and name not in inputs}
    return EngineRun(outputs | kept, tuple(changed))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def run_node(graph: Graph, node: Node, values: Mapping[str, np.ndarray], level: str) -> tuple[np.ndarray, ...]:
    """What an engine makes of one node, given the values of its inputs. Raises EngineRefusal naming the node."""
    onnx = need("onnx", "engines", "an ONNX file")
    helper = onnx.helper
    names = [name for name in dict.fromkeys((*node.inputs, *list_captured(node.proto))) if name]
    given, casts = [], []
    for name in names:
        if name in graph.tensors:
            continue
        element = helper.np_dtype_to_tensor_dtype(values[name].dtype)
        narrow = graph.types.get(name, ("", None))[0]
        if narrow in CODES and narrow != str(values[name].dtype):  # of fewer than 8 bits: NumPy has them in bytes
            casts.append(
                helper.make_node("Cast", [f"{name}.bytes"], [name], to=getattr(onnx.TensorProto, narrow.upper()))
            )
            given.append(helper.make_tensor_value_info(f"{name}.bytes", element, values[name].shape))
        else:
            given.append(helper.make_tensor_value_info(name, element, values[name].shape))
    made = [name for name in node.outputs if name]
    model = helper.make_model(
        helper.make_graph(
            [*casts, node.proto],
            "node",
            given,
            [onnx.ValueInfoProto(name=name) for name in made],
            [graph.tensors[name] for name in names if name in graph.tensors],
        ),
        opset_imports=graph.model.opset_import,
        ir_version=graph.model.ir_version,
    )
    feeds = {one.name: values[one.name.removesuffix(".bytes")] for one in given}
    try:
        if level == REFERENCE:
            evaluator = need("onnx.reference", "engines", "the ONNX reference").ReferenceEvaluator
            results = evaluator(model).run(None, feeds)
        else:
            results = open_session(model.SerializeToString(), level).run(None, feeds)
    except Exception as error:  # whatever an engine raises is its refusal
        said = " ".join(str(error).split())[:200]
        raise EngineRefusal(f"node {node.name} ({node.op}): {type(error).__name__}: {said}") from None
    by_name = dict(zip(made, map(np.asarray, results), strict=True))
    return tuple(by_name.get(name, np.zeros(0)) for name in node.outputs)


def main() -> None:
    """The worker: runs the file of each task."""
    warnings.simplefilter("ignore")  # of packages about themselves

    def do(task: dict[str, Any], values: Values, tell: Tell) -> tuple[dict[str, Any], Values]:
        result = run_file(Path(task["path"]), values, task["level"], task["expose"])
        names = {str(i): name for i, name in enumerate(result.values)}  # a tensor's name may be any text
        return {"names": names, "changed": result.changed}, {key: result.values[name] for key, name in names.items()}

    serve(do)


if __name__ == "__main__":
    main()
