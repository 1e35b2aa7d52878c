"""All that a GPU is asked to show, in 10 minutes: steps against `transformers`, memory, quantization, parity.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --model bert-tiny --batch 2 --length 16 --only random --out cpu.json

Steps are taken in turns under autocast to bfloat16 (`--dtype`), those of transformers with its fused attention; peak
memory is that of two steps of one model alone on the device. The JSON is written after every part, so that what was
done stays where time runs out. Exit status 1: a parity case failed.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import click
import torch
from steps import (
    Arrays,
    Step,
    compare_logits,
    make_theirs,
    make_trainer,
    random_batch,
    ratios,
    shape,
    their_step,
    time_steps,
)

from parity_tests import runner
from qtx.engines.backend import MissingDevice
from qtx.report.tables import format_table
from qtx_ref.models.initial import init_params
from qtx_ref.spec import ModelSpec

# name: rate of dropout, the step, the one that it is held against, at most how many times its time
PAIRS = {
    "no dropout": (0.0, "qtx", "transformers", 1.05),
    "dropout 0.1": (0.1, "qtx", "transformers", 1.25),
    "w8a8": (0.0, "qtx w8a8", "qtx", 1.15),
    "no dropout, compiled": (0.0, "qtx compiled", "transformers", 1.05),
    "dropout 0.1, compiled": (0.1, "qtx compiled", "transformers", 1.25),
    "w8a8, compiled": (0.0, "qtx w8a8 compiled", "qtx compiled", 1.15),
}


def build(name: str, spec: ModelSpec, params: Arrays, batch: Arrays, device: str, dtype: str) -> Step:
    """The step of that name; logits of transformers' are compared with ours first."""
    if name != "transformers":
        words = name.split()
        quant, compiled = "w8a8" if "w8a8" in words else "", "compiled" in words
        trainer = make_trainer(spec, params, device=device, dtype=dtype, quant=quant, compiled=compiled)
        return lambda: trainer.step(batch)
    theirs = make_theirs(spec, params, device)
    compare_logits(make_trainer(spec, params, device=device, dtype=dtype).model, theirs, batch)
    return their_step(theirs, batch, dtype)


def measure_peak(*given: Any) -> int | None:
    """Bytes at most in two steps of one model, alone; None on a CPU."""
    free()
    step = build(*given)
    if torch.cuda.is_available():
        free()
        torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_pair(name: str, size: tuple[str, int, int], rounds: int, device: str, dtype: str) -> dict[str, Any]:
    """Times, their ratio and both memories of a pair."""
    rate, ours, against, bound = PAIRS[name]
    spec = shape(size[0], rate)
    params, batch = init_params(spec, 0), random_batch(spec, *size[1:])
    peaks = [measure_peak(step, spec, params, batch, device, dtype) for step in (ours, against)]
    free()
    times = time_steps({step: build(step, spec, params, batch, device, dtype) for step in (ours, against)}, rounds)
    middle, low, high = ratios(times, ours, against)
    ms = [1000 * statistics.median(times[step]) for step in (ours, against)]
    found = {"step": ours, "against": against, "ms": ms, "ratio": middle, "lowest": low, "highest": high}
    return found | {"bound": bound, "peak_bytes": peaks}


def format_pair(name: str, pair: dict[str, Any]) -> list[str]:
    memory = ["-" if peak is None else f"{peak / 2**20:.0f}" for peak in pair["peak_bytes"]]
    spread = f"{pair['lowest']:.3f} to {pair['highest']:.3f}"
    times = [f"{ms:.2f}" for ms in pair["ms"]]
    return [name, pair["step"], pair["against"], *times, f"{pair['ratio']:.3f}", spread, f"{pair['bound']}", *memory]


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--model", default="bert-base", show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--rounds", default=21, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--pair", "pairs", multiple=True, type=click.Choice(list(PAIRS)), default=list(PAIRS))
@click.option("--only", help="Only these parity cases, as `qtx parity --only`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON.")
def main(
    device: str,
    model: str,
    batch: int,
    length: int,
    rounds: int,
    dtype: str,
    pairs: tuple[str, ...],
    only: str | None,
    out: Path,
) -> None:
    try:
        runner.check_place("torch", device)
    except MissingDevice as error:
        raise SystemExit(str(error)) from None
    what = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found: dict[str, Any] = {"device": what, "torch": torch.__version__, "model": model, "dtype": dtype}
    found |= {"batch": batch, "length": length, "steps": {}}
    title = f"{model}, {batch} x {length}, {dtype}, {what}"
    header = [title, "step", "against", "ms", "ms", "ratio", "of rounds", "bound", "MiB", "MiB"]

    def take_times(names: list[str]) -> None:
        for name in names:
            found["steps"][name] = time_pair(name, (model, batch, length), rounds, device, dtype)
            out.write_text(json.dumps(found, indent=2) + "\n")
        if names:
            print(format_table(header, [format_pair(name, found["steps"][name]) for name in names]), flush=True)

    take_times([name for name in pairs if "compiled" not in name])
    report = runner.run("torch", device, "float32", only)
    found["parity"] = report.as_json()
    out.write_text(json.dumps(found, indent=2) + "\n")
    failed = [f"{row.group}/{row.name}" for row in report.rows if not row.ok]
    print(f"parity on {device}: {len(report.rows)} cases, {len(failed)} failed {' '.join(failed)}", flush=True)
    take_times([name for name in pairs if "compiled" in name])  # last: compiling takes a minute or more
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
