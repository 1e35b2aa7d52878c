"""Runs the table of cases and reports, as plain values that JSON can hold."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, exact
from parity_tests.table import table
from qtx_ref.spec import InputTransform, ModelSpec, QuantSpec, Range, SpecError


@dataclass(frozen=True)
class Row:
    """One case: its verdicts, or why it could not be run."""

    group: str
    name: str
    seconds: float
    verdicts: tuple[Verdict, ...] = ()
    failure: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure and bool(self.verdicts) and all(v.ok for v in self.verdicts)

    @property
    def worst(self) -> Verdict | None:
        """The failed verdict, if any, else the one nearest to its tolerance; then the largest error."""
        return max(self.verdicts, key=lambda v: (not v.ok, v.strain, v.error), default=None)


@dataclass
class Report:
    """What was run and what came of it. `ok` decides the exit status; a report without a case is a failure."""

    backend: str
    device: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    first: str = ""  # of a checkpoint: the first site, in forward order, where the backends part

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Cases by group."""
        return dict(Counter(row.group for row in self.rows))

    def as_json(self) -> dict[str, Any]:
        head = {"backend": self.backend, "device": self.device, "dtype": self.dtype, "ok": self.ok}
        return head | {
            "first": self.first,
            "seconds": round(self.seconds, 2),
            "cases": self.counts,
            "rows": [as_json(row) for row in self.rows],
        }


def as_json(row: Row) -> dict[str, Any]:
    """A row with all its verdicts. What JSON has no number for is written as text."""
    verdicts = [{key: _plain(value) for key, value in asdict(v).items()} for v in row.verdicts]
    found = {
        "group": row.group,
        "name": row.name,
        "ok": row.ok,
        "seconds": round(row.seconds, 3),
        "failure": row.failure,
    }
    return found | {"verdicts": verdicts}


Progress = Callable[[int, int, Row], None]


def report_rows(report: Report) -> list[tuple[str, ...]]:
    """The table to print: case, verdict, measure, worst error, tolerance, where, got, want; one line per case."""
    return [_line(row) for row in report.rows]


WIDEST = 32  # characters of a value in the table; JSON has all of it
HEADER = ("case", "verdict", "measure", "worst error", "tolerance", "where", "got", "want")


def _line(row: Row) -> tuple[str, ...]:
    case, verdict, v = f"{row.group}/{row.name}", "ok" if row.ok else "FAIL", row.worst
    if row.failure or v is None:
        return case, verdict, row.failure or "no comparison was made", "", "", "", "", ""
    where = v.what if v.index in (None, ()) else f"{v.what} {list(v.index)}"
    return case, verdict, v.measure, _number(v.error), _number(v.tolerance), where, _number(v.got), _number(v.want)


def _number(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def select(cases: Sequence[Case], only: str | None) -> list[Case]:
    """Those whose `group/name` matches the shell pattern or contains the text. Raises SpecError where none does."""
    chosen = [case for case in cases if only is None or only in case.id or fnmatchcase(case.id, only)]
    if not chosen:
        groups = ", ".join(dict.fromkeys(case.group for case in cases))
        raise SpecError(f"no parity case matches {only!r}: give part of a group/name; groups are {groups}")
    return chosen


def run_case(case: Case, context: Context) -> Row:
    """A case that raises has failed, and says with what."""
    start = time.perf_counter()
    try:
        verdicts, failure = tuple(case.run(context)), ""
    except Exception as error:  # whatever it is, it is a finding about the backend, and the other cases go on
        verdicts, failure = (), f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Row(case.group, case.name, time.perf_counter() - start, verdicts, failure)


def run(
    backend: str = "torch",
    device: str = "cpu",
    dtype: str = "float32",
    only: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Runs the cases of a backend; `progress(done, all, row)` is called after each.

    Raises:
        SpecError: an unknown backend, dtype or pattern, or a device that is not there.
        MissingExtra: the backend is torch and torch is not installed.
    """
    cases = select(table(backend, dtype), only)
    if backend == "ref" and device != "cpu":
        raise SpecError(f"device is {device!r}: the reference runs on cpu; use --backend torch for others")
    if backend == "torch":
        from qtx_torch.backend import find_device

        find_device(device)
    return run_all(cases, Report(backend, device, dtype), progress)


def run_all(cases: Sequence[Case], report: Report, progress: Progress | None = None) -> Report:
    """The report with a row for each case."""
    context, start = Context(report.device, report.dtype), time.perf_counter()
    for case in cases:
        row = run_case(case, context)
        report.rows.append(row)
        if progress:
            progress(len(report.rows), len(cases), row)
    report.seconds = time.perf_counter() - start
    return report


def check_checkpoint(
    spec: ModelSpec,
    params: Mapping[str, np.ndarray],
    batches: Sequence[Mapping[str, np.ndarray]],
    quants: Mapping[str, QuantSpec] | None = None,
    ranges: Mapping[str, Range] | None = None,
    *,
    masked_scores: bool = False,
    transforms: Mapping[str, InputTransform] | None = None,
    calibration: Sequence[Mapping[str, np.ndarray]] = (),
    quantize: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """torch against the reference on a user's own model; `Report.first` names the site where they part, if they do.

    quants, with ranges (from the reference's calibration on these batches where there are none), are checked as well, and
    what both choose from the batches of `calibration`; `quantize` quantizes while it calibrates.
    """
    from parity_tests.mirror import checkpoint as torch_checkpoint
    from qtx_ref.backend import Model

    quants, transforms = dict(quants or {}), dict(transforms or {})
    if quants and not ranges:
        ranges = Model(spec, params).calibrate(batches, quants, masked_scores=masked_scores, transforms=transforms)
    cases = torch_checkpoint.cases(
        spec, params, batches, quants, ranges or {}, masked_scores, transforms, calibration, quantize
    )
    report = run_all(cases, Report("torch", device, "float32"), progress)
    failed = (verdict.what for row in report.rows for verdict in row.verdicts if not verdict.ok)
    report.first = next(failed, "")
    return report


def check_integers(
    reference: Any,
    model: Any,
    batch: Mapping[str, np.ndarray],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """An integer model in torch against the reference: every code of every site, and the output."""
    start = time.perf_counter()
    report, want = Report("torch", device, "integer"), integer_run(reference, batch)
    found = integer_run(model, batch)
    for done, name in enumerate(dict.fromkeys([*want, *found]), 1):
        if name in want and name in found:
            row = Row("integer", name, 0.0, (exact(name, found[name], want[name]),))
        else:
            row = Row("integer", name, 0.0, failure=f"only {'the reference' if name in want else 'torch'} has it")
        report.rows.append(row)
        if progress:
            progress(done, len(want), row)
    report.first = next((row.name for row in report.rows if not row.ok), "")
    report.seconds = time.perf_counter() - start
    return report


def integer_run(model: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    output = model.run(batch, found.__setitem__)
    return found | {f"output {key}": np.asarray(value) for key, value in output._asdict().items()}
