"""Tables as aligned text that is also Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

DIVERGED = "diverged"  # in a cell whose number was measured and is not finite


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` decimals, fewer where it is large; `-` where there is none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value) or abs(value) >= 1e6:
        return f"{value:.2e}"
    size = 0 if value == 0 else math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, min(digits, digits + 1 - size))}f}"


def format_spread(values: Sequence[float | None], digits: int = 3) -> str:
    """One value; or mean and sample standard deviation of several; `diverged` where one is not finite, `-` where one is
    missing."""
    known = [v for v in values if v is not None]
    if not all(map(math.isfinite, known)):
        return DIVERGED
    if len(known) < len(values) or not known:
        return "-"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return format_number(mean, digits)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1))
    return f"{format_number(mean, digits)} ± {format_number(deviation, digits)}"


def format_range(values: Sequence[float | None], digits: int = 3) -> str:
    """One value; or the smallest and the largest of several; `-` where one is missing."""
    known = [v for v in values if v is not None]
    if len(known) < len(values) or not known:
        return "-"
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (min(known), max(known)))
    return "..".join(ends)
