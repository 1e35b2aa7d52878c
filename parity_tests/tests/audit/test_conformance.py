"""A path beside its profile: what is counted, what explains it, and that a planted fault is seen where it should be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest

from parity_tests.tests.shell import call
from qtx.audit import conformance, golden_vectors, node_cases
from qtx.audit.conformance import choose_paths, conform
from qtx.audit.findings import FINDINGS
from qtx.audit.golden_vectors import read_golden, replay, write_golden
from qtx.audit.known import Known, read_known
from qtx.audit.node_cases import run_cases
from qtx.audit.reference import evaluate
from qtx.audit.tallies import Tally, check_path, compare, expect, prepare
from qtx.audit.vectors import DRAWN, draw_batches
from qtx.engines.paths import EngineCrash, EngineRefusal, Path, engine_names, load_engine
from qtx.files.container import FileError
from qtx_ref.profiles import profile
from qtx_ref.spec import QTX, Bias, DequantizeForm, NanPolicy, Profile, Rounding, SpecError, ZeroPoint

SATURATING = replace(QTX, quantize=replace(QTX.quantize, nan=NanPolicy.CODE_MIN))
Run = Callable[[Path, str, Mapping[str, Any]], dict[str, np.ndarray]]


def engine(profile: Profile) -> Run:
    """An engine that computes as a profile says."""
    return lambda path, op, values: evaluate(profile, op, values)


def check(
    op: str, run: Run, stated: Profile = SATURATING, known: Sequence[Known] = (), count: int = 2000
) -> dict[str, Tally]:
    path = Path("engine-path", "engine", op, "qtx", ("int8", "uint8"))
    return {row.family: row for row in check_path(path, draw_batches(op, path.codes, count), run, known, stated)}


@pytest.mark.parametrize("op", [op for op in DRAWN if op not in ("cast", "mx")])
def test_an_engine_that_keeps_its_profile_is_clean(op: str) -> None:
    rows = check(op, engine(SATURATING))
    assert set(rows) == set(DRAWN[op])
    assert all(row.clean or row.witness and "profile refuses" in row.witness for row in rows.values())
    assert rows["uniform"].clean and rows["one"].vectors == 2


def test_a_zero_point_added_before_rounding_is_seen_at_ties_alone() -> None:
    before = replace(SATURATING, quantize=replace(SATURATING.quantize, zero_point=ZeroPoint.BEFORE))
    rows = check("quantize", engine(before))
    assert rows["exact ties"].mismatches > 0.3 * rows["exact ties"].vectors and rows["exact ties"].worst == 1
    assert rows["near ties"].mismatches and rows["gaussian"].clean and rows["uniform"].clean
    witness = rows["exact ties"].witness
    assert witness is not None and witness["got"]["code"] - witness["want"]["code"] in (-1, 1)
    again = {name: np.asarray(witness[name], np.float32) for name in ("x", "scale")}
    again |= {"zero_point": np.int32(witness["zero_point"]), "dtype": witness["dtype"]}
    assert int(evaluate(before, "quantize", again)["code"]) == witness["got"]["code"]


def test_another_rounding_of_a_requantization_is_seen_with_its_operands() -> None:
    assert not isinstance(QTX.requantize, str)
    away = replace(QTX, requantize=replace(QTX.requantize, rounding=Rounding.HALF_AWAY))
    rows = check("linear", engine(away), QTX)
    assert rows["exact ties"].mismatches and rows["gaussian"].clean
    witness = rows["exact ties"].witness
    assert witness is not None and len(witness["x"]) == len(witness["w"]) == 24


def test_one_code_off_by_one_is_one_mismatch() -> None:
    def off(path: Path, op: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        result = evaluate(SATURATING, op, values)
        if values["x"].size == 1:
            result["code"] = result["code"] + 3
        return result

    rows = check("quantize", off)
    assert rows["one"].mismatches == 2 and rows["one"].worst == 3


def test_results_are_compared_by_value_and_by_units_in_the_last_place() -> None:
    x = np.array([0.0, -0.0, 1.0, np.nan, 3.0], np.float32)
    same = np.array([-0.0, 0.0, np.nextafter(np.float32(1), np.float32(2)), -np.nan, np.inf], np.float32)
    differs, _ = compare({"y": x}, {"y": same})
    assert differs.tolist() == [False, False, True, False, True]
    assert compare({"y": x[2:3]}, {"y": same[2:3]})[1] == 1
    below, above = np.array([-1e-45], np.float32), np.array([1e-45], np.float32)
    assert compare({"y": below}, {"y": above})[1] == 2
    assert compare({"code": np.zeros((2, 3), np.int8)}, {"code": np.zeros(6, np.int8)})[0].all()


def test_a_crash_and_a_refusal_are_counted_and_do_not_end_the_run() -> None:
    def fragile(path: Path, op: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if values["scale"].ndim == 0 and values["scale"] < 2.0**-126:
            raise EngineCrash("crashed (signal 11)", signal=11)
        if "axis" in values:
            raise EngineRefusal("no axis")
        return evaluate(SATURATING, op, values)

    rows = check("quantize", fragile)
    tiny, channels = rows["subnormal scales"], rows["channels"]
    assert tiny.crashes == 2 and "signal 11" in tiny.crash and not tiny.clean
    assert channels.clean and channels.refused == channels.vectors and channels.refusal == "no axis"
    assert rows["strided"].clean


def test_a_float_bias_is_handed_to_a_path_that_takes_one() -> None:
    stated, seen = replace(profile("float32"), bias=Bias.FLOAT_AFTER), []

    def look(path: Path, op: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        seen.append(None if values["bias"] is None else values["bias"].dtype)
        raise EngineRefusal("looked")

    check("linear", look, stated)
    assert set(seen) == {None, np.dtype(np.float32)}


# --- what explains a row ----------------------------------------------------------------------------------------------


def test_a_known_finding_explains_its_rows_alone(tmp_path: File) -> None:
    file = tmp_path / "known.json"
    file.write_text('{"QTX-GRA-001": [{"path": "litert-*", "family": "subnormal scales"}]}')
    (known,) = read_known(file)
    assert known == Known("QTX-GRA-001", path="litert-*", family="subnormal scales")
    assert known.explains("litert-xnnpack", "quantize", "subnormal scales", "int8")
    assert not known.explains("torch-x", "quantize", "subnormal scales", "int8")
    assert not known.explains("litert-xnnpack", "quantize", "gaussian", "int8")
    assert {one.finding for one in read_known()} <= set(FINDINGS)


def test_a_finding_with_a_profile_explains_what_that_profile_gives_and_no_more() -> None:
    """An engine whose last element goes by the rule of another profile, as the tails of vectorised kernels do."""
    stated = replace(SATURATING, quantize=replace(SATURATING.quantize, zero_point=ZeroPoint.BEFORE))

    def mixed(path: Path, op: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        code = evaluate(stated, op, values)["code"]
        return {"code": np.where(np.arange(code.shape[-1]) % 2 == 0, evaluate(SATURATING, op, values)["code"], code)}

    known = [Known("QTX-A", path="engine-*", family="* ties", profile="qtx"), Known("QTX-B", family="odd")]
    rows = check("quantize", mixed, stated, known)
    for family in ("near ties", "exact ties"):
        row = rows[family]
        assert row.mismatches and row.findings == ["QTX-A"] and not row.unexplained
    assert rows["odd"].findings == ["QTX-B"] and not rows["odd"].unexplained
    assert rows["strided"].mismatches == rows["strided"].unexplained > 0

    def wrong(path: Path, op: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {"code": mixed(path, op, values)["code"] + 5 * (np.arange(values["x"].shape[-1]) == 3)}

    row = check("quantize", wrong, stated, known)["exact ties"]
    assert row.findings == ["QTX-A"] and row.unexplained == 2


@pytest.mark.parametrize(
    "text",
    ["[]", '{"A": [{"colour": "red"}]}', '{"A": [{"path": 3}]}', '{"A": ["x"]}', '{"A": [{"profile": "nosuch"}]}', "{"],
)
def test_a_damaged_list_of_findings_is_refused(tmp_path: File, text: str) -> None:
    (tmp_path / "known.json").write_text(text)
    with pytest.raises(FileError, match=r"known\.json"):
        read_known(tmp_path / "known.json")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SpecError, match="known engines are onnx-reference"):
        choose_paths(["tensorrt"])
    with pytest.raises(SpecError, match="choose from quantize"):
        choose_paths([], ["convolve"])
    result = call("audit", "conformance", "--engine", "tensorrt")
    assert result.exit_code == 2 and "engine is 'tensorrt'" in result.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["ml_dtypes", "--op", "quantize"], "ml_dtypes has no quantize: it has cast"),
        (["onnx-node-cases", "--op", "quantize"], "leave out the operation"),
        (["onnx-node-cases", "--cpu", "Haswell"], "leave out CPU Haswell"),
        (["onnx-node-cases", "--write-golden", "nowhere"], "none of onnx-node-cases runs here"),
    ],
)
def test_a_line_that_would_do_nothing_is_refused(line: list[str], said: str) -> None:
    result = call("audit", "conformance", "--engine", *line)
    assert result.exit_code == 2 and said in result.stderr


# --- golden vectors ---------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """An engine of one path, which computes as `SATURATING`."""

    class Toy:
        PACKAGES = {"numpy": "engines"}
        PATHS = (
            Path("toy-path", "toy", "quantize", "qtx", ("int8",)),
            Path("toy-path", "toy", "linear", "qtx", ("int8",)),
        )

    monkeypatch.setattr(golden_vectors, "load_engine", lambda name: Toy)
    monkeypatch.setattr(golden_vectors, "run", engine(SATURATING))
    return "toy"


def test_golden_vectors_come_back_and_hold_a_profile_to_them(toy: str, tmp_path: File) -> None:
    file = write_golden(tmp_path, toy, lambda name: SATURATING)
    golden = read_golden(toy, tmp_path)
    assert golden is not None and f"numpy {np.__version__} on " in golden.provenance
    for path in golden_vectors.load_engine(toy).PATHS:
        rows = replay(golden, path, [], SATURATING)
        assert len(rows) == len(DRAWN[path.op]) - 2 and all(row.clean for row in rows)
    before = replace(SATURATING, quantize=replace(SATURATING.quantize, zero_point=ZeroPoint.BEFORE))
    rows = replay(golden, golden_vectors.load_engine(toy).PATHS[0], [], before)
    assert any(row.family == "exact ties" and row.mismatches for row in rows)
    assert read_golden("nobody", tmp_path) is None
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileError, match="damaged"):
        read_golden(toy, tmp_path)


# --- ONNX's node cases ------------------------------------------------------------------------------------------------


ONNX = profile(node_cases.PROFILE)


def test_every_node_case_passes_or_says_why_not() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    cases = {case.name: case for case in run_cases(ONNX)}
    assert len(cases) > 190
    assert {"FNUZ" in name or "conv" in name for name, c in cases.items() if c.verdict == "not expressible"} == {True}
    assert [case for case in cases.values() if case.verdict == "differs"] == []


def test_a_wrong_profile_fails_node_cases() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    floor = replace(ONNX, quantize=replace(ONNX.quantize, rounding=Rounding.FLOOR))
    wrong = {case.name for case in run_cases(floor) if case.verdict == "differs"}
    assert {"test_quantizelinear", "test_dynamicquantizelinear"} <= wrong


def test_the_command_counts_node_cases() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    result = call("audit", "conformance", "--engine", "onnx-node-cases", "--json", "-")
    content = json.loads(result.stdout)
    assert result.exit_code == 0
    assert len(content["cases"]) > 190 and content["rows"] == []
    assert "ONNX's node cases:" in result.stderr


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", engine_names())
def test_golden_vectors_of_the_package_are_explained(name: str) -> None:
    golden = read_golden(name)
    assert golden is not None and " on " in golden.provenance
    known, paths = read_known(), load_engine(name).PATHS
    rows = [row for path in paths for row in replay(golden, path, known)]
    assert sum(row.vectors for row in rows) > 500
    assert [row for row in rows if row.unexplained] == []
    assert {(row.path, row.op) for row in rows} == {(path.name, path.op) for path in paths}


def test_a_slice_of_an_installed_engine_keeps_its_profile() -> None:
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    report = conform(["ml_dtypes"], count=500)
    assert not report.failed and sum(row.vectors for row in report.rows) > 500


def test_an_absent_engine_is_held_to_by_its_golden_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "missing", lambda name: f"engine {name} needs a package")
    report = conform(["litert"], ["linear"], known=read_known())
    assert not report.failed and report.rows and "ai-edge-litert" in report.golden["litert"]
    result = call("audit", "conformance", "--engine", "litert", "--op", "linear")
    assert result.exit_code == 0 and "litert is absent: golden vectors of ai-edge-litert" in result.stdout
    monkeypatch.setattr(conformance, "read_golden", lambda name: None)
    result = call("audit", "conformance", "--engine", "litert")
    assert result.exit_code == 3 and "engine litert needs a package" in result.stderr


def test_the_status_is_1_where_nothing_explains_a_row(tmp_path: File) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    (tmp_path / "none.json").write_text("{}")
    line = ["audit", "conformance", "--engine", "onnx-reference", "--op", "scale", "--vectors", "300"]
    assert call(*line).exit_code == 0
    result = call(*line, "--known", tmp_path / "none.json", "--json", "-")
    assert result.exit_code == 1 and "1 unexplained" in result.stderr
    (row,) = [row for row in json.loads(result.stdout)["rows"] if row["unexplained"]]
    assert row["family"] == "vanishing" and row["witness"]["got"]["scale"] == 0


def test_paths_with_a_scale_per_channel_are_given_one() -> None:
    path = Path("engine-channel", "engine", "linear", "qtx", ("int8",))
    for batch in draw_batches("linear", path.codes, 2000, 0, ["near ties"]):
        values = prepare(batch, path, QTX)
        assert values["w_scale"].shape == (8,) and len(set(values["w_scale"].tolist())) == 5


def test_the_last_elements_go_by_the_profile_of_the_tail() -> None:
    path = Path("engine-path", "engine", "dequantize", "qtx", ("int8",), lanes=8, tail="litert-2.3-optimized-tail")
    stated = replace(QTX, dequantize=replace(QTX.dequantize, form=DequantizeForm.EXPANDED))
    values = {
        "code": np.full(17, -18, np.int8),
        "scale": np.float32(3.1255352951120585e-05),
        "zero_point": np.int32(-20),
    }
    y = expect(path, stated, values)["y"]
    assert len(set(y[:16].tolist())) == 1 and y[16] == values["scale"] * 2 != y[15]
