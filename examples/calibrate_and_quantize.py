"""From a float model to one file of integers: calibrate, lower, save, read back, and run in both numerics."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from qtx.data import load
from qtx.engines.machine import Machine
from qtx.files.artifact import load_artifact, make_artifact, save_artifact
from qtx.files.checkpoint import Checkpoint, save_checkpoint
from qtx.jobs.opening import make_artifact_model
from qtx.measure.scores import IntegerScorer, evaluate
from qtx.prepare.calibration import calibration_batches
from qtx.prepare.prepare import prepare
from qtx.recipes.named import recipe
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.profiles import profile
from qtx_ref.spec import Nonlinear


def main(backend: str = "ref") -> None:
    machine, spec = Machine(backend), replace(preset("bert-tiny"), layers=2, length=32)
    data, w8a8 = load("books", spec), recipe("w8a8", spec)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model.safetensors", Path(folder) / "model.qtx"
        checkpoint = Checkpoint(spec, init_params(spec, seed=0))  # or load_checkpoint(PATH)
        save_checkpoint(source, checkpoint)
        prepared = prepare(machine, spec, checkpoint.params, calibration_batches(data, spec), w8a8)
        seen = data.hashes("calibration")
        artifact = make_artifact(source, checkpoint, w8a8, prepared.ranges, profile("qtx"), Nonlinear.TABLE, seen)
        save_artifact(out, artifact)
        artifact = load_artifact(out)
        print(f"{out.stat().st_size} bytes, {source.stat().st_size} in float")
        for name, model in (
            ("float", machine.model(spec, checkpoint.params)),
            ("fake quantization", prepared.model(machine, spec, w8a8)),
            ("integers", IntegerScorer(make_artifact_model(artifact, machine))),
        ):
            score = evaluate(model, data.split_batches("evaluation", spec, 16, seed=0, limit=2))
            print(f"{name}: perplexity {score.perplexity:.2f} on {score.targets} targets")


if __name__ == "__main__":
    main()
