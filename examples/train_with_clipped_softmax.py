"""Trains the same small OPT with softmax and with clipped softmax, and prints what quantization costs each.

So few steps make no outliers; this shows how it is done. `qtx study` does it at any size and goes on after a kill.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from qtx.data import load
from qtx.engines.machine import Machine
from qtx.jobs.run import TrainSpec
from qtx.jobs.training import default_optim, train
from qtx.measure.outliers import measure_outliers
from qtx.measure.scores import evaluate
from qtx.prepare.calibration import calibration_batches
from qtx.prepare.prepare import prepare
from qtx.recipes.named import recipe
from qtx_ref.presets import attention, preset
from qtx_ref.spec import ModelSpec

STEPS, BATCH = 30, 8


def compare(spec: ModelSpec, machine: Machine, steps: int) -> tuple[float, float, float, float]:
    """Perplexity in float and under W8A8, max inf norm and average kurtosis of a model trained here."""
    data, w8a8 = load("books", spec), recipe("w8a8", spec)
    run = TrainSpec(spec, default_optim(spec, steps, lr=3e-3), BATCH, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        params = train(run, data, Path(folder) / "model.safetensors", machine, label="train").params
    batches = list(data.split_batches("evaluation", spec, BATCH, seed=0, limit=4))
    model = machine.model(spec, params)
    quantized = prepare(machine, spec, params, calibration_batches(data, spec), w8a8).model(machine, spec, w8a8)
    found = measure_outliers(model, batches)
    before, after = evaluate(model, batches).perplexity, evaluate(quantized, batches).perplexity
    return before, after, found.max_inf_norm, found.average_kurtosis


def main(steps: int = STEPS, backend: str = "ref") -> None:
    print(f"{'attention':20} {'float':>8} {'W8A8':>8} {'inf norm':>8} {'kurtosis':>8}")
    for name in ("vanilla", "clipped:gamma=-0.03"):
        spec = replace(preset("opt-tiny"), layers=2, width=64, hidden=128, length=32, attention=attention(name))
        print(f"{name:20}", *(f"{number:8.2f}" for number in compare(spec, Machine(backend), steps)))


if __name__ == "__main__":
    main()
