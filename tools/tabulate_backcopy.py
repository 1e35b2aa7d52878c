"""The table of docs/studies/effect/backcopy.md: of runs on `backcopy`, what the first layer's heads do with [BOS] where
they are idle and on triggers, the residual stream's peaks there and elsewhere, and what quantization costs.

python tools/tabulate_backcopy.py RUN ... [--json FILE]     a RUN is a folder with model.safetensors and log.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from qtx.data import ChainData
from qtx.data.splits import BATCH
from qtx.engines.machine import Machine
from qtx.jobs.opening import make_float_model, open_checkpoint, open_data
from qtx.recipes.sites import residual_stream
from qtx.report.tables import format_table

BATCHES = 4  # of the evaluation split
SETTLED = 8  # places after which a head can tell a trigger from the rest: the first ones have few keys
BITS = ("w8a8", "w6a6", "w4a8")


def measure_run(folder: Path) -> dict[str, object]:
    """What the table has of one run, as JSON values."""
    path = folder / "model.safetensors"
    stored = open_checkpoint(path)
    data = open_data(path, stored.spec, stored.meta, None, None)
    if not isinstance(data, ChainData):
        raise SystemExit(f"{path} was trained on {data.source}: give runs on backcopy")
    model, stream = make_float_model(stored, Machine()), residual_stream(stored.spec)
    probs = [f"layer.{i}.attn.probs" for i in range(stored.spec.layers)]
    idle, busy, peaks = [], [], []
    for batch in data.split_batches("evaluation", stored.spec, BATCH, 0, limit=BATCHES):
        tensors = {site: value for site, (value, _) in model.record(batch, [*stream, *probs]).items()}
        first = np.stack([tensors[site][..., SETTLED:, 0] for site in probs], axis=-1)  # (B, H, T, L)
        trigger = data.chain.trigger[batch["tokens"]][:, SETTLED:]  # (B, T)
        by_place = first.transpose(0, 2, 3, 1)  # (B, T, L, H)
        idle.append(by_place[~trigger].mean(axis=0))
        busy.append(by_place[trigger].mean(axis=0) if trigger.any() else np.zeros_like(idle[-1]))
        sizes = np.stack([np.abs(tensors[site]).max(axis=-1) for site in stream])  # (S, B, T)
        peaks.append((sizes[..., 0].mean(axis=1), sizes[..., 1:].max(axis=-1).mean(axis=1)))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = [line for line in lines if "evaluation" in line][-1]
    at_first, elsewhere = np.mean(peaks, axis=0)
    return {
        "run": folder.name,
        "layers": stored.spec.layers,
        "step": evaluation["step"],
        "least_loss": data.entropy(stored.spec),
        "evaluation": evaluation["evaluation"],
        "mass_idle": np.mean(idle, axis=0).tolist(),  # on [BOS], by layer and head
        "mass_trigger": np.mean(busy, axis=0).tolist(),
        "peak_first": dict(zip(stream, at_first.tolist(), strict=True)),  # mean over sequences of their largest |x|
        "peak_elsewhere": dict(zip(stream, elsewhere.tolist(), strict=True)),
    }


def make_row(run: dict) -> list[str]:
    """A run's cells."""
    values, last = run["evaluation"], list(run["peak_first"])[-1]
    costs = [f"{values[f'integer.{name}.loss'] - values['float.loss']:+.4f}" for name in BITS]
    head = int(np.argmax(run["mass_idle"][0]))
    mass = f"{run['mass_idle'][0][head]:.2f} / {run['mass_trigger'][0][head]:.2f}"
    peak = f"{run['peak_first'][last]:.1f} / {run['peak_elsewhere'][last]:.1f}"
    above = values["float.loss"] - run["least_loss"]
    return [
        run["run"],
        str(run["layers"]),
        str(run["step"]),
        f"{above:.4f}",
        mass,
        peak,
        f"{values['kurtosis']:.1f}",
        *costs,
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    measured = [measure_run(folder) for folder in given.runs]
    header = [
        "run",
        "layers",
        "step",
        "above the least",
        "[BOS] idle / trigger",
        "peak [BOS] / elsewhere",
        "kurtosis",
        *BITS,
    ]
    print(format_table(header, [make_row(run) for run in measured]))
    if given.json:
        given.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
