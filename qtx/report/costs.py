"""The tables, the paragraph and the picture of `qtx cost`, made of its measured numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from .figures import (
    COLORS,
    GRAY,
    choose_scale,
    finite,
    new_figure,
    plain,
    save_figure,
    set_title,
)
from .tables import format_number, format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FASTER, SLOWER = 0.95, 1.05  # ratios of time between which two variants are called equal
MIB = 2**20


class CellResult(TypedDict, total=False):
    """One variant in one cell; what was not measured is absent or None."""

    memory: int | None  # bytes at the peak
    error: float | None  # RMS of the difference to float32 over RMS of float32
    agreement: float | None  # share of equal argmax
    compared: int  # sequences behind it
    median: float  # seconds of a pass, as the next
    p95: float
    ratio: float  # of time, to float32
    sequences_per_s: float
    tokens_per_s: float


class KernelProfile(TypedDict, total=False):
    """Which kernels ran: shares of a pass's time from 0 to 1, and counts."""

    ops: dict[str, float]
    matmuls: float
    kernels: dict[str, int]
    quantizers: int
    weight_quantizers: int
    quantizing: float


class VariantResult(TypedDict):
    """One variant; `finding` says why it was not timed."""

    name: str
    bytes: int | None
    finding: str | None
    cells: dict[str, CellResult]
    profile: KernelProfile


class AttentionRow(TypedDict, total=False):
    """What an attention adds in one cell; times where they were measured."""

    attention: str
    cell: str  # batch size and length, `8x128`
    parameters: int  # more than vanilla's, and in percent of them
    percent: float
    fused: bool  # whether a fused kernel computes it
    forward: float  # seconds of a pass, and their ratio to vanilla's
    forward_ratio: float
    step: float  # of a training step
    step_ratio: float


class CellName(TypedDict):
    """One batch size and length, `8x128`."""

    name: str


class CostResult(TypedDict, total=False):
    """What cost.json holds of variants."""

    checkpoint: str | None
    model: str | None
    recipe: str
    backend: str
    device: str
    threads: int
    rounds: int
    cells: list[CellName]
    variants: list[VariantResult]


def format_size(count: int | None) -> str:
    """Bytes in MiB."""
    return "-" if count is None else f"{count / MIB:.1f}"


def format_percent(share: float | None) -> str:
    """A share of 1 in percent."""
    return "-" if share is None else f"{100 * share:.0f}%"


def tabulate_costs(result: CostResult) -> str:
    """Every variant in every cell: what was measured, or the finding that kept it from being timed."""
    header = ["variant", "batch x length", "ms", "p95", "to float32", "seq/s", "tokens/s", "MiB", "disk MiB", "error"]
    header.append("same argmax")
    rows = []
    for cell in result["cells"]:
        for variant in result["variants"]:
            part = variant["cells"].get(cell["name"], {})
            if variant["finding"] and not part:
                continue
            cells = [variant["name"], cell["name"]]
            cells += [format_number(None if part.get(key) is None else part[key] * 1e3, 2) for key in ("median", "p95")]
            cells += [format_number(part.get("ratio"), 2), format_number(part.get("sequences_per_s"), 1)]
            cells += [
                format_number(part.get("tokens_per_s"), 0),
                format_size(part.get("memory")),
                format_size(variant["bytes"]),
            ]
            cells += [format_error(part.get("error")), format_agreement(part)]
            rows.append(cells)
    text = format_table(header, rows)
    for variant in result["variants"]:
        if variant["finding"]:
            text += f"\n{variant['name']}: not timed: {variant['finding']}"
    return text


def format_agreement(cell: CellResult) -> str:
    """The share of equal answers with the number of sequences behind it, which is measured in one cell of each
    length."""
    share = cell.get("agreement")
    if share is None:
        return "-"
    return f"{100 * share:.1f}%" + (f" of {cell['compared']} seq" if "compared" in cell else "")


def format_error(value: float | None) -> str:
    """A relative error with two digits."""
    return "-" if value is None else "0" if value == 0 else f"{value:.2g}"


def tabulate_kernels(result: CostResult) -> str:
    """Which kernels ran, in the last cell."""
    rows = []
    for variant in result["variants"]:
        profile = variant["profile"]
        if not profile:
            continue
        ops = ", ".join(f"{name} {100 * share:.0f}%" for name, share in list(profile.get("ops", {}).items())[:4])
        kernels = ", ".join(f"{count} x {name}" for name, count in profile.get("kernels", {}).items())
        quantizers = profile.get("quantizers")
        counted = "-" if quantizers is None else f"{quantizers} ({profile['weight_quantizers']} of weights)"
        rows.append([variant["name"], format_percent(profile.get("matmuls")), counted, kernels or "-", ops or "-"])
    return format_table(["variant", "in matmuls", "quantizers", "integer matmuls", "most expensive ops"], rows)


def tabulate_attentions(rows: Sequence[AttentionRow]) -> str:
    """Parameters and time that each attention adds."""
    training = any("step" in row for row in rows)
    header = ["attention", "batch x length", "parameters", "%", "forward ms", "added"]
    header += ["step ms", "added"] * training
    cells = []
    for row in rows:
        cells.append([row["attention"], row["cell"], f"+{row['parameters']}", f"{row['percent']:.4f}"])
        cells[-1] += [format_number(row["forward"] * 1e3, 2), f"{100 * (row['forward_ratio'] - 1):+.1f}%"]
        if training:
            cells[-1] += [format_number(row["step"] * 1e3, 2), f"{100 * (row['step_ratio'] - 1):+.1f}%"]
    return format_table(header, cells)


# --- the paragraph ----------------------------------------------------------------------------------------------------


def describe_ratio(ratio: float) -> str:
    """A ratio of time in words."""
    if FASTER <= ratio <= SLOWER:
        return f"as fast as float32 ({ratio:.2f} times its latency)"
    return f"{'faster' if ratio < 1 else 'slower'} than float32 ({ratio:.2f} times its latency)"


def collect_cells(variant: VariantResult, key: Literal["ratio", "error"]) -> list[float]:
    """A variant's values of one key, of the cells in which it was measured."""
    return [value for cell in variant["cells"].values() if (value := cell.get(key)) is not None]


def format_span(values: Sequence[float]) -> str:
    """The least and the largest value, or the one that they both are."""
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def describe_costs(result: CostResult) -> str:
    """Where the time goes, and whether fake quantization and integers are faster here."""
    variants = {variant["name"]: variant for variant in result["variants"]}
    base = variants["float32"]
    text = []
    if (share := base["profile"].get("matmuls")) is not None:
        text.append(
            f"Float32 spends {format_percent(share)} of its op time in matrix products, which is what integers can win."
        )
    fake = variants.get("fake quantization")
    if fake and collect_cells(fake, "ratio"):
        text.append(describe_fake(fake, base))
    integer = variants.get("integers")
    if integer and collect_cells(integer, "ratio"):
        text.append(describe_integers(integer, base))
    elif integer and integer["finding"]:
        text.append(f"Integers were not measured: {integer['finding']}.")
    text.append(describe_engines(result["variants"]))
    return " ".join(filter(None, text))


def describe_fake(fake: VariantResult, base: VariantResult) -> str:
    """Fake quantization's time and memory against float32's, and what was published of them."""
    ratios, profile = collect_cells(fake, "ratio"), fake["profile"]
    text = f"Fake quantization is {describe_ratio(take_median(ratios))}; over all sizes {format_span(ratios)}"
    if "quantizers" in profile:
        text += (
            f": the same products in float, and {profile['quantizers']} quantize-dequantize steps a pass "
            f"({profile['weight_quantizers']} of them of weights), {format_percent(profile['quantizing'])} of it"
        )
    memory = compare_memory(fake, base)
    if memory:
        text += f"; it takes {format_span(memory)} times the memory"
    agrees = take_median(ratios) >= FASTER and (not memory or min(memory) >= FASTER)
    published = "no faster and no smaller than float, 58 to 59 ms and 484 to 486 MB whatever the method"
    verdict = "agrees with" if agrees else "does not agree with"
    return f"{text}. This {verdict} the published result (arXiv 2603.04308: {published})."


def describe_integers(integer: VariantResult, base: VariantResult) -> str:
    """Integers' time, memory and bytes against float32's, and their kernels."""
    ratios, profile = collect_cells(integer, "ratio"), integer["profile"]
    text = f"Integers are {describe_ratio(take_median(ratios))}; over all sizes {format_span(ratios)}"
    if "kernels" in profile:
        kernels = " and ".join(f"{name} ({count})" for name, count in profile["kernels"].items())
        text += f": {format_percent(profile['matmuls'])} of a pass is integer matmuls, by {kernels}, the rest "
        text += "requantization, tables, norms and sums of integers, one op after another"
    memory = compare_memory(integer, base)
    if memory:
        text += f"; they take {format_span(memory)} times the memory"
    if integer["bytes"] and base["bytes"]:
        text += f" and {integer['bytes'] / base['bytes']:.2f} times the bytes on disk"
    return f"{text}."


def describe_engines(variants: Sequence[VariantResult]) -> str:
    """Other engines' time and error; empty where none was timed."""
    timed = {v["name"]: collect_cells(v, "ratio") for v in variants if v["name"].startswith(("onnxruntime", "torch "))}
    timed = {name: ratios for name, ratios in timed.items() if ratios}
    if not timed:
        return ""
    parts = [f"{name} {take_median(ratios):.2f} times" for name, ratios in timed.items()]
    worst = {v["name"]: max(collect_cells(v, "error"), default=0) for v in variants if v["name"] in timed}
    text = f"What other engines' kernels take of float32's latency: {', '.join(parts)}"
    name = max(worst, key=worst.__getitem__)
    return f"{text}; the largest error among them is {worst[name]:.2g} ({name})."


def take_median(values: Sequence[float]) -> float:
    """The median of values in any order."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def compare_memory(variant: VariantResult, base: VariantResult) -> list[float]:
    """Ratios of memory to the base's, of the cells in which both were measured."""
    pairs = [(cell.get("memory"), base["cells"][name].get("memory")) for name, cell in variant["cells"].items()]
    return [own / other for own, other in pairs if own and other]


# --- the picture ------------------------------------------------------------------------------------------------------

ROW = 0.24  # inches
WIDE = 4  # panels beside one another
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.1}  # below a number
PLAIN = "float32"  # the variant that the others are compared with


def draw_cost(path: Path, result: CostResult) -> None:
    """Writes `make_cost_figure` as a PNG. Raises MissingExtra without matplotlib."""
    save_figure(make_cost_figure(result), path)


def make_cost_figure(result: CostResult) -> Figure:
    """For each cell a panel of latency and one of peak memory, with a bar and its number for every variant of the
    table, or words where it was not measured. Each panel has its own scale. Raises MissingExtra without matplotlib."""
    cells, variants = result["cells"], result["variants"]
    columns = min(WIDE, max(len(cells), 1))
    bands = max(1, -(-len(cells) // columns))
    height = 1.5 + 2 * bands * (0.75 + ROW * max(len(variants), 2))
    figure = new_figure(max(7.0, 2.2 + 2.9 * columns), height, "the picture of the costs")
    panels = figure.subplots(2 * bands, columns, squeeze=False)
    for k in range(bands * columns):
        pair = panels[2 * (k // columns), k % columns], panels[2 * (k // columns) + 1, k % columns]
        if k >= len(cells):
            for panel in pair:
                panel.remove()
            continue
        draw_bars(pair[0], cells[k]["name"], "median", 1e3, variants)
        draw_bars(pair[1], cells[k]["name"], "memory", 1 / MIB, variants)
        for panel in pair:
            panel.set_yticks(range(len(variants)), [plain(v["name"], 30) for v in variants] if k % columns == 0 else [])
        pair[0].set_title(describe_cell(cells[k]["name"]), fontsize=10)
        pair[0].set_xlabel("latency, ms")
        pair[1].set_xlabel("peak memory, MiB")
    set_title(figure, describe_run(result), "bar: median; whisker: 95th percentile of the rounds; dashed: float32")
    return figure


def draw_bars(
    panel: Axes, cell: str, key: Literal["median", "memory"], factor: float, variants: Sequence[VariantResult]
) -> None:
    """One cell's bars, the first variant uppermost; on a logarithmic axis where they span more than a decade and a
    half."""
    parts = [variant["cells"].get(cell, {}) for variant in variants]
    values = [None if (value := part.get(key)) is None else value * factor for part in parts]
    whiskers = [part["p95"] * factor if key == "median" and "p95" in part else None for part in parts]
    known = finite([*values, *whiskers])
    choose_scale(panel, "x", finite(values))
    edge = 0.5 * min(known) if panel.get_xscale() == "log" else 0.0
    top = max(known, default=1.0)
    room = 1.35 * top if panel.get_xscale() == "linear" else edge * (top / edge) ** 1.35
    for place, (variant, value, whisker) in enumerate(zip(variants, values, whiskers, strict=True)):
        if value is None:
            words = "not timed" if variant.get("finding") or key == "median" else "not measured"
            panel.text(
                0.02,
                place,
                words,
                transform=panel.get_yaxis_transform(),
                fontsize=7,
                va="center",
                color=GRAY,
                bbox=WHITE,
            )
            continue
        color = GRAY if variant["name"] == PLAIN else COLORS[0]
        panel.barh(place, value - edge, 0.7, left=edge, color=color)
        if whisker is not None:
            panel.plot([value, whisker], [place, place], color="black", linewidth=1)
        label = f" {format_number(value, 2 if value < 10 else 1)}"
        panel.text(max(value, whisker or 0), place, label, fontsize=7, va="center", bbox=WHITE)
        if variant["name"] == PLAIN:
            panel.axvline(value, color="black", linewidth=0.8, linestyle="--", zorder=1.5)
    panel.set_xlim(edge, room)
    panel.set_ylim(max(len(variants), 1) - 0.4, -0.6)
    panel.grid(axis="x", alpha=0.25)
    if panel.get_xscale() == "linear":
        panel.locator_params(axis="x", nbins=5)


def describe_cell(name: str) -> str:
    """A cell's batch and length in words; its name where that says neither."""
    batch, _, length = name.partition("x")
    return f"batch {batch}, length {length}" if batch.isdigit() and length.isdigit() else plain(name)


def describe_run(result: CostResult) -> str:
    """Model, recipe and machine, as far as the result names them."""
    parts = [str(result.get("checkpoint") or result.get("model") or "")]
    parts += [f"{result['recipe']}"] if "recipe" in result else []
    parts += [f"{result['backend']} on {result['device']}"] if {"backend", "device"} <= result.keys() else []
    parts += [f"{result[key]} {key}" for key in ("threads", "rounds") if result.get(key)]
    return f"qtx cost: {', '.join(filter(None, parts))}"
