"""Time of statistics and of calibration against a float forward pass of the same batch, taken in turns in one run.

    python benchmarks/analyze.py                           # bert-tiny, untrained
    OMP_NUM_THREADS=1 python benchmarks/analyze.py MODEL.safetensors --batch 16 --length 64
    python benchmarks/analyze.py --memory                  # peak memory of an analysis of N and of 4 N batches

Everything includes its own forward pass. Calibration is by running minimum and maximum. Tokens are random; with
--padding the sequences have different lengths. Ratios are of the minima and, per round, their median.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from qtx.data import load
from qtx.engines.backend import backend
from qtx.files.checkpoint import load_checkpoint
from qtx.measure import analysis
from qtx.recipes.sites import paper_sites, sites
from qtx.report.tables import format_table
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.random import stream
from qtx_ref.spec import Family, ModelSpec, QuantSpec


def batch_of(spec: ModelSpec, size: int, length: int, padding: bool) -> dict[str, np.ndarray]:
    rng = stream(0, "batch")
    if spec.family is Family.VIT:
        return {"images": rng.normal(size=(size, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)}
    tokens = rng.integers(0, spec.vocab, (size, length))
    real = rng.integers(length // 4, length + 1, (size, 1)) if padding else np.full((size, 1), length)
    return {"tokens": tokens, "mask": np.arange(length) < real, "types": np.zeros_like(tokens)}


def time_calls(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one that warms up; each round in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for turn in range(rounds + 1):
        order = stream(turn, "order").permutation(np.array(order, dtype=object)).tolist()
        for name, call in order:
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak(batches: int) -> None:
    """Prints the peak memory, in KiB, of analyzing so many batches of bert-tiny in this process."""
    import resource

    spec = preset("bert-tiny")
    data = load(None, spec)
    given = (batch_of(spec, 16, spec.length, True) for _ in range(batches))
    analysis.analyze(backend("torch").Model(spec, init_params(spec, 0)), data, given, batches)
    click.echo(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--batch", "size", default=16, show_default=True)
@click.option("--length", default=64, show_default=True)
@click.option("--padding", is_flag=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--memory", is_flag=True)
@click.option("--peak", "batches", type=int, hidden=True)
def main(checkpoint, size, length, padding, rounds, memory, batches):
    torch = backend("torch")
    if batches:
        peak(batches)
        return
    if memory:
        rows = []
        for count in (4, 16, 64):
            command = [sys.executable, __file__, "--peak", str(count)]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append([str(count), f"{int(found) / 1024:.1f}"])
        click.echo(format_table(["batches", "peak MiB"], rows))
        return
    if checkpoint is None:
        spec = preset("bert-tiny")
        model = torch.Model(spec, init_params(spec, 0))
    else:
        trained = load_checkpoint(checkpoint)
        spec, model = trained.spec, torch.Model(trained.spec, trained.params)
    batch, named = batch_of(spec, size, length, padding), sites(spec)
    every, paper = dict.fromkeys(named.results, "sequence"), paper_sites(spec).inf_norm
    results, operands = ({site: QuantSpec() for site in part} for part in (named.results, named.operands))
    calls = {
        "float forward": lambda: model.forward(batch),
        f"statistics, all {len(every)} sites": lambda: model.statistics(batch, every),
        f"statistics, the paper's {len(paper)} sites": lambda: model.statistics(batch, paper),
        "published metrics there": lambda: model.statistics(batch, paper, ("inf_norm", "kurtosis_published")),
        f"calibration, {len(results)} results": lambda: model.calibrate([batch], results),
        f"calibration, {len(operands)} operands too": lambda: model.calibrate([batch], results | operands),
    }
    seconds = time_calls(calls, rounds)
    base = seconds["float forward"]
    rows = [
        [
            name,
            f"{1000 * min(taken):.1f}",
            f"{min(taken) / min(base):.2f}",
            f"{statistics.median(a / b for a, b in zip(taken, base, strict=True)):.2f}",
        ]
        for name, taken in seconds.items()
    ]
    click.echo(f"{spec.layers} layers, width {spec.width}, {size} x {length} tokens, {torch.threads()} thread(s)")
    click.echo(format_table(["", "ms", "to forward", "median"], rows))


if __name__ == "__main__":
    main()
