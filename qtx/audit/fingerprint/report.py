"""A fingerprint for people, as JSON values, and as the profile of what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qtx_ref.spec import (
    OPERATIONS,
    QTX,
    DequantizeRule,
    FakeQuantizeRule,
    MatmulRule,
    Profile,
    QuantizeRule,
    to_dict,
)

from .boxes import Observed
from .linear import make_requantize
from .questions import Values
from .search import Fingerprint, Verdict, Witness

SEEN = {  # operations of a profile that an operation of a box shows
    "quantize": ("quantize",),
    "dequantize": ("dequantize",),
    "fake_quantize": ("fake_quantize",),
    "linear": ("matmul", "bias", "requantize"),
}


def make_profile(found: Fingerprint, engine: str, path: str, values: Values | None = None) -> Profile:
    """The profile that reproduces a box: the project's own rules but for what was seen. `values`: another of those that
    are alike."""
    values = values or found.values
    rules: dict[str, Any]
    if found.operation == "quantize":
        rules = {"quantize": QuantizeRule(*values)}
    elif found.operation == "dequantize":
        rules = {"dequantize": DequantizeRule(*values)}
    elif found.operation == "fake_quantize":
        rules = {"fake_quantize": FakeQuantizeRule(QuantizeRule(*values[:7]), DequantizeRule(*values[7:]))}
    else:
        rules = {"matmul": MatmulRule(*values[:3]), "bias": values[3], "requantize": make_requantize(values[4:])}
    unseen = tuple(name for name in OPERATIONS if name not in SEEN[found.operation])
    name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in path)
    return replace(QTX, name=name, version=1, engine=engine, path=path, **rules, unseen=unseen)


def list_sources(found: Fingerprint) -> dict[str, str]:
    """Where each field of `make_profile` was seen: the inputs that decided it."""
    seen = SEEN[found.operation]
    sources = {name: "not seen: as qtx has it" for name in (*OPERATIONS, "unseen")}
    prefix = "" if found.operation == "linear" else f"{found.operation}."
    sources |= {name: f"of {found.calls} calls of the box" for name in seen}
    for verdict in found.verdicts:
        sources[f"{prefix}{verdict.axis}"] = tell_verdict(verdict)
    return sources


def tell_input(given: Mapping[str, Any]) -> str:
    """x 0.5, scale 1, zero point 3, codes uint8."""
    parts = []
    for name, value in given.items():
        shown = f"{value:.9g}" if isinstance(value, float) else str(value)
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)


def tell_witness(witness: Witness) -> str:
    """An input, its answer, and what others would have been."""
    by_answer: dict[str, list[str]] = {}
    for name, answer in witness.others.items():
        by_answer.setdefault(show(answer), []).append(name)
    others = "; ".join(f"{', '.join(names)}: {answer}" for answer, names in by_answer.items())
    return f"{tell_input(witness.input)} gives {show(witness.answer)} ({others})"


def show(value: Any) -> str:
    """A code, a real number, or several codes."""
    if isinstance(value, list):
        return " or ".join(show(one) for one in value)
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def tell_verdict(verdict: Verdict) -> str:
    """What decided an axis, and what could not."""
    parts = [tell_witness(witness) for witness in verdict.witnesses]
    if verdict.equal:
        parts.append(f"undetermined: {verdict.reason}")
    return "; ".join(parts) or "no other value goes with the others"


def tell(found: Fingerprint, observed: Observed, name: str) -> str:
    """The report as text."""
    lines = [f"{found.operation} of {name}", *(f"  {line}" for line in observed.lines)]
    if found.unexplained is not None:
        lines += [
            f"no combination of rules explains: {tell_witness(found.unexplained)}",
            *([f"  {found.note}"] if found.note else []),
        ]
        if found.nearest:
            near = ", ".join(f"{axis} {value}" for axis, value in found.nearest.items() if value != "None")
            lines.append(f"  the nearest: {near}")
    for verdict in found.verdicts:
        if verdict.value is None:
            continue
        mark = " (undetermined)" if verdict.equal else ""
        lines.append(f"  {verdict.axis}: {verdict.value}{mark}")
        lines += [f"      {tell_witness(witness)}" for witness in verdict.witnesses]
        if verdict.equal:
            lines += [f"      {reason}" for reason in verdict.reason.split("; ")]
    lines += [f"  refused: {line}" for line in found.refusals]
    lines += [f"  of {line} the rules say nothing" for line in found.uncovered]
    lines.append(
        f"{found.deciding} calls to decide, {found.calls} in all with {found.inputs:,} numbers, "
        f"{found.verified:,} of them fresh ones to verify"
    )
    return "\n".join(lines)


def as_json(found: Fingerprint, observed: Observed, name: str) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "box": name,
        "operation": found.operation,
        "seen": list(observed.lines),
        "rules": [
            {
                "axis": verdict.axis,
                "value": to_dict(verdict.value),
                "undetermined": [to_dict(value) for value in verdict.equal],
                "reason": verdict.reason,
                "inputs": [plain(witness) for witness in verdict.witnesses],
            }
            for verdict in found.verdicts
        ],
        "unexplained": None if found.unexplained is None else plain(found.unexplained),
        "note": found.note,
        "nearest": found.nearest,
        "refused": list(found.refusals),
        "uncovered": list(found.uncovered),
        "calls": {"deciding": found.deciding, "all": found.calls, "numbers": found.inputs, "verified": found.verified},
    }


def plain(witness: Witness) -> dict[str, Any]:
    """A witness as JSON values, which know neither NaN nor infinity."""
    given = {key: finite(value) for key, value in witness.input.items()}
    others = {key: finite(value) for key, value in witness.others.items()}
    return {"input": given, "answer": finite(witness.answer), "others": others}


def finite(value: Any) -> Any:
    """A number JSON has, or the word for it."""
    return str(value) if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
