"""Channels and blocks along any axis: ranges, scales, observers, small floats, masks, and who refuses them."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from qtx_ref.presets import preset
from qtx_ref.spec import (
    QTX,
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    ObserverKind,
    ObserverSpec,
    Operand,
    QuantSpec,
    SharedScale,
    SpecError,
    check_generation,
    check_integer,
    from_dict,
    to_dict,
)

F32 = np.float32
X = (np.random.default_rng(0).standard_normal((4, 6, 8)) * 5).astype(F32)
CHANNELS = QuantSpec(granularity=Granularity.CHANNEL, dynamic=True)
BLOCKS = QuantSpec(granularity=Granularity.BLOCK, block=2, dynamic=True)
MX = FloatQuantSpec(FloatFormat.E4M3, granularity=Granularity.BLOCK, block=2, dynamic=True, shared=SharedScale.EVEN)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("spec", [CHANNELS, BLOCKS, MX])
def test_an_axis_is_the_last_one_of_the_tensor_turned(call, spec, axis):
    """Scale, zero point and values of x along the axis are those along the last of the tensor moved there."""
    turned = np.ascontiguousarray(np.moveaxis(X, axis, -1))
    own = replace(spec, axis=axis)
    for weight in (False, True):
        scale, zero = call("quant.quantizer.dynamic_scale", X, own, None, weight)
        want, want_zero = call("quant.quantizer.dynamic_scale", turned, replace(spec, axis=None), None, False)
        np.testing.assert_array_equal(np.moveaxis(scale, axis, -1), want)
        np.testing.assert_array_equal(np.moveaxis(zero, axis, -1), want_zero)
        y, inside = call("quant.quantizer.fake_quantize", X, scale, zero, own)
        want_y, want_inside = call("quant.quantizer.fake_quantize", turned, want, want_zero, spec)
        np.testing.assert_array_equal(np.moveaxis(y, axis, -1), want_y)
        np.testing.assert_array_equal(np.moveaxis(inside, axis, -1), want_inside)


def test_columns_by_hand(call):
    x = F32([[1, -20], [3, 40], [-5, 0]])
    low, high = call("quant.affine.ranges", x, replace(CHANNELS, axis=0))
    assert (low.tolist(), high.tolist()) == ([[-20], [3], [-5]], [[1], [40], [0]])
    low, high = call("quant.affine.ranges", x[:2], replace(BLOCKS, axis=0))
    assert (low.tolist(), high.tolist()) == ([[1, -20], [1, -20]], [[3, 40], [3, 40]])
    with pytest.raises(ValueError, match="block 2 does not divide axis 0, 3"):
        call("quant.affine.ranges", x, replace(BLOCKS, axis=0))
    for axis in (2, -3):
        for spec in (CHANNELS, BLOCKS, MX):
            with pytest.raises(ValueError, match=f"axis {axis} of a tensor of 2 axes: give one from -2 to 1"):
                call("quant.quantizer.dynamic_scale", x, replace(spec, axis=axis), None, False)


@pytest.mark.parametrize("spec", [BLOCKS, MX])
def test_padding_does_not_enter_a_block_that_reaches_it(call, spec):
    """Along the tokens a block has real and padded rows; along the last axis a row of padding has its own."""
    where = np.ones((4, 6, 1), bool)
    where[:, 5] = False
    large = X.copy()
    large[:, 5] = 1000
    scale, _ = call("quant.quantizer.dynamic_scale", large, replace(spec, axis=1), where, False)
    alone, _ = call("quant.quantizer.dynamic_scale", np.where(where, X, 0), replace(spec, axis=1), None, False)
    np.testing.assert_array_equal(scale, alone)


@pytest.mark.parametrize("kind", ObserverKind)
@pytest.mark.parametrize("backend", ["qtx_ref", "qtx_torch"])
@pytest.mark.parametrize("axis", [0, 1])
def test_observers_of_an_axis(kind, backend, axis):
    """What an observer of the tensor turned finds, masked too."""
    observers = importlib.import_module(f"{backend}.quant.observers")
    spec = replace(CHANNELS, dynamic=False, observer=ObserverSpec(kind, percentile=90.0, candidates=5))
    where = np.ones((4, 6, 1), bool)
    where[:, :, 0] = np.arange(6) < 4 if axis == 0 else True
    where = where if axis == 0 else where & (np.arange(4) < 3)[:, None, None]

    def find(one: QuantSpec, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
        observer = observers.Observer(one)
        give = torch.tensor if backend == "qtx_torch" else np.asarray
        observer.update(give(np.ascontiguousarray(x)), give(np.ascontiguousarray(mask)))
        return np.asarray(observer.scale_zero()[0])

    got = find(replace(spec, axis=axis), X, where)
    full = np.moveaxis(np.broadcast_to(where, X.shape), axis, -1)[..., :1]
    want = find(spec, np.moveaxis(X, axis, -1), full)
    np.testing.assert_array_equal(np.moveaxis(got, axis, -1), want)
    with (
        pytest.raises(ValueError, match="a mask over channels")
        if kind
        not in (
            ObserverKind.CURRENT,
            ObserverKind.RUNNING,
        )
        else pytest.raises(AssertionError)
    ):
        find(replace(spec, axis=1), X, np.broadcast_to(np.arange(6)[:, None] < 4, X.shape))
        raise AssertionError("a range of no element is (0, 0)")


def test_an_axis_belongs_to_channels_and_blocks():
    for granularity in (Granularity.TENSOR, Granularity.TOKEN):
        with pytest.raises(SpecError, match="quantizer axis is 0: it belongs to granularity channel or block"):
            QuantSpec(granularity=granularity, dynamic=True, axis=0)
        with pytest.raises(SpecError, match="float quantizer axis is 0"):
            FloatQuantSpec(FloatFormat.E4M3, granularity=granularity, dynamic=True, axis=0)
    data = to_dict(replace(BLOCKS, axis=-2))
    assert from_dict(QuantSpec, data).axis == -2
    del data["axis"]
    assert from_dict(QuantSpec, data) == BLOCKS


def test_who_refuses_an_axis():
    for site in ("layer.0.ffn.hidden.weight", "layer.0.attn.value"):
        with pytest.raises(SpecError, match=f"site {site} cannot run in integers: its channels are named by axis, 0"):
            check_integer({site: replace(CHANNELS, axis=0)}, QTX)
    with pytest.raises(SpecError, match="no channel apart and no axis"):
        Operand(replace(MX, axis=0))
    with pytest.raises(SpecError, match="would see the future"):
        check_generation(preset("opt-tiny"), {"layer.0.ffn.hidden": replace(BLOCKS, axis=1)}, 8)
    check_generation(preset("opt-tiny"), {"layer.0.ffn.hidden": replace(BLOCKS, axis=-1)}, 8)


def test_percentiles_without_a_sort_are_those_of_a_sort(call):
    """Of long rows with ties, at both tails, and of rows of one and two values."""
    rng = np.random.default_rng(0)
    short = rng.normal(size=(2, 1)), rng.normal(size=(2, 2))
    for rows in (rng.standard_t(2, (3, 100_003)), rng.integers(-3, 4, (2, 5000)), *short):
        values = rows.astype(np.float32)
        for q in (0.001, 0.1, 30.0, 50.0, 99.999, 100.0):
            ordered = np.sort(values, axis=-1).astype(np.float64)
            position = (ordered.shape[-1] - 1) * (q / 100)
            below = int(position)
            a, b = ordered[:, below], ordered[:, min(below + 1, ordered.shape[-1] - 1)]
            want = (a + (b - a) * (position - below))[:, None].astype(np.float32)
            np.testing.assert_array_equal(call("quant.observers.percentile", values, q), want)
