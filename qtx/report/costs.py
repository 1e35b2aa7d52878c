"""The tables, the paragraph and the picture of `qtx cost`, made of its measured numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engines.backend import need
from ..files.container import write_picture
from .tables import number, table

FASTER, SLOWER = 0.95, 1.05  # ratios of time between which two variants are called equal
MIB = 2**20


def size(count: int | None) -> str:
    """Bytes in MiB."""
    return "-" if count is None else f"{count / MIB:.1f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def cost_table(result: Mapping[str, Any]) -> str:
    """Every variant in every cell: what was measured, or the finding that kept it from being timed."""
    header = ["variant", "batch x length", "ms", "p95", "to float32", "seq/s", "tokens/s", "MiB", "disk MiB", "error",
              "same argmax"]  # fmt: skip
    rows = []
    for cell in result["cells"]:
        for variant in result["variants"]:
            found = variant["cells"].get(cell["name"], {})
            if variant["finding"] and not found:
                continue
            times = [number(found.get(key) and found[key] * 1e3, 2) for key in ("median", "p95")]
            rows.append([variant["name"], cell["name"], *times, number(found.get("ratio"), 2),
                         number(found.get("sequences_per_s"), 1), number(found.get("tokens_per_s"), 0),
                         size(found.get("memory")), size(variant["bytes"]), error(found.get("error")),
                         agreement(found)])  # fmt: skip
    text = table(header, rows)
    for variant in result["variants"]:
        if variant["finding"]:
            text += f"\n{variant['name']}: not timed: {variant['finding']}"
    return text


def agreement(cell: Mapping[str, Any]) -> str:
    """The share of equal answers with the number of sequences behind it, which is measured in one cell of each length."""
    if cell.get("agreement") is None:
        return "-"
    return f"{100 * cell['agreement']:.1f}%" + (f" of {cell['compared']} seq" if "compared" in cell else "")


def error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.2g}"


def kernel_table(result: Mapping[str, Any]) -> str:
    """Which kernels ran, in the last cell."""
    rows = []
    for variant in result["variants"]:
        found = variant["profile"]
        if not found:
            continue
        ops = ", ".join(f"{name} {100 * share:.0f}%" for name, share in list(found.get("ops", {}).items())[:4])
        kernels = ", ".join(f"{count} x {name}" for name, count in found.get("kernels", {}).items())
        quantizers = found.get("quantizers")
        counted = "-" if quantizers is None else f"{quantizers} ({found['weight_quantizers']} of weights)"
        rows.append([variant["name"], percent(found.get("matmuls")), counted, kernels or "-", ops or "-"])
    return table(["variant", "in matmuls", "quantizers", "integer matmuls", "most expensive ops"], rows)


def attention_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Parameters and time that each attention adds."""
    training = any("step" in row for row in rows)
    header = ["attention", "batch x length", "parameters", "%", "forward ms", "added"]
    header += ["step ms", "added"] * training
    cells = []
    for row in rows:
        cells.append([row["attention"], row["cell"], f"+{row['parameters']}", f"{row['percent']:.4f}"])
        for kind in ["forward", "step"][: 1 + training]:
            cells[-1] += [number(row[kind] * 1e3, 2), f"{100 * (row[f'{kind}_ratio'] - 1):+.1f}%"]
    return table(header, cells)


# --- the paragraph ----------------------------------------------------------------------------------------------------


def versus(ratio: float) -> str:
    """A ratio of time in words."""
    if FASTER <= ratio <= SLOWER:
        return f"as fast as float32 ({ratio:.2f} times its latency)"
    return f"{'faster' if ratio < 1 else 'slower'} than float32 ({ratio:.2f} times its latency)"


def over_cells(variant: Mapping[str, Any], key: str) -> list[float]:
    return [cell[key] for cell in variant["cells"].values() if cell.get(key) is not None]


def span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def paragraph(result: Mapping[str, Any]) -> str:
    """Where the time goes, and whether fake quantization and integers are faster here."""
    variants = {variant["name"]: variant for variant in result["variants"]}
    base = variants["float32"]
    text = []
    if (share := base["profile"].get("matmuls")) is not None:
        text.append(
            f"Float32 spends {percent(share)} of its op time in matrix products, which is what integers can win."
        )
    fake = variants.get("fake quantization")
    if fake and over_cells(fake, "ratio"):
        text.append(fake_sentence(fake, base))
    integer = variants.get("integers")
    if integer and over_cells(integer, "ratio"):
        text.append(integer_sentence(integer, base))
    elif integer and integer["finding"]:
        text.append(f"Integers were not measured: {integer['finding']}.")
    text.append(engines_sentence(result["variants"]))
    return " ".join(filter(None, text))


def fake_sentence(fake: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    ratios, found = over_cells(fake, "ratio"), fake["profile"]
    text = f"Fake quantization is {versus(middle(ratios))}; over all sizes {span(ratios)}"
    if "quantizers" in found:
        text += (
            f": the same products in float, and {found['quantizers']} quantize-dequantize steps a pass "
            f"({found['weight_quantizers']} of them of weights), {percent(found['quantizing'])} of it"
        )
    memory = ratios_of_memory(fake, base)
    if memory:
        text += f"; it takes {span(memory)} times the memory"
    agrees = middle(ratios) >= FASTER and (not memory or min(memory) >= FASTER)
    published = "no faster and no smaller than float, 58 to 59 ms and 484 to 486 MB whatever the method"
    verdict = "agrees with" if agrees else "does not agree with"
    return f"{text}. This {verdict} the published result (arXiv 2603.04308: {published})."


def integer_sentence(integer: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    ratios, found = over_cells(integer, "ratio"), integer["profile"]
    text = f"Integers are {versus(middle(ratios))}; over all sizes {span(ratios)}"
    if "kernels" in found:
        kernels = " and ".join(f"{name} ({count})" for name, count in found["kernels"].items())
        text += f": {percent(found['matmuls'])} of a pass is integer matmuls, by {kernels}, the rest "
        text += "requantization, tables, norms and sums of integers, one op after another"
    memory = ratios_of_memory(integer, base)
    if memory:
        text += f"; they take {span(memory)} times the memory"
    if integer["bytes"] and base["bytes"]:
        text += f" and {integer['bytes'] / base['bytes']:.2f} times the bytes on disk"
    return f"{text}."


def engines_sentence(variants: Sequence[Mapping[str, Any]]) -> str:
    timed = {v["name"]: over_cells(v, "ratio") for v in variants if v["name"].startswith(("onnxruntime", "torch "))}
    timed = {name: ratios for name, ratios in timed.items() if ratios}
    if not timed:
        return ""
    parts = [f"{name} {middle(ratios):.2f} times" for name, ratios in timed.items()]
    worst = {v["name"]: max(over_cells(v, "error"), default=0) for v in variants if v["name"] in timed}
    text = f"What other engines' kernels take of float32's latency: {', '.join(parts)}"
    name = max(worst, key=worst.__getitem__)
    return f"{text}; the largest error among them is {worst[name]:.2g} ({name})."


def middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def ratios_of_memory(variant: Mapping[str, Any], base: Mapping[str, Any]) -> list[float]:
    pairs = [(cell.get("memory"), base["cells"][name].get("memory")) for name, cell in variant["cells"].items()]
    return [own / other for own, other in pairs if own and other]


# --- the picture ------------------------------------------------------------------------------------------------------


def bars(path: Path, result: Mapping[str, Any]) -> None:
    """Latency (median, with p95 as a whisker) and memory of every variant by cell, as a PNG. Raises MissingExtra without
    matplotlib."""
    matplotlib = need("matplotlib", "report", "the picture of the costs")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    cells = [cell["name"] for cell in result["cells"]]
    shown = [variant for variant in result["variants"] if variant["cells"]]
    width = 0.8 / max(len(shown), 1)
    for i, variant in enumerate(shown):
        found = [variant["cells"].get(cell, {}) for cell in cells]
        at = [k + i * width for k in range(len(cells))]
        median = [(f.get("median") or 0) * 1e3 for f in found]
        above = [max((f.get("p95") or 0) * 1e3 - m, 0) for f, m in zip(found, median, strict=True)]
        axes[0].bar(at, median, width, label=variant["name"], yerr=[[0] * len(above), above], error_kw={"linewidth": 1})
        axes[1].bar(at, [(f.get("memory") or 0) / MIB for f in found], width)
    for axis, label in zip(axes, ("latency, ms (whisker: p95)", "peak memory, MiB"), strict=True):
        axis.set_xticks([k + 0.4 - width / 2 for k in range(len(cells))], cells)
        axis.set(xlabel="batch x length", ylabel=label)
    axes[0].legend(fontsize="small")
    write_picture(path, figure)
    pyplot.close(figure)
