"""What each path of each engine does, axis by axis, as its profile states it: the tables of docs/engines.md."""

from __future__ import annotations

from typing import Any

from qtx_ref.profiles import profile
from qtx_ref.spec import Fixed, to_dict

from ..engines.paths import OPERATIONS, engine_names, find_narrow, paths_of

__all__ = ["list_rows", "show_tables"]

HIDDEN = ("infinity",)  # axes on which all paths agree
SHARED = {"linear": ("matmul", "bias", "requantize"), "mx": ()}  # records of a profile that an operation reads
Row = dict[str, Any]


def list_rows(op: str) -> list[Row]:
    """One row for the paths of one profile: their names, and the value of each axis by `record.axis`."""
    rows: dict[tuple[str, str], Row] = {}
    for engine in engine_names():
        for path in paths_of(engine):
            if path.op != op:
                continue
            note = f"the last size mod {path.lanes} elements: {path.tail}" if path.tail else ""
            for name, remark in ((path.profile, note), (find_narrow(path), "on x86 without VNNI")):
                if name is not None:
                    key, row = (name, remark), {"paths": [], **read(name, op), "profile": name, "note": remark}
                    row = rows.setdefault(key, row)
                    row["paths"].append(path.name)
    return list(rows.values())


def read(name: str, op: str) -> Row:
    """The axes of a profile that an operation reads."""
    stated, row = profile(name), {}
    for record in SHARED.get(op, (op,)):
        if record in stated.unseen:
            continue
        rule = getattr(stated, record)
        if record == "requantize":
            row["requantize"] = "fixed" if isinstance(rule, Fixed) else "float"
        row |= flatten(record if record != op else "", to_dict(rule))
    return row


def flatten(prefix: str, value: Any) -> Row:
    """Leaves of a record by their path."""
    if not isinstance(value, dict):
        return {prefix: value}
    row: Row = {}
    for key, part in value.items():
        if key not in HIDDEN:
            row |= flatten(f"{prefix}.{key}" if prefix else key, part)
    return row


def show_tables() -> str:
    """Every operation's table in Markdown."""
    parts = []
    for op in OPERATIONS:
        rows = list_rows(op)
        axes = list(dict.fromkeys(key for row in rows for key in row if key not in ("paths", "profile", "note")))
        if not axes:
            continue
        head = ["path", *axes, "profile"]
        lines = [f"### {op}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in rows:
            cells = [", ".join(row["paths"]), *(show(row.get(axis, "")) for axis in axes)]
            note = f"; {row['note']}" if row["note"] else ""
            lines.append("| " + " | ".join([*cells, row["profile"] + note]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def show(value: Any) -> str:
    """A value of an axis in a cell; numbers that are powers of two as such."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        mantissa, exponent = value.hex().split("p")
        return f"2^{int(exponent)}" if mantissa == "0x1.0000000000000" and value != 1 else f"{value:.6g}"
    return str(value)
