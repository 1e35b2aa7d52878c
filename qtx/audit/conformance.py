"""Every path of the installed engines, and golden vectors of the others, beside the profiles that state them.

What differs, and what crashes, is explained by a finding that is known to say so of that path, or it is news.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from qtx_ref.spec import SpecError

from ..engines.backend import MissingExtra
from ..engines.paths import Path, engine_names, missing, paths_of, run
from .golden_vectors import read_golden, replay
from .known import Known
from .node_cases import CaseResult, run_cases
from .tallies import Tally, check_path
from .vectors import DRAWN, count_batches, draw_batches

__all__ = ["COUNT", "NODE_CASES", "Report", "choose_paths", "conform", "count_work"]

COUNT = 50_000  # vectors of an operation of a path
NODE_CASES = "onnx-node-cases"  # beside the engines
Tell = Callable[[int], None]  # of how many batches more are done


def ignore(count: int) -> None:
    """Tells nobody."""


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a conformance run found."""

    rows: list[Tally] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    golden: dict[str, str] = field(default_factory=dict)  # engines that are absent, and whose vectors stood for them
    absent: dict[str, str] = field(default_factory=dict)  # engines that are absent, and what to install

    @property
    def unexplained(self) -> list[Tally]:
        """Rows that no finding explains."""
        return [row for row in self.rows if row.unexplained]

    @property
    def failed(self) -> bool:
        """Whether there is anything that no finding explains."""
        return bool(self.unexplained) or any(case.verdict == "differs" and case.finding is None for case in self.cases)


def choose_paths(engines: Sequence[str] = (), ops: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """The paths of the named engines, of all where none is named, that have one of the operations; and which of these
    engines are not installed. Raises SpecError for a name that there is none of."""
    for op in ops:
        if op not in DRAWN:
            raise SpecError(f"operation is {op!r}: choose from {', '.join(DRAWN)}")
    known = [*engine_names(), NODE_CASES]
    for name in engines:
        if name not in known:
            raise SpecError(f"engine is {name!r}: known engines are {', '.join(known)}")
    chosen = [name for name in engine_names() if name in engines or not engines]
    absent = [name for name in chosen if missing(name) is not None]
    paths = [path for name in chosen for path in paths_of(name) if path.op in DRAWN]
    some = [path for path in paths if path.op in ops or not ops]
    if paths and not some:
        has = ", ".join(dict.fromkeys(path.op for path in paths))
        raise SpecError(f"{', '.join(chosen)} has no {' or '.join(ops)}: it has {has}")
    return some, absent


def count_work(paths: Sequence[Path], count: int) -> int:
    """How many batches paths have."""
    return sum(sum(count_batches(path.op, path.codes, count).values()) for path in paths)


def conform(
    engines: Sequence[str] = (),
    ops: Sequence[str] = (),
    cpu: str | None = None,
    count: int = COUNT,
    seed: int = 0,
    known: Sequence[Known] = (),
    tell: Tell = ignore,
) -> Report:
    """Holds paths to their profiles, on `count` vectors each, and golden vectors of engines that are not installed.

    Raises SpecError for an engine, an operation or a profile that there is none of, MissingExtra for a `cpu` that is
    missing.
    """
    if NODE_CASES in engines and (ops or cpu):
        raise SpecError(f"{NODE_CASES} are run as they are: leave out {'the operation' if ops else f'CPU {cpu}'}")
    paths, absent = choose_paths(engines, ops)
    report = Report(absent={name: str(missing(name)) for name in absent})
    for path in paths:
        if path.engine in absent:
            continue
        batches = draw_batches(path.op, path.codes, count, seed)
        report.rows += check_path(path, batches, partial(run, cpu=cpu), known, cpu=cpu, tell=tell)
    for name in absent:
        if (golden := read_golden(name)) is not None:
            report.golden[name] = golden.provenance
            report.rows += [row for path in paths if path.engine == name for row in replay(golden, path, known)]
        elif name in engines:
            raise MissingExtra(report.absent[name])
    if NODE_CASES in engines or not (engines or ops or missing("onnx-reference")):
        report.cases = run_cases()
    for case in report.cases:
        if case.verdict == "differs":
            case.finding = next((one.finding for one in known if one.explains(NODE_CASES, case.op, case.name)), None)
    return report
