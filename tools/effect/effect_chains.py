"""Of a model on `backcopy`: what each head does with [BOS] where it is idle and on triggers, and the residual stream's
peaks there and elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qtx.data import ChainData
from qtx.data.splits import BATCH
from qtx.engines.machine import Machine
from qtx.jobs.opening import make_float_model, open_checkpoint, open_data
from qtx.recipes.sites import residual_stream

BATCHES = 4  # of the evaluation split
SETTLED = 8  # places after which a head can tell a trigger from the rest: the first ones have few keys


def measure_run(folder: Path) -> dict[str, object]:
    """What is kept of one run, a folder with model.safetensors and log.jsonl, as JSON values."""
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
