"""onnxruntime as an engine beside ours: its quantization tools, a session, and where a session spends its time."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .backend import need

TOP = 6  # ops that a profile names
PASSES = 3  # of a profile
PRODUCTS = ("MatMul", "Gemm", "Attention")  # in the names of ops that multiply matrices
RUNTIME = ("onnxruntime", "engines", "engine onnxruntime")


class OnnxRunner:
    """An ONNX file on onnxruntime's CPU provider; a runner as `qtx_torch.runners` has them. Raises MissingExtra."""

    def __init__(self, path: Path, threads: int, profile: bool = False) -> None:
        runtime = need(*RUNTIME)
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = threads
        # as torch's threads here, which sleep while they wait: engines take turns, and none may heat the cores of the
        # next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(path.with_suffix(".profile"))
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def inputs(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the file takes of a batch."""
        return {name: np.ascontiguousarray(batch[name]) for name in self.names}

    def __call__(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return self.session.run(None, inputs)[0]

    def output(self, result: np.ndarray) -> np.ndarray:
        """What a call gave, as an array."""
        return result


def by_clock(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def shares(path: Path, threads: int, batch: Mapping[str, np.ndarray]) -> tuple[dict[str, float], float]:
    """Share of the op time of some passes: of each of the most expensive ops, and of all matrix products."""
    runner = OnnxRunner(path, threads, profile=True)
    for _ in range(PASSES):
        runner(runner.inputs(batch))
    written = Path(runner.session.end_profiling())
    spent: Counter[str] = Counter()
    for event in json.loads(written.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    written.unlink()
    total = sum(spent.values()) or 1
    matrices = sum(t for name, t in spent.items() if any(part in name for part in PRODUCTS))
    return {name: t / total for name, t in spent.most_common(TOP)}, matrices / total


def quantize(source: Path, path: Path, static: bool, batches: Iterator[Mapping[str, np.ndarray]]) -> None:
    """An int8 model, the file `path`, of the ONNX model `source` by onnxruntime's tools, as they come.

    Dynamic: int8 weights, activations measured as they come. Static: uint8 activations by min-max over `batches`, int8
    weights, of matrix products alone (QDQ): a range of scores that a mask has made -inf has no scale.
    Raises MissingExtra without onnx or onnxruntime.
    """
    need("onnx", *RUNTIME[1:])
    tools = need("onnxruntime.quantization", *RUNTIME[1:])
    shapes = need("onnxruntime.quantization.shape_inference", *RUNTIME[1:])
    logging.getLogger().setLevel(logging.ERROR)
    prepared = path.with_suffix(".prepared.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about themselves
        shapes.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        if static:
            kinds = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QInt8}
            products = {"op_types_to_quantize": ["MatMul", "Gemm"]}
            tools.quantize_static(str(prepared), str(path), make_reader(tools, source, batches), **kinds, **products)
        else:
            tools.quantize_dynamic(str(prepared), str(path))
    prepared.unlink()


def make_reader(tools: Any, source: Path, batches: Iterator[Mapping[str, np.ndarray]]) -> Any:
    """Calibration batches as the tools of onnxruntime, which has no types, ask for them."""
    wanted = OnnxRunner(source, 1)

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else wanted.inputs(batch)

    return Reader()
