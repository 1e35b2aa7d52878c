"""Paths of the engines: the inputs on which they differ, and how a path is named, missing, or of another package."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qtx_ref
from qtx.audit.engine_table import show_tables
from qtx.engines import paths
from qtx.engines.backend import MissingExtra
from qtx.engines.paths import EngineCrash, EngineRefusal, find_path, list_paths, load_engine, name_profile, run
from qtx_ref.integer import products
from qtx_ref.profiles import NAMES, profile, sources
from qtx_ref.quant import affine
from qtx_ref.spec import NanPolicy, QuantSpec, Rounding, SpecError

ROOT = Path(qtx_ref.__file__).parent.parent
F32 = np.float32
LITERT = ("litert-reference", "litert-optimized", "litert-xnnpack")
BYTES, SIGNED = QuantSpec(8, symmetric=False), QuantSpec(8, symmetric=False, signed=True)


def ask(name: str, op: str, values: dict, cpu: str | None = None) -> np.ndarray:
    """The one array that a path gives; skips where the engine is not installed."""
    engine = next(n for n in paths.engine_names() for path in load_engine(n).PATHS if path.name == name)
    if line := paths.missing(engine):
        pytest.skip(line)
    (result,) = run(name, op, values, cpu).values()
    return result


# --- witnesses --------------------------------------------------------------------------------------------------------


def make_layer(accumulators: list[int], scales: tuple[float, float, float], zero: int, dtype: str) -> dict:
    """A linear of zeros whose bias is its accumulators."""
    x_scale, w_scale, y_scale = map(F32, scales)
    return {
        "x": np.zeros((1, 4), dtype),
        "x_scale": x_scale,
        "x_zero": np.array(0, dtype),
        "w": np.ones((4, len(accumulators)), np.int8),
        "w_scale": w_scale,
        "w_zero": np.int8(0),
        "bias": np.array(accumulators, np.int64 if dtype == "int16" else np.int32),
        "y_scale": y_scale,
        "y_zero": np.array(zero, dtype),
    }


@pytest.mark.parametrize(("name", "code"), list(zip(LITERT, (18, 19, 19), strict=True)))
def test_litert_rounds_a_tie_in_three_ways(name: str, code: int) -> None:
    layer = make_layer([-8], (2**-5, 2**-6, 2**-7), 19, "int8")
    assert ask(name, "linear", layer).tolist() == [[code]]


@pytest.mark.parametrize("name", LITERT)
def test_litert_scales_wide_accumulators_in_float64(name: str) -> None:
    layer = make_layer([738377], (0.00018145863, 0.017178232, 0.0003276135), 0, "int16")
    assert ask(f"{name}-16x8", "linear", layer).tolist() == [[7025]]


def test_litert_reference_is_no_fixed_point() -> None:
    """-83.50000001 by the exact scales; a multiplier of 31 bits makes it -83.49999999."""
    layer = make_layer([-1420602615], (1.3898649215698242, 0.002766285091638565, 65411.734375), 0, "int8")
    assert ask("litert-reference", "linear", layer).tolist() == [[-84]]


@pytest.mark.parametrize("name", ["onnxruntime-all", "onnx-reference"])
def test_float16_quantizes_in_float16(name: str) -> None:
    given = {"x": np.float16([-67.9]), "scale": np.float16(0.006042), "zero_point": np.int16(21253), "dtype": "int16"}
    assert ask(name, "quantize", given).tolist() == [10021]
    back = {"code": np.int16([-32768]), "scale": np.float16(0.001838), "zero_point": np.int16(-15379), "dtype": "int16"}
    assert ask(name, "dequantize", back).tolist() == [np.float16(-31.95)]


def test_xnnpack_crashes_on_a_subnormal_scale_and_the_next_call_runs() -> None:
    values = {"x": F32([1, 2]), "zero_point": np.int8(0), "dtype": "int8"}
    with pytest.raises(EngineCrash, match="signal 11"):
        ask("litert-xnnpack", "quantize", values | {"scale": F32(1e-39)})
    assert ask("litert-xnnpack", "quantize", values | {"scale": F32(1)}).tolist() == [1, 2]
    assert ask("litert-reference", "quantize", values | {"scale": F32(1e-39)}).tolist() == [-128, -128]


def test_litert_optimised_rounds_its_last_elements_otherwise() -> None:
    """2.5 and 3.5: half to even in eights, half away in what is left."""
    values = {"x": F32([2.5, 3.5] * 5), "scale": F32(1), "zero_point": np.int8(0), "dtype": "int8"}
    assert ask("litert-optimized", "quantize", values).tolist() == [2, 4] * 4 + [3, 4]
    assert find_path("litert-optimized", "quantize").lanes == 8


@pytest.mark.parametrize(
    ("name", "codes"),
    [  # of 0.5, 1.5, 2.5 with zero point 1, and of NaN
        ("onnx-reference", [1, 3, 3, -128]),
        ("onnxruntime-all", [1, 3, 3, -128]),
        ("torch-quantize_per_tensor", [2, 2, 4, 127]),
        ("torch-decomposed", [1, 3, 3, 0]),
        ("torchao", [1, 3, 3, 0]),
        ("litert-reference", [2, 3, 4, -128]),
        ("litert-xnnpack", [1, 3, 3, 127]),
    ],
)
def test_ties_and_nan(name: str, codes: list[int]) -> None:
    values = {"x": F32([0.5, 1.5, 2.5, np.nan]), "scale": F32(1), "zero_point": np.int8(1), "dtype": "int8"}
    assert ask(name, "quantize", values).tolist() == codes


def test_465_is_three_numbers() -> None:
    values = {"x": F32([465]), "format": "e4m3"}
    assert ask("torch-cast", "cast", values).tolist() == [0x7E]  # 448
    assert ask("ml_dtypes", "cast", values).tolist() == [0x7F]  # NaN


# --- profiles ---------------------------------------------------------------------------------------------------------


def quantizers() -> list[paths.Path]:
    """Paths of quantize in bytes whose scale is one."""
    return [p for p in list_paths() if p.op == "quantize" and "int8" in p.codes and "channel" not in p.name]


@pytest.mark.parametrize("path", quantizers(), ids=lambda path: path.name)
def test_a_profile_states_its_path(path: paths.Path) -> None:
    """20,000 near ties, and 16 of each kind that is beyond int32; the audit has a million."""
    if path.tail:
        assert 20_032 % path.lanes == 0  # no tail
    rng, zero = np.random.default_rng(0), 5
    ties = (rng.integers(-140, 140, 20_000) + 0.5) * float(F32(0.0312345))
    near = np.nextafter(ties.astype(F32), F32(np.inf) * rng.choice([-1, 1], ties.size).astype(F32))
    beyond = F32(0.0312345) * F32(2.0) ** np.repeat(F32([31, 33, 62, 64]), 4) * np.tile(F32([1, -1]), 8)
    x = np.concatenate([near, beyond, np.tile(F32([np.inf, -np.inf, np.nan, 0]), 4)])
    values = {"x": x, "scale": F32(0.0312345), "zero_point": np.int8(zero), "dtype": "int8"}
    got = run(path, "quantize", values)["code"]
    stated = profile(path.profile).quantize
    want = affine.quantize(x, values["scale"], np.int32(zero), SIGNED, stated)
    assert np.array_equal(got, want)
    wrong = replace(stated, nan=NanPolicy.ZERO, rounding=Rounding.FLOOR)  # the planted fault
    assert not np.array_equal(got, affine.quantize(x, values["scale"], np.int32(zero), SIGNED, wrong))


@pytest.mark.parametrize("engine", paths.BUILT_IN)
def test_every_path_names_a_profile_and_every_field_a_source(engine: str) -> None:
    for path in load_engine(engine).PATHS:
        stated = profile(path.profile)
        assert path.engine == engine and path.op in paths.OPERATIONS and path.codes
        assert path.tail in ("", *NAMES)
        for record in (path.op,) if path.op != "linear" else ("matmul", "requantize"):
            assert record == "mx" or record not in stated.unseen, (path.name, record)
        assert all(sources(path.profile).values())


# --- CPUs -------------------------------------------------------------------------------------------------------------


def full_range(depth: int = 65) -> tuple[np.ndarray, np.ndarray]:
    """Bytes that saturate pairs."""
    rng = np.random.default_rng(1)
    x, w = rng.integers(0, 256, (16, depth)).astype(np.uint8), rng.integers(-128, 128, (depth, 24)).astype(np.int8)
    x[0], w[:, 0] = 255, 127
    return x, w


@pytest.mark.parametrize(("name", "shift"), [("torch-fbgemm", 0), ("torch-onednn", 0), ("torch-onednn-s8", 128)])
def test_torch_on_avx2_saturates_as_its_profile_does(name: str, shift: int) -> None:
    if paths.platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the switches are of x86")
    x, w = full_range()
    x = (x.astype(int) - shift).astype(np.int8 if shift else np.uint8)
    path = find_path(name, "linear") if paths.missing("torch") is None else pytest.skip(paths.missing("torch"))
    zero = 0 if shift else 128
    layer = {"x": x, "x_scale": F32(1), "x_zero": np.array(0, x.dtype), "w": w, "w_scale": F32(1), "w_zero": np.int8(0)}
    y = ask(name, "linear", layer | {"y_scale": F32(4096), "y_zero": np.array(zero, x.dtype)}, "avx2").astype(int)
    stated = name_profile(path, "avx2")
    assert stated == f"{path.profile}-avx2"
    for rule, equal in ((profile(stated).matmul, True), (profile(path.profile).matmul, False)):
        sums = products.matmul(x, w, SIGNED if shift else BYTES, SIGNED, rule=rule)
        ends = (-128, 127) if shift else (0, 255)
        assert np.array_equal(y, np.clip(np.rint(sums / 4096) + zero, *ends)) is equal


def test_onnxruntime_on_an_emulated_cpu_is_matmul_pairs16() -> None:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("needs qemu-x86_64, of qemu-user")
    x, w = full_range()
    given = {"x": x, "w": w, "x_zero": np.uint8(0), "w_zero": np.int8(0)}
    assert np.array_equal(ask("onnxruntime-all", "matmul", given, "Haswell"), products.matmul_pairs16(x, w))
    assert name_profile(find_path("onnxruntime-all", "matmul"), "Haswell") == "onnxruntime-avx2"


def test_a_cpu_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="CPU avx2 is a switch of torch, torchao"):
        paths.make_worker("litert", "avx2")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingExtra, match="CPU Haswell needs qemu-x86_64"):
        paths.make_worker("litert", "Haswell")


# --- names, plug-ins, the page ----------------------------------------------------------------------------------------


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SpecError, match="path is 'nobody'"):
        find_path("nobody", "quantize")
    with pytest.raises(SpecError, match="engine is 'nobody'"):
        load_engine("nobody")
    if paths.missing("onnx-reference") is None:
        with pytest.raises(SpecError, match="operation of onnx-reference is 'cast'"):
            find_path("onnx-reference", "cast")


def test_an_engine_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ai_edge_litert" else found(name))
    assert 'engine litert needs ai_edge_litert, which is not installed: pip install "qtx[engines]"' in paths.missing(
        "litert"
    )
    assert not [path for path in list_paths() if path.engine == "litert"]
    with pytest.raises(MissingExtra, match="needs ai_edge_litert"):
        run("litert-xnnpack", "quantize", {})


def test_a_refusal_is_the_engines_own_word() -> None:
    layer = make_layer([0, 0], (1, 1, 1), 0, "int8") | {"w_scale": F32([1, 2])}
    with pytest.raises(EngineRefusal, match="litert-reference takes one scale; see litert-reference-channel"):
        ask("litert-reference", "linear", layer)


EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "engines.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_engine_of_the_page_is_a_plug_in(tmp_path: Path) -> None:
    """As another package brings it: a module, and its entry point in the metadata."""
    (example,) = [text for text in EXAMPLES if "PACKAGES" in text]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "engine.py").write_text(example)
    metadata = tmp_path / "mine-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[qtx.engines]\nmine = mine.engine\n")
    code = """
import numpy as np
from qtx.engines.paths import list_paths, run
(path,) = [path for path in list_paths() if path.engine == "mine"]
values = {"x": np.float32([0.5, 1.5, -0.5]), "scale": np.float32(1), "zero_point": np.int8(1), "dtype": "int8"}
print(run(path, "quantize", values)["code"].tolist())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[1, 2, 0]\n"


def test_a_cpu_that_the_emulator_does_not_have_is_refused() -> None:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64, of qemu-user, is not installed")
    with pytest.raises(SpecError, match="CPU nosuch is none that qemu-x86_64 has"):
        run("ml_dtypes", "cast", {}, "nosuch")


def test_a_plug_in_that_cannot_be_imported_is_told_and_ends_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "theirs.py").write_text("import no_such_driver")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(paths, "find_plugins", lambda: {"theirs": "theirs"})
    said = "engine theirs: its module theirs cannot be imported: ModuleNotFoundError: No module named 'no_such_driver'"
    assert paths.missing("theirs") == said
    with pytest.raises(MissingExtra, match="no_such_driver"):
        load_engine("theirs")
    assert find_path("ml_dtypes", "cast").engine == "ml_dtypes"
    assert "theirs" not in show_tables() and all(path.engine != "theirs" for path in list_paths())


def test_the_example_of_the_page_prints_what_it_says(capsys: pytest.CaptureFixture) -> None:
    for engine in ("onnxruntime", "torch"):
        if line := paths.missing(engine):
            pytest.skip(line)
    (example,) = [text for text in EXAMPLES if "PACKAGES" not in text]
    exec(compile(example, "engines.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1:] == re.findall(r"# (\[.*\])", example)


def test_the_tables_of_the_page_are_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "engines.md").read_text()
    assert page.partition("<!-- qtx audit engines -->\n")[2].strip() == show_tables().strip()
    for op, (takes, gives) in paths.OPERATIONS.items():
        assert f"| {op} | {takes} | {gives} |" in page


def test_paths_are_known_whose_engine_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "missing", lambda name: f"engine {name} needs more")
    with pytest.raises(SpecError, match="known paths are .*torch-fbgemm"):
        paths.find_path("nobody", "quantize")
