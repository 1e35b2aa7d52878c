"""One calibrated range has one scale, whatever the numerics: 2^-8 only where the tensor was 0 in all of calibration."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from qtx_ref.integer.lowering import Lowering
from qtx_ref.quant.quantizer import was_silent
from qtx_ref.spec import (
    QTX,
    Granularity,
    Nonlinear,
    ObserverKind,
    ObserverSpec,
    QuantSpec,
    Range,
)

F32 = np.float32
SPARSE = np.zeros(1000, F32)
SPARSE[:5] = 3  # 99.5 % zeros: the percentiles 1 and 99 are 0
CASES = [(SPARSE, 1.0), (np.zeros(1000, F32), 2.0**-8)]


@pytest.mark.parametrize("backend", ["qtx_ref", "qtx_torch"])
@pytest.mark.parametrize("x, scale", CASES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_fake_quantization_and_integers_share_a_scale(backend, x, scale, symmetric):
    """A percentile of mostly zeros had 1.0 in one and 2^-8 in the other."""
    spec = QuantSpec(symmetric=symmetric, observer=ObserverSpec(ObserverKind.PERCENTILE, percentile=99))
    observer = importlib.import_module(f"{backend}.quant.observers").Observer(spec)
    if backend == "qtx_torch":
        from torch import from_numpy as given
    else:
        given = np.asarray
    for half in (x[500:], x[:500]):
        observer.update(given(half.reshape(1, 50, 10)))
    one = Range(*(np.asarray(part) for part in (*observer.range(), *observer.scale_zero())))
    assert (one.low, one.high, one.scale, one.zero_point) == (0, 0, scale, 0)
    lowered, _ = Lowering({}, {"a": spec}, {"a": one}, QTX, Nonlinear.TABLE).scale_zero(one, spec)
    assert lowered == scale and was_silent(one) == (scale != 1)


@pytest.mark.parametrize("backend", ["qtx_ref", "qtx_torch"])
def test_each_channel_has_its_own(backend):
    spec = QuantSpec(
        granularity=Granularity.CHANNEL, observer=ObserverSpec(ObserverKind.RUNNING_PERCENTILE, percentile=99)
    )
    x = np.stack([SPARSE, np.zeros(1000, F32)], -1)
    observer = importlib.import_module(f"{backend}.quant.observers").Observer(spec)
    if backend == "qtx_torch":
        from torch import from_numpy as given
    else:
        given = np.asarray
    observer.update(given(x))
    observer.update(given(x * 0))
    assert np.asarray(observer.scale_zero()[0]).tolist() == [[1.0, 2.0**-8]]
