"""How far integers are from fake quantization: one op at a time, and as they add up through a model.

    python -m parity_tests.long.integer_report [CHECKPOINT ...] [--recipe w8a8] [--steps 150]

Without a checkpoint the small presets are trained first. Printed per model: the largest difference, in codes, of one
requantization (an accumulator by integers, and through float32) and of one op on the same input codes, with the share
that differs at all in brackets; the differences at the last residual of two free runs; and the task metric on the
evaluation split, from float, from fake quantization and from the integers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.subjects.integer_models import (
    OPTIM,
    PRESETS,
    Arrays,
    Batch,
    Lowered,
    lower_model,
    record_run,
)
from qtx.data import load
from qtx.files.checkpoint import file_of, load_checkpoint
from qtx.measure.scores import IntegerScorer
from qtx.report.tables import format_table
from qtx_ref import models
from qtx_ref.attention import probabilities
from qtx_ref.backend import IntegerModel, Model
from qtx_ref.integer.lifting import float_params
from qtx_ref.integer.lowering import ACTIVATIONS
from qtx_ref.integer.model import Code, Integer
from qtx_ref.models.initial import init_params, shapes
from qtx_ref.numerics import FakeQuant
from qtx_ref.presets import preset
from qtx_ref.quant import affine
from qtx_ref.spec import AttentionSpec, Family, ModelSpec
from qtx_ref.tape import Var, const

SPANS = {"0": (0, 0), "1": (1, 1), "2": (2, 2), "more": (3, None)}


@dataclass
class Differences:
    """Differences between codes: how many of each size."""

    counts: dict[int, int] = field(default_factory=dict)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        sizes, counts = np.unique(np.abs(a.astype(np.int64) - b.astype(np.int64)), return_counts=True)
        for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            self.counts[size] = self.counts.get(size, 0) + count

    @property
    def largest(self) -> int:
        return max(self.counts, default=0)

    def share(self, low: int, high: int | None = None) -> float:
        """Of all, those from low to high (None: and beyond)."""
        inside = sum(n for size, n in self.counts.items() if size >= low and (high is None or size <= high))
        return inside / max(sum(self.counts.values()), 1)


def decode(x: Code) -> np.ndarray:
    """What a code or an accumulator stands for, float64."""
    y = np.asarray(x.unit, np.float64) * np.asarray(x.subtract_zero(), np.float64)
    return y if x.offset is None else y + x.offset


class Beside(Integer):
    """Beside each op: the same op in float64 on what its integer inputs stand for, then quantized.

    `single` counts where requantization alone is between the two, `ops` whole ops, by site.
    """

    def __init__(self, low: Lowered) -> None:
        super().__init__(low.constants, low.quants, low.profile)
        self.float = float_params(low.spec, low.constants)
        self.single = Differences()
        self.ops: dict[str, Differences] = {}

    def beside(self, differences: Differences, site: str, code: Code, truth: np.ndarray) -> None:
        if site in self.quants:
            want = affine.quantize(
                truth.astype(np.float32), code.unit, code.zero_point, self.quants[site], self.profile.quantize
            )
            differences.add(code.value, want)

    def op(self, site: str, code: Code, truth: np.ndarray) -> Code:
        self.beside(self.ops.setdefault(site, Differences()), site, code, truth)
        return code

    def named(self, site: str, x: Code) -> Code:
        code = super().named(site, x)
        self.beside(self.single, site, code, decode(x))
        return code

    def linear(self, site: str, x: Code, *, weight: str | None = None, named: bool = True) -> Code:
        y = super().linear(site, x, weight=weight, named=named)
        if not named or f"{site}.input" in self.quants:
            return y
        w = self.float[weight or f"{site}.weight"].astype(np.float64)
        w = w if w.ndim == 3 else w[None]
        rows = decode(x).reshape(-1, len(w), w.shape[2]).swapaxes(0, 1)  # (H, N, I)
        truth = (rows @ w.swapaxes(1, 2)).swapaxes(0, 1).reshape(*x.shape[:-1], -1)
        return self.op(site, y, truth + np.ravel(self.float.get(f"{site}.bias", 0)))

    def norm(self, site: str, x: Code, eps: float) -> Code:
        r = decode(x)
        r = r - r.mean(-1, keepdims=True)
        truth = r / np.sqrt((r * r).mean(-1, keepdims=True) + eps)
        truth = truth * self.float[f"{site}.weight"] + self.float[f"{site}.bias"]
        return self.op(site, super().norm(site, x, eps), truth)

    def add(self, site: str, a: Code, b: Code) -> Code:
        return self.op(site, super().add(site, a, b), decode(a) + decode(b))

    def mul(self, site: str, a: Code, b: Code) -> Code:
        return self.op(site, super().mul(site, a, b), decode(a) * decode(b))

    def activation(self, site: str, x: Code, kind: str) -> Code:
        truth = np.maximum(decode(x), 0) if kind == "relu" else ACTIVATIONS[kind](decode(x))
        return self.op(site, super().activation(site, x, kind), truth)

    def softmax(self, site: str, scores: Code, mask: np.ndarray, spec: AttentionSpec) -> Code:
        logit = self.float.get(f"{site}.sink")
        p = probabilities(const(decode(scores)), mask, spec, None if logit is None else const(logit.astype(np.float64)))
        return self.op(site, super().softmax(site, scores, mask, spec), p.value)


def beside(low: Lowered, batch: Batch) -> Beside:
    """The model run on a batch with each op held to its float form."""
    nx = Beside(low)
    models.forward(nx, low.spec, batch)
    return nx


def metric(model: Any, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean loss and share of right answers of anything that evaluates a batch."""
    loss, count, right = np.sum([model.evaluate(batch) for batch in batches], axis=0)
    return loss / count, right / count


def fake(low: Lowered) -> Model:
    """The same codes under fake quantization."""
    model = Model(low.spec, float_params(low.spec, low.constants))
    model.bind(low.quants, low.ranges)
    return model


class RecordSite(FakeQuant):
    """Keeps what it makes of one site."""

    def __init__(self, model: Model, site: str) -> None:
        super().__init__(model.quants, model.fixed)
        self.site = site

    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        y = super().apply(site, x, where)
        if site == self.site:
            self.kept = y.value
        return y


def last_residual(low: Lowered, batches: Sequence[Batch]) -> Differences:
    """Codes of the last residual add: integers against fake quantization, each running freely, at real tokens."""
    site = f"layer.{low.spec.layers - 1}.ffn.residual"
    scale, zero = (low.constants[f"{site}.{key}"] for key in ("scale", "zero_point"))
    model, free, differences = low.model(IntegerModel), fake(low), Differences()
    nx = RecordSite(free, site)
    nx.load(free.weights)
    for batch in batches:
        models.forward(nx, low.spec, batch)
        code, want = dict(record_run(model, batch).sites)[site], affine.quantize(nx.kept, scale, zero, low.quants[site])
        where = batch["mask"] if "mask" in batch else np.ones(code.shape[:2], bool)
        differences.add(code[where], want[where])
    return differences


def train_model(name: str, steps: int) -> tuple[ModelSpec, Arrays]:
    from qtx_torch.backend import Model as TorchModel
    from qtx_torch.backend import Trainer

    spec = preset(name)
    model = TorchModel(spec, init_params(spec, 0))
    trainer = Trainer(model, replace(OPTIM, steps=steps))
    size = 64 if spec.family is Family.VIT else 8
    for batch in islice(load(None, spec).train_batches(spec, size, seed=0), steps):
        trainer.step(batch)
    return spec, model.params()


SAME = "last residual: same / 1 / 2 / more"
HEADER = ("model", "one requantization", "one op", SAME, "metric", "float", "fake", "integer", "to fake")


def report(name: str, spec: ModelSpec, params: Mapping[str, np.ndarray], recipe: str) -> list[str]:
    """The table's row of one model."""
    size = 64 if spec.family is Family.VIT else 8
    data = load(None, spec)
    calibration = list(data.split_batches("calibration", spec, size, 0, limit=16))
    held_out = list(data.split_batches("evaluation", spec, size, 0))
    low = lower_model(spec, {key: params[key] for key in shapes(spec)}, calibration, held_out[0], recipe)
    nx = beside(low, held_out[0])
    ops = Differences()
    for differences in nx.ops.values():
        for key, count in differences.counts.items():
            ops.counts[key] = ops.counts.get(key, 0) + count
    free = last_residual(low, held_out[:2])
    scored = (Model(spec, params), fake(low), IntegerScorer(low.model(IntegerModel)))
    by_accuracy = spec.family is Family.VIT
    scores = [100 * right if by_accuracy else np.exp(loss) for loss, right in (metric(m, held_out) for m in scored)]
    return [
        name,
        *(f"{differences.largest} ({differences.share(1):.1e})" for differences in (nx.single, ops)),
        " / ".join(f"{free.share(*span):.2%}" for span in SPANS.values()),
        "accuracy, %" if by_accuracy else "perplexity",
        *(f"{score:.3f}" for score in scores),
        f"{scores[2] / scores[1] - 1:+.3%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="*")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    rows = []
    for name in options.checkpoint or PRESETS:
        if options.checkpoint:
            checkpoint = load_checkpoint(Path(name))
            spec, params = checkpoint.spec, checkpoint.params
            name = f"{spec.family} {file_of(Path(name)).parent.name}"
        else:
            spec, params = train_model(name, options.steps)
        rows.append(report(name, spec, params, options.recipe))
    print(format_table(HEADER, rows))


if __name__ == "__main__":
    main()
