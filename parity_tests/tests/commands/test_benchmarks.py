"""The suite of benchmarks: what is timed, in which order, and what is kept. No time that was measured is held to
anything."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import qtx_ref

pytest.importorskip("torch")
ROOT = Path(qtx_ref.__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not installed
harness, groups, report, command = (
    importlib.import_module(f"benchmarks.{name}") for name in ("harness", "groups", "report", "__main__")
)
Row, Skip, Differ = harness.Row, harness.Skip, harness.Differ
MIB = 2**20


# --- one row ----------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_times() -> None:
    row = harness.make_row("a", "b", {"a": [1.0, 8.0, 9.0], "b": [1.0, 2.0, 3.0]}, bound=2.5)
    assert row == Row("a", "b", 3.0, 1.0, 4.0, 8000.0, 2000.0, bound=2.5)


def test_calls_take_turns_and_every_second_round_is_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(harness, "make_clock", lambda device: lambda: float(next(clock)))
    times = harness.time_calls({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert times == {"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, 1.0]}
    assert "".join(seen) == "aabb" + "ab" + "ba" + "ab"  # two of each warm up


def test_nothing_is_timed_before_parity() -> None:
    called: list[int] = []
    with pytest.raises(Differ, match="^codes differ in 1 of 2$"):
        harness.compare(
            "a",
            lambda: called.append(1),
            "b",
            lambda: called.append(1),
            rounds=2,
            check=lambda: harness.equal(np.array([1, 2]), np.array([1, 3])),
        )
    assert not called


@pytest.mark.parametrize(
    ("other", "message"),
    [([1.0, 2.5], "results differ by 0.5"), ([1.0, math.nan], "differ by nan"), ([1.0], "have shapes")],
)
def test_what_is_not_near_is_refused(other: list[float], message: str) -> None:
    with pytest.raises(Differ, match=message):
        harness.near([1.0, 2.0], other, 0.25)
    assert harness.near([1.0, 2.0], [1.0, 2.25], 0.25, "outputs") == "outputs within 2e-01"


def allocate(held: int, passing: int):
    """A call that has `held` MiB before it and takes `passing` MiB more."""
    kept = np.ones(held * MIB, np.uint8)
    return lambda: int(kept[0]) + int(np.ones(passing * MIB, np.uint8)[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_memory_is_that_of_the_call_and_of_what_it_holds() -> None:
    assert harness.peak(allocate, 64, 32, held=False) == pytest.approx(32, abs=4)  # pages, and what Python itself takes
    assert harness.peak(allocate, 64, 32) == pytest.approx(96, abs=4)
    with pytest.raises(RuntimeError, match="in a process of its own: ValueError"):
        harness.peak(allocate, -1, 1)


# --- groups -----------------------------------------------------------------------------------------------------------


COMPILES = ("integer_model",)  # before the first row


def weightless(*given: object, **how: object) -> float:
    return 1.0


QUICK = [group for group in groups.GROUPS if "cpu" in group.devices and group.name not in COMPILES]


@pytest.mark.parametrize("group", QUICK, ids=lambda group: group.name)
def test_the_smallest_row_of_each_group(group, monkeypatch: pytest.MonkeyPatch) -> None:
    if group.name == "data":
        pytest.importorskip("tokenizers", reason="the extra text is not installed")
    module = sys.modules[group.find().__module__]
    if hasattr(module, "peak"):  # a process each, which is tested above
        monkeypatch.setattr(module, "peak", weightless)
    row = next(iter(group.find()("cpu", True)))
    if isinstance(row, Skip):
        pytest.skip(row.why)
    assert 0 < row.low <= row.ratio <= row.high < math.inf
    assert row.ms > 0 and row.against_ms > 0 and row.name and row.against
    assert row.notes, "it says what agreed"
    json.dumps(asdict(row), allow_nan=False)


class FakeGroup:
    """A group that yields what it is given; an exception is raised."""

    name = groups.GROUPS[0].name

    def __init__(self, *parts: object) -> None:
        self.parts = parts

    def find(self):
        def rows(device: str, quick: bool) -> Iterator[object]:
            for part in self.parts:
                if isinstance(part, BaseException):
                    raise part
                yield part

        return rows


ROW = Row("a", "b", 1.0, 0.5, 2.0, 3.0, 3.0, notes="codes equal")


def test_a_group_that_fails_leaves_what_an_earlier_run_measured(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    assert command.run_group(FakeGroup(ROW, Skip("c", "not installed")), "cpu", True, out)
    first = json.loads(out.read_text())
    assert first["unfinished"] == {} and first["groups"][FakeGroup.name]["rows"] == [asdict(ROW)]
    assert first["groups"][FakeGroup.name]["skipped"] == [{"name": "c", "why": "not installed"}]
    assert not command.run_group(FakeGroup(ROW, Differ("codes differ")), "cpu", True, out)
    second = json.loads(out.read_text())
    assert second["groups"] == first["groups"]
    assert second["unfinished"][FakeGroup.name]["failed"] == "Differ: codes differ"


def test_what_is_measured_when_ctrl_c_comes_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    with pytest.raises(KeyboardInterrupt):
        command.run_group(FakeGroup(ROW, KeyboardInterrupt()), "cpu", True, out)
    assert json.loads(out.read_text())["unfinished"][FakeGroup.name]["rows"] == [asdict(ROW)]


def test_a_stopped_run_goes_on_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two groups is done, the second is stopped; --resume begins with the second."""
    out, begun = tmp_path / "cpu.json", []

    def stop(words: list[str], **given: object):
        begun.append(words[4])
        if len(begun) == 2:
            raise KeyboardInterrupt
        results = json.loads(out.read_text())
        results["groups"][words[4]] = results["unfinished"].pop(words[4])
        out.write_text(json.dumps(results))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(command.subprocess, "run", stop)
    names = ["plain", "size"]
    only = [word for name in names for word in ("--only", name)]
    stopped = CliRunner().invoke(command.main, ["--out", str(out), *only])
    assert stopped.exit_code == 130 and "stopped in size" in stopped.output
    assert CliRunner().invoke(command.main, ["--out", str(out), "--resume"]).exit_code == 0
    assert begun == [*names, "size"] and json.loads(out.read_text())["unfinished"] == {}


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    if harness.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(command.main, ["--device", "cuda"])
    assert result.exit_code == 1 and "torch finds no CUDA device; use --device cpu" in str(result.exception)
    result = CliRunner().invoke(command.main, ["--device", "tpu", "--out", str(tmp_path / "tpu.json")])
    assert result.exit_code == 1 and str(result.exception) == "device is 'tpu': no group is for it; use cpu or cuda"
    assert not list(tmp_path.iterdir())
    (other := tmp_path / "other.md").write_text("# other")
    result = CliRunner().invoke(command.main, ["show", str(other)])
    assert result.exit_code == 1 and f"{other} holds no results: " in str(result.exception)
    for text in ('{"groups": {', "[]", '{"groups": {}}', '{"groups": [], "unfinished": {}}'):
        other.write_text(text)
        for words in (["show", str(other)], ["--only", "plain", "--resume", "--out", str(other)]):
            result = CliRunner().invoke(command.main, words)
            assert result.exit_code == 1 and f"{other} holds no results: " in str(result.exception)
        assert other.read_text() == text
    result = CliRunner().invoke(command.main, ["--only", "everything"])
    assert result.exit_code == 2 and "'everything' is not one of" in result.output


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    rows = [Row(f"a, T {n}", f"b, T {n}", 1.0, 1.0, 1.0, 3.0 * n * n, 5.0 * n) for n in (2, 4, 8)]
    lines = report.format_exponents(rows).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [["a", "T 2 to 8", "12.00", "192.0", "2.00"], ["b", "T 2 to 8", "10.00", "40.00", "1.00"]]


def test_a_table_has_only_columns_that_a_row_has() -> None:
    found = {"header": {"threads": 1}, "rows": [asdict(ROW)], "skipped": [{"name": "c", "why": "not installed"}]}
    table = report.format_group(found, "Question").splitlines()
    assert table[0].count("|") == 8 and "at most" not in table[0] and "MiB" not in table[0]
    assert table[2].split("|")[1].strip() == "a" and table[-1] == "Without c: not installed."


def test_a_bound_has_three_digits() -> None:
    """30 % of a copy's speed is 3.33 of its time, not 3.3333333333333335."""
    row = replace(ROW, bound=1 / 0.3)
    table = report.format_group({"header": {"threads": 1}, "rows": [asdict(row)], "skipped": []}, "Question")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[2][cells[0].index("at most")] == "3.33"
    assert ", at most 3.33);" in report.format_row(row)


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    """docs/speed.md is as `python -m benchmarks page` leaves it, and has all that was measured."""
    page, found = report.PAGE.read_text(encoding="utf-8"), report.read_results()
    assert report.fill_page(page, found) == page
    shown = {(match["place"], match["name"]) for match in report.PART.finditer(page)}
    for place, results in found.items():
        assert results["unfinished"] == {}
        assert (report.RESULTS / f"{place}.json").stat().st_size < 100_000
        assert shown >= {(place, name) for name in ("machine", *results["groups"])}
    known = {group.name for group in groups.GROUPS} | {"machine"}
    assert {name for _, name in shown} <= known


def test_a_page_is_filled_where_it_says_so() -> None:
    found = {"cpu": {"groups": {"plain": {"header": {"threads": 1}, "rows": [asdict(ROW)], "skipped": []}}}}
    page = "a\n<!-- cpu plain -->\nold\n<!-- end -->\nb\n<!-- cuda plain -->\nold\n<!-- end -->\n"
    table = report.format_part(found["cpu"], "plain")
    wanted = f"a\n<!-- cpu plain -->\n{table}\n<!-- end -->\nb\n<!-- cuda plain -->\n<!-- end -->\n"
    assert report.fill_page(page, found) == wanted == report.fill_page(wanted, found)


def test_results_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Row(f"a, T {n}", f"b, T {n}", 1.0, 1.0, 1.0, 1.0 * n, 1.0 * n) for n in (2, 4)]
    results = {"groups": {"plain": {"rows": [asdict(ROW)]}, "size": {"rows": [asdict(row) for row in rows]}}}
    drawn = report.draw_results(results, tmp_path / "cpu.json")
    assert [path.name for path in drawn] == ["cpu.png", "cpu-sizes.png"]
    assert all(path.stat().st_size for path in drawn)
