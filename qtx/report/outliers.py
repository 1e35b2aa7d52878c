"""Pictures of an analysis, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import erf

from qtx_ref.stats import SIGMAS

from ..engines.backend import need
from ..files.container import write_picture
from ..measure.analysis import Analysis, bin_edges
from ..measure.heads import Head

MAPS = 6  # heads whose attention is drawn
WORDS = 40  # tokens on an axis: more cannot be read
NAMES = ("depth.png", "channels.png", "histogram.png", "attention.png", "patches.png")  # the last one of images alone
OCTAVE = 8  # bins of the drawn histogram between a number and its double


def draw(folder: Path, model: Any, found: Analysis) -> list[str]:
    """Writes the pictures of an analysis as PNGs and gives their names. Raises MissingExtra without matplotlib."""
    matplotlib = need("matplotlib", "report", "the pictures of an analysis")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = found.heads[:MAPS]
    probs = {}
    for layer in {head.layer for head in chosen}:
        site = f"layer.{layer}.attn.probs"
        probs[layer] = model.record(found.example, [site])[site][0][0]  # (H, T, T)
    pictures: dict[str, Callable[[], Any]] = {
        "depth.png": lambda: depth(pyplot, found),
        "channels.png": lambda: channels(pyplot, found),
        "histogram.png": lambda: histogram(pyplot, found),
    }
    if found.image is None:
        pictures["attention.png"] = lambda: text_attention(pyplot, found, chosen, probs)
    else:
        sites = dict.fromkeys(found.stream, "sequence")
        own = model.statistics(found.example, sites, ("beyond_tokens",))
        example = sum(part["beyond_tokens"][0] for part in own.values())  # (T,)
        pictures["attention.png"] = lambda: image_attention(pyplot, found, chosen, probs)
        pictures["patches.png"] = lambda: patches(pyplot, found, example)
    for name, make in pictures.items():
        figure = make()
        write_picture(folder / name, figure)
        pyplot.close(figure)
    return list(pictures)


def depth(pyplot: Any, found: Analysis) -> Any:
    """Kurtosis and inf norm of each layer's sums and of what is added."""
    known = found.by_site()
    count = sum(site.endswith(".ffn.residual") for site in found.stream)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for part, style in (("attn.output", "o--"), ("attn.residual", "o-"), ("ffn.output", "s--"), ("ffn.residual", "s-")):
        rows = [known[f"layer.{i}.{part}"] for i in range(count)]
        for axis, name in zip(axes, ("kurtosis", "inf_norm"), strict=True):
            axis.plot(range(count), [getattr(row, name) for row in rows], style, label=part, linewidth=1, markersize=4)
    axes[0].axhline(3, color="gray", linewidth=0.8, linestyle=":")
    axes[0].set(xlabel="layer", ylabel="kurtosis (dotted: normal)", yscale="log", xticks=range(count))
    axes[1].set(xlabel="layer", ylabel="inf norm, mean over sequences", yscale="log", xticks=range(count))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def channels(pyplot: Any, found: Analysis) -> Any:
    """Root mean square of each channel along the residual stream; the recurring channels are named."""
    rows = np.log10(np.sqrt(np.stack([found.energy[site] for site in found.stream])) + 1e-12)
    size = 1.5 + 0.24 * len(rows)
    figure, axis = pyplot.subplots(figsize=(12, size), layout="constrained")
    middle = np.median(rows)
    picture = axis.imshow(
        rows, aspect="auto", interpolation="nearest", cmap="magma", vmin=middle - 0.5, vmax=rows.max()
    )
    axis.set_yticks(range(len(rows)), found.stream, fontsize=8)
    named = sorted({channel.channel for channel in found.channels})
    apart = [c for i, c in enumerate(named) if not i or c - named[i - 1] > rows.shape[1] / 60]
    axis.set_xticks(apart, apart, fontsize=8, rotation=90)
    axis.set_xlabel("channel (named: outliers in most tokens)" if named else "channel")
    figure.colorbar(picture, label="log10 of the channel's root mean square")
    return figure


def histogram(pyplot: Any, found: Analysis) -> Any:
    """Share of elements by |x| over the site's root mean square, of the sum after each FFN and of a normal variable."""
    known, edges = found.by_site(), bin_edges()
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    names = [site for site in found.stream if site.endswith(".ffn.residual")]
    grid = 2.0 ** (np.arange(-6 * OCTAVE, 9 * OCTAVE + 1) / OCTAVE)
    some = np.isfinite(edges[1:])
    middle = (edges[:-1][some] + edges[1:][some]) / 2
    for site, color in zip(names, pyplot.cm.viridis(np.linspace(0, 0.9, len(names))), strict=True):
        counts = found.histograms[site][some]
        shares, _ = np.histogram(middle / (known[site].rms or 1), grid, weights=counts / max(counts.sum(), 1))
        axis.stairs(
            np.where(shares > 0, shares, np.nan),
            grid,
            baseline=None,
            color=color,
            label=site.removesuffix(".ffn.residual"),
        )
    normal = np.diff(erf(grid / np.sqrt(2)))
    axis.stairs(
        np.where(normal > 1e-9, normal, np.nan), grid, baseline=None, color="black", linestyle=":", label="normal"
    )
    axis.axvline(SIGMAS, color="gray", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel=f"|x| / root mean square, ffn.residual (line: {SIGMAS:g})",
             ylabel=f"share of elements, {OCTAVE} bins an octave")  # fmt: skip
    axis.legend(fontsize=8, ncols=1 + len(names) // 8)
    return figure


def title(head: Head) -> str:
    kind = "does nothing" if head.idle else "acts"
    return f"layer {head.layer} head {head.head}: {kind}\nmarked {head.marked:.0%}, update {head.update:.1%}"


def grid_of(pyplot: Any, count: int, size: float) -> tuple[Any, list[Any]]:
    """A figure of `count` pictures in rows of three."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(size * columns, size * rows), layout="constrained", squeeze=False
    )
    for axis in list(axes.flat)[count:]:
        axis.axis("off")
    return figure, list(axes.flat)[:count]


def text_attention(pyplot: Any, found: Analysis, chosen: list[Head], probs: dict[int, np.ndarray]) -> Any:
    """Probabilities that each query (down) of one sequence gives to each key (across), of its first and last tokens."""
    real = np.flatnonzero(found.example["mask"][0])
    shown = real if len(real) <= WORDS else np.concatenate([real[: WORDS - 5], real[-5:]])
    # a character that the fonts lack would be a warning, and a $ would begin a formula
    words = [
        found.tokens.word(found.example["tokens"][0, i]).encode("latin-1", "replace").decode("latin-1") for i in shown
    ]
    words = [word.replace("$", r"\$") for word in words]
    figure, axes = grid_of(pyplot, len(chosen), 6.0)
    for axis, head in zip(axes, chosen, strict=True):
        rows = probs[head.layer][head.head][np.ix_(shown, shown)]
        axis.imshow(rows, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title(head), fontsize=10)
        axis.set_xticks(range(len(shown)), words, rotation=90, fontsize=7)
        axis.set_yticks(range(len(shown)), words, fontsize=7)
        if len(shown) < len(real):  # what is left out
            axis.axvline(WORDS - 5.5, color="gray", linewidth=0.8)
            axis.axhline(WORDS - 5.5, color="gray", linewidth=0.8)
    return figure


def pixels(image: np.ndarray) -> np.ndarray:
    """An image (C, S, S) as matplotlib draws it, from 0 to 1."""
    spread = image - image.min()
    shown = spread / (spread.max() or 1)
    return shown.transpose(1, 2, 0) if len(image) == 3 else shown.mean(axis=0)


def over_image(axis: Any, image: np.ndarray, by_patch: np.ndarray) -> Any:
    """One number per patch (n n,) over an image in grey: the larger, the less of the image is seen."""
    n, size = int(np.sqrt(len(by_patch))), image.shape[-1]
    place = {"extent": (0, size, size, 0), "interpolation": "nearest"}
    top = by_patch.max() or 1
    axis.imshow(pixels(image), cmap="gray", vmin=-0.5, vmax=1.1, **place)
    shown = by_patch.reshape(n, n)
    drawn = axis.imshow(shown, cmap="autumn_r", alpha=0.8 * shown / top, vmin=0, vmax=top, **place)
    axis.set(xticks=[], yticks=[])
    return drawn


def image_attention(pyplot: Any, found: Analysis, chosen: list[Head], probs: dict[int, np.ndarray]) -> Any:
    """Probability that CLS gives to each patch of one image."""
    figure, axes = grid_of(pyplot, len(chosen), 3.6)
    for axis, head in zip(axes, chosen, strict=True):
        row = probs[head.layer][head.head][0]  # (T,)
        drawn = over_image(axis, found.example["images"][0], row[1:])
        axis.set_title(f"{title(head)}, to CLS {row[0]:.0%}", fontsize=9)
        figure.colorbar(drawn, ax=axis, shrink=0.7)
    return figure


def patches(pyplot: Any, found: Analysis, example: np.ndarray) -> Any:
    """Outliers of the residual stream by patch: of all images over their mean, of one image over itself."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    every = sum(found.places.values())
    parts = ("all images, over their mean", found.image, every), ("one image", found.example["images"][0], example)
    for axis, (name, image, counts) in zip(axes, parts, strict=True):
        drawn = over_image(axis, image, counts[1:])
        axis.set_title(f"outliers by patch: {name}\n{counts[0]} on CLS, {counts[1:].sum()} on patches", fontsize=10)
        figure.colorbar(drawn, ax=axis, shrink=0.8)
    return figure
