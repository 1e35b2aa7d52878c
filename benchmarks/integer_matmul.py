"""Time of an exact int8 matmul against a float32 one of the same shape, taken in turns in one run.

    python benchmarks/integer_matmul.py                    # 512 x 768 x 3072
    python benchmarks/integer_matmul.py --shape 128 768 768 --rounds 15

Rows: NumPy through float32 blocks, with a zero point of u8 codes too, and by NumPy's integer matmul (int32, timed
once); torch by `qtx_torch.integer.products` with and without byte instructions, and `torch._int_mm` alone, also by its
own loop, which is what it runs on a CPU without VNNI (timed once). "To integer loops" is to that loop, or NumPy's.
Every result is held to the exact one before it is timed. Ratios are medians over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import click
import numpy as np
import torch

from qtx.report.tables import format_table
from qtx_ref.integer import products as ref
from qtx_ref.random import stream
from qtx_ref.spec import QuantSpec
from qtx_torch.integer import products

S8, U8 = QuantSpec(symmetric=True), QuantSpec()


def time_calls(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round that warms up. A slow one is timed once. Each round begins
    with another call, since each finds the caches as the one before left them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for turn in range(rounds + 1):
        order = stream(turn, "order").permutation(np.array(order, dtype=object)).tolist()
        for name, call in order:
            if "once" in name and turn != 1:
                continue
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def without_onednn(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """torch's own loop, which a CPU without VNNI runs."""

    def run() -> torch.Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return call()

    return run


def with_bytes(use: bool, call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with mock.patch.object(products, "byte_instructions", lambda device: use):
            return call()

    return run


@click.command(help=__doc__)
@click.option("--shape", nargs=3, type=int, default=(512, 768, 3072), show_default=True, help="M K N")
@click.option("--rounds", default=15, show_default=True)
def main(shape: tuple[int, int, int], rounds: int) -> None:
    m, k, n = shape
    rng = stream(0, "integer matmul")
    a, b = rng.integers(-128, 128, (m, k)).astype(np.int8), rng.integers(-128, 128, (k, n)).astype(np.int8)
    u, zero = (a.view(np.uint8) ^ 128), np.array(100)
    ta, tb, tu, tzero = (torch.from_numpy(x) for x in (a, b, u, zero))
    fa, fb = a.astype(np.float32), b.astype(np.float32)
    tfa, tfb = ta.float(), tb.float()
    exact = a.astype(np.float64) @ b.astype(np.float64)
    moved = exact + 28.0 * b.sum(0, dtype=np.float64)  # u - 100 = a + 28

    blocks = with_bytes(False, lambda: products.matmul(ta, tb, S8, S8))
    integers: dict[str, tuple[Callable[[], object], np.ndarray]] = {
        "NumPy blocks, s8 x s8": (lambda: ref.matmul(a, b, S8, S8), exact),
        "NumPy blocks, u8 x s8, zero point 100": (lambda: ref.matmul(u, b, U8, S8, zero), moved),
        "NumPy integer matmul, once": (lambda: a.astype(np.int32) @ b.astype(np.int32), exact),
        "torch blocks, s8 x s8": (blocks, exact),
        "torch as it chooses, s8 x s8": (lambda: products.matmul(ta, tb, S8, S8), exact),
        "torch as it chooses, u8 x s8, zero point 100": (lambda: products.matmul(tu, tb, U8, S8, tzero), moved),
        "torch._int_mm": (lambda: torch._int_mm(ta, tb), exact),
        "torch._int_mm without oneDNN, once": (without_onednn(lambda: torch._int_mm(ta, tb)), exact),
    }
    for name, (call, want) in integers.items():
        if not np.array_equal(np.asarray(call()), want):
            raise SystemExit(f"{name} is not exact: nothing was timed")
    floats = {"NumPy float32 @": lambda: fa @ fb, "torch float32 @": lambda: tfa @ tfb}
    times = time_calls({**floats, **{name: call for name, (call, _) in integers.items()}}, rounds)

    rows = []
    for name, seconds in times.items():
        library = name.split()[0].split(".")[0]
        loops = "NumPy integer matmul, once" if library == "NumPy" else "torch._int_mm without oneDNN, once"
        against = []
        for other in (f"{library} float32 @", loops, "torch._int_mm"):
            pairs = zip(seconds, times[other], strict=False)  # one round where either is timed once
            against.append(f"{statistics.median(x / y for x, y in pairs):.4f}")
        rows.append([name, f"{1000 * statistics.median(seconds):.1f}", *against])
    print(
        format_table(
            [
                f"{m} x {k} x {n}, {torch.get_num_threads()} threads",
                "ms",
                "to float32 @",
                "to integer loops",
                "to _int_mm",
            ],
            rows,
        )
    )
    print(f"byte instructions (VNNI): {products.byte_instructions('cpu')}")


if __name__ == "__main__":
    main()
