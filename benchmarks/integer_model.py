"""A whole model in integers against the same model in float: time and memory, as ratios within one run.

    python benchmarks/integer_model.py                             # bert-base, 8 x 128 tokens
    python benchmarks/integer_model.py --model opt-tiny --batch 4 --rounds 9

The two backends must give the same codes before anything is timed. Times are medians of runs taken in turns; memory is
the largest resident size of a process that holds and runs one of them alone, less that of one that only holds Python
and the libraries (Linux: VmHWM).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from qtx.engines.backend import backend
from qtx.files.artifact import Artifact, load_artifact, make_artifact, save_artifact
from qtx.files.checkpoint import Checkpoint, save_checkpoint
from qtx.recipes.named import recipe, resolve
from qtx.report.tables import format_table
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention, preset
from qtx_ref.random import stream
from qtx_ref.spec import QTX, Family, ModelSpec, Nonlinear

RUNS = ("ref float", "ref integer", "torch float", "torch integer")


def random_batch(spec: ModelSpec, size: int, length: int) -> dict[str, np.ndarray]:
    rng = stream(0, "benchmark")
    if spec.family is Family.VIT:
        return {"images": rng.normal(size=(size, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)}
    tokens = rng.integers(0, spec.vocab, (size, length))
    return {"tokens": tokens, "types": np.zeros_like(tokens), "mask": np.ones(tokens.shape, bool)}


def make(name: str, kind: str, recipe_name: str, file: Path, size: int, length: int) -> None:
    """An artifact of first parameters, its ranges from one random batch."""
    spec = replace(preset(name), attention=attention(kind))
    params = init_params(spec, 0)
    chosen = recipe(recipe_name, spec)
    model = backend("torch").Model(spec, params)
    ranges = model.calibrate([random_batch(spec, size, length)], resolve(chosen, spec))
    source = file.with_suffix(".safetensors")
    checkpoint = Checkpoint(spec, params)
    save_checkpoint(source, checkpoint)
    save_artifact(file, make_artifact(source, checkpoint, chosen, ranges, QTX, Nonlinear.TABLE, []))


def runner(run: str, artifact: Artifact):
    """A call that runs a batch once."""
    library, kind = run.split()
    module = backend(library)
    if kind == "float":
        model = module.Model(artifact.spec, artifact.float_params())
        return model.forward
    return module.IntegerModel(artifact.spec, artifact.constants, artifact.quants, artifact.profile).run


def peak_memory(run: str | None, file: Path, size: int, length: int) -> int:
    """Bytes, in a process of its own."""
    call = [
        sys.executable,
        __file__,
        "--alone",
        str(run),
        "--file",
        str(file),
        "--batch",
        str(size),
        "--length",
        str(length),
    ]
    return json.loads(subprocess.run(call, capture_output=True, check=True, text=True).stdout)


def alone(run: str, file: Path, size: int, length: int) -> None:
    import torch  # noqa: F401  # part of every process that is compared

    if run != "None":
        artifact = load_artifact(file)
        runner(run, artifact)(random_batch(artifact.spec, size, length))
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))


@click.command(help=__doc__)
@click.option("--model", default="bert-base", show_default=True)
@click.option("--attention", "kind", default="vanilla", show_default=True)
@click.option("--recipe", "recipe_name", default="w8a8", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--alone", "only", hidden=True)
@click.option("--file", type=click.Path(path_type=Path), hidden=True)
def main(model, kind, recipe_name, batch, length, rounds, only, file) -> None:
    if only is not None:
        alone(only, file, batch, length)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qtx"
        make(model, kind, recipe_name, path, batch, length)
        artifact = load_artifact(path)
        inputs = random_batch(artifact.spec, batch, length)
        calls = {run: runner(run, artifact) for run in RUNS}
        if not np.array_equal(calls["ref integer"](inputs).value, calls["torch integer"](inputs).value):
            raise SystemExit("the backends' integers differ: nothing was timed")
        seconds: dict[str, list[float]] = {run: [] for run in RUNS}
        for turn in range(rounds + 1):
            for run, call in calls.items():
                start = time.perf_counter()
                call(inputs)
                if turn:
                    seconds[run].append(time.perf_counter() - start)
        base = peak_memory(None, path, batch, length)
        memory = {run: peak_memory(run, path, batch, length) - base for run in RUNS}
    rows = []
    for run in RUNS:
        floating = f"{run.split()[0]} float"
        ratio = statistics.median(x / y for x, y in zip(seconds[run], seconds[floating], strict=True))
        times = f"{statistics.median(seconds[run]):.2f}"
        rows.append([run, times, f"{ratio:.2f}", f"{memory[run] / 2**20:.0f}", f"{memory[run] / memory[floating]:.2f}"])
    header = [f"{model}, {kind}, {recipe_name}, {batch} x {length}", "s", "to float", "MiB", "to float"]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
