"""What the commands do is there for Python too: each job runs from a request, and none of them needs click."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from parity_tests import runner
from qtx import jobs
from qtx.data import load
from qtx.engines.machine import Machine
from qtx.files.artifact import load_artifact
from qtx.files.checkpoint import load_checkpoint
from qtx.files.container import CheckpointError
from qtx.hub import import_model
from qtx.jobs.analyze import AnalyzeRequest, analyze
from qtx.jobs.cost import CostRequest, measure_cost
from qtx.jobs.evaluate import EvaluateRequest, evaluate
from qtx.jobs.exchange import export_checkpoint, import_folder
from qtx.jobs.finetune import FinetuneRequest, finetune
from qtx.jobs.generate import GenerateRequest, generate
from qtx.jobs.opening import open_model
from qtx.jobs.parity import ParityRequest, check_file
from qtx.jobs.pretrain import PretrainRequest, pretrain
from qtx.jobs.ptq import PtqRequest, compare_recipes
from qtx.jobs.quantize import QuantizeRequest, quantize
from qtx.jobs.run import TrainSpec
from qtx.jobs.study import run_study
from qtx.jobs.training import default_optim, train
from qtx.jobs.vectors import CheckRequest, VectorsRequest, check_vectors, write_vectors
from qtx.runs.reading import RunSpec, make_run
from qtx_ref.presets import PRESETS, preset
from qtx_ref.spec import SpecError

HERE = Machine("ref")
MODULES = sorted(path.stem for path in Path(jobs.__file__).parent.glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Presets for a test: vit-small and opt-small."""
    with pytest.MonkeyPatch.context() as patch:
        for name, more in (("vit", {"patch_size": 4, "patch_norm": False}), ("opt", {})):
            whole = replace(PRESETS[f"{name}-tiny"], layers=2, width=16, heads=2, hidden=24, **more)
            patch.setitem(PRESETS, f"{name}-small", whole)
        yield


def say(model: str, steps: int, batch: int) -> RunSpec:
    """A short run of the reference."""
    said = {"model.preset": model, "optim.steps": steps, "data.batch": batch, "machine.backend": "ref"}
    return make_run(said)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    request = PretrainRequest(tmp_path_factory.mktemp("vit"), say("vit-small", steps=2, batch=4))
    assert pretrain(request).extra["history.loss"].shape == (2,)
    return request.path


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    request = PretrainRequest(tmp_path_factory.mktemp("opt"), say("opt-small", steps=1, batch=2))
    pretrain(request)
    return request.path


@pytest.fixture(scope="module")
def integers(vit: Path) -> Path:
    written = quantize(QuantizeRequest(vit, vit.with_suffix(".qtx"), machine=HERE))
    assert written.path == vit.with_suffix(".qtx") and written.recipe.name == "w8a8" and written.profile.name == "qtx"
    assert written.size.file == written.path.stat().st_size
    return written.path


def test_compiled_integers_have_the_same_score(integers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execution = pytest.importorskip("qtx_torch.integer.execution")
    plain, _ = evaluate(EvaluateRequest(integers, batches=1, machine=HERE))
    traced = partial(execution.Execution, backend="eager")  # without generating code, which takes a minute
    monkeypatch.setattr(execution, "Execution", traced)
    monkeypatch.setattr(execution, "find_compiler", lambda device: "")
    score, words = evaluate(EvaluateRequest(integers, batches=1, machine=Machine("torch"), compiled=True))
    assert score == plain
    assert words.numerics.startswith("integer, compiled, w8a8")


def test_what_could_not_be_compiled_is_not_called_compiled(
    integers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    execution = pytest.importorskip("qtx_torch.integer.execution")
    monkeypatch.setattr(execution, "find_compiler", lambda device: "no C++ compiler")
    _, words = evaluate(EvaluateRequest(integers, batches=1, machine=Machine("torch"), compiled=True))
    assert "note: integers run without the compiled form: no C++" in capsys.readouterr().err
    assert words.numerics.startswith("integer, w8a8")


def test_compiled_belongs_to_integers_on_torch(vit: Path, integers: Path) -> None:
    with pytest.raises(SpecError, match="--compiled belongs to --backend torch: the reference is not compiled"):
        evaluate(EvaluateRequest(integers, machine=Machine("ref"), compiled=True))
    with pytest.raises(SpecError, match="--compiled belongs to --numerics integer"):
        evaluate(EvaluateRequest(integers, numerics="fake", machine=Machine("torch"), compiled=True))
    with pytest.raises(SpecError, match="--compiled and --strict do not go together"):
        evaluate(EvaluateRequest(integers, strict=True, machine=Machine("torch"), compiled=True))
    with pytest.raises(SpecError, match="--compiled is of integers on --backend torch; leave it or --backend ref out"):
        measure_cost(CostRequest(model="vit-small", backend="ref", compiled=True))


def test_pretraining_is_training_of_what_is_named(vit: Path, tmp_path: Path) -> None:
    model = preset("vit-small")
    run = TrainSpec(model, default_optim(model, 2), 4, 0)
    checkpoint = train(run, load(None, model), tmp_path / "model.safetensors", HERE)
    known = load_checkpoint(vit)
    assert checkpoint.params.keys() == known.params.keys()
    assert all(np.array_equal(value, known.params[name]) for name, value in checkpoint.params.items())


def test_quantize_and_evaluate(vit: Path, integers: Path) -> None:
    score, words = evaluate(EvaluateRequest(vit, batches=1, machine=HERE))
    assert (words.numerics, words.note) == ("float", "") and score.targets == 16
    again, words = evaluate(EvaluateRequest(integers, batches=1, machine=HERE))
    assert str(words).startswith("integer, w8a8, profile qtx") and abs(again.loss / score.loss - 1) < 0.05
    fake, words = evaluate(EvaluateRequest(integers, numerics="fake", batches=1, machine=HERE))
    assert words.numerics.startswith("fake, ") and abs(fake.loss / again.loss - 1) < 0.02
    ranges = quantize(QuantizeRequest(vit, vit.with_name("ranges.safetensors"), recipe="w4a8", machine=HERE))
    assert ranges.size is None and ranges.ranges.keys() == load_checkpoint(ranges.path).ranges.keys()
    opened = open_model(integers, HERE)
    assert opened.integer and opened.stored.recipe.name == "w8a8"
    with pytest.raises(SpecError, match="--numerics, --strict and --compiled belong to"):
        evaluate(EvaluateRequest(vit, strict=True, machine=HERE))
    with pytest.raises(SpecError, match="nonlinear is 'none'"):
        quantize(QuantizeRequest(vit, vit.with_name("other.qtx"), nonlinear="none", machine=HERE))
    with pytest.raises(CheckpointError, match="exists"):
        quantize(QuantizeRequest(vit, integers, machine=HERE))


def test_generate(opt: Path) -> None:
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    text = generate(GenerateRequest(opt, "It was the best", tokens=3, machine=HERE))
    assert len(text.tokens) == text.prompt_tokens + 3 and text.text.startswith("it was the best")
    for name, value, said in (
        ("temperature", float("nan"), "temperature is"),
        ("temperature", -1.0, "temperature is"),
        ("tokens", 0, "tokens is"),
        ("prompt", "\udcff", "is no UTF-8"),  # what Python makes of a byte on the command line that is no text
        ("prompt", "the " * 1000, "give a shorter text"),
    ):
        with pytest.raises(SpecError, match=said):
            generate(replace(GenerateRequest(opt, "It was", machine=HERE), **{name: value}))


def test_finetune(vit: Path, tmp_path: Path) -> None:
    run = make_run({"data.sources": "digits", "optim.steps": 1, "machine.backend": "ref"})
    request = FinetuneRequest(vit, tmp_path, run, head_only=True)
    checkpoint, score = finetune(request)
    assert checkpoint.spec.classes == 10 and score.targets == 180 and request.path.is_file()
    with pytest.raises(CheckpointError, match="go on with --resume"):
        finetune(request)
    assert finetune(replace(request, resume=True))[1] == score


def test_analyze(vit: Path) -> None:
    analysis, written = analyze(AnalyzeRequest(vit, batches=1, machine=HERE))
    assert written == [] and len(analysis.heads) == 4


def test_compare_recipes(vit: Path, tmp_path: Path) -> None:
    here, w8a8 = make_run({"machine.backend": "ref"}), make_run({"quant.recipes": ["w8a8"]})
    comparison, written = compare_recipes(
        PtqRequest(vit, tmp_path, here.under(w8a8), sequences=4, calibration=1, keep=("w8a8",))
    )
    assert list(comparison.rows) == ["float", "w8a8"] and written[:2] == ["ptq.json", "w8a8.safetensors"]
    with pytest.raises(SpecError, match="--sensitivity w8a8 and --skip w4a4"):
        compare_recipes(PtqRequest(vit, tmp_path / "a", here, skip=("w4a4",), sensitivity="w8a8"))


def test_recipes_are_compared_without_a_picture(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where matplotlib is not installed; it was a traceback at the end of the work."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = make_run({"machine.backend": "ref"}).under(make_run({"quant.recipes": ["w8a8"]}))
    _, written = compare_recipes(PtqRequest(vit, tmp_path, run, sequences=4, calibration=1))
    assert written == ["ptq.json"]
    assert "no picture: a picture needs matplotlib, which is not installed" in capsys.readouterr().err


def test_study(tmp_path: Path) -> None:
    run = say("vit-small", steps=1, batch=2).under(make_run({"model.attention": "vanilla"}))
    study = run_study(run, tmp_path)
    assert list(study.runs) == ["vanilla-seed0"] and "| vanilla " in study.tabulate()


def test_cost() -> None:
    costs = measure_cost(CostRequest(model="vit-small", batches=(1,), rounds=1, backend="ref", attentions=("clipped",)))
    assert [row["attention"] for row in costs.result["attentions"]] == ["vanilla", "clipped"]
    assert costs.written == [] and "| clipped " in costs.text
    with pytest.raises(SpecError, match="give a checkpoint or --model"):
        measure_cost(CostRequest())


def test_vectors(integers: Path, tmp_path: Path) -> None:
    names, inputs = write_vectors(VectorsRequest(integers, tmp_path / "v.safetensors", machine=HERE))
    checked = check_vectors(CheckRequest(integers, tmp_path / "v.safetensors", machine=HERE))
    assert inputs == 2 and checked == (len(names), [])
    assert load_artifact(integers).spec == load_checkpoint(integers.with_suffix(".safetensors")).spec


def test_parity(vit: Path, integers: Path) -> None:
    pytest.importorskip("torch")
    for path, group in ((vit, "checkpoint"), (integers, "integer")):
        told: list[tuple] = []
        report = check_file(ParityRequest(path), runner, lambda *given, told=told: told.append(given))
        assert report.ok and [row for _, _, row in told] == report.rows and set(report.counts) == {group}
        assert (report.file, report.sha256) == (str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(SpecError, match="device is 'tpu'"):
        check_file(ParityRequest(vit, device="tpu"), runner)
    with pytest.raises(CheckpointError, match=r"no\.safetensors"):
        check_file(ParityRequest(vit.with_name("no.safetensors")), runner)


def test_exchange(vit: Path, tmp_path: Path) -> None:
    written = export_checkpoint(vit, tmp_path / "folder")
    assert "model.safetensors" in written.files
    checkpoint = import_folder(tmp_path / "folder", tmp_path / "again.safetensors")
    assert checkpoint.params.keys() == import_model(tmp_path / "folder").params.keys()
    assert all(np.array_equal(value, checkpoint.params[name]) for name, value in load_checkpoint(vit).params.items())


@pytest.mark.parametrize("name", MODULES)
def test_no_job_names_click_or_a_command(name: str) -> None:
    path = Path(jobs.__file__).with_name(f"{name}.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.partition(".")[0] == "click" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert "click" not in (node.module or "") and "commands" not in (node.module or "").split(".")


def run_fresh(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_jobs_are_imported_without_click_and_torch() -> None:
    imports = "; ".join(f"import qtx.jobs.{name}" for name in MODULES if name != "__init__")
    run_fresh(f"import sys; sys.modules['click'] = None; {imports}; assert 'torch' not in sys.modules")


def test_help_is_shown_without_torch() -> None:
    code = "main(['--help'], standalone_mode=False); assert 'torch' not in sys.modules"
    assert "Usage: " in run_fresh(f"import sys; from qtx.cli import main; {code}")
