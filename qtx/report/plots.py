"""Pictures, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..engines.backend import need
from ..files.container import write_picture
from ..measure.history import History


def curves(path: Path, runs: Mapping[str, History]) -> None:
    """Loss and max inf norm per step of several runs, as a PNG; where integers were watched, also perplexity in integers
    beside float, and kurtosis. Raises MissingExtra without matplotlib."""
    matplotlib = need("matplotlib", "report", "the picture of the curves")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    watched = any(history.integer_step for history in runs.values())
    shape, size = ((2, 3), (15, 8)) if watched else ((1, 2), (11, 4))
    figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained")
    loss, norm, *more = axes.flat
    for name, history in runs.items():
        steps = np.arange(1, len(history.loss) + 1)
        window = max(1, len(steps) // 50)
        smooth = np.convolve(history.loss, np.ones(window) / window, mode="valid") if len(steps) else []
        (line,) = loss.plot(steps[window - 1 :], smooth, label=name, linewidth=1)
        norm.plot(history.watch_step, history.inf_norm, linewidth=1)
        if history.integer_step:
            kurtosis, perplexity, gap, key = more
            integers, floats = np.array(history.integer_perplexity), np.array(history.float_perplexity)
            style = {"color": line.get_color(), "linewidth": 1}
            kurtosis.plot(history.integer_step, history.kurtosis, **style)
            perplexity.plot(history.integer_step, integers, **style)
            perplexity.plot(history.integer_step, floats, ":", color=line.get_color(), linewidth=3)
            gap.plot(history.integer_step, 100 * (integers / floats - 1), **style)
    loss.set(xlabel="step", ylabel="training loss (nats)")
    norm.set(xlabel="step", ylabel="max inf norm", yscale="log")
    if watched:
        kurtosis.set(xlabel="step", ylabel="average kurtosis")
        perplexity.set(xlabel="step", ylabel="perplexity: integers (line), float (dots)", yscale="log")
        gap.set(xlabel="step", ylabel="integer perplexity above float (%)")
        key.axis("off")
        key.legend(*loss.get_legend_handles_labels(), loc="center")
    else:
        loss.legend()
    write_picture(path, figure)
    pyplot.close(figure)
