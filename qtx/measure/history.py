"""What a run of training leaves of its course: its curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

CURVE = "history.curve."
WATCHED = ("integer_step", "integer_perplexity", "float_perplexity", "kurtosis", "watched_inf_norm")
WATCH = ("integer.w8a8.loss", "float.loss", "kurtosis", "inf_norm")  # the curves of these, after the step


@dataclass
class History:
    """Per step the loss in nats; now and then the largest inf norm over the paper's sites, on one fixed batch.

    `curves`, by name, are what was measured on held-out data, as (step, value): `<numerics>.loss` in nats and
    `<numerics>.accuracy` in percent, the float model's published `kurtosis` and `inf_norm`, and of `Sinks` what its
    `values` are.
    """

    loss: list[float] = field(default_factory=list)
    watch_step: list[int] = field(default_factory=list)
    inf_norm: list[float] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each of these curves."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, value))

    def tensors(self) -> dict[str, np.ndarray]:
        """The curves as a checkpoint's `history.*`: loss and inf norm (N,) float64, their steps int64, and each of
        `curves` (N, 2) float64."""
        own = {"loss": np.float64, "watch_step": np.int64, "inf_norm": np.float64}
        tensors = {f"history.{name}": np.array(getattr(self, name), kind) for name, kind in own.items()}
        return tensors | {f"{CURVE}{name}": np.array(points, np.float64) for name, points in self.curves.items()}

    @classmethod
    def of(cls, extra: Mapping[str, np.ndarray]) -> History:
        """The curves of a checkpoint's `extra`. Raises KeyError where one is missing."""
        own = {name: extra[f"history.{name}"].tolist() for name in ("loss", "watch_step", "inf_norm")}
        curves = {
            name.removeprefix(CURVE): [(int(step), value) for step, value in points.tolist()]
            for name, points in extra.items()
            if name.startswith(CURVE)
        }
        return cls(**own, curves=read_watch(extra) | curves)

    def watched(self) -> dict[str, list[float]]:
        """Where integers were watched: the steps, perplexity by w8a8 in integers and in float, the published average
        kurtosis and max inf norm."""
        by_step = [dict(self.curves.get(name, ())) for name in WATCH]
        steps = [step for step in by_step[0] if all(step in curve for curve in by_step)]
        columns = [[curve[step] for step in steps] for curve in by_step]
        columns[:2] = [[perplexity(loss) for loss in column] for column in columns[:2]]
        return {WATCHED[0]: [*steps], **dict(zip(WATCHED[1:], columns, strict=True))}


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity where a float64 does not hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def read_watch(extra: Mapping[str, np.ndarray]) -> dict[str, list[tuple[int, float]]]:
    """The watch's curves of a file of version 0.2, which has perplexities in place of losses."""
    if "history.integer_step" not in extra:
        return {}
    steps = extra["history.integer_step"].tolist()
    columns = [extra[f"history.{name}"] for name in WATCHED[1:]]
    columns[:2] = [np.log(column) for column in columns[:2]]
    return {name: list(zip(steps, column.tolist(), strict=True)) for name, column in zip(WATCH, columns, strict=True)}
