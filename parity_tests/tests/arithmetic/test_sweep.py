"""A slice of `python -m parity_tests.sweep`, and proof that the sweep sees what is wrong."""

from __future__ import annotations

import importlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.sweep import cases, configuration, integers, quantizers
from parity_tests.sweep.__main__ import (
    SweepResult,
    compare,
    count_differing,
    run_chain,
    sweep,
    tensors,
)
from qtx_torch.integer import fixed_point, products
from qtx_torch.quant import affine, formats

AXES = {
    "affine": quantizers.AFFINE,
    "fixed_point": integers.FIXED,
    "integer": integers.INTEGER,
    "formats": quantizers.FORMATS,
    "groups": integers.GROUPS,
}


CORE = {
    "affine": lambda m, x, scale, zero, words, spec, profile, **rest: {
        "fake": m.fake_quantize(x, scale, zero, spec, profile.fake_quantize, words)
    },
    "fixed_point": lambda m, a, factors, zero, bias, spec, rule, place, **rest: {
        "codes": m.requantize(a, factors, zero, spec, rule, bias, place)
    },
    "integer": lambda m, a, b, zero_a, zero_b, bias, a_spec, b_spec, accumulator, rule, integers, **rest: {
        "matmul": m.matmul(a, b, a_spec, b_spec, zero_a, zero_b, bias, accumulator, rule, integers)
    },
    "groups": lambda m, a, b, multiplier, shift, rule, a_bits, b_bits, integers, **rest: {
        "product": m.product(a, b, multiplier, shift, rule, a_bits, b_bits, integers)
    },
    "formats": lambda m, x, kind, rule, block, **rest: {"fake": m.mx_fake_quantize(x, kind, rule, block)},
}


@pytest.mark.parametrize("module", AXES)
def test_eager_slice(module):
    result = sweep(module, codes=500_000, configurations=200)
    assert result.differing == 0, "\n".join(result.first[:5])
    assert result.codes >= 500_000 and result.refused < result.configurations / 4


@pytest.mark.parametrize("module", AXES)
def test_every_value_of_every_axis_is_drawn(module):
    axes = AXES[module]
    drawn = [configuration.pick(axes, i) for i in range(1000)]
    for name, values in axes.items():
        assert {str(d[name]) for d in drawn} == {str(v) for v in values}, name


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised by the import of torch's own compiler
@pytest.mark.parametrize("module", CORE)
def test_compiled_slice(module):
    """Each module's main function; whole chains of all configurations take a C++ compiler minutes."""
    count = 2 if module in ("affine", "formats") else 1  # the others check ranges on the way: a dozen graphs each
    result = sweep(module, codes=0, configurations=count, compiled=True, chain=CORE[module])
    assert result.differing == 0, "\n".join(result.first[:5])
    assert result.codes > 0 and result.graphs >= count


@settings(max_examples=40)
@given(st.sampled_from(sorted(AXES)), st.integers(1000, 10**6))
def test_drawn_configurations(module, index):
    """Any configuration, by hypothesis, which shrinks to the first index that fails."""
    case = cases.DRAWS[module](index, 2000)
    reference, accelerated = (
        importlib.import_module(f"{package}.{cases.MODULES[module]}") for package in ("qtx_ref", "qtx_torch")
    )
    result = SweepResult()
    got = run_chain(case.chain, accelerated, tensors(case.arrays), case.settings)
    compare(result, str(case.axes), got, run_chain(case.chain, reference, case.arrays, case.settings))
    assert result.differing == 0, result.first


@pytest.mark.parametrize(
    "module, function",
    [(affine, "quantize"), (fixed_point, "requantize"), (products, "matmul"), (formats, "encode")],
)
def test_a_planted_fault_is_counted(module, function):
    """One code in one element, in its last bit."""
    right = getattr(module, function)

    def wrong(*arguments, **settings):
        result = right(*arguments, **settings).clone()
        result.view(-1)[0] ^= 1
        return result

    with mock.patch.object(module, function, wrong):
        result = sweep(
            {m: n for n, m in cases.MODULES.items()}[module.__name__.partition(".")[2]], codes=0, configurations=3
        )
    assert result.differing > 0 and result.first


def test_differing_counts_bits():
    zero, nan = np.float32([0.0, 1]), np.float32([np.nan, 1])
    assert count_differing(np.float32([-0.0, 1]), zero) == 1
    assert count_differing(nan, nan) == 0 and count_differing(zero, nan) == 1
    assert count_differing(zero.astype(np.float64), zero) == 2 and count_differing(zero[:1], zero) == 2
    result = SweepResult()
    compare(result, "words", "no", "yes")
    assert result.differing == 1
