"""The findings: every reproduction prints what it says, and the page is what the command prints."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import sys
import warnings
from pathlib import Path

import pytest

import qtx_ref
from parity_tests.tests.shell import call
from qtx.audit.findings import FINDINGS, LIST, list_printed

NEEDS = {
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "litert": "ai_edge_litert",
    "torchao": "torchao",
}  # packages of engines
ROOT = Path(qtx_ref.__file__).parent.parent


def list_missing(code: str) -> list[str]:
    """The packages that a reproduction imports and that are not installed."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    names |= {NEEDS[word] for word in re.findall(r'run\(f?"(\w+)-', code)}
    return sorted(name for name in {name.partition(".")[0] for name in names} if not importlib.util.find_spec(name))


def run(code: str) -> list[str]:
    """What the lines print. Packages may warn about themselves."""
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out):
        warnings.simplefilter("ignore")
        exec(compile(code, "reproduction", "exec"), {})
    return out.getvalue().splitlines()


@pytest.mark.parametrize("name", FINDINGS)
def test_a_reproduction_prints_what_it_says(name: str) -> None:
    code = FINDINGS[name].reproduce
    if missing := list_missing(code):
        pytest.skip(f"{', '.join(missing)} not installed")
    if name == "QTX-ACC-001" and sys.platform != "linux":
        pytest.skip("the switch of fbgemm is known on Linux")
    assert run(code) == list_printed(FINDINGS[name]) != []


def test_names_are_unique_and_by_area() -> None:
    assert len(FINDINGS) == len(LIST)
    for name in FINDINGS:
        assert re.fullmatch(r"QTX-(QUA|DEQ|REQ|ACC|BIA|CAS|SCA|GRA|NAN)-\d{3}", name)


def test_the_page_is_what_the_command_prints() -> None:
    result = call("audit", "findings")
    assert result.exit_code == 0
    assert (ROOT / "docs" / "findings.md").read_text(encoding="utf-8") == result.stdout


def test_one_by_name_as_text_and_json() -> None:
    one = call("audit", "findings", "QTX-QUA-001")
    assert one.exit_code == 0 and one.stdout.startswith("## QTX-QUA-001") and "QTX-QUA-002" not in one.stdout
    same = call("audit", "findings", "QTX-QUA-001", "--json", "-")
    assert '"id": "QTX-QUA-001"' in same.stdout and same.stderr == one.stdout
    wrong = call("audit", "findings", "QTX-QUA-000")
    assert wrong.exit_code == 2 and "known findings are QTX-QUA-001" in wrong.stderr


def test_a_planted_line_is_seen() -> None:
    assert run("print(1 + 1)  # 3") != ["3"]
    assert list_missing("import no_such_package.part\nfrom os import path") == ["no_such_package"]
