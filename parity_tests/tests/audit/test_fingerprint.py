"""Fingerprints: every value of every axis is planted in a box and comes back; boxes of no rules are called so."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product as product_of
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.long import fingerprints
from parity_tests.long.fingerprints import list_candidates, plant
from parity_tests.tests.shell import call
from qtx.audit.fingerprint.boxes import choose_path
from qtx.audit.fingerprint.finding import find_rules
from qtx.audit.fingerprint.questions import Arrays, Function, Values
from qtx.audit.fingerprint.report import list_sources, make_profile, tell
from qtx.files.profiles import read_profile
from qtx_ref.quant import affine
from qtx_ref.spec import (
    QTX,
    Beyond,
    Bias,
    Dtype,
    HighProduct,
    LeftShift,
    Order,
    Overflow,
    Products,
    QuantSpec,
    Rounding,
    SpecError,
    ZeroPoint,
)

EIGHT = ("uint8", "int8")  # dtypes that quick boxes take
CANDIDATES = {op: list_candidates(op) for op in ("quantize", "dequantize", "fake_quantize", "linear")}


def cover(op: str) -> list[Values]:
    """A few combinations that have every value of every axis between them: of some drawn at random, again and again the
    one that has the most values which are still missing."""
    candidates = CANDIDATES[op]
    rng = np.random.default_rng(5)
    left = {(i, value) for one in candidates for i, value in enumerate(one)}
    chosen = []
    while left:
        drawn = [candidates[place] for place in rng.integers(0, len(candidates), 500)]
        chosen.append(max(drawn, key=lambda one: len(left & set(enumerate(one)))))
        left -= set(enumerate(chosen[-1]))
    return chosen


def name_of(values: Any) -> str:
    return "-".join(str(value) for value in values if value is not None)


def take(op: str, function: Function, dtypes: tuple[str, ...] = EIGHT) -> Any:
    """The fingerprint of a box."""
    return find_rules(function, op, dtypes)[0]


# --- planted rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", cover("quantize"), ids=name_of)
def test_every_value_of_quantize_comes_back(values: Values) -> None:
    found = take("quantize", plant("quantize", values))
    assert values in found.alike, found


@pytest.mark.parametrize("values", CANDIDATES["dequantize"], ids=name_of)
def test_every_value_of_dequantize_comes_back(values: Values) -> None:
    assert values in take("dequantize", plant("dequantize", values), ("int8", "int16")).alike


@pytest.mark.parametrize("values", cover("fake_quantize")[:2], ids=name_of)
def test_fake_quantize_comes_back(values: Values) -> None:
    assert values in take("fake_quantize", plant("fake_quantize", values)).alike


@pytest.mark.parametrize("values", cover("linear"), ids=name_of)
def test_every_value_of_a_linear_layer_comes_back(values: Values) -> None:
    wide = 15 in values or Beyond.INT64 in values  # of accumulators of 64 bits
    found = take("linear", plant("linear", values), ("int16",) if wide else ("uint8",))
    assert values in found.alike, found


def test_where_the_scales_are_multiplied_and_what_a_level_becomes_are_decided() -> None:
    single, double, half = Dtype.FLOAT32, Dtype.FLOAT64, HighProduct.HALF_UP
    exact = (Products.EXACT, 1, Overflow.WRAP, Bias.INT32)
    for scales in (single, double):  # LiteRT's optimised kernels, of one scale of weights and of several
        values = (*exact, "fixed", double, scales, 31, half, None, None, Rounding.HALF_UP, LeftShift.WRAP, None)
        found = take("linear", plant("linear", values), ("int8",))
        decided = next(one for one in found.verdicts if one.axis == "requantize.scales")
        assert decided.value is scales and not decided.equal
        assert {one[4:] for one in found.alike} == {values[4:]}
    product = ("float", single, None, None, None, Order.RATIO, ZeroPoint.AFTER, Rounding.HALF_EVEN, None)
    for beyond, codes in product_of(Beyond, ("uint8", "int16")):
        found = take("linear", plant("linear", (*exact, *product, beyond)), (codes,))
        by_axis = {one.axis: one for one in found.verdicts}
        decided, bias = by_axis["requantize.beyond"], by_axis["bias"]
        assert bias.value is Bias.INT32 and not bias.equal  # no rule of floats says anything of an int32 one
        if codes == "int16" or beyond is Beyond.WRAP32:
            assert decided.value is beyond and not decided.equal
        else:  # no accumulator of 32 bits times an M below 2^30 leaves int64
            assert {decided.value, *decided.equal} == {Beyond.SATURATE, Beyond.INT64}


def test_a_slice_of_the_thousand() -> None:
    results = fingerprints.plant_all(fingerprints.draw_combinations(20, seed=3)[:5])
    assert [one.tell() for one in results if not one.returned] == []


def test_a_verdict_names_what_decides_it_and_what_nothing_does() -> None:
    rule = next(one for one in CANDIDATES["quantize"])  # half_even, after, False, float32, raise, saturate, saturate
    found, observed = find_rules(plant("quantize", rule), "quantize", ("uint8",))
    by_axis = {verdict.axis: verdict for verdict in found.verdicts}
    told = {name for witness in by_axis["rounding"].witnesses for name in witness.others}
    assert told == {"half_away", "half_up", "toward_zero", "floor"}
    witness = by_axis["nan"].witnesses[0]
    assert np.isnan(witness.input["x"]) and witness.answer == "raises"
    assert found.deciding < 15 and found.verified > 5000
    text = tell(found, observed, "box")
    assert "codes uint8: 0 to 255" in text and f"{found.deciding} calls to decide" in text


def test_what_a_box_refuses_is_undetermined_and_why() -> None:
    rule = CANDIDATES["quantize"][0]
    inner = plant("quantize", rule)

    def box(arrays: Arrays) -> np.ndarray:
        if arrays["x"].dtype == np.float16:
            raise TypeError("no halves here")
        return inner(arrays)

    arithmetic = next(one for one in take("quantize", box).verdicts if one.axis == "arithmetic")
    assert [str(one) for one in arithmetic.equal] == ["input"]
    assert "no halves here" in arithmetic.reason


def test_in_float64_the_order_of_factors_is_seen_where_a_reciprocal_twice_is_another_number() -> None:
    exact = (Products.EXACT, 1, Overflow.WRAP, Bias.INT32, "float", Dtype.FLOAT64, None, None, None)
    values = (*exact, Order.STEPS_DIVIDED, ZeroPoint.BEFORE, Rounding.HALF_UP, None, Beyond.WRAP32)
    found = take("linear", plant("linear", values), ("uint8",))
    order = next(one for one in found.verdicts if one.axis == "requantize.order")
    assert values in found.alike and order.value is Order.STEPS_DIVIDED and not order.equal


def test_infinities_of_float16_are_levels_beyond_int32() -> None:
    rule = (Dtype.FLOAT16, None, None, None, Order.SCALES_DIVIDED, ZeroPoint.BEFORE, Rounding.TOWARD_ZERO, None)
    values = (Products.RUNS16, 8, Overflow.WRAP, Bias.FLOAT_BEFORE, "float", *rule, Beyond.WRAP32)
    # accumulator 13952 with scales .75, 12.875, 824 is infinity before it is divided
    assert values in find_rules(plant("linear", values), "linear", seed=0)[0].alike


def test_a_box_that_takes_no_zero_point_is_asked_without() -> None:
    def box(arrays: Arrays) -> np.ndarray:
        if arrays["zero_point"].any():
            raise ValueError("zero points are 0 here")
        return plant("dequantize", CANDIDATES["dequantize"][0])(arrays)

    found = take("dequantize", box, ("int16",))
    assert CANDIDATES["dequantize"][0] in found.alike and found.calls < 20
    assert any("zero points are 0 here" in line for line in found.refusals)


def test_codes_of_four_bits_and_narrow_ones_are_seen() -> None:
    for spec, shown in (
        (QuantSpec(4, symmetric=False), "0 to 15"),
        (QuantSpec(8, symmetric=False, narrow=True), "1 to"),
    ):

        def box(a: Arrays, spec: QuantSpec = spec) -> np.ndarray:
            zero = np.clip(a["zero_point"].astype(np.int32), spec.code_min, spec.code_max)
            return affine.quantize(a["x"], a["scale"], zero, spec)

        found, observed = find_rules(box, "quantize", ("uint8",))
        assert shown in observed.lines[0] and found.unexplained is None


# --- boxes of no rules ------------------------------------------------------------------------------------------------


def alter(change: Callable[[Arrays, np.ndarray], np.ndarray]) -> Function:
    """The project's quantizer, its codes changed."""
    inner = plant("quantize", CANDIDATES["quantize"][0])
    return lambda arrays: change(arrays, inner(arrays))


def add_noise(arrays: Arrays, code: np.ndarray) -> np.ndarray:
    return np.clip(code + NOISE.integers(-1, 2, code.shape) * (NOISE.random(code.shape) < 0.05), 0, 255)


NOISE = np.random.default_rng(1)
STRANGERS = {
    "noise": add_noise,
    "another clamp": lambda arrays, code: np.minimum(code, 254),
    "off by one": lambda arrays, code: np.minimum(code + 1, 255),
    "one tie the wrong way": lambda a, code: code + ((a["x"] == 36.5 * a["scale"]) & (a["zero_point"] == 0)),
    "one code": lambda arrays, code: np.where(code == 77, 78, code),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_box_of_no_rules_is_called_so(name: str) -> None:
    found, observed = find_rules(alter(STRANGERS[name]), "quantize", ("uint8",))
    assert found.unexplained is not None and not found.alike
    assert "no combination of rules explains" in tell(found, observed, "box")
    if name == "one code":
        level = found.unexplained.input["x"] / found.unexplained.input["scale"] + found.unexplained.input["zero_point"]
        assert abs(level - 77) <= 0.5 and found.unexplained.answer == 78
    if name == "one tie the wrong way":
        assert found.unexplained.input["x"] == 36.5 * found.unexplained.input["scale"]


def test_a_linear_layer_of_no_rules_is_called_so() -> None:
    inner = plant("linear", CANDIDATES["linear"][0])
    found = take("linear", lambda a: inner(a) + (inner(a) == 100), ("uint8",))
    assert found.unexplained is not None and found.unexplained.answer == 101


def test_chance_of_other_odds_is_no_stochastic_rounding() -> None:
    def box(arrays: Arrays) -> np.ndarray:
        level = np.float64(arrays["x"]) / arrays["scale"] + arrays["zero_point"]
        return np.clip(np.floor(level) + NOISE.integers(0, 2, level.shape) * (level % 1 > 0), 0, 255).astype(int)

    found = take("quantize", box)
    assert found.unexplained is not None and found.unexplained.input["x"] == 0.25


def test_what_is_no_box_is_refused() -> None:
    with pytest.raises(SpecError, match="takes no codes of uint8"):
        find_rules(lambda arrays: 1 // 0, "quantize", ("uint8",))
    with pytest.raises(SpecError, match="with the shape"):
        find_rules(lambda arrays: arrays["x"][:3].astype(int), "quantize", ("uint8",))
    with pytest.raises(SpecError, match="answers with float32: give codes as integers"):
        find_rules(lambda arrays: arrays["x"], "quantize", ("uint8",))
    with pytest.raises(SpecError, match="answers with uint8: give floats"):
        find_rules(lambda arrays: arrays["code"], "dequantize", ("uint8",))
    with pytest.raises(SpecError, match="SystemExit: 3"):
        find_rules(lambda arrays: sys.exit(3), "quantize", ("uint8",))


def test_a_box_may_write_into_its_arguments() -> None:
    values = CANDIDATES["quantize"][0]
    inner = plant("quantize", values)

    def box(arrays: Arrays) -> np.ndarray:
        code = inner(arrays)
        arrays["x"][...] = 0
        return code

    assert values in take("quantize", box, ("uint8",)).alike


# --- the profile and the command --------------------------------------------------------------------------------------


def test_the_profile_reproduces_the_box_and_says_where_it_was_seen() -> None:
    values = CANDIDATES["linear"][777]
    found = take("linear", plant("linear", values), ("uint8",))
    rules = make_profile(found, "a function", "box:f")
    assert rules.name == "box-f" and rules.quantize == QTX.quantize and "quantize" in rules.unseen
    sources = list_sources(found)
    assert "accumulator" in sources["requantize.rounding"] and sources["quantize"].startswith("not seen")


MODULE = """
import numpy as np

def quantize(x, scale, zero_point):
    ends = np.iinfo(zero_point.dtype)
    if np.isnan(x).any():
        raise ValueError("NaN")
    level = np.floor(np.float32(x) / np.float32(scale) + np.float32(0.5)) + np.float32(zero_point)
    return np.clip(level, ends.min, ends.max).astype(zero_point.dtype)

def broken(x, scale, zero_point):
    code = quantize(x, scale, zero_point)
    return np.where(code == 42, 43, code)
"""


def test_the_command_names_the_rules_of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_box.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    line = ["audit", "fingerprint", "--callable", "stranger_box:quantize", "--codes", "uint8,int8"]
    result = call(*line, "--out", "box.json", "--json", "result.json")
    # floor(x + 1/2) in float32 is half_up but where x + 1/2 is rounded up to the next whole number
    assert result.exit_code == 1 and "no combination of rules explains" in result.output
    assert not (tmp_path / "box.json").exists()
    (tmp_path / "stranger_box.py").write_text(
        MODULE.replace("np.float32(x) /", "np.float64(x) /").replace("np.float32(0.5)", "0.5")
    )
    sys.modules.pop("stranger_box")
    result = call(*line, "--out", "box.json", "--json", "result.json")
    assert result.exit_code == 0, result.output
    written = read_profile(str(tmp_path / "box.json"))
    assert (str(written.quantize.rounding), str(written.quantize.arithmetic)) == ("half_up", "float64")
    rules = {one["axis"]: one for one in json.loads((tmp_path / "result.json").read_text())["rules"]}
    assert rules["nan"]["value"] == "raise" and rules["rounding"]["inputs"]
    result = call("audit", "fingerprint", "--callable", "stranger_box:broken", "--codes", "uint8,int8")
    assert result.exit_code == 1 and "gives 43" in result.output
    (tmp_path / "broken_box.py").write_text("raise RuntimeError('no device')")
    result = call("audit", "fingerprint", "--callable", "broken_box:quantize")
    assert result.exit_code == 2 and "--callable broken_box:quantize: RuntimeError: no device" in result.output


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "one of them"),
        (["--callable", "nothing"], "package.module:function"),
        (["--callable", "no_such_module:f"], "no_such_module"),
        (["--engine", "nobody"], "known paths"),
        (["--callable", "math:sqrt", "--cpu", "avx2"], "belongs to --engine"),
    ],
)
def test_what_the_command_refuses(line: list[str], said: str) -> None:
    result = call("audit", "fingerprint", *line)
    assert result.exit_code == 2 and said in result.output


@pytest.mark.parametrize(
    ("name", "op", "rules"),
    [
        ("onnx-reference", "quantize", "half_even after False input converted saturate wrap32"),
        ("onnx-reference", "dequantize", "difference input"),
        ("torch-quantize_per_tensor", "quantize", "half_even fused True float32 code_max saturate saturate"),
        # of whole lanes; of two channels, which go by the reference's kernels
        ("litert-optimized", "quantize", "is profile litert-2.3-optimized"),
        ("litert-optimized-channel", "quantize", "is profile litert-2.3-reference"),
        ("litert-optimized", "linear", "is profile litert-2.3-optimized"),
    ],
)
def test_an_engine_is_named(name: str, op: str, rules: str) -> None:
    package = name.split("-")[0]
    pytest.importorskip("ai_edge_litert" if package == "litert" else package)
    line, _ = fingerprints.ask_engine(choose_path(name, op))
    seen = line.rpartition(": ")[2].replace(",", "")
    if package == "torch":  # NaN is what the CPU's conversion leaves
        seen, rules = (" ".join(text.split()[:4]) for text in (seen, rules))
    assert rules in f"{seen} {line}".replace(",", "")
