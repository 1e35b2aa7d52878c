"""Runs the table of cases and reports, as plain values that JSON can hold."""

from __future__ import annotations

import math
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, exact
from parity_tests.table import list_cases
from qtx import __version__
from qtx.engines.backend import MissingDevice
from qtx.engines.backend import backend as find_backend
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
    first: str = ""  # of a file: the first site, in forward order, where the backends part
    file: str = ""  # the checkpoint or artifact that was compared; without one it was the table of cases
    sha256: str = ""  # of that file

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def counts(self) -> dict[str, int]:
        """Cases by group."""
        return dict(Counter(row.group for row in self.rows))

    def head(self) -> dict[str, Any]:
        """What was compared, where, and by which versions."""
        return {
            "schema_version": SCHEMA_VERSION,
            "made_by": describe_machine(self.backend, self.device),
            "file": {"path": self.file, "sha256": self.sha256} if self.file else None,
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
        }

    def as_json(self) -> dict[str, Any]:
        return self.head() | {
            "ok": self.ok,
            "first": self.first,
            "seconds": round(self.seconds, 2),
            "cases": self.counts,
            "rows": [as_json(row) for row in self.rows],
        }


def as_json(row: Row) -> dict[str, Any]:
    """A row with all its verdicts. What JSON has no number for is written as text."""
    return {
        "group": row.group,
        "name": row.name,
        "ok": row.ok,
        "seconds": round(row.seconds, 3),
        "failure": row.failure,
        "verdicts": [{key: _plain_value(value) for key, value in asdict(v).items()} for v in row.verdicts],
    }


def describe_machine(backend: str, device: str) -> dict[str, Any]:
    """What a report's numbers may depend on: versions, the CPU's vector instructions, threads, and the GPU that was
    used."""
    about = {
        "qtx": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": name_blas(),
        "torch": None,
        "gpu": None,
        "platform": platform.platform(),
        "cpu": platform.machine(),
        "cpu_flags": read_cpu_flags(),
        "threads": find_backend(backend).threads(),
    }
    if backend == "torch":
        import torch

        about["torch"] = torch.__version__
        about["gpu"] = torch.cuda.get_device_name(device) if device != "cpu" else None
    return about


def name_blas() -> str:
    """NumPy's BLAS and its version, as NumPy was built."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def read_cpu_flags() -> list[str]:
    """Instructions that arithmetic may use, as Linux names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted({flag for flag in flags if flag.startswith(VECTOR_FLAGS)})


Progress = Callable[[int, int, Row], None]
SCHEMA_VERSION = 1  # of the JSON; it rises when a key is taken away or changes its meaning
VECTOR_FLAGS = ("sse", "ssse", "avx", "fma", "f16c", "amx", "asimd", "neon", "sve", "i8mm", "bf16")


def report_rows(report: Report) -> list[tuple[str, ...]]:
    """The table to print: case, verdict, measure, worst error, tolerance, where, got, want; one line per case."""
    return [_format_row(row) for row in report.rows]


WIDEST = 32  # characters of a value in the table; JSON has all of it
HEADER = ("case", "verdict", "measure", "worst error", "tolerance", "where", "got", "want")


def _format_row(row: Row) -> tuple[str, ...]:
    case, verdict, v = f"{row.group}/{row.name}", "ok" if row.ok else "FAIL", row.worst
    if row.failure or v is None:
        return case, verdict, row.failure or "no comparison was made", "", "", "", "", ""
    where = v.what if v.index in (None, ()) else f"{v.what} {list(v.index)}"
    return (
        case,
        verdict,
        v.measure,
        _format_number(v.error),
        _format_number(v.tolerance),
        where,
        _format_number(v.got),
        _format_number(v.want),
    )


def _format_number(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _plain_value(value: Any) -> Any:
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


def check_place(backend: str, device: str) -> None:
    """Raises where nothing can be computed.

    Raises:
        SpecError: an unknown backend, or a device that it never computes on.
        MissingExtra: the backend is not installed.
        MissingDevice: a GPU that this machine does not have.
    """
    find_backend(backend)
    if backend == "ref":
        if device != "cpu":
            raise SpecError(f"device is {device!r}: the reference runs on cpu; use --backend torch for others")
        return
    from qtx_torch.backend import find_device

    try:
        find_device(device)
    except SpecError as error:
        if re.fullmatch(r"cuda(:\d+)?", device):
            raise MissingDevice(str(error)) from None
        raise


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
        SpecError: an unknown backend, device, dtype or pattern.
        MissingExtra, MissingDevice: the backend is not installed, or the device not there.
    """
    check_place(backend, device)
    cases = select(list_cases(backend, dtype), only)
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

    quants, with ranges (from the reference's calibration on these batches where there are none), are checked as well,
    and what both choose from the batches of `calibration`; `quantize` quantizes while it calibrates.
    """
    from parity_tests.mirror import checkpoint as torch_checkpoint
    from qtx_ref.backend import Model

    quants, transforms = dict(quants or {}), dict(transforms or {})
    if quants and not ranges:
        ranges = Model(spec, params).calibrate(batches, quants, masked_scores=masked_scores, transforms=transforms)
    cases = torch_checkpoint.list_cases(
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
    report, want = Report("torch", device, "integer"), run_integers(reference, batch)
    got = run_integers(model, batch)
    for done, name in enumerate(dict.fromkeys([*want, *got]), 1):
        if name in want and name in got:
            row = Row("integer", name, 0.0, (exact(name, got[name], want[name]),))
        else:
            row = Row("integer", name, 0.0, failure=f"only {'the reference' if name in want else 'torch'} has it")
        report.rows.append(row)
        if progress:
            progress(done, len(want), row)
    report.first = next((row.name for row in report.rows if not row.ok), "")
    report.seconds = time.perf_counter() - start
    return report


def run_integers(model: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The codes of every site of an integer model in the order of the forward pass, and its output."""
    codes: dict[str, np.ndarray] = {}
    output = model.run(batch, codes.__setitem__)
    return codes | {f"output {key}": np.asarray(value) for key, value in output._asdict().items()}
