"""All that a GPU is asked to show, in 10 minutes: parity, steps against `transformers`, memory, quantization.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --device cpu --model bert-tiny --batch 2 --length 16 --only random --out cpu.json

Steps are taken in turns under autocast to bfloat16 (`--dtype`), those of transformers with its fused attention; peak
memory is what two steps of a model add to what was there before it. The JSON is written after every part, and as
parity goes; a part that fails is noted in it, and the next one begins. At the end of `--minutes` what is under way is
cut off, whatever it waits for, and what is missing is said. Exit status 1: something failed or is missing.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from parity_tests import runner
from qtx.engines.backend import MissingDevice
from qtx.report.tables import format_table
from qtx_ref.models.initial import init_params
from qtx_ref.spec import ModelSpec

from .harness import make_row, time_calls
from .steps import Arrays, Step, compare_logits, make_trainer, make_transformers, random_batch, shape, torch_step

# name: rate of dropout, the step, the one that it is held against, at most how many times its time
PAIRS = {
    "no dropout": (0.0, "qtx", "transformers", 1.05),
    "dropout 0.1": (0.1, "qtx", "transformers", 1.25),
    "w8a8": (0.0, "qtx w8a8", "qtx", 1.15),
    "no dropout, compiled": (0.0, "qtx compiled", "transformers", 1.05),
    "dropout 0.1, compiled": (0.1, "qtx compiled", "transformers", 1.25),
    "w8a8, compiled": (0.0, "qtx w8a8 compiled", "qtx compiled", 1.15),
}


def build(name: str, spec: ModelSpec, params: Arrays, batch: Arrays, dtype: str, device: str) -> Step:
    """The step of that name; logits of transformers' are compared with ours first."""
    if name != "transformers":
        words = name.split()
        quant, compiled = "w8a8" if "w8a8" in words else "", "compiled" in words
        trainer = make_trainer(spec, params, device=device, dtype=dtype, quant=quant, compiled=compiled)
        return lambda: trainer.step(batch)
    theirs = make_transformers(spec, params, device)
    compare_logits(make_trainer(spec, params, device=device, dtype=dtype).model, theirs, batch)
    return torch_step(theirs, batch, dtype)


def measure_peak(device: str, *given: Any) -> tuple[Step, int | None]:
    """A step, and how many bytes it and two of it take at most, beside what was there; None on a CPU."""
    free()
    cuda = device != "cpu"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    step = build(*given, device)
    free()
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    step()
    step()
    return step, torch.cuda.max_memory_allocated(device) - before if cuda else None


def free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def time_pair(name: str, size: tuple[str, int, int], rounds: int, device: str, dtype: str) -> dict[str, Any]:
    """Times, their ratio and both memories of a pair."""
    if "compiled" in name:
        torch._dynamo.reset()  # it compiles the same code only so many times
    rate, ours, against, bound = PAIRS[name]
    spec = shape(size[0], rate)
    params, batch = init_params(spec, 0), random_batch(spec, *size[1:])
    steps, peaks = {}, []
    for step in (ours, against):
        steps[step], peak = measure_peak(device, step, spec, params, batch, dtype)
        peaks.append(peak)
    row = make_row(ours, against, time_calls(steps, rounds, device))
    found = {"step": ours, "against": against, "ms": [row.ms, row.against_ms]}
    found |= {"ratio": row.ratio, "lowest": row.low, "highest": row.high}
    return found | {"bound": bound, "peak_bytes": peaks}


def format_pair(name: str, pair: dict[str, Any]) -> list[str]:
    memory = ["-" if peak is None else f"{peak / 2**20:.0f}" for peak in pair["peak_bytes"]]
    spread = f"{pair['lowest']:.3f} to {pair['highest']:.3f}"
    times = [f"{ms:.2f}" for ms in pair["ms"]]
    return [name, pair["step"], pair["against"], *times, f"{pair['ratio']:.3f}", spread, f"{pair['bound']}", *memory]


def describe(device: str) -> dict[str, Any]:
    """What the figures depend on: versions, and the device."""
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if device != "cpu" else None}
    for package in ("transformers", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return runner.describe_machine("torch", device) | versions


class Parts:
    """Parts that are done one after another in a given time, and the file that has what came of them."""

    def __init__(self, out: Path, found: dict[str, Any], seconds: float) -> None:
        self.out, self.found, self.end = out, found, time.monotonic() + seconds
        self.missing: list[str] = []
        self.failed: list[str] = []
        self.longest = 0.0
        self.lock = threading.Lock()

    def write(self) -> None:
        """The file as of now, at no moment half of it."""
        with self.lock:
            part = self.out.with_name(f".{self.out.name}.part")
            part.write_text(json.dumps(self.found | {"missing": self.missing, "failed": self.failed}, indent=2) + "\n")
            part.replace(self.out)

    def take(self, parts: dict[str, Callable[[], bool]]) -> None:
        """Does the parts. One that returns False or raises has failed; one that would take, as long as the longest
        before, more than what is left is not begun."""
        self.missing = list(parts)
        self.write()
        timer = threading.Timer(self.end - time.monotonic(), self.cut)
        timer.daemon = True
        timer.start()
        for name, do in parts.items():
            begin = time.monotonic()
            if begin + self.longest > self.end:
                print(f"{name}: not begun, {self.end - begin:.0f} s are left", flush=True)
                continue
            try:
                if not do():
                    self.failed.append(name)
            except (Exception, SystemExit) as error:  # whatever it is, the other parts are wanted
                self.failed.append(name)
                self.found.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}", flush=True)
            self.missing.remove(name)
            self.longest = max(self.longest, time.monotonic() - begin)
            self.write()
        timer.cancel()

    def cut(self) -> None:
        """The time is over."""
        try:
            self.write()
            print(f"time is over: without {', '.join(self.missing)}", flush=True)
        finally:
            os._exit(1)


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--model", default="bert-base", show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--rounds", default=21, show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--pair", "pairs", multiple=True, type=click.Choice(list(PAIRS)), default=list(PAIRS))
@click.option("--only", help="Only these parity cases, as `qtx parity --only`.")
@click.option("--minutes", default=10.0, show_default=True, help="For all of it.")
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
    minutes: float,
    out: Path,
) -> None:
    try:
        runner.check_place("torch", device)
    except MissingDevice as error:
        raise SystemExit(str(error)) from None
    machine = describe(device)
    what = machine["gpu"] or "cpu"
    found: dict[str, Any] = {"device": what, "machine": machine, "model": model, "dtype": dtype}
    found |= {"batch": batch, "length": length, "steps": {}}
    parts = Parts(out, found, 60 * minutes)
    title = f"{model}, {batch} x {length}, {dtype}, {what}"
    header = [title, "step", "against", "ms", "ms", "ratio", "of rounds", "bound", "MiB", "MiB"]
    print(
        f"torch {machine['torch']}, CUDA {machine['cuda']}, transformers {machine['transformers']}, {what}", flush=True
    )

    def show_case(done: int, count: int, row: runner.Row) -> None:
        found["parity"] = {"done": done, "of": count, "last": row.name}
        if not row.ok:
            print(f"parity, {row.group}/{row.name} failed: {row.failure or row.worst}", flush=True)
        if not row.ok or done % 20 == 0:
            parts.write()

    def check_parity() -> bool:
        report = runner.run("torch", device, "float32", only, show_case)
        found["parity"] = report.as_json()
        wrong = sum(not row.ok for row in report.rows)
        print(f"parity on {device}: {len(report.rows)} cases, {wrong} failed, {report.seconds:.0f} s", flush=True)
        return report.ok

    def compare_steps(name: str) -> bool:
        found["steps"][name] = time_pair(name, (model, batch, length), rounds, device, dtype)
        print(format_table(header, [format_pair(name, found["steps"][name])]), flush=True)
        return True

    # compiling, which may take minutes, comes last
    ordered = sorted(pairs, key=lambda name: "compiled" in name)
    parts.take({"parity": check_parity} | {name: lambda name=name: compare_steps(name) for name in ordered})
    sys.exit(1 if parts.failed or parts.missing else 0)


if __name__ == "__main__":
    main()
