"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..backend import need
from ..training import History


def curves(path: Path, runs: Mapping[str, History]) -> None:
    """Loss and max inf norm per step of several runs, as a PNG. Raises MissingExtra without matplotlib."""
    matplotlib = need("matplotlib", "report", "the picture of the curves")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, history in runs.items():
        steps = np.arange(1, len(history.loss) + 1)
        window = max(1, len(steps) // 50)
        smooth = np.convolve(history.loss, np.ones(window) / window, mode="valid") if len(steps) else []
        left.plot(steps[window - 1 :], smooth, label=name, linewidth=1)
        right.plot(history.watch_step, history.inf_norm, label=name, linewidth=1)
    left.set(xlabel="step", ylabel="training loss (nats)")
    right.set(xlabel="step", ylabel="max inf norm", yscale="log")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
