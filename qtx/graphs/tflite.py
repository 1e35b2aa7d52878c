"""A .tflite file of integers: its operators, run by LiteRT with every tensor shown, or one by one by `qtx_ref`.

LiteRT runs in a worker process. Its delegate makes one kernel of many operators and keeps their tensors to itself, so
each tensor is made an output of the graph; outputs that are others then are named.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.integer import fixed_point, products
from qtx_ref.quant import affine
from qtx_ref.spec import Profile, QuantSpec, SpecError, accumulator_bits

from ..engines.backend import need
from ..engines.process import Tell, Values, Worker, make_environment, serve
from ..files.formats import FileError, check_file

__all__ = ["KERNELS", "Graph", "Operator", "Tensor", "compute", "is_known", "read_graph", "run_engine"]

KERNELS = ("reference", "optimized", "xnnpack")
WHAT = "a .tflite file"
MARK = b"TFL3"  # bytes 4 to 8
SECONDS = 600.0
SPECS = {
    "int8": QuantSpec(8, signed=True),
    "uint8": QuantSpec(8),
    "int16": QuantSpec(16, signed=True),
}


@dataclass(frozen=True)
class Tensor:
    """What a tensor is. `scale` and `zero_point`: empty for floats, one, or one per index of the first axis; `data`:
    of a constant."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scale: np.ndarray
    zero_point: np.ndarray
    data: np.ndarray | None


@dataclass(frozen=True)
class Operator:
    """One operator: `activation` is what is fused behind it."""

    kind: str
    inputs: tuple[str, ...]  # "" for one that is left out
    output: str
    activation: str


@dataclass(frozen=True)
class Graph:
    """Operators in the order in which they run, tensors by name."""

    operators: tuple[Operator, ...]
    tensors: dict[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def schema() -> Any:
    """The module of the file's tables."""
    return need("ai_edge_litert.schema_py_generated", "engines", WHAT)


def names_of(kinds: Any) -> dict[int, str]:
    """The names of an enum of the schema, by number."""
    return {value: name for name, value in vars(kinds).items() if isinstance(value, int)}


def read_model(path: Path) -> Any:
    """The file's tables. Raises FileError where it is no .tflite file, MissingExtra without LiteRT."""
    check_file(path, "no such file: give a .tflite file")
    content = path.read_bytes()
    if content[4:8] != MARK:
        raise FileError(f"{path} is no .tflite file")
    try:
        return schema().ModelT.InitFromPackedBuf(content, 0)
    except Exception as error:  # a damaged file fails wherever its offsets lead
        raise FileError(f"{path} cannot be read as .tflite: {' '.join(str(error).split())[:200]}") from None


def read_graph(path: Path) -> Graph:
    """The graph of a file with one subgraph. Raises FileError where it is none, MissingExtra without LiteRT."""
    s, model = schema(), read_model(path)
    if len(model.subgraphs) != 1:
        raise FileError(f"{path} has {len(model.subgraphs)} subgraphs: only files with one are read")
    graph = model.subgraphs[0]
    types, operators, activations = map(names_of, (s.TensorType, s.BuiltinOperator, s.ActivationFunctionType))
    tensors = []
    for position, one in enumerate(graph.tensors):
        about, dtype = one.quantization, types[one.type].lower()
        shape = tuple(int(n) for n in one.shape) if one.shape is not None else ()
        data = model.buffers[one.buffer].data
        value = None if data is None or not len(data) else np.frombuffer(bytes(data), dtype).reshape(shape)
        none: list[float] = []
        scale = none if about is None or about.scale is None else about.scale
        zero = none if about is None or about.zeroPoint is None else about.zeroPoint
        name = one.name.decode() if one.name else f"tensor.{position}"
        tensors.append(Tensor(name, dtype, shape, np.asarray(scale, np.float32), np.asarray(zero, np.int64), value))
    made = []
    for op in graph.operators:
        code = model.operatorCodes[op.opcodeIndex]
        kind = operators[max(code.builtinCode, code.deprecatedBuiltinCode)]
        fused = getattr(op.builtinOptions, "fusedActivationFunction", 0)
        inputs = tuple(tensors[i].name if i >= 0 else "" for i in op.inputs)
        made.append(Operator(kind, inputs, tensors[op.outputs[0]].name, activations[fused]))
    ends = (tuple(tensors[i].name for i in some) for some in (graph.inputs, graph.outputs))
    return Graph(tuple(made), {one.name: one for one in tensors}, *ends)


# --- in LiteRT --------------------------------------------------------------------------------------------------------


def run_engine(
    path: Path, inputs: Mapping[str, np.ndarray], kernels: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Every tensor that an operator makes, and which outputs are others when intermediates are shown; in a worker.

    Raises SpecError for kernels that are not known, EngineRefusal, EngineCrash.
    """
    if kernels not in KERNELS:
        raise SpecError(f"kernels are {kernels!r}: give {', '.join(KERNELS)}")
    with Worker([sys.executable, "-m", "qtx.graphs.tflite"], make_environment()) as worker:
        head, values = worker.call({"path": str(path), "kernels": kernels}, dict(inputs), SECONDS)
    return {name: values[key] for key, name in head["names"].items()}, tuple(head["changed"])


def run_file(
    path: Path, inputs: Mapping[str, np.ndarray], kernels: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """`run_engine` in this process."""
    flatbuffers = need("flatbuffers", "engines", WHAT)
    model = read_model(path)
    graph = model.subgraphs[0]
    plain = invoke(path.read_bytes(), inputs, kernels)
    graph.outputs = np.unique(np.concatenate([graph.outputs, *(op.outputs for op in graph.operators)])).astype(np.int32)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), MARK)
    shown = invoke(bytes(builder.Output()), inputs, kernels)
    changed = [name for name, value in plain.items() if value.tobytes() != shown[name].tobytes()]
    order = [op.output for op in read_graph(path).operators]
    return {name: shown[name] for name in order if name in shown} | plain, tuple(changed)


def invoke(content: bytes, inputs: Mapping[str, np.ndarray], kernels: str) -> dict[str, np.ndarray]:
    """The outputs of a model, by name."""
    module = need("ai_edge_litert.interpreter", "engines", WHAT)
    kinds = {"reference": "BUILTIN_REF", "optimized": "BUILTIN_WITHOUT_DEFAULT_DELEGATES", "xnnpack": "BUILTIN"}
    resolver = module.OpResolverType[kinds[kernels]]
    interpreter = module.Interpreter(model_content=content, num_threads=1, experimental_op_resolver_type=resolver)
    for one in interpreter.get_input_details():
        interpreter.resize_tensor_input(one["index"], inputs[one["name"]].shape)
    interpreter.allocate_tensors()
    for one in interpreter.get_input_details():
        interpreter.set_tensor(one["index"], inputs[one["name"]])
    interpreter.invoke()
    return {one["name"]: np.array(interpreter.get_tensor(one["index"])) for one in interpreter.get_output_details()}


# --- in qtx_ref -------------------------------------------------------------------------------------------------------


def is_known(graph: Graph, op: Operator) -> bool:
    """Whether qtx_ref has the operator."""
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    if op.kind == "FULLY_CONNECTED":
        codes = all(graph.tensors[name].dtype in SPECS for name in (*op.inputs[:2], op.output))
        return codes and op.activation in ("NONE", "RELU")
    if op.kind == "QUANTIZE":
        return x.dtype == "float32" and y.dtype in SPECS and y.scale.size == 1
    return op.kind == "RESHAPE" or (op.kind == "DEQUANTIZE" and x.dtype in SPECS and x.scale.size == 1)


def compute(graph: Graph, op: Operator, values: Mapping[str, np.ndarray], profile: Profile) -> np.ndarray | None:
    """What an operator makes of the values so far, under a profile; None for one that qtx_ref does not have."""
    if not is_known(graph, op):
        return None
    x, y = graph.tensors[op.inputs[0]], graph.tensors[op.output]
    if op.kind == "FULLY_CONNECTED":
        return multiply(graph, op, values, profile)
    value = take(graph, op.inputs[0], values)
    if op.kind == "QUANTIZE":
        spec, zero = SPECS[y.dtype], y.zero_point[0].astype(np.int32)
        return affine.quantize(value, y.scale[0], zero, spec, profile.quantize).astype(y.dtype)
    if op.kind == "DEQUANTIZE":
        return affine.dequantize(value, x.scale[0], x.zero_point[0].astype(np.int32), profile.dequantize)
    return value.reshape(y.shape)


def take(graph: Graph, name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """A constant, or what was made."""
    data = graph.tensors[name].data
    return values[name] if data is None else data


def multiply(graph: Graph, op: Operator, values: Mapping[str, np.ndarray], profile: Profile) -> np.ndarray:
    """Codes of a fully connected layer: rows of x times w (O, I), plus a bias in integers."""
    x, w = (graph.tensors[name] for name in op.inputs[:2])
    y, get = graph.tensors[op.output], partial(take, graph, values=values)
    specs = SPECS[x.dtype], SPECS[w.dtype]
    bias = get(op.inputs[2]).astype(np.int64) if len(op.inputs) > 2 and op.inputs[2] else None
    rows = get(op.inputs[0]).reshape(-1, w.shape[1])
    bits = 64 if bias is not None and graph.tensors[op.inputs[2]].dtype == "int64" else accumulator_bits(*specs)
    zeros = x.zero_point[0].astype(np.int32), w.zero_point.astype(np.int32)
    acc = products.linear(rows, get(op.inputs[1]), *specs, *zeros, bias, bits, profile.matmul)
    real = fixed_point.real_multiplier(x.scale[0], w.scale, y.scale[0], profile.requantize)
    spec, zero = SPECS[y.dtype], y.zero_point[0].astype(np.int32)
    code = fixed_point.requantize(acc, np.asarray(real), zero, spec, profile.requantize)
    if op.activation == "RELU":
        code = np.maximum(code, zero)
    return code.astype(y.dtype).reshape(*get(op.inputs[0]).shape[:-1], -1)


def main() -> None:
    """The worker: runs the file of each task."""
    warnings.simplefilter("ignore")  # of packages about themselves

    def do(task: dict[str, Any], values: Values, tell: Tell) -> tuple[dict[str, Any], Values]:
        made, changed = run_file(Path(task["path"]), values, task["kernels"])
        names = {str(i): name for i, name in enumerate(made)}  # a tensor's name may be any text
        return {"names": names, "changed": changed}, {key: made[name] for key, name in names.items()}

    serve(do)


if __name__ == "__main__":
    main()
