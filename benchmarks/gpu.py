"""All that a GPU is asked to show, in 10 minutes: parity, steps against `transformers`, memory, quantization.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --device cpu --model bert-tiny --batch 2 --length 16 --only random --out cpu.json

Steps are taken in turns under autocast to bfloat16 (`--dtype`), those of transformers with its fused attention; peak
memory is what two steps of a model add to what was there before it. The JSON is written after every part, and as
parity goes; a part that fails is noted in it, and the next one begins. At the end of `--minutes` what is under way is
cut off, whatever it waits for, and what is missing is said. Exit status 1: something failed or is missing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from parity_tests import runner
from qtx.engines.backend import MissingDevice
from qtx_ref.models.initial import init_params

from .harness import Row, Skip, build_measured, compare, header, write_json
from .report import format_header, format_row
from .steps import Step, compare_logits, make_trainer, make_transformers, random_batch, shape, torch_step

# name: rate of dropout, the step, the one that it is held against, at most how many times its time
PAIRS = {
    "no dropout": (0.0, "qtx", "transformers", 1.05),
    "dropout 0.1": (0.1, "qtx", "transformers", 1.25),
    "w8a8": (0.0, "qtx w8a8", "qtx", None),
    "no dropout, compiled": (0.0, "qtx compiled", "transformers", 1.05),
    "dropout 0.1, compiled": (0.1, "qtx compiled", "transformers", 1.25),
    "w8a8, compiled": (0.0, "qtx w8a8 compiled", "qtx compiled", 1.1),
}


def build(name: str, model: str, dropout: float, batch: int, length: int, dtype: str, device: str) -> Step:
    """The step of that name."""
    spec = shape(model, dropout)
    params, data = init_params(spec, 0), random_batch(spec, batch, length)
    if name == "transformers":
        return torch_step(make_transformers(spec, params, device), data, dtype)
    words = name.split()
    quant, compiled = "w8a8" if "w8a8" in words else "", "compiled" in words
    trainer = make_trainer(spec, params, device=device, dtype=dtype, quant=quant, compiled=compiled)
    return lambda: trainer.step(data)


def check_logits(model: str, dropout: float, batch: int, length: int, dtype: str, device: str) -> str:
    """Ours against those of transformers, in the arithmetic that is timed."""
    spec = shape(model, dropout)
    params, data = init_params(spec, 0), random_batch(spec, batch, length)
    ours = make_trainer(spec, params, device=device, dtype=dtype).model
    return compare_logits(ours, make_transformers(spec, params, device), data)


def time_pair(name: str, size: tuple[str, int, int], rounds: int, device: str, dtype: str) -> Row:
    """Times, their ratio and both memories of a pair."""
    if "compiled" in name:
        torch._dynamo.reset()  # it compiles the same code only so many times
    dropout, ours, against, bound = PAIRS[name]
    model, *shaped = size
    given = (model, dropout, *shaped, dtype, device)
    call, mib = build_measured(build, ours, *given, device=device)
    other, against_mib = build_measured(build, against, *given, device=device)
    return compare(
        f"{name}, {ours}", call, against, other, rounds=rounds, device=device, bound=bound,
        check=lambda: check_logits(*given), mib=mib, against_mib=against_mib,
    )  # fmt: skip


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Every pair in bfloat16; those that compile, which may take minutes, last."""
    size = ("bert-tiny", 2, 32) if quick else ("bert-base", 32, 128)
    for name in order_pairs(PAIRS):
        if not (quick and "compiled" in name):
            yield time_pair(name, size, 2 if quick else 21, device, "bfloat16")


def order_pairs(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: "compiled" in name)


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
            write_json(self.out, self.found | {"missing": self.missing, "failed": self.failed})

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
    machine = header(device)
    found: dict[str, Any] = {"machine": machine, "model": model, "dtype": dtype}
    found |= {"batch": batch, "length": length, "steps": {}}
    parts = Parts(out, found, 60 * minutes)
    print(format_header(machine), flush=True)

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
        row = time_pair(name, (model, batch, length), rounds, device, dtype)
        found["steps"][name] = asdict(row)
        print(format_row(row), flush=True)
        return True

    steps = {name: lambda name=name: compare_steps(name) for name in order_pairs(pairs)}
    parts.take({"parity": check_parity} | steps)
    sys.exit(1 if parts.failed or parts.missing else 0)


if __name__ == "__main__":
    main()
