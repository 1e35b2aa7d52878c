"""A training step whose matmuls are fake-quantized against the float step of the same model, in turns.

OMP_NUM_THREADS=1 python benchmarks/fake_quant.py                      # bert-base, 8 x 128 tokens, w8a8
OMP_NUM_THREADS=1 python benchmarks/fake_quant.py --compiled           # both under torch.compile
"""

from __future__ import annotations

import statistics

import click
import torch
from steps import make_trainer, random_batch, ratios, shape, time_steps

from qtx.report.tables import format_table
from qtx_ref.models.initial import init_params

BOUND = 1.15


@click.command(help=__doc__)
@click.option("--model", default="bert-base", show_default=True)
@click.option("--layers", default=0, help="Instead of the model's own number.")
@click.option("--quant", default="w8a8", show_default=True, help="As --train-quant of `qtx train`.")
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--dropout", "rates", multiple=True, type=float, default=(0.0, 0.1), show_default=True)
@click.option("--compiled", is_flag=True, help="Both steps under torch.compile.")
def main(
    model: str, layers: int, quant: str, batch: int, length: int, rounds: int, rates: tuple[float, ...], compiled: bool
) -> None:
    rows = []
    for rate in rates:
        spec = shape(model, rate, layers)
        params, data = init_params(spec, 0), random_batch(spec, batch, length)
        trainers = {name: make_trainer(spec, params, quant=name, compiled=compiled) for name in (quant, "")}
        steps = {name: lambda trainer=trainer, data=data: trainer.step(data) for name, trainer in trainers.items()}
        times = time_steps(steps, rounds)
        middle, low, high = ratios(times, quant, "")
        ms = [f"{1000 * statistics.median(seconds):.0f}" for seconds in times.values()]
        rows.append([f"dropout {rate}", *ms, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{BOUND}"])
    name = f"{model} of {layers} layers" if layers else model
    title = f"{name}, {batch} x {length}, {torch.get_num_threads()} threads, {'compiled' if compiled else 'eager'}"
    print(format_table([title, f"{quant} ms", "float ms", "ratio", "of rounds", "bound"], rows))


if __name__ == "__main__":
    main()
