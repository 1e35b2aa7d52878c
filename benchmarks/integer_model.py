"""A whole model in integers, compiled, against the same model in float: the faster of its eager and compiled forward
passes. Its codes are the eager integers' before anything is timed, whose are the reference's (`qtx parity`).

Floors of a layer, (B T) rows: 12 D^2 products a row at the int8 unit's rate, with VNNI an eighth of float32's time;
attention's 2 T D a row; about 30 vector operations for each of 20 D codes a row, and of 2 H T probabilities. Without a
head: a language model's last product, which integers make eight times faster, would hide the rest.

    python -m benchmarks group integer_model
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks group integer_model                # as without VNNI
    python -m benchmarks.integer_model bert-base w8a8                               # seconds to the first output
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from qtx.engines import ort
from qtx.engines.backend import MissingExtra, need
from qtx.recipes.named import recipe, resolve
from qtx_ref.integer.lowering import lower
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import QTX, Granularity, Head, ModelSpec, Output, QuantSpec, Recipe, Rule
from qtx_torch.backend import IntegerModel, Model
from qtx_torch.integer.machine import multiplies_bytes
from qtx_torch.numerics import Float
from qtx_torch.runners import onnx_export
from qtx_torch.runners.passes import IntegerRunner

from .harness import Call, Row, Skip, compare, equal, peak, time_calls
from .steps import random_batch

SIZES = {"6 x 384": {"layers": 6, "width": 384, "hidden": 1536}, "bert-base": {}, "tiny": {"layers": 2, "width": 48}}
CELLS = ((1, 64), (1, 128), (8, 64), (8, 128))
WITH_BYTES = {"w8a8": 0.6, "w8a8-channel-ffn16": 0.9, "w8a8, rows": 0.9, "w8a8-peg4": 0.9, "w8a8-out8": 0.9}
WITHOUT = {"w8a8": 1.3, "w7a8": 0.9}
ENGINES = ("onnxruntime dynamic int8", "onnxruntime static int8")
FIRST, SECOND = 60, 5  # seconds to the first output: nothing compiled yet, and all in inductor's cache


@cache
def make_spec(size: str) -> ModelSpec:
    spec = replace(preset("bert-base"), head=Head.NONE, dropout=0.0, attention_dropout=0.0)
    return replace(spec, **SIZES[size])


def make_recipe(name: str, spec: ModelSpec) -> Recipe:
    """By its name; or w8a8 with a scale per token of what enters a linear layer, which integers can have (w8a8-token
    scales what enters norms too)."""
    if name != "w8a8, rows":
        return recipe(name, spec)
    base, rows = recipe("w8a8", spec), QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
    sites = ("embed.norm", "layer.*norm", "*.attn.context")
    return replace(base, rules=(*base.rules, Rule(sites, rows, "a scale per token of what enters a linear")))


def make_integers(size: str, name: str, *, compiled: bool) -> IntegerModel:
    """First parameters under a recipe, with ranges of one random batch."""
    spec = make_spec(size)
    params = init_params(spec, 0)
    quants = resolve(make_recipe(name, spec), spec)
    ranges = Model(spec, params).calibrate([random_batch(spec, 2, 64)], quants)
    constants = lower(spec, params, quants, ranges)
    return IntegerModel(spec, constants, quants, QTX, compiled=compiled)


def build(way: str, size: str, batch: int, length: int) -> Call:
    """A forward pass in float, `float` or `float, compiled`, or in compiled integers of the recipe `way`."""
    spec = make_spec(size)
    data = random_batch(spec, batch, length)
    if not way.startswith("float"):
        return run_integers(make_integers(size, way, compiled=True), data)
    model, nx = Model(spec, init_params(spec, 0)), Float()
    run = torch.compile(model.net) if way.endswith("compiled") else model.net
    inputs = model.accept(data)
    return torch.no_grad()(lambda: run(nx, inputs))


def run_integers(model: IntegerModel, data: dict[str, np.ndarray]) -> Call:
    runner = IntegerRunner(model)
    inputs = runner.inputs(data)
    return lambda: runner(inputs)


def check_codes(model: IntegerModel, data: dict[str, np.ndarray]) -> str:
    """Compiled and eager: `record` keeps the eager form."""
    ours, theirs = model.run(data), model.run(data, lambda site, value: None)
    return equal(ours.value, theirs.value)


def build_engine(way: str, folder: Path, size: str, batch: int, length: int) -> Call:
    """A forward pass of onnxruntime's int8."""
    need("onnxruntime", "onnx", "benchmarks")
    spec = make_spec(size)
    source, path = folder / f"{size}.onnx", folder / f"{size}-{way}.onnx"
    if not source.exists():
        onnx_export.export_onnx(spec, init_params(spec, 0), source, masked=False)
    data = random_batch(spec, batch, length)
    if not path.exists():
        ort.quantize(source, path, "static" in way, iter([data]))
    runner = ort.OnnxRunner(path, torch.get_num_threads())
    inputs = runner.inputs(data)
    return lambda: runner(inputs)


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Each recipe against the faster float; w8a8 against int8 engines too."""
    bounds = WITH_BYTES if multiplies_bytes("cpu") else WITHOUT
    rounds = 2 if quick else 5
    for size in ("tiny",) if quick else ("6 x 384", "bert-base"):
        models = {name: make_integers(size, name, compiled=True) for name in (["w8a8"] if quick else bounds)}
        with tempfile.TemporaryDirectory(prefix="qtx-bench-") as folder:
            for batch, length in CELLS[:1] if quick else CELLS:
                data = random_batch(make_spec(size), batch, length)
                floats = {way: build(way, size, batch, length) for way in ("float", "float, compiled")}
                times = time_calls(floats, rounds, device)
                against = min(floats, key=lambda way: np.median(times[way]))
                for name, model in models.items():
                    yield compare(
                        f"{size}, {batch} x {length}, {name}", run_integers(model, data), against, floats[against],
                        rounds=rounds, check=partial(check_codes, model, data), bound=bounds[name],
                    )  # fmt: skip
                for way in ENGINES if bounds is WITH_BYTES else ():  # no switch of ours takes VNNI from them
                    try:
                        other = build_engine(way, Path(folder), size, batch, length)
                    except MissingExtra as error:
                        yield Skip(way, str(error))
                        continue
                    ours = run_integers(models["w8a8"], data)
                    yield compare(
                        f"{size}, {batch} x {length}, w8a8", ours, way, other, rounds=rounds,
                        check=partial(check_codes, models["w8a8"], data), notes="its norms and softmax are in float",
                    )  # fmt: skip
        if not quick:
            yield weigh_start(size)


def weigh_start(size: str) -> Row:
    """Seconds from a lowered model to its first output, in two processes with one cache that was empty; memory of the
    compiled model beside float's."""
    with tempfile.TemporaryDirectory(prefix="qtx-bench-") as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        call = [sys.executable, "-m", "benchmarks.integer_model", size, "w8a8"]
        first, second = (
            json.loads(subprocess.run(call, env=environment, capture_output=True, check=True, text=True).stdout)
            for _ in range(2)
        )
    notes = (
        f"first {first:.1f} s (at most {FIRST}), second {second:.1f} s (at most {SECOND}); memory: a pass of 8 x 128"
    )
    memory = [peak(build, way, size, 8, 128, compiled=True) for way in ("w8a8", "float, compiled")]
    return Row(
        f"{size}, w8a8, second start", "first start", second / first, second / first, second / first,
        1000 * second, 1000 * first, memory[0], memory[1], notes=notes,
    )  # fmt: skip


def time_start(size: str, name: str) -> float:
    """Seconds from a model that is lowered to its first output, of one sequence."""
    model = make_integers(size, name, compiled=False)
    constants = {key: value.numpy() for key, value in model.constants.items()}
    data = random_batch(model.spec, 1, 128)
    begin = time.perf_counter()
    out: Output = IntegerModel(model.spec, constants, model.quants, model.profile, compiled=True).run(data)
    assert out.value.shape[:2] == (1, 128)
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps(time_start(*sys.argv[1:])))
