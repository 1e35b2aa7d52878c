"""The compiled form of integers: the reference's codes, what cannot be proved refused, and where it does not run."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch._dynamo.utils import counters

from parity_tests.long.compiled import check_integers
from parity_tests.subjects import integer_models
from qtx_ref import backend as ref_backend
from qtx_ref.spec import QTX, Fixed, LeftShift, Nonlinear, QuantSpec, SpecError
from qtx_torch.backend import IntegerModel
from qtx_torch.compiler import find_compiler
from qtx_torch.integer import execution
from qtx_torch.integer.execution import Edge, Execution, pack, smallest_batch
from qtx_torch.integer.model import Code
from qtx_torch.integer.parts import can_keep
from qtx_torch.integer.proof import Proof

TABLE = Nonlinear.TABLE
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler says them of torch


def prove(low: integer_models.Lowered, **changes: object) -> Proof:
    """The proof of a small model with some of its constants, or its profile, replaced."""
    model = low.model(IntegerModel)
    constants = model.constants | {name: x for name, x in changes.items() if isinstance(x, torch.Tensor)}
    profile = changes.get("profile", model.profile)
    proof = Proof(model.spec, constants, model.quants, profile)
    with torch.no_grad():
        model.net(proof, smallest_batch(model.spec, model.device))
    return proof


@pytest.fixture(scope="module")
def bert() -> integer_models.Lowered:
    return integer_models.small("bert_plain", "w8a8", "qtx", TABLE)


def test_compiled_codes_are_the_references() -> None:
    if reason := find_compiler("cpu"):
        pytest.skip(reason)
    verdicts = list(check_integers("bert_clipped_alpha", ("w8a8", "qtx", TABLE), ("all", "two")))
    assert len(verdicts) == 8
    assert [verdict.what for verdict in verdicts if not verdict.ok] == []


def test_a_second_start_traces_nothing_whatever_the_constants() -> None:
    """Kept graphs hold no constants: a model of other weights runs by the graphs of the first, with its own codes."""
    if reason := find_compiler("cpu") or ("" if can_keep() else "this torch keeps no graphs"):
        pytest.skip(reason)
    low = integer_models.small("bert_clipped_alpha", "w8a8", "qtx", TABLE)
    first = low.model(IntegerModel, compiled=True).run(low.batch)
    changed = {name: low.constants[name][::-1].copy() for name in ("layer.1.ffn.hidden.weight", "embed.norm.weight")}
    other = replace(low, constants={**low.constants, **changed})
    counters.clear()
    second = low.model(IntegerModel, compiled=True).run(low.batch)
    got = other.model(IntegerModel, compiled=True).run(low.batch)
    assert counters["stats"]["unique_graphs"] == 0
    np.testing.assert_array_equal(second.value, first.value)
    np.testing.assert_array_equal(got.value, other.model(ref_backend.IntegerModel).run(low.batch).value)
    assert not np.array_equal(got.value, first.value)


def test_traced_codes_with_scales_of_the_data_are_the_references() -> None:
    verdicts = list(check_integers("opt_plain", ("rows", "qtx", TABLE), backend_name="eager"))
    assert len(verdicts) == 12
    assert [verdict.what for verdict in verdicts if not verdict.ok] == []


def test_layers_of_one_recipe_share_a_graph(bert: integer_models.Lowered) -> None:
    model = bert.model(IntegerModel)
    alike = Execution(model.net, bert.spec, model.constants, model.quants, model.profile, model.device)
    assert bert.spec.layers > 1
    assert len(set(map(id, alike.steps))) == 1
    other = dict(model.quants)
    other["layer.0.attn.scores"] = replace(other["layer.0.attn.scores"], narrow=True)
    apart = Execution(model.net, bert.spec, model.constants, other, model.profile, model.device)
    assert len(set(map(id, apart.steps))) == 2


def test_there_is_room_for_every_kind_of_batch(bert: integer_models.Lowered) -> None:
    """A batch of one and a length of one have graphs of their own; torch makes 8 of a function unless it is told."""
    model, eager = bert.model(IntegerModel), bert.model(IntegerModel)
    parts = model.net, bert.spec, model.constants, model.quants, model.profile, model.device
    model.execution = Execution(*parts, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for size, length in ((2, 5), (1, 5), (2, 1)):
            tokens = np.arange(size * length).reshape(size, length) % bert.spec.vocab
            batch = {"tokens": tokens, "types": np.zeros_like(tokens), "mask": tokens >= 0}
            assert np.array_equal(model.run(batch).value, eager.run(batch).value)


@pytest.mark.parametrize("name", ["layer.0.ffn.residual", "layer.1.attn.query", "embed.norm"])
def test_gathered_constants_are_the_rule(bert: integer_models.Lowered, name: str) -> None:
    """floor((m x - m z + half + zero 2^r) / 2^r) against Python's integers, at ties and ends."""
    proof = prove(bert)
    offset, right = (int(proof.constants[f"{name}.{key}"]) for key in ("offset", "right"))
    zero = int(proof.constants[f"{name}.zero_point"])
    if "residual" in name:  # of two parts, with zero points of their own
        factors = proof.constants[f"{name}.factor"].tolist()
        assert factors == proof.constants[f"{name}.multiplier"].tolist()
        zeros = [int(proof.constants[f"layer.0.{part}.zero_point"]) for part in ("attn.norm", "ffn.output")]
        for x in itertools.product((0, 1, 100, 255), (-128, -1, 3, 255)):
            total = sum((v - z) * m for v, z, m in zip(x, zeros, factors, strict=True))
            unit = 2 ** int(proof.constants[f"{name}.shift"])
            codes = sum(v * m for v, m in zip(x, factors, strict=True))
            assert (codes + offset) >> right == (2 * total + unit) // (2 * unit) + zero
        return
    factor = int(proof.constants[f"{name}.factor"])
    assert factor == int(proof.constants[f"{name}.multiplier"])
    shift = int(proof.constants[f"{name}.shift"])
    for x in (0, 1, -1, 2**31 - 1, -(2**31), 12345, -777):
        numerator, unit = 2 * x * factor + 2 ** (31 - shift), 2 ** (32 - shift)
        assert (x * factor + offset) >> right == numerator // unit + zero


def test_what_data_could_break_is_refused_with_its_site(bert: integer_models.Lowered) -> None:
    bias = torch.full((bert.spec.hidden,), 2**31 - 5, dtype=torch.int32)
    with pytest.raises(SpecError, match="layer.1.ffn.hidden.*accumulators may run"):
        prove(bert, **{"layer.1.ffn.hidden.bias": bias})
    gain = torch.full((bert.spec.width,), 2**30, dtype=torch.int32)
    with pytest.raises(SpecError, match="site layer.0.attn.norm .*accumulators may reach"):
        prove(bert, **{"layer.0.attn.norm.bias": gain * 2 - 1})
    assert isinstance(QTX.requantize, Fixed)
    strict = replace(QTX, requantize=replace(QTX.requantize, left=LeftShift.REPORT))
    with pytest.raises(SpecError, match="site layer.0.attn.scores .*beyond int32"):
        prove(bert, profile=strict, **{"layer.0.attn.scores.shift": torch.tensor(24, dtype=torch.int32)})


def test_edges_say_what_comes_with_the_codes() -> None:
    value, unit, zero = torch.zeros(2, 3, 4, dtype=torch.int8), torch.ones(()), torch.zeros((), dtype=torch.int32)
    spec = QuantSpec()
    static = Edge.of(Code(value, unit, zero, spec))
    assert not static.whole
    assert pack(Code(value, unit, zero, spec), static.whole)[1:] == (None, None)
    measured = Edge.of(Code(value, torch.ones(2, 3, 1), zero, spec, measured=True))
    assert measured.whole
    assert all(x is not None for x in pack(Code(value, torch.ones(2, 3, 1), zero, spec, measured=True), measured.whole))


def test_without_a_compiler_a_warning_says_why_and_codes_are_the_same(
    bert: integer_models.Lowered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "find_compiler", lambda device: "no C++ compiler")
    with pytest.warns(UserWarning, match="without the compiled form: no C"):
        model = bert.model(IntegerModel, compiled=True)
    assert model.execution is None
    np.testing.assert_array_equal(model.run(bert.batch).value, bert.model(IntegerModel).run(bert.batch).value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_folder_for_caches_that_cannot_be_made_is_named(device: str, tmp_path: Path) -> None:
    """Importing inductor makes it, once in a process."""
    (tmp_path / "taken").write_text("")
    ask = f"from qtx_torch.compiler import find_compiler; print(find_compiler('{device}'))"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "taken")}
    said = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("inductor's caches have no folder (TORCHINDUCTOR_CACHE_DIR), ")
    assert str(tmp_path / "taken") in said.stdout


def test_what_only_the_eager_form_can_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that are not finite raise as they do eagerly; who watches is shown every site."""
    low = integer_models.small("vit_plain", "w8a8", "qtx", TABLE)
    model = low.model(IntegerModel, compiled=True)
    spoiled = {"images": np.where(low.batch["images"] > 1, np.nan, low.batch["images"])}
    assert np.isnan(spoiled["images"]).any()
    with pytest.raises(SpecError, match="NaN"):
        model.run(spoiled)

    def fail(inputs: Mapping) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(model, "execution", fail)
    seen: list[str] = []
    model.run(low.batch, lambda site, value: seen.append(site))
    assert "layer.0.attn.scores.accumulator" in seen


def test_strict_and_compiled_do_not_go_together(bert: integer_models.Lowered) -> None:
    with pytest.raises(SpecError, match="compiled is True, and strict"):
        bert.model(IntegerModel, strict=True, compiled=True)


def test_a_constant_laid_out_otherwise_means_another_graph() -> None:
    """Generated code has its strides, and no condition on them is asked again."""
    x = torch.zeros(3, 4)
    others = x.double(), torch.zeros(4, 3), x.mT.contiguous().mT
    assert all(execution.describe((x, 1)) != execution.describe((other, 1)) for other in others)
    assert execution.describe((x, 1)) == execution.describe((x + 1, 1)) != execution.describe((x, 2))


def test_a_compiler_that_fails_is_named(bert: integer_models.Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there and has no headers of Python's, as where only the compiler was installed."""
    exc = pytest.importorskip("torch._inductor.exc")
    model = bert.model(IntegerModel)

    def fail(inputs: Mapping) -> None:
        raise exc.InductorError(exc.CppCompileError(["g++", "x.cpp"], "x.cpp:1: fatal error: Python.h\nmore"), None)

    monkeypatch.setattr(model, "execution", fail)
    with pytest.raises(SpecError) as caught:
        model.run(bert.batch)
    said = "the compiler fails, x.cpp:1: fatal error: Python.h: run it without the compiled form, or mend it"
    assert str(caught.value) == said

    def fill(inputs: Mapping) -> None:
        raise exc.InductorError(OSError(30, "Read-only file system", "/a"), None)

    monkeypatch.setattr(model, "execution", fill)
    said = r"system: '/a', with its caches in TORCHINDUCTOR_CACHE_DIR: run it without the compiled form, or mend it$"
    with pytest.raises(SpecError, match=said):
        model.run(bert.batch)
    monkeypatch.setattr(model, "execution", lambda inputs: {}["no"])
    with pytest.raises(KeyError):
        model.run(bert.batch)
