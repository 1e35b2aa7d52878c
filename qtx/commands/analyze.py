"""`qtx analyze`: where the outliers are, in tables and pictures."""

from __future__ import annotations

from pathlib import Path

import click

from qtx_ref.stats import SIGMAS

from ..engines.machine import Machine
from ..jobs.analyze import BATCHES, AnalyzeRequest, analyze
from ..measure.analysis import PERCENTILES, Analysis, Carrier
from ..measure.heads import EXCESS, KEPT, MASS, OPEN, UPDATE, HeadStatistics
from ..report.tables import format_number, format_table
from .options import CHECKPOINT, DATA, JSON, LIMIT, MACHINE, OUT, say, write_json

LISTED = 12  # heads in the table; all of them are in the JSON


@click.command(name="analyze")
@CHECKPOINT
@DATA
@LIMIT
@click.option("--out", type=OUT, help="Folder for pictures and analysis.json; default: none.")
@MACHINE
@JSON
def analyze_command(
    checkpoint: Path,
    data: str | None,
    tokenizer: Path | None,
    batches: int | None,
    out: Path | None,
    machine: Machine,
    json_path: str | None,
) -> None:
    """Where the outliers are.

    Sizes and tails of every site, growth along the residual stream, the channels and tokens that carry outliers, and
    the attention heads that do nothing; over 16 evaluation batches unless --batches says otherwise.
    """
    analysis, written = analyze(AnalyzeRequest(checkpoint, out, batches or BATCHES, data, tokenizer, machine))
    say("\n\n".join(f"{title}\n{body}" for title, body in tabulate(analysis)), json_path)
    if written:
        say(f"\nwritten to {out}: {', '.join(written)}", json_path)
    write_json(json_path, analysis.to_json_values())


def format_percent(share: float, digits: int = 1) -> str:
    """A share from 0 to 1 in percent."""
    return f"{100 * share:.{digits}f} %"


def tabulate(analysis: Analysis) -> list[tuple[str, str]]:
    """Each table with its title."""
    parts = [
        (
            "size: largest |x| (mean over sequences, and of all), ends, root mean square, and percentiles of |x| "
            "(within 1/128 of the exact value)",
            tabulate_sizes(analysis),
        ),
        (
            "tails: kurtosis (3 for a normal variable; mean over sequences, the published form, and of all elements), "
            f"energy in the largest channels, elements beyond {SIGMAS:g} sigma of their sequence and "
            "channels that have them",
            tabulate_tails(analysis),
        ),
        ("growth: the residual stream by depth, and what is added to it", tabulate_growth(analysis)),
    ]
    if analysis.channels:
        title = (
            "channels that recur: outliers in most tokens, over all sites of the residual stream (embedding: a layer)"
        )
        parts.append((title, tabulate_channels(analysis)))
    if any(kind.outliers for kind in analysis.kinds):
        parts.append(
            ("tokens that carry the residual stream's outliers, by kind", tabulate_carriers(analysis.kinds, "kind"))
        )
    if analysis.words:
        parts.append(("and the most frequent of them", tabulate_carriers(analysis.words, "token")))
    idle = sum(head.idle for head in analysis.heads)
    parts.append((f"attention by layer: {idle} of {len(analysis.heads)} heads do nothing", tabulate_layers(analysis)))
    title = (
        f"heads, those that do nothing first: an update of at most {format_percent(UPDATE, 0)} of the residual's norm, "
        f"whatever the reason: gate closed (a mean opening of at most {format_percent(OPEN, 0)}), no probability "
        f"(at most {format_percent(KEPT, 0)} on all keys), marked keys (at least {format_percent(MASS, 0)} of the "
        f"probability, and {EXCESS:g} times what even attention would give them), or small values"
    )
    sizes_title = (
        "and the size of their values V and of the product P V: mean L2 norm at all tokens and at the marked ones"
    )
    return [*parts, (title, tabulate_heads(analysis)), (sizes_title, tabulate_head_sizes(analysis))]


def tabulate_sizes(analysis: Analysis) -> str:
    """A row per site: how large its values are."""
    header = ["site", "inf norm", "largest", "lowest", "highest", "rms", *(f"{q:g} %" for q in PERCENTILES)]
    return format_table(
        header,
        [
            [
                s.site,
                *(format_number(x, 2) for x in (s.inf_norm, s.inf_norm_max, s.lowest, s.highest)),
                format_number(s.rms),
                *(format_number(x) for x in s.percentiles.values()),
            ]
            for s in analysis.sites
        ],
    )


def tabulate_tails(analysis: Analysis) -> str:
    """A row per site: how heavy its tails are, and what lies beyond 6 sigma."""
    sigma = f"> {SIGMAS:g} sigma"
    header = ["site", "kurtosis", "published", "pooled", "top 1 %", "top 0.1 %", sigma, "per million", "channels"]
    return format_table(
        header,
        [
            [
                s.site,
                *(format_number(x, 2) for x in (s.kurtosis, s.kurtosis_published, s.kurtosis_pooled)),
                format_percent(s.top_energy),
                format_percent(s.top_energy_tenth),
                str(s.beyond_6_sigma),
                format_number(1e6 * s.beyond_6_sigma / max(s.elements, 1), 1),
                f"{len(s.beyond_channels)} of {s.channels}",
            ]
            for s in analysis.sites
        ],
    )


def tabulate_growth(analysis: Analysis) -> str:
    """A row per site of the residual stream and per branch that is added to it, by depth."""
    header = ["site", "inf norm", "to the first", "rms", "kurtosis"]
    return format_table(
        header,
        [
            [
                row["site"] if row["stream"] else f"+ {row['site']}",
                format_number(row["inf_norm"], 2),
                format_number(row["ratio"], 2),
                format_number(row["rms"]),
                format_number(row["kurtosis"], 2),
            ]
            for row in analysis.growth()
        ],
    )


def tabulate_channels(analysis: Analysis) -> str:
    """A row per channel of the residual stream that has outliers: where, and at what share of the tokens."""
    depth = 1 + len({site.split(".")[1] for site in analysis.stream if site.startswith("layer.")})
    header = ["channel", "layers", "sites", "of the tokens", "most", "at"]
    return format_table(
        header,
        [
            [
                str(c.channel),
                f"{c.layers} of {depth}",
                f"{c.sites} of {len(analysis.stream)}",
                format_percent(c.token_share, 2),
                format_percent(c.largest_share, 2),
                c.largest_site,
            ]
            for c in analysis.channels
        ],
    )


def tabulate_carriers(rows: list[Carrier], name: str) -> str:
    """A row per kind of token or place: its share of the tokens and of the outliers."""
    header = [name, "of the tokens", "of the outliers", "times its share"]
    return format_table(
        header,
        [
            [
                row.name,
                format_percent(row.tokens, 2),
                format_percent(row.outliers, 2),
                format_number(row.outliers / row.tokens, 2),
            ]
            for row in rows
        ],
    )


def tabulate_layers(analysis: Analysis) -> str:
    """A row per layer: means over its heads, and how many of them do nothing."""
    names = list(analysis.heads[0].mass)
    rows = []
    for layer in sorted({head.layer for head in analysis.heads}):
        part = [head for head in analysis.heads if head.layer == layer]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        rows.append(
            [
                f"layer {layer}",
                str(sum(head.idle for head in part)),
                *(format_percent(mean([head.mass[name] for head in part])) for name in names),
                format_number(mean([head.entropy for head in part]), 2),
                format_percent(mean([head.relative_entropy for head in part])),
                format_percent(mean([head.update for head in part])),
            ]
        )
    return format_table(["mean over heads", "idle", *names, "entropy", "of largest", "update"], rows)


def tabulate_heads(analysis: Analysis) -> str:
    """A row per head of `list_heads`: what it attends to, and whether it does nothing."""
    names = list(analysis.heads[0].mass)
    header = ["head", "does nothing", *names, "marked", "even", "kept", "gate", "entropy", "of largest", "update"]
    rows = []
    for head in list_heads(analysis):
        row = [f"layer {head.layer} head {head.head}", head.reason or "no"]
        row += [format_percent(share) for share in (*head.mass.values(), head.marked, head.even, head.kept)]
        row += ["-" if head.gate is None else format_percent(head.gate), format_number(head.entropy, 2)]
        rows.append([*row, format_percent(head.relative_entropy), format_percent(head.update)])
    return format_table(header, rows)


def list_heads(analysis: Analysis) -> list[HeadStatistics]:
    """Those that do nothing, at least LISTED."""
    return analysis.heads[: max(LISTED, sum(head.idle for head in analysis.heads))]


def tabulate_head_sizes(analysis: Analysis) -> str:
    """A row per head of `list_heads`: the sizes of its V and P V, at all tokens and at those of each mark."""
    names = list(analysis.heads[0].value)
    header = ["head", *(f"{part} {name}" for part in ("V", "P V") for name in names)]
    rows = []
    for head in list_heads(analysis):
        row = [f"layer {head.layer} head {head.head}"]
        rows.append(row + [format_number(part[name], 2) for part in (head.value, head.product) for name in names])
    return format_table(header, rows)
