"""Integer models: properties of the ops, planted faults, what strict refuses, and the distance to fake quantization."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parity_tests.long import integer_report, large_integer
from parity_tests.subjects import integer_models, rules
from parity_tests.subjects.integer_models import RunRecord, record_run, same
from qtx.measure.scores import IntegerScorer
from qtx_ref.backend import IntegerModel as RefModel
from qtx_ref.integer import fixed_point, lowering, ops
from qtx_ref.profiles import NAMES, profile
from qtx_ref.quant import affine
from qtx_ref.random import stream
from qtx_ref.spec import AddRule, Gate, QuantSpec, SpecError
from qtx_torch import model as torch_model
from qtx_torch.backend import IntegerModel
from qtx_torch.integer import fixed_point as torch_fixed_point
from qtx_torch.integer import ops as torch_ops

SEEDS = st.integers(0, 2**32 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)
OPS = ("exp_polynomial", "gelu_polynomial", "sigmoid_polynomial", "tanh_polynomial")


def agree(function: str, *values: object, module: str = "ops") -> None:
    """The function of both backends on the same integers: the same integers."""

    def tensor(x: object) -> object:
        if isinstance(x, (list, tuple)):
            return type(x)(tensor(part) for part in x)
        return torch.tensor(x) if isinstance(x, (np.ndarray, np.generic)) else x

    def flat(x: object) -> list[np.ndarray]:
        return [a for part in x for a in flat(part)] if isinstance(x, (list, tuple)) else [np.asarray(x)]

    ref, ours = {
        "ops": (ops, torch_ops),
        "fixed_point": (fixed_point, torch_fixed_point),
    }[module]
    want = flat(getattr(ref, function)(*values))
    for a, b in zip(flat(getattr(ours, function)(*map(tensor, values))), want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@given(st.lists(INT32, min_size=1, max_size=40))
def test_polynomials_of_any_integer(values: list[int]) -> None:
    x = np.array(values, np.int64)
    for name in OPS:
        agree(name, np.abs(x) if name == "exp_polynomial" else x)


@given(st.lists(st.integers(-(2**61), 2**61), min_size=1), st.integers(1, 2**60))
def test_division_of_negative_numbers_too(values: list[int], divisor: int) -> None:
    agree("half_up", np.array(values), np.array(divisor))


@given(st.lists(st.integers(2**60, 2**62 - 1), min_size=1))
def test_square_root(values: list[int]) -> None:
    agree("square_root", np.array(values))


@given(SEEDS, st.sampled_from([8, 15, 16]), st.integers(1, 70), st.integers(0, 2**40))
def test_normalize(seed: int, bits: int, width: int, eps: int) -> None:
    agree("normalize", stream(seed, "codes").integers(0, 2**bits, (3, width)).astype(np.int32), np.int64(eps))


@given(SEEDS, st.sampled_from(["table", "polynomial"]), st.booleans(), st.sampled_from([4, 8, 16]))
def test_softmax(seed: int, kind: str, sink: bool, bits: int) -> None:
    rng = stream(seed, "scores")
    code = rng.integers(0, 2**bits, (2, 3, 4, 5)).astype(np.int32)
    mask = rng.uniform(size=(2, 1, 4, 5)) < rng.uniform()
    real = np.float64(10 ** rng.uniform(0, 4))
    table = np.rint(np.exp(-np.arange(min(2**bits, 4000)) * rng.uniform(0.001, 1)) * 2**24).astype(np.int32)
    exponential = table if kind == "table" else fixed_point.quantize_multiplier(real)
    extra = (rng.integers(-400, 400, 3).astype(np.int32), rng.integers(2**20, 2**22, 3)) if sink else None
    agree("softmax", code, mask, exponential, extra)
    p = ops.softmax(code, mask, exponential, extra)
    zeta, gamma, alpha = np.int64(rng.integers(2**24, 2**26)), -rng.integers(0, 2**33), rng.integers(0, 2**33)
    agree("row_gamma", np.int64(alpha), mask)
    for stretch in (np.int64(gamma), ops.row_gamma(np.int64(alpha), mask)):
        agree("clip_stretch", p, zeta, stretch)


@given(SEEDS, st.sampled_from([rules.ADD_UP, rules.ADD_AWAY]))
def test_weighted_sums_and_means(seed: int, rule: AddRule) -> None:
    rng = stream(seed, "sums")
    parts = [rng.integers(-(2**31), 2**31, (3, 4, 5)).astype(np.int32) for _ in range(2)]
    reals = [np.float64(10 ** rng.uniform(-9, 8)), 10 ** rng.uniform(-9, 8, (3, 4, 1))]
    agree("weighted_sum", parts, *lowering.common_shift(reals), rule)
    agree("mean", parts[0], rng.uniform(size=(3, 4, 1)) < 0.4)
    agree("mean", parts[0], None)


@given(SEEDS, st.sampled_from(NAMES), st.sampled_from([True, False]))
def test_one_requantization_is_within_one_code_of_fake_quantization(seed: int, name: str, symmetric: bool) -> None:
    """From the same accumulators: by the profile's requantization, or through the float that they stand for."""
    rng, chosen, spec = stream(seed, "requantization"), profile(name), QuantSpec(symmetric=symmetric)
    unit, scale = 2.0 ** rng.uniform(-24, -8), np.float32(2.0 ** rng.uniform(-8, 2))
    zero = np.int32(0 if symmetric else rng.integers(0, 256))
    reach = min(int(300 * scale / unit), 2**30)  # beyond the codes at both ends
    acc = rng.integers(-reach, reach + 1, 4000).astype(np.int32)
    rule = chosen.requantize
    got = fixed_point.requantize(acc, fixed_point.real_multiplier(unit, 1, scale, rule), zero, spec, rule)
    want = affine.quantize((unit * acc).astype(np.float32), scale, zero, spec, chosen.quantize)
    assert np.abs(got - want).max() <= 1


@pytest.mark.parametrize("name", rules.REQUANTIZE)
def test_every_requantization_is_within_one_of_the_product(name: str) -> None:
    rng, rule = stream(0, "requantization", name), rules.REQUANTIZE[name]
    for real in 2.0 ** rng.uniform(-20, 0, 50):
        acc = rng.integers(-(2**22), 2**22, 2000).astype(np.int32)
        level = fixed_point.round_by(acc, fixed_point.real_multiplier(np.float64(real), 1, 1, rule), rule)
        assert np.abs(level - np.rint(acc * real)).max() <= 1


@pytest.mark.parametrize("name", ["bert_sink_and_mlp", "opt_post_norm_projected", "vit_clipped_row"])
def test_every_op_on_the_same_codes_is_within_one_of_its_float_form(name: str) -> None:
    low = integer_models.small(name)
    nx = integer_report.beside(low, low.batch)
    assert nx.single.largest <= 1
    assert {site: differences.largest for site, differences in nx.ops.items() if differences.largest > 1} == {}
    assert nx.ops.keys() >= {"layer.1.attn.query", "layer.1.attn.probs", "layer.1.ffn.residual", "layer.1.ffn.norm"}


def test_integers_and_fake_quantization_give_the_same_loss() -> None:
    low = integer_models.small("opt_gate_linear")
    fake = integer_report.metric(integer_report.fake(low), [low.batch])
    assert integer_report.metric(IntegerScorer(low.model(IntegerModel)), [low.batch])[0] == pytest.approx(
        fake[0], rel=0.01
    )


# --- the checker is checked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("layer.0.attn.query.multiplier", 2**24),  # of 2^30 and more: less than that moves no code here
        ("layer.1.attn.probs.table", 2**14),  # of 2^24
        ("layer.1.ffn.residual.zero_point", 1),
        ("layer.1.ffn.output.bias", 1),
        ("layer.0.attn.value.weight", 1),
        ("layer.0.ffn.activation.table", 1),
    ],
)
def test_one_constant_that_is_off_is_caught(name: str, step: int) -> None:
    low = integer_models.small("bert_plain")
    want = record_run(low.model(RefModel), low.batch)
    assert all(verdict.ok for verdict in same(record_run(low.model(IntegerModel), low.batch), want))
    changed = replace(
        low, constants={**low.constants, name: low.constants[name] - low.constants[name].dtype.type(step)}
    )
    assert any(not verdict.ok for verdict in same(record_run(changed.model(IntegerModel), low.batch), want))


def test_a_site_left_out_is_caught() -> None:
    low = integer_models.small("vit_plain")
    seen = record_run(low.model(RefModel), low.batch)
    for missing in (0, len(seen.sites) // 2, -1):
        rest = list(seen.sites)
        del rest[missing]
        assert not all(verdict.ok for verdict in same(RunRecord(rest, seen.output), seen))


def test_the_large_command_names_the_first_site_that_differs() -> None:
    low = integer_models.small("opt_plain")
    bias = "layer.1.ffn.output.bias"
    changed = replace(low, constants={**low.constants, bias: low.constants[bias] + 1})
    ref, model = low.model(RefModel), low.model(IntegerModel)
    count, differs = large_integer.find_difference(ref, model, low.batch)
    assert (count > 50, differs) == (True, "")
    assert (
        large_integer.find_difference(ref, changed.model(IntegerModel), low.batch)[1]
        == "layer.1.ffn.output.accumulator"
    )
    start = low.batch["tokens"][:, :3]
    assert large_integer.compare_generated(ref, model, start)[1] == ""
    assert large_integer.compare_generated(ref, changed.model(IntegerModel), start)[1] == "generated"


# --- strict -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert_plain", "vit_plain"])
def test_strict_stops_at_the_first_float(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low = integer_models.small(name)
    for kind, module in ((RefModel, ops), (IntegerModel, torch_ops)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "half_up", lambda a, b: a // b + (a * 0.5 > a))
            low.model(kind).run(low.batch)
            with pytest.raises(TypeError, match="strict integer arithmetic came upon float"):
                low.model(kind, strict=True).run(low.batch)


def test_strict_refuses_what_needs_a_float(monkeypatch: pytest.MonkeyPatch) -> None:
    low = integer_models.small("bert_plain", "w8a8", "float32")
    rows = integer_models.small("bert_plain", "rows")
    for kind in (RefModel, IntegerModel):
        with pytest.raises(SpecError, match="profile float32 requantizes by float32"):
            low.model(kind, strict=True)
        with pytest.raises(SpecError, match="embed.norm cannot run in integers: its scale is taken from the data"):
            rows.model(kind, strict=True)
    monkeypatch.setattr(torch_model, "find_device", lambda name: torch.device(name))
    with pytest.raises(SpecError, match="strict runs on cpu"):
        integer_models.small("bert_plain").model(IntegerModel, device="cuda", strict=True)


def test_only_a_causal_model_generates() -> None:
    low = integer_models.small("bert_plain")
    for kind in (RefModel, IntegerModel):
        with pytest.raises(SpecError, match="only a causal model"):
            low.model(kind).generate(low.batch["tokens"], 1, lambda scores: scores.argmax(-1))


def test_every_attention_is_in_the_table() -> None:
    assert set(integer_models.attentions("bert-tiny")) >= {str(gate) for gate in Gate if gate is not Gate.NONE}
    assert len(integer_models.attentions("bert-tiny")) == 11
    assert len(integer_models.attentions("opt-tiny")) == 10
