"""A report of `qtx parity` as JUnit XML, which continuous integration reads: one test case a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from parity_tests.proof.verdict import Verdict
from parity_tests.runner import Report, Row

SUITE = "qtx parity"
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 has no character for


def document(report: Report) -> bytes:
    """The whole file. A row that could not be run is an error, one in which something differs a failure."""
    counts = {
        "tests": len(report.rows),
        "failures": sum(not row.ok and not row.failure for row in report.rows),
        "errors": sum(bool(row.failure) for row in report.rows),
        "time": f"{report.seconds:.3f}",
    }
    root = element(None, "testsuites", name=SUITE, **counts)
    suite = element(root, "testsuite", name=SUITE, **counts)
    properties = element(suite, "properties")
    for name, value in flat(report.head()).items():
        element(properties, "property", name=name, value=value)
    for row in report.rows:
        case = element(suite, "testcase", classname=row.group, name=row.name, time=f"{row.seconds:.3f}")
        if not row.ok:
            fault(case, row)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def fault(case: ElementTree.Element, row: Row) -> None:
    """What went wrong with a row: why it could not be run, or each verdict that failed."""
    lines = [row.failure] if row.failure else [sentence(verdict) for verdict in row.verdicts if not verdict.ok]
    lines = lines or ["no comparison was made"]
    kind = element(case, "error" if row.failure else "failure", message=lines[0])
    kind.text = FORBIDDEN.sub("?", "\n".join(lines))


def sentence(verdict: Verdict) -> str:
    at = "" if verdict.index in (None, ()) else f" {list(verdict.index)}"
    return (
        f"{verdict.what}{at}: {verdict.measure} {verdict.error} above {verdict.tolerance} ({verdict.reason}); "
        f"got {verdict.got}, want {verdict.want}"
    )


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested values by names joined with a point."""
    named: dict[str, str] = {}
    for name, value in values.items():
        inner = flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": text(value)}
        named |= inner
    return named


def text(value: Any) -> str:
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def element(parent: ElementTree.Element | None, tag: str, **attributes: Any) -> ElementTree.Element:
    made = {name: FORBIDDEN.sub("?", str(value)) for name, value in attributes.items()}
    return ElementTree.Element(tag, made) if parent is None else ElementTree.SubElement(parent, tag, made)
