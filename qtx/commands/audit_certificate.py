"""qtx audit certificate: can an integer product overflow, for any codes?"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from qtx_ref.spec import SpecError

from ..audit.certificate import ENGINES, Certificate, Line, certify, list_engines
from ..audit.certificate_bounds import TARGETS, Verdict
from ..audit.findings import FINDINGS
from ..files.artifact import SUFFIX, load_artifact
from ..jobs.opening import open_data
from ..report.tables import format_table
from .options import JSON, options, say, write_json
from .parity import Verdicts

FINDING = {  # by column
    "avx2": "QTX-ACC-001",
    "acc16": "QTX-ACC-005",
    "accumulator": "QTX-ACC-004",
    "left shift": "QTX-REQ-007",
}
SIZE = 2  # sequences or images of a batch


@click.command("certificate", cls=Verdicts)
@click.argument("model", type=click.Path(path_type=Path), metavar=f"MODEL{SUFFIX}|MODEL.onnx")
@options(
    click.option(
        "--data",
        help=f"Also count on data: of a MODEL{SUFFIX} as qtx evaluate has them; of an ONNX file a .npz of its inputs.",
    ),
    click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json for your own text."),
    click.option("--batches", type=click.IntRange(1), help=f"Evaluation batches of {SIZE}; default 1."),
    click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Kernels; default: all."),
    click.option(
        "--engine",
        "engines",
        multiple=True,
        type=click.Choice([*ENGINES, "none"]),
        help="Engines that are given the witnesses; default: those installed whose CPU can be had.",
    ),
)
@JSON
def certificate_command(
    model: Path,
    data: str | None,
    tokenizer: Path | None,
    batches: int | None,
    targets: tuple[str, ...],
    engines: tuple[str, ...],
    json_path: str | None,
) -> None:
    """Prove that no integer product overflows, or show operands that do it.

    MODEL is an artifact or a quantized ONNX file. Per product and kernel: avx2 adds pairs in int16, acc16 runs of them;
    vnni, s8s8 and u8u8 add in int32. Exit status 1 where something overflows or a node is not read, 2 for a refusal.
    """
    if data is None and (tokenizer or batches):
        raise SpecError("--tokenizer and --batches belong to --data")
    if "none" in engines and len(engines) > 1:
        raise SpecError(f"--engine none: leave out {', '.join(name for name in engines if name != 'none')}")
    chosen = list_engines() if not engines else [name for name in engines if name != "none"]
    source = read_batches(model, data, tokenizer, batches or 1) if data is not None else iter(())
    certificate = certify(model, targets or tuple(TARGETS), source, chosen)
    say(describe(certificate, targets or tuple(TARGETS)), json_path)
    write_json(json_path, {"certificate": to_json(certificate)})
    if not certificate.holds:
        sys.exit(1)


def read_batches(model: Path, data: str, tokenizer: Path | None, count: int) -> Iterator[Mapping[str, np.ndarray]]:
    """What the model is run on. Raises SpecError, DataError, FileError for data that cannot be had."""
    if model.suffix == SUFFIX:
        artifact = load_artifact(model)
        opened = open_data(model, artifact.spec, artifact.meta, data, tokenizer)
        return iter(opened.split_batches("evaluation", artifact.spec, SIZE, 0, limit=count))
    if not data.endswith(".npz") or tokenizer is not None:
        raise SpecError(f"--data {data}: of an ONNX file give a .npz with an array for each of its inputs")
    try:
        with np.load(data, allow_pickle=False) as arrays:
            return iter([{name: arrays[name] for name in arrays.files}])
    except ValueError as error:
        raise SpecError(f"--data {data}: {error}") from None


def describe(certificate: Certificate, targets: tuple[str, ...]) -> str:
    """One table, a line per product; below it the witnesses that engines were given."""
    tallied = any(line.tally for line in certificate.lines)
    header = [
        "product",
        "codes",
        "K x N",
        *targets,
        "accumulator",
        "left shift",
        *(["pairs on data"] if tallied else []),
        "cures",
    ]
    rows = []
    for line in certificate.lines:
        size = f"{line.depth or '?'} x {line.columns or '-'}"
        cells = [describe_verdict(pick(line, name)) for name in (*targets, "accumulator", "left shift")]
        cells[-2] += " (64 bits)" if line.accumulator == 64 else ""
        rows.append(
            [line.name, line.codes, size, *cells, *([describe_tally(line)] if tallied else []), describe_cures(line)]
        )
    text = [format_table(header, rows), "", summarize(certificate, targets), *list_findings(certificate)]
    return "\n".join([*text, *map(describe_witness, certificate.lines)]).rstrip()


def describe_verdict(verdict: Verdict | None) -> str:
    """`proved`, or the farthest value."""
    if verdict is None:
        return "-"
    note = f" {verdict.note}" if verdict.note and verdict.note != "no left shift" else ""
    return f"proved{note}" if verdict.holds else f"{verdict.worst:,}{note and f' ({verdict.note})'}"


def describe_tally(line: Line) -> str:
    """Shares of pairs that saturate and of results that have one."""
    if line.tally is None:
        return "-"
    tally = line.tally
    return (
        f"{tally.saturated / tally.pairs:.2g}, {tally.wrong / tally.results:.2g} of results" if tally.saturated else "0"
    )


def describe_cures(line: Line) -> str:
    """Each cure and how far it moves the result."""
    return (
        "; ".join(
            f"{cure.name} {'?' if cure.error is None else '0' if cure.error == 0 else f'{cure.error:.2%}'}"
            for cure in line.cures
        )
        or "-"
    )


def summarize(certificate: Certificate, targets: tuple[str, ...]) -> str:
    """How many products are proved, by target."""
    counts = []
    for name in (*targets, "accumulator", "left shift"):
        verdicts = [pick(line, name) for line in certificate.lines]
        judged = [one for one in verdicts if one is not None]
        if judged:
            counts.append(f"{name} {sum(one.holds for one in judged)} of {len(judged)}")
    text = f"{certificate.model}: proved {', '.join(counts)}"
    return text + (f"; not read: {', '.join(certificate.unread)}" if certificate.unread else "")


def list_findings(certificate: Certificate) -> list[str]:
    """What is known of that which is not proved, a line each."""
    columns = [name for name in FINDING if any(is_open(pick(line, name)) for line in certificate.lines)]
    return [f"{name}: {FINDING[name]}, {FINDINGS[FINDING[name]].title}" for name in columns]


def is_open(verdict: Verdict | None) -> bool:
    """Whether there is a witness."""
    return verdict is not None and not verdict.holds


def pick(line: Line, name: str) -> Verdict | None:
    """A verdict by its column."""
    return {**line.targets, "accumulator": line.overflow, "left shift": line.shift}.get(name)


def describe_witness(line: Line) -> str:
    """What a pair's witness gives in the emulator and in engines."""
    verdict = line.targets.get("avx2")
    if verdict is None or verdict.witness is None or not verdict.witness.engines:
        return ""
    one = verdict.witness
    seen = ", ".join(
        f"{name} {value if isinstance(value, str) else f'{value:,}'}" for name, value in one.engines.items()
    )
    return f"{line.name}: {one.exact:,} is {one.computed:,} in the emulator, {seen}"


def to_json(certificate: Certificate) -> dict[str, Any]:
    """The certificate as JSON values, the codes of every witness among them."""
    lines = []
    for line in certificate.lines:
        names = (*line.targets, "accumulator", "left shift")
        verdicts = {name: pick(line, name) for name in names}
        lines.append(
            {
                "product": line.name,
                "codes": line.codes,
                "constant": line.constant,
                "depth": line.depth,
                "columns": line.columns,
                "accumulator_bits": line.accumulator,
                "proved": line.holds,
                "verdicts": {name: None if one is None else plain(asdict(one)) for name, one in verdicts.items()},
                "findings": [FINDING[name] for name in FINDING if is_open(pick(line, name))],
                "cures": [{"name": cure.name, "error": cure.error, "note": cure.note} for cure in line.cures],
                "data": None if line.tally is None else plain(asdict(line.tally)),
            }
        )
    return {"model": certificate.model, "proved": certificate.holds, "products": lines, "unread": certificate.unread}


def plain(value: Any) -> Any:
    """Arrays as lists."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
