"""Trains the same small ViT with softmax and with clipped softmax, and prints what quantization costs each.

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

STEPS, BATCH = 30, 32


def main(steps: int = STEPS, backend: str = "ref") -> None:
    machine = Machine(backend)
    print(f"{'attention':24} {'accuracy':>8} {'W8A8':>8} {'inf norm':>8} {'kurtosis':>8}")
    for name in ("vanilla", "clipped:gamma=-0.03"):
        spec = replace(preset("vit-tiny"), layers=2, attention=attention(name))
        data = load("digits", spec)
        run = TrainSpec(spec, default_optim(spec, steps), BATCH, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            trained = train(run, data, Path(folder) / "model.safetensors", machine)
        w8a8 = recipe("w8a8", spec)
        quantized = prepare(machine, spec, trained.params, calibration_batches(data, spec), w8a8)
        model = machine.model(spec, trained.params)

        def batches():
            return data.split_batches("evaluation", spec, BATCH, 0)

        score = evaluate(model, batches()).accuracy
        after = evaluate(quantized.model(machine, spec, w8a8), batches()).accuracy
        outliers = measure_outliers(model, batches())
        print(f"{name:24} {score:8.2f} {after:8.2f} {outliers.max_inf_norm:8.2f} {outliers.average_kurtosis:8.2f}")


if __name__ == "__main__":
    main()
