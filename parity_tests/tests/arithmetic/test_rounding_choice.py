"""GPTQ against its definition with inverses made anew, both against every rounding there is, and on correlated
inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from qtx_ref.quant import affine
from qtx_ref.quant.rounding_choice import adaround, gptq, row_errors
from qtx_ref.spec import Granularity, QuantSpec

PER = (Granularity.TENSOR, Granularity.CHANNEL)


def problem(outputs: int, inputs: int, quant: QuantSpec, seed: int = 0) -> tuple[np.ndarray, ...]:
    """A weight, the Gram matrix of correlated inputs, scale, zero point, and the weight rounded to nearest."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(inputs, inputs)) / inputs**0.5 + rng.normal(size=(1, inputs)) * rng.normal(size=(inputs, 1))
    x = rng.normal(size=(10 * inputs, inputs)) @ mix
    weight = rng.normal(size=(outputs, inputs)).astype(np.float32)
    scale, zero = affine.scale_zero(*affine.ranges(weight, quant, True), quant)
    return weight, x.T @ x, scale, zero, affine.fake_quantize(weight, scale, zero, quant)[0]


def textbook(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, zero: np.ndarray, quant: QuantSpec) -> np.ndarray:
    """Optimal brain quantization in column order (Frantar et al. 2023, eq. 2): after each column the inverse of the
    Hessian of those that are left is made from it anew."""
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    w = weight.astype(np.float64)
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(hessian[j:, j:])
        column = affine.fake_quantize(w[:, j : j + 1].astype(np.float32), scale, zero, quant)[0].astype(np.float64)
        w[:, j + 1 :] -= (w[:, j : j + 1] - column) / inverse[0, 0] * inverse[0, 1:]
        w[:, j : j + 1] = column
    return w


@pytest.mark.parametrize("granularity", PER)
@pytest.mark.parametrize("block", [1, 5, 128])
def test_gptq_is_the_textbook_one(granularity: Granularity, block: int) -> None:
    quant = QuantSpec(4, granularity is Granularity.CHANNEL, granularity=granularity)
    weight, gram, scale, zero, nearest = problem(9, 24, quant)
    got, want = gptq(weight, gram, quant, scale, zero, block=block), textbook(weight, gram, scale, zero, quant)
    plain = (row_errors(nearest - weight.astype(np.float64), gram) <= row_errors(want - weight, gram))[:, None]
    np.testing.assert_array_equal(got, np.where(plain, nearest, want))
    assert plain.mean() < 0.5


@pytest.mark.parametrize("choose", [gptq, adaround])
def test_no_choice_of_codes_errs_less_than_the_best_of_all(choose: Callable) -> None:
    """Rows of 4 weights on 8 codes: each of 4096 rounded rows is tried. Never above nearest, and often the best
    itself."""
    quant = QuantSpec(3, True, granularity=Granularity.CHANNEL)
    best = 0
    for seed in range(6):
        weight, gram, scale, zero, nearest = problem(5, 4, quant, seed)
        got = row_errors(choose(weight, gram, quant, scale, zero) - weight.astype(np.float64), gram)
        plain = row_errors(nearest - weight.astype(np.float64), gram)
        codes = np.array(list(itertools.product(range(-4, 4), repeat=4)))
        for row in range(5):
            least = row_errors(codes * np.float64(scale[row]) - weight[row], gram).min()
            assert least * (1 - 1e-6) <= got[row] <= plain[row]  # float32 products of code and scale
            best += got[row] <= least * (1 + 1e-6)
    assert best >= 15  # of 30


@pytest.mark.parametrize("choose", [gptq, adaround])
@pytest.mark.parametrize("granularity", PER)
@pytest.mark.parametrize("symmetric", [False, True])
def test_correlated_inputs_leave_much_less_error_than_nearest(
    choose: Callable, granularity: Granularity, symmetric: bool
) -> None:
    quant = QuantSpec(4, symmetric, granularity=granularity)
    weight, gram, scale, zero, nearest = problem(20, 32, quant)
    got = choose(weight, gram, quant, scale, zero)
    np.testing.assert_array_equal(affine.fake_quantize(got, scale, zero, quant)[0], got)
    ours, plain = (row_errors(w - weight.astype(np.float64), gram) for w in (got, nearest))
    assert (ours <= plain).all() and ours.sum() < 0.4 * plain.sum()


@pytest.mark.parametrize("choose", [gptq, adaround])
def test_heads_are_chosen_one_by_one_and_dead_channels_are_no_trouble(choose: Callable) -> None:
    quant = QuantSpec(3, True, granularity=Granularity.CHANNEL)
    parts = [problem(4, 8, quant, seed) for seed in (0, 1)]
    weight, scale, zero = (np.stack([part[i] for part in parts]) for i in (0, 2, 3))
    gram = np.random.default_rng(0).normal(size=(16, 16))  # between heads: no row reads it
    for h, part in enumerate(parts):
        part[1][:, 5] = part[1][5] = 0
        gram[8 * h : 8 * h + 8, 8 * h : 8 * h + 8] = part[1]
    got = choose(weight, gram, quant, scale, zero)
    for h, part in enumerate(parts):
        np.testing.assert_array_equal(got[h], choose(*part[:2], quant, *part[2:4]))
    silent = choose(weight, 0 * gram, quant, scale, zero)
    np.testing.assert_array_equal(silent, np.stack([part[4] for part in parts]))
