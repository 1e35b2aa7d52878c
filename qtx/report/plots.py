"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..backend import need
from ..training import History


def curves(path: Path, runs: Mapping[str, History]) -> None:
    """Loss and max inf norm per step of several runs, as a PNG; where integers were watched, also perplexity in integers
    beside float, and kurtosis. Raises MissingExtra without matplotlib."""
    matplotlib = need("matplotlib", "report", "the picture of the curves")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = 2 if any(history.integer_step for history in runs.values()) else 1
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 4 * rows), layout="constrained", squeeze=False)
    left, right = axes[0]
    for name, history in runs.items():
        steps = np.arange(1, len(history.loss) + 1)
        window = max(1, len(steps) // 50)
        smooth = np.convolve(history.loss, np.ones(window) / window, mode="valid") if len(steps) else []
        left.plot(steps[window - 1 :], smooth, label=name, linewidth=1)
        right.plot(history.watch_step, history.inf_norm, label=name, linewidth=1)
        if history.integer_step:
            (line,) = axes[1, 0].plot(history.integer_step, history.integer_perplexity, label=name, linewidth=1)
            axes[1, 0].plot(history.integer_step, history.float_perplexity, ":", color=line.get_color(), linewidth=2)
            axes[1, 1].plot(history.integer_step, history.kurtosis, label=name, linewidth=1)
    left.set(xlabel="step", ylabel="training loss (nats)")
    right.set(xlabel="step", ylabel="max inf norm", yscale="log")
    if rows == 2:
        axes[1, 0].set(xlabel="step", ylabel="perplexity: integers (line), float (dots)", yscale="log")
        axes[1, 1].set(xlabel="step", ylabel="average kurtosis")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
