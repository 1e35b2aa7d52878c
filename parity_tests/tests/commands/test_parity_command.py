"""`qtx parity` as a script meets it: exit statuses, JSON, JUnit, 80 columns, and the page that says so."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from parity_tests import runner
from parity_tests.junit import document
from parity_tests.proof.case import Case, Context
from parity_tests.proof.verdict import Verdict, exact
from parity_tests.runner import Report, Row
from parity_tests.tests.shell import call, good
from qtx import __version__
from qtx.cli import main
from qtx.commands import parity as cli_parity
from qtx.jobs import parity as job

ABOVE = Path(__file__).parents
PAGE = next(page for folder in ABOVE if (page := folder / "docs" / "parity-in-ci.md").is_file()).read_text("utf-8")
KEPT = next(folder for above in ABOVE if (folder := above / "fixtures" / "v0.1").is_dir())
FLOAT = KEPT / "study" / "vanilla-seed0" / "model.safetensors"
ARTIFACT = KEPT / "opt.qtx"
DATA = ("--data", KEPT / "words.txt")
FEW = ("--backend", "ref", "--only", "quant/ties")


def differ(context: Context) -> list[Verdict]:
    return [exact("layer.0.ffn.hidden", np.array([1, 2, 4]), np.array([1, 2, 3]))]


def crash(context: Context) -> list[Verdict]:
    raise RuntimeError("no memory\x00 left")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts cases in the place of the table."""

    def plant(**runs: Callable[[Context], list[Verdict]]) -> None:
        table = [Case("planted", name, "ref", run) for name, run in runs.items()]
        monkeypatch.setattr(runner, "list_cases", lambda backend, dtype: table)

    return plant


# --- exit statuses ----------------------------------------------------------------------------------------------------


def test_agreement_is_0_and_difference_1(cases: Callable[..., None]) -> None:
    assert call("parity", *FEW).exit_code == 0
    cases(fine=lambda context: [exact("x", 1, 1)], bad=differ)
    result = call("parity", "--backend", "ref")
    assert result.exit_code == 1 and "1 failed" in result.stdout


def test_what_was_compared_is_said_where_a_signal_ends_it(cases: Callable[..., None]) -> None:
    cases(bad=differ, fine=lambda context: [exact("x", 1, 1)], last=lambda context: signal.raise_signal(signal.SIGINT))
    result = call("parity", "--backend", "ref")
    assert result.exit_code == 130 and "2 cases were compared, 1 failed: planted/bad\n" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--only", "no-such-case"), "no-such-case"),
        (("--backend", "jax"), "'jax'"),
        (("--backend", "ref", "--device", "cuda"), "'cuda'"),
        (("--device", "tpu"), "'tpu'"),
        (("--dtype", "float16"), "'float16'"),
        (("--frobnicate",), "frobnicate"),
        (("missing.safetensors",), "missing.safetensors"),
        ((KEPT / "words.txt",), "words.txt"),
        ((ARTIFACT, "--backend", "ref"), "is held to the reference in torch"),
        ((ARTIFACT, "--dtype", "float64"), "no float dtype"),
        ((ARTIFACT, "--only", "quant"), "no table of cases"),
        ((ARTIFACT, "--data", "missing.txt"), "missing.txt"),
        (("--data", "words.txt"), "words.txt"),
        (("--json", "words.txt"), "words.txt"),
        (("--junit", "words.txt"), "words.txt"),
        (("--junit", "link.xml"), "link.xml"),
        (("--junit", "r.json", "--json", "r.json"), "r.json"),
    ],
)
def test_what_is_refused_is_2(arguments: tuple, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("not mine", encoding="utf-8")
    Path("link.xml").symlink_to("words.txt")
    result = call("parity", *arguments)
    assert result.exit_code == 2 and named in result.output and "Traceback" not in result.output
    assert Path("words.txt").read_text(encoding="utf-8") == "not mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.xml", "words.txt"]


@pytest.mark.parametrize(
    "arguments", [(), (ARTIFACT, *DATA), (FLOAT, *DATA), ("--backend", "torch", "--only", "quant")]
)
def test_a_missing_device_is_3_before_any_case(arguments: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "run_case", lambda *given: pytest.fail("a case was run"))
    monkeypatch.setattr(job, "open_model", lambda *given: pytest.fail("the file was opened"))
    for device in ("cuda", "cuda:0"):
        result = call("parity", *arguments, "--device", device)
        assert result.exit_code == 3 and f"device is '{device}'" in result.output, result.output


def test_a_missing_backend_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    for arguments in ((), (ARTIFACT, *DATA)):
        result = call("parity", *arguments)
        assert result.exit_code == 3 and 'pip install "qtx[torch]"' in result.output, result.output
    assert call("parity", *FEW).exit_code == 0


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_json_says_what_was_compared_and_by_what() -> None:
    got = json.loads(good("parity", ARTIFACT, *DATA, "--json", "-").stdout)
    assert got["schema_version"] == 1 and got["ok"] and got["dtype"] == "integer"
    assert got["file"] == {"path": str(ARTIFACT), "sha256": hashlib.sha256(ARTIFACT.read_bytes()).hexdigest()}
    made = got["made_by"]
    assert (made["qtx"], made["numpy"], made["torch"]) == (__version__, np.__version__, torch.__version__)
    assert made["python"] == ".".join(map(str, sys.version_info[:3])) and made["threads"] == torch.get_num_threads()
    assert made["gpu"] is None and made["blas"]
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        assert made["cpu_flags"] and set(made["cpu_flags"]) <= set(cpu.read_text(encoding="utf-8").split())


def test_json_of_the_table_without_torch() -> None:
    got = json.loads(good("parity", *FEW, "--json", "-").stdout)
    assert got["file"] is None and got["made_by"]["torch"] is None and got["cases"] == {"quant": 1}


# --- JUnit ------------------------------------------------------------------------------------------------------------


def test_junit_has_a_case_a_row(cases: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "new" / "parity.xml"
    cases(fine=lambda context: [exact("x", 1, 1)], bad=differ, broken=crash, nothing=lambda context: [])
    assert call("parity", "--backend", "ref", "--junit", path).exit_code == 1
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    for counted in (root, suite):
        assert [counted.get(key) for key in ("tests", "failures", "errors")] == ["4", "2", "1"]
    rows = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(rows) == ["fine", "bad", "broken", "nothing"] and rows["bad"].get("classname") == "planted"
    assert not list(rows["fine"])
    message = rows["bad"].find("failure").get("message")
    assert "layer.0.ffn.hidden [2]: exact 1.0 above 0.0" in message and "got 4, want 3" in message
    assert rows["broken"].find("error").get("message") == "RuntimeError: no memory? left"
    assert rows["nothing"].find("failure").text == "no comparison was made"
    properties = {entry.get("name"): entry.get("value") for entry in suite.iter("property")}
    assert properties["made_by.qtx"] == __version__ and properties["backend"] == "ref"
    good("parity", *FEW[:2], "--only", "fine", "--junit", path)  # its own report is replaced
    assert ElementTree.parse(path).getroot().get("tests") == "1"


def test_junit_is_not_written_over_a_checkpoint(tmp_path: Path) -> None:
    report = document(Report("ref", "cpu", "float32", [Row("a", "b", 0.0)]))
    path = tmp_path / "model.safetensors"
    path.write_bytes(report)  # a report under the name of the file to compare
    result = call("parity", path, "--junit", path)
    assert result.exit_code == 2 and "another file of this command" in result.output
    assert path.read_bytes() == report


# --- columns ----------------------------------------------------------------------------------------------------------


def widths(text: str) -> set[int]:
    return {len(line) for line in text.splitlines()}


def test_columns_fit_where_there_is_no_terminal(cases: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    cases(**{f"a_case_with_a_name_as_long_as_{'many_' * 9}others": differ, "broken": crash, "fine_too": differ})
    result = call("parity", "--backend", "ref")
    assert max(widths(result.stdout)) <= 80
    table, *details = result.stdout.split("\nplanted/")
    assert "planted/a_case_with" in table and "..." in table
    assert "layer.0.ffn.hidden [2]: exact 1 above 0; got 4, want 3" in " ".join(" ".join(details).split())
    assert "RuntimeError: no memory" in result.stdout


def test_columns_fit_a_terminal() -> None:
    header, row = (
        runner.HEADER,
        ("g/name", "ok", "max relative", "1e-09", "1e-08", "layer.0.ffn.output [1]", "0.5", "0.25"),
    )
    whole = cli_parity.fit_table(header, [row], 200)
    assert all(word in whole for word in (*header, *row))
    assert max(widths(whole)) <= 107
    assert cli_parity.fit_table(header, [row], max(widths(whole))) == whole  # it just fits
    narrower = cli_parity.fit_table(header, [row], max(widths(whole)) - 1)
    assert "0.25" not in narrower and "layer.0.ffn.output [1]" in narrower
    for width in (120, 100, 80, 70, 60):
        assert max(widths(cli_parity.fit_table(header, [row], width))) <= width


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_gives_commands_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^(?:\s*- run: )?qtx (.*)$", PAGE, re.MULTILINE)
    assert len(lines) == 9
    for line in lines:
        name, *arguments = shlex.split(line.partition(" || ")[0], comments=True)
        main.commands[name].make_context(name, arguments)


def test_the_page_names_every_key_and_status() -> None:
    report = Report("ref", "cpu", "float32", [Row("g", "n", 0.0, (exact("x", 1, 2),))])
    got = report.as_json()
    for key in (*got, *got["made_by"], *got["rows"][0], *got["rows"][0]["verdicts"][0]):
        assert f"`{key}`" in PAGE, key
    assert f"| `schema_version` | {got['schema_version']};" in PAGE
    said = good("parity", "--help").output
    for status in "0123":
        assert f"\n| {status} |" in PAGE and f"\n    {status}  " in said
    assert "http" not in PAGE
