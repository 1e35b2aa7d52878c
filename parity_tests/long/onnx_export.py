"""Exported files of published sizes: every code of every site, in each engine, against the reference.

    python -m parity_tests.long.onnx_export [--model minilm ...] [--form integer ...] [--rows 2] [--tokens 32] [--small]

--small: instead, every small model of the cases, each attention and gate of each family, in both forms.

First values of the parameters, their vectors moved a little, ranges from random batches, int8. The table is the one in
docs/onnx.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from parity_tests.subjects import small_models
from parity_tests.subjects.integer_models import Batch, lower_model, make_recipe
from qtx.files.artifact import Artifact, load_artifact, save_artifact
from qtx.graphs.export import FORMS, export_artifact
from qtx.graphs.export_check import EngineCheck, check_export
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention, preset
from qtx_ref.random import stream
from qtx_ref.spec import Family, Head, ModelSpec, Nonlinear

TINY = ("opt-tiny", "vit-tiny")
CALIBRATION = 24  # tokens of each of two batches


def list_models() -> dict[str, ModelSpec]:
    """The shapes that are exported."""
    base = preset("bert-base")
    minilm = replace(base, layers=6, width=384, heads=12, hidden=1536, head=Head.NONE)
    tiny = {name: preset(name) for name in TINY}
    clipped = replace(tiny["opt-tiny"], attention=attention("clipped"))
    return {"minilm": minilm, "bert-base": base, "opt-tiny": clipped, "vit-tiny": tiny["vit-tiny"]}


def random_batch(spec: ModelSpec, rows: int, tokens: int, place: str) -> Batch:
    """Random images, or tokens of which the last row ends early."""
    rng = stream(0, "onnx export", place)
    if spec.family is Family.VIT:
        size = (rows, spec.channels, spec.image_size, spec.image_size)
        return {"images": rng.normal(size=size).astype(np.float32)}
    token = rng.integers(0, spec.vocab, (rows, min(tokens, spec.length)))
    mask = np.ones(token.shape, bool)
    mask[-1, -(token.shape[1] // 4) :] = False
    return {"tokens": token, "types": rng.integers(0, max(spec.types, 1), token.shape), "mask": mask}


def make_file(name: str, path: Path) -> None:
    """An int8 artifact of that shape."""
    spec = (list_models() | small_models.specs())[name]
    params = init_params(spec, 0)
    for key, value in params.items():
        if value.ndim == 1:
            value += stream(0, "onnx export", key).normal(0, 0.05, value.shape).astype(np.float32)
    batches = [random_batch(spec, 1, CALIBRATION, f"calibration {i}") for i in range(2)]
    low = lower_model(spec, params, batches, batches[0])
    recipe = make_recipe("w8a8", spec)
    save_artifact(path, Artifact(spec, recipe, low.profile, Nonlinear.TABLE, dict(low.constants), {}))


def measure(name: str, form: str, folder: Path, batch: tuple[int, int]) -> Iterator[tuple[EngineCheck, float, int]]:
    """Each engine's result, with its seconds and the bytes of the files."""
    source, out = folder / f"{name}.qtx", folder / f"{name}-{form}.onnx"
    if not source.exists():
        make_file(name, source)
    written = export_artifact(source, out, form)
    inputs = random_batch(load_artifact(source).spec, *batch, "input")
    start = time.perf_counter()
    for result in check_export(source, out, inputs):
        yield result, time.perf_counter() - start, sum(written.files.values())
        start = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(list_models()), default=list(list_models()))
    parser.add_argument("--form", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    models = list(small_models.specs()) if options.small else options.model
    failed = False
    print("| model | form | MB | engine | exact codes | differ | near | float codes | flip | by | free | seconds |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            for form in options.form:
                for result, seconds, size in measure(name, form, Path(folder), (options.rows, options.tokens)):
                    failed |= not result.equal
                    numbers = [f"{number:,}" for number in result.count()]
                    row = [name, form, f"{size / 1e6:.1f}", result.engine, *numbers, f"{seconds:.1f}"]
                    print("|", " | ".join(row), "|", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
