"""Pictures of an analysis, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import erf

from qtx_ref.stats import SIGMAS

from ..engines.protocols import Model
from ..measure.analysis import Analysis, bin_edges
from ..measure.heads import HeadStatistics
from .figures import (
    COLORS,
    GRAY,
    add_legend,
    choose_looks,
    choose_scale,
    finite,
    new_figure,
    new_panels,
    plain,
    save_figure,
    set_title,
    spans_decades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

WHAT = "the pictures of an analysis"
NAMES = ("depth.png", "channels.png", "histogram.png", "attention.png", "patches.png")  # the last one of images alone
MAPS = 6  # heads whose attention is drawn
WORDS, LAST = 40, 5  # tokens on an axis: more cannot be read; and how many of them are a sequence's last
OCTAVE = 8  # bins of the drawn histogram between a number and its double
PARTS = ("attn.output", "attn.residual", "ffn.output", "ffn.residual")


def draw_analysis(folder: Path, model: Model, analysis: Analysis, title: str) -> list[str]:
    """Writes the pictures of an analysis as PNGs and gives their names. Raises MissingExtra without matplotlib."""
    chosen = analysis.heads[:MAPS]
    probs = {}
    for layer in {head.layer for head in chosen}:
        site = f"layer.{layer}.attn.probs"
        probs[layer] = model.record(analysis.example, [site])[site][0][0]  # (H, T, T)
    figures = {
        "depth.png": make_depth_figure(analysis, title),
        "channels.png": make_channel_figure(analysis, title),
        "histogram.png": make_histogram_figure(analysis, title),
    }
    if analysis.image is None:
        figures["attention.png"] = make_text_figure(analysis, chosen, probs, title)
    else:
        sites = dict.fromkeys(analysis.stream, "sequence")
        own = model.statistics(analysis.example, sites, ("beyond_tokens",))
        example = sum(part["beyond_tokens"][0] for part in own.values())  # (T,)
        figures["attention.png"] = make_image_figure(analysis, chosen, probs, title)
        figures["patches.png"] = make_patch_figure(analysis, example, title)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return list(figures)


def make_depth_figure(analysis: Analysis, title: str) -> Figure:
    """Kurtosis and inf norm of each layer's sums and of what is added. Raises MissingExtra without matplotlib."""
    known = analysis.by_site()
    count = sum(site.endswith(".ffn.residual") for site in analysis.stream)
    figure, panels = new_panels(5.5, 3.9, 2, 2, WHAT)
    labels = {"kurtosis": "kurtosis", "inf_norm": "inf norm, mean over sequences"}
    looks = choose_looks(PARTS)
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        lines = {part: [getattr(known[f"layer.{i}.{part}"], name) for i in range(count)] for part in PARTS}
        for part, values in lines.items():
            panel.plot(range(count), values, **looks[part].style(count), label=part)
        choose_scale(panel, "y", [value for values in lines.values() for value in values])
        panel.locator_params(axis="x", integer=True)
        panel.set(xlabel="layer", ylabel=label)
        panel.grid(alpha=0.25)
    normal = panels[0].axhline(3, color=GRAY, linewidth=1, linestyle=":")
    add_legend(figure, [*panels[0].get_lines()[: len(PARTS)], normal], [*PARTS, "a normal variable (3)"])
    set_title(figure, f"{title}: by depth", "output: what is added to the residual stream; residual: the sum")
    return figure


def make_channel_figure(analysis: Analysis, title: str) -> Figure:
    """Root mean square of each channel along the residual stream; the recurring channels are named on top, every one.
    Raises MissingExtra without matplotlib."""
    from matplotlib.colors import LogNorm, Normalize

    rows = np.sqrt(np.stack([analysis.energy[site] for site in analysis.stream])) + 1e-12  # (S, C)
    count, width = rows.shape
    figure = new_figure(12, 2.2 + min(0.24 * count, 14), WHAT)
    axis = figure.subplots()
    low, high = float(np.median(rows)) / 10**0.5, float(rows.max())
    norm = LogNorm(low, high) if spans_decades([low, high]) else Normalize(min(low, float(rows.min())), high)
    drawn = axis.imshow(rows, aspect="auto", interpolation="nearest", cmap="magma", norm=norm)
    every = -(-count // 58)  # rows that have room for a name
    axis.set_yticks(range(0, count, every), analysis.stream[::every], fontsize=8)
    axis.set_xlabel("channel")
    named = sorted({channel.channel for channel in analysis.channels})
    for channel, place in zip(named, space_apart(named, width / 50, width), strict=True):
        axis.annotate(
            str(channel),
            (channel, -0.5),
            (place, -0.5 - 0.025 * count - 0.2),
            fontsize=8,
            rotation=90,
            ha="center",
            va="bottom",
            arrowprops={"arrowstyle": "-", "linewidth": 0.6},
            annotation_clip=False,
        )
    figure.colorbar(drawn, label="root mean square of the channel")
    note = "numbers on top: channels that are outliers in most tokens" if named else ""
    set_title(figure, f"{title}: channels along the residual stream", note)
    return figure


def space_apart(places: Sequence[int], gap: float, end: float) -> list[float]:
    """Ascending places moved as little to the right, and from the end back to the left, as leaves `gap` between
    them."""
    moved: list[float] = []
    for place in places:
        moved.append(max(float(place), moved[-1] + gap) if moved else float(place))
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], moved[i + 1] - gap if i + 1 < len(moved) else end)
    return moved


def make_histogram_figure(analysis: Analysis, title: str) -> Figure:
    """A panel for each layer's sum after its FFN: share of elements by |x| over the site's root mean square, beside a
    normal variable's. A bin without elements reaches down to the axis. Raises MissingExtra without matplotlib."""
    known, edges = analysis.by_site(), bin_edges()
    names = [site for site in analysis.stream if site.endswith(".ffn.residual")]
    some = np.isfinite(edges[1:])
    middle = (edges[:-1][some] + edges[1:][some]) / 2
    scaled = {name: middle / (known[name].rms or 1) for name in names}
    ends = [1.0, *(scaled[name][analysis.histograms[name][some] > 0].max(initial=1) for name in names)]
    octaves = int(np.ceil(np.log2(max(finite(ends))))) + 1
    grid = 2.0 ** (np.arange(-6 * OCTAVE, max(octaves, 4) * OCTAVE + 1) / OCTAVE)
    shares = {}
    for name in names:
        counts = analysis.histograms[name][some]
        shares[name] = np.histogram(scaled[name], grid, weights=counts / max(counts.sum(), 1))[0]
    least = min([1e-6, *(part[part > 0].min(initial=1) for part in shares.values())])
    normal = np.diff(erf(grid / np.sqrt(2)))
    figure, panels = new_panels(3.7, 2.7, len(names), 3 if len(names) < 13 else 6, WHAT)
    for panel, name in zip(panels, names, strict=True):
        if shares[name].any():
            panel.stairs(shares[name], grid, fill=True, color=COLORS[6], label="elements")
        else:
            panel.text(0.5, 0.5, "no data", transform=panel.transAxes, ha="center", va="center", color=GRAY)
        panel.stairs(normal, grid, baseline=None, color="black", linestyle=":", label="a normal variable")
        panel.axvline(SIGMAS, color=COLORS[1], linewidth=1, label=f"{SIGMAS:g} times the root mean square")
        panel.set(xscale="log", yscale="log", xlim=(grid[0], grid[-1]), ylim=(least / 2, 0.2))
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("|x| / root mean square", fontsize=9)
        panel.set_ylabel(f"share of elements\n({OCTAVE} bins an octave)", fontsize=9)
        panel.grid(alpha=0.25)
    if panels:
        handles = {str(h.get_label()): h for panel in panels for h in panel.get_legend_handles_labels()[0]}
        add_legend(figure, list(handles.values()), list(handles))
    set_title(figure, f"{title}: sizes in the residual stream")
    return figure


def describe_head(head: HeadStatistics) -> str:
    """A head's place, whether it does something, and by how much."""
    kind = "does nothing" if head.idle else "acts"
    return f"layer {head.layer} head {head.head}: {kind}\nmarked {head.marked:.0%}, update {head.update:.1%}"


def make_text_figure(
    analysis: Analysis, chosen: Sequence[HeadStatistics], probs: Mapping[int, np.ndarray], title: str
) -> Figure:
    """Probabilities that each query (down) of one sequence gives to each key (across), of its first and last tokens;
    probs:
    by layer (H, T, T). Raises MissingExtra without matplotlib."""
    real = np.flatnonzero(analysis.example["mask"][0])
    places = real if len(real) <= WORDS else np.concatenate([real[: WORDS - LAST], real[-LAST:]])
    figure, panels = new_panels(6.0, 6.0, len(chosen), 3, WHAT)
    kinds = analysis.tokens
    assert kinds is not None  # of text
    words = [plain(kinds.word(analysis.example["tokens"][0, i]), 16) for i in places]
    note = "one sequence"
    if len(places) < len(real):
        note += f"; lines: {len(real) - len(places)} tokens left out between"
    maps = [probs[head.layer][head.head][np.ix_(places, places)] for head in chosen]
    top = max([1e-6, *(float(rows.max()) for rows in maps)])  # one scale for all
    for panel, head, rows in zip(panels, chosen, maps, strict=True):
        drawn = panel.imshow(rows, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
        panel.set_title(describe_head(head), fontsize=10)
        panel.set_xticks(range(len(places)), words, rotation=90, fontsize=7)
        panel.set_yticks(range(len(places)), words, fontsize=7)
        panel.set(xlabel="key", ylabel="query")
        if len(places) < len(real):
            panel.axvline(WORDS - LAST - 0.5, color=GRAY, linewidth=0.8)
            panel.axhline(WORDS - LAST - 0.5, color=GRAY, linewidth=0.8)
    if panels:
        figure.colorbar(drawn, ax=panels, shrink=0.5, label="probability")
    set_title(figure, f"{title}: attention", note)
    return figure


def scale_pixels(image: np.ndarray) -> np.ndarray:
    """An image (C, S, S) as matplotlib draws it, from 0 to 1."""
    spread = image - image.min()
    part = spread / (spread.max() or 1)
    return part.transpose(1, 2, 0) if len(image) == 3 else part.mean(axis=0)


def draw_over_image(axis: Axes, image: np.ndarray, by_patch: np.ndarray) -> AxesImage:
    """One number per patch (n n,) over an image in grey: the larger, the less of the image is seen."""
    n, size = int(np.sqrt(len(by_patch))), image.shape[-1]
    place: dict[str, Any] = {"extent": (0, size, size, 0), "interpolation": "nearest"}
    top = by_patch.max() or 1
    axis.imshow(scale_pixels(image), cmap="gray", vmin=-0.5, vmax=1.1, **place)
    square = by_patch.reshape(n, n)
    drawn = axis.imshow(square, cmap="autumn_r", alpha=0.8 * square / top, vmin=0, vmax=top, **place)
    axis.set(xticks=[], yticks=[])
    return drawn


def make_image_figure(
    analysis: Analysis, chosen: Sequence[HeadStatistics], probs: Mapping[int, np.ndarray], title: str
) -> Figure:
    """Probability that CLS gives to each patch of one image; probs: by layer (H, T, T). Raises MissingExtra without
    matplotlib."""
    figure, panels = new_panels(3.8, 3.4, len(chosen), 3, WHAT)
    for panel, head in zip(panels, chosen, strict=True):
        row = probs[head.layer][head.head][0]  # (T,)
        drawn = draw_over_image(panel, analysis.example["images"][0], row[1:])
        panel.set_title(f"{describe_head(head)}, to CLS {row[0]:.0%}", fontsize=9)
        figure.colorbar(drawn, ax=panel, shrink=0.7, label="probability")
    set_title(figure, f"{title}: attention of CLS", "one image")
    return figure


def make_patch_figure(analysis: Analysis, example: np.ndarray, title: str) -> Figure:
    """Outliers of the residual stream by patch: of all images over their mean, of one image over itself; example: its
    outliers by token (T,). Raises MissingExtra without matplotlib."""
    figure, panels = new_panels(4.6, 4.0, 2, 2, WHAT)
    every = np.sum(list(analysis.places.values()), axis=0)
    first = analysis.example["images"][0]
    parts = ("all images, over their mean", analysis.image, every), ("one image", first, example)
    for panel, (name, image, counts) in zip(panels, parts, strict=True):
        drawn = draw_over_image(panel, image, counts[1:])
        panel.set_title(f"{name}: {counts[0]} on CLS, {counts[1:].sum()} on patches", fontsize=9)
        figure.colorbar(drawn, ax=panel, shrink=0.8, label="outliers")
    set_title(figure, f"{title}: outliers by patch", f"beyond {SIGMAS:g} sigma, over all sites of the residual stream")
    return figure
