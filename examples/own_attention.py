"""An attention of one's own: sigmoid(scores - log T), which can attend to nothing, trained a few steps on the tape.

Models ask a numerics for their arithmetic; overriding its `softmax` changes every layer of BERT, OPT and ViT, and the
gradient comes with it. Sigmoid attention is that of Ramapuram et al. 2024 (arXiv 2409.04431).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qtx.data import load
from qtx_ref import models, ops
from qtx_ref.models.initial import init_params
from qtx_ref.numerics import Float
from qtx_ref.optim import AdamW
from qtx_ref.presets import preset
from qtx_ref.spec import AttentionSpec, OptimSpec
from qtx_ref.tape import Var, backward, const, leaf

STEPS = 15


class SigmoidAttention(Float):
    """`Float`, but for how probabilities are made of scaled scores (B, H, Tq, Tk)."""

    def softmax(self, site: str, scores: Var, mask: np.ndarray, spec: AttentionSpec) -> Var:
        shift = np.asarray(-np.log(scores.shape[-1]), scores.value.dtype)
        p = ops.mul(ops.sigmoid(ops.add(scores, const(shift))), const(mask.astype(scores.value.dtype)))
        return self.named(site, p, self._pairs(mask))


def main(steps: int = STEPS) -> None:
    spec = replace(preset("opt-tiny"), layers=2, width=64, hidden=128, length=32)
    data = load("books", spec)
    for numerics in (Float, SigmoidAttention):
        params = init_params(spec, seed=0)
        optimizer = AdamW(params, OptimSpec(lr=3e-3, warmup=2, steps=steps))
        losses = []
        for _, batch in zip(range(steps), data.train_batches(spec, 8, seed=0), strict=False):
            leaves = {name: leaf(value) for name, value in params.items()}
            nx = numerics()
            nx.load(leaves)
            loss = models.loss(models.forward(nx, spec, batch), batch)
            optimizer.step(dict(zip(leaves, backward(loss, leaves.values()), strict=True)))
            losses.append(float(loss.value))
        print(f"{numerics.__name__}: loss {losses[0]:.4f} to {losses[-1]:.4f} in {steps} steps")


if __name__ == "__main__":
    main()
