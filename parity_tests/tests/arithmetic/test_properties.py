"""Properties that hold for every configuration: hypothesis draws the configuration and a seed, NumPy the arrays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtx_ref import ops, random
from qtx_ref.attention import probabilities
from qtx_ref.presets import PRESETS
from qtx_ref.quant import affine
from qtx_ref.quant.observers import Observer
from qtx_ref.spec import (
    AttentionSpec,
    Gate,
    Granularity,
    ModelSpec,
    ObserverKind,
    ObserverSpec,
    OptimSpec,
    QuantSpec,
    Recipe,
    Rule,
    Schedule,
    Softmax,
    SpecError,
    from_dict,
    to_dict,
)
from qtx_ref.tape import const

SEEDS = st.integers(0, 2**32 - 1)
OBSERVERS = st.builds(
    ObserverSpec,
    kind=st.sampled_from(ObserverKind),
    momentum=st.floats(0, 0.99),
    percentile=st.floats(60, 100),
    candidates=st.integers(2, 30),
    margin=st.floats(0, 1),
)
QUANTS = st.builds(
    QuantSpec,
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    granularity=st.sampled_from([Granularity.TENSOR, Granularity.CHANNEL]),
    observer=OBSERVERS,
)
SOFTMAXES = st.one_of(
    st.sampled_from([Softmax.PLAIN, Softmax.PLUS_ONE, Softmax.SINK]).map(lambda kind: AttentionSpec(softmax=kind)),
    st.builds(AttentionSpec, softmax=st.just(Softmax.CLIPPED), gamma=st.floats(-0.5, 0), zeta=st.floats(1, 1.5)),
    st.builds(AttentionSpec, softmax=st.just(Softmax.CLIPPED_ROW), alpha=st.floats(0, 8), zeta=st.floats(1, 1.5)),
)
GATED = st.sampled_from(Gate).map(lambda gate: AttentionSpec(gate=gate))


def draw(seed: int, scale: float = 1.0) -> np.ndarray:
    """Long-tailed values, (2, 7, 5)."""
    return (scale * np.random.default_rng(seed).standard_t(2, size=(2, 7, 5))).astype(np.float32)


@given(QUANTS, SEEDS, st.floats(1e-3, 1e3))
def test_a_round_trip_is_within_half_a_scale(spec: QuantSpec, seed: int, size: float) -> None:
    x = draw(seed, size)
    low, high = affine.min_max(x, affine.range_axes(spec, 3, False))
    scale, zero = affine.scale_zero(low, high, spec)
    codes = affine.quantize(x, scale, zero, spec)
    assert codes.dtype == np.int32 and codes.min() >= spec.code_min and codes.max() <= spec.code_max
    real = affine.dequantize(codes, scale, zero)
    y, inside = affine.fake_quantize(x, scale, zero, spec)
    np.testing.assert_array_equal(y, real)
    # rounding the zero point moves the ends of an asymmetric range by up to half a scale: there it may be a whole one
    error = np.abs(x.astype(np.float64) - real)
    noise = 4e-7 * np.abs(x).max() + 1e-6 * scale
    assert (error <= 0.5 * scale + noise)[inside].all() and (error <= scale + noise).all()
    again = affine.quantize(real, scale, zero, spec)
    np.testing.assert_array_equal(again, codes)


@given(QUANTS, SEEDS)
def test_quantizing_keeps_order_and_zero(spec: QuantSpec, seed: int) -> None:
    x = np.sort(draw(seed).ravel())
    scale, zero = affine.scale_zero(x[0], x[-1], spec)
    assert (np.diff(affine.quantize(x, scale, zero, spec)) >= 0).all()
    y, _ = affine.fake_quantize(np.zeros(1, np.float32), scale, zero, spec)
    assert y[0] == 0


@given(SOFTMAXES, SEEDS, st.integers(1, 6), st.booleans())
def test_probabilities(spec: AttentionSpec, seed: int, keys: int, causal: bool) -> None:
    rng = np.random.default_rng(seed)
    scores, sink = const(5 * rng.normal(size=(2, 3, 4, keys))), const(rng.normal(size=3))
    mask = rng.uniform(size=(2, 1, 4, keys)) < 0.6
    p = probabilities(scores, mask, spec, sink).value
    assert ((p >= 0) & (p <= 1)).all() and not p[~np.broadcast_to(mask, p.shape)].any()
    sums, some = p.sum(-1), np.broadcast_to(mask.any(-1), p.shape[:-1])
    assert not sums[~some].any()
    if spec.softmax is Softmax.PLAIN:
        np.testing.assert_allclose(sums[some], 1, rtol=1e-12)
    if spec.softmax in (Softmax.PLUS_ONE, Softmax.SINK):
        assert (sums[some] < 1 + 1e-12).all()
    if spec.softmax is Softmax.PLAIN or spec.zeta == 1:
        assert (sums <= 1 + 1e-12).all()
    moved = probabilities(const(scores.value + np.where(mask, 0, 1e9)), mask, spec, sink).value
    np.testing.assert_array_equal(moved, p)  # what is masked is not looked at


@given(QUANTS, SEEDS, st.integers(1, 3))
def test_observed_ranges(spec: QuantSpec, seed: int, count: int) -> None:
    batches = [draw(seed + i) for i in range(count)]
    where = np.random.default_rng(seed).uniform(size=(2, 7, 1)) < 0.7
    where[0, 0] = True
    observer, clean = Observer(spec), Observer(spec)
    for x in batches:
        observer.update(x, where)
        clean.update(np.where(where, x, 0 * x + x[0, 0]), where)
    low, high = observer.range()
    assert low.dtype == high.dtype == np.float32 and (low <= high).all()
    assert low.shape == ((1, 1, 1) if spec.granularity is Granularity.TENSOR else (1, 1, 5))
    np.testing.assert_array_equal(low, clean.range()[0])  # what is masked never enters
    np.testing.assert_array_equal(high, clean.range()[1])
    counted = np.concatenate([np.broadcast_to(x, x.shape)[where[..., 0]] for x in batches])  # (N, 5)
    if spec.observer.kind in (ObserverKind.RUNNING, ObserverKind.PERCENTILE, ObserverKind.RUNNING_PERCENTILE):
        slack = 1e-6 * np.abs(counted).max()
        assert low.min() >= counted.min() - slack and high.max() <= counted.max() + slack


@given(
    SEEDS, st.integers(0, 2**40), st.integers(0, 2**31), st.text(max_size=12), st.integers(1, 60), st.integers(0, 60)
)
def test_random_words_have_addresses(seed: int, high: int, step: int, site: str, count: int, more: int) -> None:
    words = random.bits(seed + high, step, site, count + more)
    np.testing.assert_array_equal(random.bits(seed + high, step, site, count), words[:count])
    np.testing.assert_array_equal(random.bits(seed + high, step, site, count, more), words[more:])
    assert words.dtype == np.uint64 and (words < 2**32).all()
    np.testing.assert_array_equal(random.keep_mask(seed + high, step, site, (count,), 0.0), np.ones(count, bool))


@given(SEEDS, st.floats(0.01, 0.99))
def test_dropout_drops_more_at_a_higher_rate(seed: int, rate: float) -> None:
    kept, fewer = (random.keep_mask(seed, 0, "a", (500,), r) for r in (rate, min(1.0, rate + 0.1)))
    assert (kept | ~fewer).all()
    part = random.keep_mask(seed, 0, "a", (7, 11), rate, first=37)
    np.testing.assert_array_equal(part, kept[37 : 37 + 77].reshape(7, 11))


@given(st.sampled_from(sorted(PRESETS)), st.one_of(SOFTMAXES, GATED), QUANTS, st.sampled_from(Schedule))
def test_a_spec_travels_as_json(name: str, attention: AttentionSpec, quant: QuantSpec, schedule: Schedule) -> None:
    model = PRESETS[name]
    if not (model.causal and attention.gate is Gate.HEAD_CONDITIONAL):
        model = replace(model, attention=attention)
    recipe = Recipe("r", (Rule(("*.weight", "a"), quant, "assumed"), Rule(("b",), None, "assumed")))
    for spec in (model, attention, quant, recipe, OptimSpec(schedule=schedule, steps=7, warmup=3)):
        data = to_dict(spec)
        assert from_dict(type(spec), data) == spec
        with pytest.raises(SpecError, match="no_such_key"):
            from_dict(type(spec), {**data, "no_such_key": 1})
        with pytest.raises(SpecError):
            from_dict(type(spec), [data])


@given(st.sampled_from(["layers", "width", "heads", "hidden", "vocab"]), st.integers(-5, 0))
def test_sizes_below_one_are_refused(key: str, value: int) -> None:
    with pytest.raises(SpecError, match=str(value)):
        replace(PRESETS["opt-tiny"], **{key: value})


@given(st.integers(-3, 40))
def test_bits(bits: int) -> None:
    if 2 <= bits <= 16:
        spec = QuantSpec(bits=bits)
        assert spec.code_max - spec.code_min + 1 == 2**bits
    else:
        with pytest.raises(SpecError, match=str(bits)):
            QuantSpec(bits=bits)


@given(st.floats(1e-6, 5), st.floats(0, 0.999))
def test_stretching_outwards_alone(gamma: float, zeta: float) -> None:
    for setting in ({"gamma": gamma}, {"zeta": zeta}):
        with pytest.raises(SpecError):
            AttentionSpec(softmax=Softmax.CLIPPED, **setting)


@given(SEEDS, st.integers(2, 6))
def test_per_head_linear_is_a_block_diagonal_matrix(seed: int, heads: int) -> None:
    rng = np.random.default_rng(seed)
    w, x = rng.normal(size=(heads, 2, 3)), rng.normal(size=(4, heads * 3))
    whole = np.zeros((heads * 2, heads * 3))
    for h in range(heads):
        whole[2 * h : 2 * h + 2, 3 * h : 3 * h + 3] = w[h]
    np.testing.assert_allclose(ops.linear(const(x), const(w)).value, x @ whole.T, rtol=1e-12, atol=1e-12)


def test_model_spec_is_checked_when_made() -> None:
    with pytest.raises(SpecError, match="head_conditional"):
        replace(PRESETS["opt-tiny"], attention=AttentionSpec(gate=Gate.HEAD_CONDITIONAL))
    assert isinstance(from_dict(ModelSpec, to_dict(PRESETS["vit-tiny"])), ModelSpec)
