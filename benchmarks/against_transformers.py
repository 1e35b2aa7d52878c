"""Our training step against that of `transformers`: the same shape, weights, loss, clipping and AdamW, in turns.

    OMP_NUM_THREADS=1 python benchmarks/against_transformers.py                 # bert-base, 4 x 128 tokens
    OMP_NUM_THREADS=1 python benchmarks/against_transformers.py --profile       # and where the time goes

Logits must agree first. Needs the extra `hub`'s transformers.
"""

from __future__ import annotations

import statistics

import click
import torch
from steps import (
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

from qtx.report.tables import format_table
from qtx_ref.models.initial import init_params
from qtx_torch import random

BOUNDS = {0.0: 1.03, 0.1: 1.25}


def profile(steps: dict[str, Step], top: int = 16) -> str:
    """Milliseconds of each torch op in one step of each, the longest first."""
    spent: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            step()
        for event in seen.key_averages():
            spent.setdefault(event.key, {})[name] = event.self_cpu_time_total / 1000
    longest = sorted(spent, key=lambda op: -max(spent[op].values()))[:top]
    rest = [sum(ms.get(name, 0.0) for op, ms in spent.items() if op not in longest) for name in steps]
    rows = [[op, *(f"{spent[op].get(name, 0.0):.1f}" for name in steps)] for op in longest]
    return format_table(["op, ms in one step", *steps], [*rows, ["all others", *(f"{ms:.1f}" for ms in rest)]])


def time_masks() -> str:
    """Nanoseconds an element of the mask that dropout takes, ours by Philox and torch's."""
    shape = (4, 12, 128, 128)
    held = torch.empty(shape)
    masks = {
        "random.keep_mask": lambda: random.keep_mask(0, 1, "layer.0.attn.probs", shape, 0.1),
        "bernoulli_": lambda: held.bernoulli_(0.9),
    }
    middle = {name: statistics.median(seconds) for name, seconds in time_steps(masks, 15).items()}
    return ", ".join(f"{name} {1e9 * seconds / held.numel():.1f} ns an element" for name, seconds in middle.items())


@click.command(help=__doc__)
@click.option("--model", default="bert-base", show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--dropout", "rates", multiple=True, type=float, default=(0.0, 0.1), show_default=True)
@click.option("--profile", "profiled", is_flag=True, help="Also the time of each op.")
def main(model: str, batch: int, length: int, rounds: int, rates: tuple[float, ...], profiled: bool) -> None:
    rows, tables = [], []
    for rate in rates:
        spec = shape(model, rate)
        params, data = init_params(spec, 0), random_batch(spec, batch, length)
        trainer, theirs = make_trainer(spec, params), make_theirs(spec, params)
        gap = compare_logits(trainer.model, theirs, data)
        steps = {"qtx": lambda trainer=trainer, data=data: trainer.step(data), "transformers": their_step(theirs, data)}
        times = time_steps(steps, rounds)
        middle, low, high = ratios(times, "qtx", "transformers")
        ms = [f"{1000 * statistics.median(seconds):.0f}" for seconds in times.values()]
        bound = BOUNDS.get(rate)
        rows.append(
            [f"dropout {rate}", f"{gap:.1e}", *ms, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", str(bound or "")]
        )
        if profiled:
            tables.append(profile(steps))
    title = f"{model}, {batch} x {length}, {torch.get_num_threads()} threads"
    print(format_table([title, "logits", "qtx ms", "transformers ms", "ratio", "of rounds", "bound"], rows))
    print(time_masks())
    for table in tables:
        print("\n" + table)


if __name__ == "__main__":
    main()
