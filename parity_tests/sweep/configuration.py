"""What a configuration is, and how the values of its axes are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtx_ref.random import stream

BOTH = (False, True)
F32 = np.float32


@dataclass(frozen=True)
class Configuration:
    """chain(module, **arrays, **settings) -> named results. `axes` says what was drawn."""

    chain: Callable[..., dict[str, Any]]
    arrays: dict[str, np.ndarray | None]
    settings: dict[str, Any]
    axes: dict[str, Any]


def pick(axes: dict[str, tuple], index: int) -> dict[str, Any]:
    """One value per axis for configuration `index`."""
    return {
        name: values[stream(0, "axis", name, index // len(values)).permutation(len(values))[index % len(values)]]
        for name, values in axes.items()
    }
