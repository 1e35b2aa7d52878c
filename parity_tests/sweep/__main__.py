"""Reference = torch eager = torch compiled, to the bit, over random configurations of the integer arithmetic.

    python -m parity_tests.sweep --module integer --codes 10000000

prints how many codes were compared and how many differed, and fails if one did. The test suite runs a slice.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._dynamo.utils import counters

from parity_tests.sweep.cases import DRAWS, MODULES
from parity_tests.sweep.configuration import Configuration
from qtx_torch.integer import products


@dataclass
class SweepResult:
    configurations: int = 0
    refused: int = 0  # configurations that both backends refuse, with the same words
    codes: int = 0
    differing: int = 0
    graphs: int = 0  # that torch compiled
    first: list[str] = field(default_factory=list)  # a line per differing result


def tensors(arrays: dict[str, np.ndarray | None]) -> dict[str, torch.Tensor | None]:
    return {name: None if x is None else torch.from_numpy(np.array(x)) for name, x in arrays.items()}


def flatten(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """Named results as arrays; a tuple becomes one entry per member."""
    named = {}
    for name, value in results.items():
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            named[f"{name}[{i}]" if isinstance(value, tuple) else name] = np.asarray(part)
    return named


def run_chain(chain: Any, module: Any, arrays: dict[str, Any], settings: dict[str, Any]) -> dict[str, np.ndarray] | str:
    """The results, or the words of the refusal."""
    try:
        return flatten(chain(module, **arrays, **settings))
    except ValueError as error:
        return str(error)


def count_differing(got: np.ndarray, want: np.ndarray) -> int:
    """Elements that differ in a bit; one NaN is as good as another. All of them, if shape or dtype differs."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return max(1, want.size)
    unequal = got != want
    if want.dtype.kind == "f":
        unequal = np.where(np.isnan(want), ~np.isnan(got), unequal | (np.signbit(got) != np.signbit(want)))
    return int(unequal.sum())


def compare(
    result: SweepResult, label: str, got: dict[str, np.ndarray] | str, want: dict[str, np.ndarray] | str
) -> None:
    """Adds one configuration to the result."""
    result.configurations += 1
    if isinstance(got, str) or isinstance(want, str):
        result.refused += 1
        if got != want:
            result.differing += 1
            result.first.append(f"{label}: reference {want!r:.200}, torch {got!r:.200}")
        return
    for name in want:
        result.codes += want[name].size
        if count := count_differing(got[name], want[name]):
            result.differing += count
            result.first.append(f"{label}: {name}: {count} of {want[name].size} differ")


def settle_instructions(case: Configuration) -> Any:
    """The context that a configuration runs in: whether torch may use byte instructions."""
    use = case.axes.get("vnni", True) and products.byte_instructions("cpu")
    return mock.patch.object(products, "byte_instructions", lambda device: use)


def sweep(module: str, codes: int, configurations: int, compiled: bool = False, chain: Any = None) -> SweepResult:
    """At least `codes` codes in at least `configurations` configurations (at most twice as many), eager or compiled;
    through `chain` in place of the case's own."""
    reference, accelerated = (
        importlib.import_module(f"{package}.{MODULES[module]}") for package in ("qtx_ref", "qtx_torch")
    )
    result, index, size = SweepResult(), 0, max(3000, codes // configurations)  # long enough for vector instructions
    while index < configurations or (result.codes < codes and index < 2 * configurations):
        case = DRAWS[module](index, size)
        run = own = chain or case.chain
        if compiled:
            torch._dynamo.reset()
            counters.clear()
            run = torch.compile(own, dynamic=False)
        with (
            settle_instructions(case),
            torch._dynamo.config.patch(recompile_limit=64),
        ):  # a function called often stays compiled
            got = run_chain(run, accelerated, tensors(case.arrays), case.settings)
        result.graphs += counters["stats"]["unique_graphs"] if compiled else 0
        mode = "compiled" if compiled else "eager"
        label = f"{module} {index} {mode} { {k: str(v) for k, v in case.axes.items()} }"
        compare(result, label, got, run_chain(own, reference, case.arrays, case.settings))
        index += 1
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="reference = torch eager = torch compiled, over random configurations")
    parser.add_argument("--module", required=True, choices=DRAWS)
    parser.add_argument("--codes", type=int, default=10_000_000, help="compared eagerly, at least")
    parser.add_argument("--configurations", type=int, default=1000, help="eager ones, at least")
    parser.add_argument("--compiled", type=int, default=30, help="configurations compiled as well")
    options = parser.parse_args()
    failed = False
    for mode, configurations, codes in (
        ("eager", options.configurations, options.codes),
        ("compiled", options.compiled, 0),
    ):
        if not configurations:
            continue
        start = time.perf_counter()
        result = sweep(options.module, codes, configurations, mode == "compiled")
        for line in result.first[:20]:
            print(line)
        print(
            f"{options.module} {mode}: {result.configurations} configurations ({result.refused} refused by both), "
            f"{result.codes} codes, {result.differing} differ, {time.perf_counter() - start:.0f} s"
            + (f", {result.graphs} graphs" if result.graphs else "")
        )
        failed |= result.differing > 0 or result.codes < codes
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
