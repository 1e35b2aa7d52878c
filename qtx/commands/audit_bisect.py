"""qtx audit bisect: the first tensor in which two executions of a model differ, and why."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from qtx_ref.spec import SpecError

from ..audit.bisect.execution import Execution
from ..audit.bisect.executions import parse_execution
from ..audit.bisect.inputs import make_inputs
from ..audit.bisect.search import Axis, Bisection, bisect
from ..audit.findings import FINDINGS
from ..engines.paths import EngineCrash, EngineRefusal
from ..report.tables import format_table
from .options import JSON, options, say, write_json
from .parity import Refused, Verdicts

SHOWN = 12  # tensors of the growth
CAUSES = {  # the finding of an axis
    "quantize.zero_point": "QTX-QUA-001",
    "quantize.reciprocal": "QTX-QUA-003",
    "quantize.nan": "QTX-NAN-001",
    "quantize.beyond": "QTX-QUA-004",
    "dequantize": "QTX-DEQ-001",
    "fake_quantize": "QTX-QUA-003",
    "matmul.overflow": "QTX-ACC-004",
    "matmul": "QTX-ACC-001",
    "bias": "QTX-BIA-001",
    "requantize.zero_point": "QTX-REQ-001",
    "requantize.order": "QTX-REQ-003",
    "requantize": "QTX-REQ-002",
}


@click.command("bisect", cls=Verdicts)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@options(
    click.option("--data", help="A .npz with an array for each input; default: drawn from --seed."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of inputs that are drawn."),
)
@JSON
def bisect_command(a: str, b: str, data: str | None, seed: int, json_path: str | None) -> None:
    """The first tensor in which two executions of one quantized model differ, and the rule that does it.

    A and B are MODEL@WORDS, WORDS with commas between them. MODEL.qtx: ref or torch, integer or fake. MODEL.onnx:
    reference, disable, basic, extended, all (onnxruntime's levels), qtx_ref, cpu=Haswell. MODEL.tflite: reference,
    optimized, xnnpack, qtx_ref. profile=NAME|FILE where qtx computes. Exit status 1 where they differ.
    """
    executions = parse_execution(a), parse_execution(b)
    try:
        found = bisect(*executions, read_inputs(executions, data, seed))
    except (EngineCrash, EngineRefusal) as error:
        raise Refused(str(error)) from None
    say(describe(found), json_path)
    write_json(json_path, {"bisection": to_json(found)})
    if found.first is not None:
        sys.exit(1)


def read_inputs(executions: tuple[Execution, Execution], data: str | None, seed: int) -> dict[str, np.ndarray]:
    """What both are run on. Raises SpecError for a file that is no .npz of arrays."""
    if data is None:
        return make_inputs(executions, seed)
    try:
        with np.load(Path(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError) as error:
        raise SpecError(f"--data {data}: give a .npz of arrays ({' '.join(str(error).split())[:100]})") from None


def describe(found: Bisection) -> str:
    """The report as text."""
    lines = [f"A  {found.a}", f"B  {found.b}", ""]
    if found.first is None:
        lines.append(f"{found.compared} tensors, all equal")
    else:
        lines += describe_first(found)
    for label, names in found.changed.items():
        lines.append(f"{label.upper()}: showing intermediates changed {', '.join(names)}")
    for label, names in found.unseen.items():
        some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        lines.append(f"{label.upper()}: {len(names)} tensors of the file are fused away: {some}")
    return "\n".join(lines)


def describe_first(found: Bisection) -> list[str]:
    """Where, why, and what comes of it."""
    first = found.first
    assert first is not None
    at = found.example
    where = f", at {at['index']} {at['a']} and {at['b']}" if "index" in at else ""
    lines = [
        f"{found.compared} tensors compared, {len(found.growth)} differ",
        f"first: {first.name}, {first.differing} of {first.size} values, by {first.largest:g} at most{where}",
        f"made by: {found.operation}",
    ]
    for axis in found.axes:
        lines.append(f"cause: {describe_axis(axis)}{describe_finding(axis)}")
    if found.axes:
        shares = " and ".join(f"{equal} of {count} of {key.upper()}'s" for key, (equal, count) in found.fits.items())
        lines.append(f"these rules make {shares} tensors, each operation fed that execution's own")
    lines += [f"or: {'; '.join(map(describe_axis, axes))}" for axes in found.rivals]
    if found.constants and not found.axes:
        lines.append(f"cause: constants that differ: {', '.join(found.constants)}")
    if found.unexplained:
        lines.append(f"cause: not found: {found.unexplained}")
    rows = [[p.name, f"{p.differing / p.size:.2%}", f"{p.largest:g}"] for p in found.growth]
    shown = rows if len(rows) <= SHOWN else [*rows[: SHOWN - 1], rows[-1]]
    lines += ["", format_table(["tensor", "differing", "by at most"], shown)]
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} between; --json has all")
    if found.predictions is not None:
        lines.append("predictions: {} of {} differ".format(*found.predictions))
    return lines


def describe_axis(axis: Axis) -> str:
    """`requantize.rounding: half_up in A, half_even in B`."""
    return f"{axis.field}: {axis.a} in A, {axis.b} in B"


def find_finding(axis: Axis) -> str | None:
    """The identifier of the finding that explains an axis."""
    found = CAUSES.get(axis.field) or CAUSES.get(axis.field.partition(".")[0])
    return found if found in FINDINGS else None


def describe_finding(axis: Axis) -> str:
    """Where it is explained."""
    found = find_finding(axis)
    return f" ({found})" if found else ""


def to_json(found: Bisection) -> dict[str, Any]:
    """The report as JSON values."""
    made = asdict(found)
    made["findings"] = sorted({one for axis in found.axes if (one := find_finding(axis))})
    return made
