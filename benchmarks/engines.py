"""A forward pass of one float model by others: `transformers`, onnxruntime, torch's and torchao's dynamic int8.

int8 engines keep norms, softmax and activations in float; their logits are only near.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qtx.engines import ort
from qtx.engines.backend import MissingExtra, need
from qtx_ref.models.initial import init_params
from qtx_ref.spec import ModelSpec
from qtx_torch.backend import Model
from qtx_torch.runners import onnx_export
from qtx_torch.runners.dynamic_int8 import DynamicInt8
from qtx_torch.runners.passes import FloatRunner

from .harness import Call, Row, Skip, compare, near, peak
from .steps import make_transformers, random_batch, read_logits, shape

WAYS = (
    "qtx, compiled",
    "transformers",
    "transformers, compiled",
    "onnxruntime",
    "torch dynamic int8",
    "torchao dynamic int8, compiled",
    "onnxruntime dynamic int8",
    "onnxruntime static int8",
)
INT8 = 0.5  # how far logits of int8 engines may be; those of first parameters are below 4


@cache
def make_shape(model: str, layers: int) -> ModelSpec:
    return shape(model, 0.0, layers)


def export(way: str, folder: str, model: str, layers: int, batch: int, length: int) -> Path:
    """The ONNX file that onnxruntime runs; made once in the folder."""
    spec = make_shape(model, layers)
    source = Path(folder) / "float.onnx"
    if not source.exists():
        onnx_export.export_onnx(spec, init_params(spec, 0), source, masked=False)
    if way == "onnxruntime":
        return source
    static = "static" in way
    path = Path(folder) / f"{'static' if static else 'dynamic'}.onnx"
    if not path.exists():
        ort.quantize(source, path, static, iter([random_batch(spec, batch, length)]))
    return path


def build(way: str, folder: str, model: str, layers: int, batch: int, length: int) -> Call:
    """A forward pass that gives logits."""
    spec = make_shape(model, layers)
    data = random_batch(spec, batch, length)
    if way.startswith("onnxruntime"):
        runner = ort.OnnxRunner(export(way, folder, model, layers, batch, length), torch.get_num_threads())
        inputs = runner.inputs(data)
        return lambda: runner(inputs)
    if way.startswith(("transformers", "torchao")):
        need("transformers", "bench", "benchmarks")
        theirs = make_transformers(spec, init_params(spec, 0)).eval()
        if way.startswith("torchao"):
            quantization = need("torchao.quantization", "bench", "benchmarks")
            config = quantization.Int8DynamicActivationInt8WeightConfig()
            # as torch's own: every linear layer, the decoder too
            quantization.quantize_(theirs, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))
        if way.endswith("compiled"):
            theirs = torch.compile(theirs)
        tokens = torch.from_numpy(data["tokens"])

        def call() -> torch.Tensor:
            with torch.no_grad():
                return read_logits(theirs(tokens))

        return call
    ours = Model(spec, init_params(spec, 0))
    runner = FloatRunner(ours, DynamicInt8(ours) if way == "torch dynamic int8" else None)
    given = runner.inputs(data)
    run = torch.compile(runner.__call__) if way.endswith("compiled") else runner
    return lambda: run(given)


def weigh(way: str, folder: str, *size: object) -> float | None:
    return peak(build, way, folder, *size, compiled=way.endswith("compiled"))


def compare_output(call: Call, logits: np.ndarray, limit: float) -> str:
    return near(call(), logits, limit, "logits")


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Each way against ours in float, eager."""
    sizes = [("bert-tiny", 1, 1, 32)] if quick else [("bert-base", 6, 1, 128), ("bert-base", 6, 8, 128)]
    for size in sizes:
        title = f"{size[0]} of {size[1]} layers, {size[2]} x {size[3]}"
        with tempfile.TemporaryDirectory(prefix="qtx-bench-") as folder:
            base = build("qtx", folder, *size)
            logits, least = np.asarray(base()), weigh("qtx", folder, *size)
            # compiling takes a minute each
            for way in (way for way in WAYS if size[2] == 1 or not way.endswith("compiled")):
                if quick and way.endswith("compiled"):
                    continue
                try:
                    call, limit = build(way, folder, *size), INT8 if "int8" in way else 1e-4
                    check = partial(compare_output, call, logits, limit)
                    yield compare(
                        f"{title}, {way}", call, "qtx", base,
                        rounds=2 if quick else 7, check=check,
                        mib=weigh(way, folder, *size), against_mib=least,
                    )  # fmt: skip
                except MissingExtra as error:
                    yield Skip(way, str(error))
