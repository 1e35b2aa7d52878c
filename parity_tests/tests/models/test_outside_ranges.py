"""Where ranges and statistics leave the domain of the arithmetic, the two backends give one answer."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import qtx_torch.attention
import qtx_torch.backend
import qtx_torch.ops
import qtx_torch.quant.observers
import qtx_torch.quant.quantizer
import qtx_torch.stats
from parity_tests.tests.models.answers import INF, NAN, answer, same, tensors, wider
from qtx_ref import stats
from qtx_ref.quant import observers, quantizer
from qtx_ref.spec import (
    FloatQuantSpec,
    Granularity,
    ObserverKind,
    ObserverSpec,
    QuantSpec,
)

# --- ranges -----------------------------------------------------------------------------------------------------------


def arrays(dtype: str) -> dict[str, np.ndarray]:
    """Whole numbers and halves, whose sums are exact in any order."""
    x = (np.arange(-8, 16).reshape(2, 3, 4) / 2).astype(dtype)
    got = {
        "3-d": x,
        "2-d": x[0],
        "transposed": x[0].T,
        "strided": wider(x),
        "1-d": x[0, 0],
        "0-d": x[1, 2, 3],
        "one": x[:1, 0, 0],
        "no row": x[:0],
        "no token": x[:, :0],
        "no channel": x[..., :0],
        "nothing": x[0, 0, :0],
    }
    got = {name: np.asarray(value) for name, value in got.items()}
    for name, odd in (("NaN", NAN), ("inf", INF), ("-inf", -INF)):
        got[name] = x.copy()
        got[name][1, 0, 2] = odd
    got["constant"] = np.full((2, 3, 4), 0.1, dtype)
    return got


WHERES = {
    "none": None,
    "rows": np.array([[[True], [True], [False]], [[False], [True], [True]]]),
    "uint8": np.ones((2, 3, 1), "u1"),
    "int64": np.ones((2, 3, 1), "i8"),
    "float": np.ones((2, 3, 1)),
    "short": np.ones((2, 2, 1), bool),
    "more axes": np.ones((1, 2, 3, 1), bool),
    "channels": np.array([True, False, True, True]),
    "one": np.ones((1,), bool),
    "0-d": np.array(True),
    "false": np.zeros((1, 1, 1), bool),
}


QUANTS = {
    "tensor": QuantSpec(),
    "channel": QuantSpec(granularity=Granularity.CHANNEL),
    "token": QuantSpec(granularity=Granularity.TOKEN, dynamic=True),
}


QUANTS |= {
    "symmetric": QuantSpec(symmetric=True, granularity=Granularity.CHANNEL),
    "group": QuantSpec(granularity=Granularity.GROUP, groups=2),
    "block": QuantSpec(granularity=Granularity.BLOCK, dynamic=True, block=2),
    "outliers": QuantSpec(8, True, granularity=Granularity.TOKEN, dynamic=True, outliers=5.0),
    "e4m3": FloatQuantSpec("e4m3"),
}


KINDS = {str(kind): QuantSpec(observer=ObserverSpec(kind=kind)) for kind in ObserverKind}


KINDS |= {f"{k} channel": replace(q, granularity=Granularity.CHANNEL) for k, q in KINDS.items() if "mse" not in k}


def observed(module: Any, quant: Any, weight: bool, x: Any, where: Any) -> Any:
    observer = module.Observer(quant, weight)
    observer.update(x, where)
    return observer.range()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("quant", QUANTS)
def test_scales_of_odd_tensors(quant, dtype):
    for (name, x), weight in product(arrays(dtype).items(), (False, True)):
        given = x, QUANTS[quant], None, weight
        got = answer(qtx_torch.quant.quantizer.dynamic_scale, *map(tensors, given))
        try:
            same(got, answer(quantizer.dynamic_scale, *given))
        except AssertionError as error:
            raise AssertionError(f"{name}, weight {weight}") from error


@pytest.mark.parametrize("quant", ["tensor", "channel", "token", "block", "outliers"])
@pytest.mark.parametrize("where", WHERES)
def test_masks_of_ranges(quant, where):
    for name, x in arrays("f4").items():
        given = x, QUANTS[quant], WHERES[where], False
        got = answer(qtx_torch.quant.quantizer.dynamic_scale, *map(tensors, given))
        try:
            same(got, answer(quantizer.dynamic_scale, *given))
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["none", "rows", "uint8", "short", "channels", "false"])
def test_observers_of_odd_tensors(kind, where):
    for (name, x), weight in product(arrays("f8" if where == "none" else "f4").items(), (False, True)):
        given = KINDS[kind], weight, x, WHERES[where]
        got = answer(observed, qtx_torch.quant.observers, *map(tensors, given))
        try:
            same(got, answer(observed, observers, *given))
        except AssertionError as error:
            raise AssertionError(f"{name}, weight {weight}") from error


def test_what_is_beyond_float32_is_infinite():
    for module, x in (
        (observers, np.array([1e300])),
        (qtx_torch.quant.observers, torch.tensor([1e300], dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="values run from inf to inf; a range needs finite numbers"):
            module.Observer(QuantSpec()).update(x)


# --- statistics -------------------------------------------------------------------------------------------------------


EXACT = ("inf_norm", "lowest", "highest", "histogram", "beyond_channels", "beyond_tokens", "energy")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("unit", ["sequence", "token"])
@pytest.mark.parametrize("where", ["none", "rows", "uint8", "short", "false"])
def test_statistics_of_odd_tensors(unit, where, dtype):
    for name, x in arrays(dtype).items():
        given = x, WHERES[where], unit
        got, want = answer(qtx_torch.stats.describe, *map(tensors, given)), answer(stats.describe, *given)
        if isinstance(want, str):
            same(got, want)
            continue
        for key in stats.STATISTICS:
            if key in EXACT:
                same(got[key], want[key])
            else:
                np.testing.assert_allclose(got[key], want[key], rtol=1e-12, atol=1e-12, err_msg=f"{name} {key}")  # sums


@pytest.mark.parametrize("where", ["none", "rows", "uint8", "short", "false"])
def test_moments_of_odd_tensors(where):
    for x in arrays("f8").values():
        same(
            answer(qtx_torch.stats.moments, *map(tensors, (x, WHERES[where]))), answer(stats.moments, x, WHERES[where])
        )


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e10 / 7, -0.7, 0.0])
def test_a_constant_has_no_kurtosis(value):
    """The mean of equal numbers, rounded, need not be that number; deviations that are all equal have kurtosis 1."""
    for size in range(2, 40):
        x = np.full((1, size, 3), value)
        for unit in ("sequence", "token"):
            for got in (stats.describe(x, None, unit), qtx_torch.stats.describe(torch.tensor(x), None, unit)):
                assert not np.asarray(got["kurtosis"]).any() and not np.asarray(got["kurtosis_published"]).any()


def test_kurtosis_of_what_is_no_number_is_none():
    for odd in (NAN, INF):
        x = np.array([[1.0, odd, 2.0]])
        with np.errstate(invalid="ignore"):
            assert np.isnan(stats.kurtosis(stats.central_moments(x))).all()
        assert qtx_torch.stats.kurtosis(qtx_torch.stats.central_moments(torch.tensor(x))).isnan().all()


def test_sizes_of_updates_of_odd_tensors():
    context, weight = np.arange(24.0).reshape(2, 3, 4), np.eye(4)
    for (name, where), odd in product(WHERES.items(), (1.0, NAN, INF)):
        x, residual = context.copy(), context[..., ::-1] + 1
        x[1, 1, 1] = odd
        if name == "rows":
            residual[0, 0] = 0
        given = x, weight, residual, where, 2
        got, want = answer(qtx_torch.stats.updates, *map(tensors, given)), answer(stats.updates, *given)
        if isinstance(want, str):
            same(got, want)
        else:
            same(got["tokens"], want["tokens"])
            np.testing.assert_allclose(got["update"], want["update"], rtol=1e-12)  # another way to the same norms


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (0, 2, 3, 4), (2, 2, 3, 0), (2, 2, 0, 4)])
def test_attention_that_looks_at_nothing(shape):
    probs = np.full(shape, 0.25)
    for where in (np.ones((1, 1, *shape[2:]), bool), np.zeros((1, 1, *shape[2:]), bool), np.ones(shape[2:], "u1")):
        given = probs, where, {"end": np.ones((shape[0], shape[3]), bool)}
        got = answer(qtx_torch.stats.attention, tensors(probs), tensors(where), {"end": tensors(given[2]["end"])})
        want = answer(stats.attention, *given)
        if isinstance(want, str):
            same(got, want)
        else:
            for key in want:
                np.testing.assert_allclose(got[key], want[key], rtol=1e-12, err_msg=key)  # sums in another order
