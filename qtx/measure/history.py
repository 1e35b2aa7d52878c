"""What a run of training leaves of its course: its curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

WATCHED = ("integer_step", "integer_perplexity", "float_perplexity", "kurtosis", "watched_inf_norm")


@dataclass
class History:
    """Per step the loss in nats; now and then the largest inf norm over the paper's sites, on one fixed batch.

    Where integers are watched, also perplexity in integers and in float on a fixed slice, and the float model's
    published average kurtosis and max inf norm on another.
    """

    loss: list[float] = field(default_factory=list)
    watch_step: list[int] = field(default_factory=list)
    inf_norm: list[float] = field(default_factory=list)
    integer_step: list[int] = field(default_factory=list)
    integer_perplexity: list[float] = field(default_factory=list)
    float_perplexity: list[float] = field(default_factory=list)
    kurtosis: list[float] = field(default_factory=list)
    watched_inf_norm: list[float] = field(default_factory=list)

    def tensors(self) -> dict[str, np.ndarray]:
        """The curves as a checkpoint's `history.*`, steps int64 and all else float64; the watch's where there are
        any."""
        kept = {key: value for key, value in vars(self).items() if value or key not in WATCHED}
        return {f"history.{k}": np.array(v, np.int64 if k.endswith("step") else np.float64) for k, v in kept.items()}

    @classmethod
    def of(cls, extra: Mapping[str, np.ndarray]) -> History:
        """The curves of a checkpoint's `extra`. Raises KeyError where one is missing."""
        names = [f.name for f in fields(cls) if f.name not in WATCHED or f"history.{f.name}" in extra]
        return cls(**{name: extra[f"history.{name}"].tolist() for name in names})

    def watched(self) -> dict[str, list[float]]:
        """The integer watch's curves."""
        return {name: getattr(self, name) for name in WATCHED}
