"""A slice of `python -m parity_tests.sweep.__main__`, and proof that the sweep sees what is wrong."""

from __future__ import annotations

import importlib
import inspect
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.sweep import cases as sweep_cases
from parity_tests.sweep.__main__ import (
    Tally,
    compare,
    differing,
    outcome,
    sweep,
    tensors,
)
from qtx_torch.integer import fixed_point
from qtx_torch.integer import products as integer
from qtx_torch.quant import affine, formats

AXES = {
    "affine": sweep_cases.AFFINE,
    "fixed_point": sweep_cases.FIXED,
    "integer": sweep_cases.INTEGER,
    "formats": sweep_cases.FORMATS,
}


CORE = {
    "affine": lambda m, x, scale, zero, words, spec, profile, **rest: {
        "fake": m.fake_quantize(x, scale, zero, spec, profile, words)
    },
    "fixed_point": lambda m, a, real, zero, spec, profile, **rest: {
        "codes": m.requantize(a, real, zero, spec, profile)
    },
    "integer": lambda m, a, b, zero_a, zero_b, bias, a_spec, b_spec, accumulator, profile, integers, **rest: {
        "matmul": m.matmul(a, b, a_spec, b_spec, zero_a, zero_b, bias, accumulator, profile, integers)
    },
    "formats": lambda m, x, kind, rule, block, **rest: {"fake": m.mx_fake_quantize(x, kind, rule, block)},
}


@pytest.mark.parametrize("module", AXES)
def test_eager_slice(module):
    tally = sweep(module, codes=500_000, configurations=200)
    assert tally.differing == 0, "\n".join(tally.first[:5])
    assert tally.codes >= 500_000 and tally.refused < tally.configurations / 4


@pytest.mark.parametrize("module", AXES)
def test_every_value_of_every_axis_is_drawn(module):
    axes = AXES[module]
    drawn = [sweep_cases.pick(axes, i) for i in range(1000)]
    for name, values in axes.items():
        assert {str(d[name]) for d in drawn} == {str(v) for v in values}, name


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # raised by the import of torch's own compiler
@pytest.mark.parametrize("module", CORE)
def test_compiled_slice(module):
    """Each module's main function; whole chains of all configurations take a C++ compiler minutes."""
    count = 2 if module in ("affine", "formats") else 1  # the others check ranges on the way: a dozen graphs each
    tally = sweep(module, codes=0, configurations=count, compiled=True, chain=CORE[module])
    assert tally.differing == 0, "\n".join(tally.first[:5])
    assert tally.codes > 0 and tally.graphs >= count


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(AXES)), st.integers(1000, 10**6))
def test_drawn_configurations(module, index):
    """Any configuration, by hypothesis, which shrinks to the first index that fails."""
    case = sweep_cases.DRAWS[module](index, 2000)
    reference, accelerated = (
        importlib.import_module(f"{package}.{sweep_cases.MODULES[module]}") for package in ("qtx_ref", "qtx_torch")
    )
    tally = Tally()
    got = outcome(case.chain, accelerated, tensors(case.arrays), case.settings)
    compare(tally, str(case.axes), got, outcome(case.chain, reference, case.arrays, case.settings))
    assert tally.differing == 0, tally.first


@pytest.mark.parametrize(
    "module, function",
    [(affine, "quantize"), (fixed_point, "requantize"), (integer, "matmul"), (formats, "encode")],
)
def test_a_planted_fault_is_counted(module, function):
    """One code in one element, in its last bit."""
    right = getattr(module, function)

    def wrong(*arguments, **settings):
        result = right(*arguments, **settings).clone()
        result.view(-1)[0] ^= 1
        return result

    with mock.patch.object(module, function, wrong):
        tally = sweep(
            {m: n for n, m in sweep_cases.MODULES.items()}[module.__name__.partition(".")[2]], codes=0, configurations=3
        )
    assert tally.differing > 0 and tally.first


def test_differing_counts_bits():
    zero, nan = np.float32([0.0, 1]), np.float32([np.nan, 1])
    assert differing(np.float32([-0.0, 1]), zero) == 1
    assert differing(nan, nan) == 0 and differing(zero, nan) == 1
    assert differing(zero.astype(np.float64), zero) == 2 and differing(zero[:1], zero) == 2
    tally = Tally()
    compare(tally, "words", "no", "yes")
    assert tally.differing == 1


@pytest.mark.parametrize("module", ["affine", "rounding", "fixed_point", "integer", "formats"])
def test_the_two_backends_have_the_same_functions(module):
    """Name and parameters of every function of the reference."""

    def functions(package: str) -> dict[str, list[str]]:
        found = vars(importlib.import_module(f"{package}.{sweep_cases.MODULES[module]}"))
        return {n: list(inspect.signature(f).parameters) for n, f in found.items() if inspect.isfunction(f)}

    accelerated = functions("qtx_torch")
    for name, parameters in functions("qtx_ref").items():
        assert accelerated.get(name) == parameters, name
