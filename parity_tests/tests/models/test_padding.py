"""Padded positions never move a range, at any site, in either backend; and a gate may join a trained model."""

from dataclasses import replace

import numpy as np
import pytest

import qtx_ref.backend
import qtx_torch.backend
from qtx.recipes.sites import sites
from qtx_ref.models.initial import add_gate, init_params
from qtx_ref.presets import attention, preset
from qtx_ref.quant.observers import Observer
from qtx_ref.spec import Gate, ObserverKind, ObserverSpec, QuantSpec

BACKENDS = {"ref": qtx_ref.backend, "torch": qtx_torch.backend}
SPEC = replace(preset("bert-tiny"), layers=1, width=16, heads=2, hidden=32, vocab=50, length=8)


def padded_batch(filler: int) -> dict[str, np.ndarray]:
    tokens = np.arange(10, 26).reshape(2, 8)
    mask = np.ones((2, 8), bool)
    mask[0, 5:] = False
    tokens[~mask] = filler
    return {"tokens": tokens, "mask": mask, "types": np.zeros((2, 8), np.int64)}


@pytest.mark.parametrize("kind", ["clipped+mlp", "sink+head_conditional", "softmax1+elementwise"])
@pytest.mark.parametrize("name", ["ref", "torch"])
def test_padding_moves_no_range(name, kind):
    module = BACKENDS[name]
    spec = replace(SPEC, attention=attention(kind))
    model = module.Model(spec, init_params(spec, 0))
    quants = dict.fromkeys(sites(spec).all, QuantSpec())
    for quantize in (False, True):
        one, other = (model.calibrate([padded_batch(f)], quants, quantize=quantize) for f in (3, 40))
        for site, got in one.items():
            for field, value in got._asdict().items():
                np.testing.assert_array_equal(value, getattr(other[site], field), err_msg=f"{site} {field}")


@pytest.mark.parametrize("kind", [ObserverKind.CURRENT, ObserverKind.RUNNING, ObserverKind.RUNNING_PERCENTILE])
def test_a_batch_without_elements_changes_nothing(kind):
    observer = Observer(QuantSpec(observer=ObserverSpec(kind=kind)))
    x = np.array([[-1.0, 5.0]], np.float32)
    observer.update(x)
    before = [side.tolist() for side in observer.range()]
    observer.update(x, np.zeros((1, 1), bool))
    assert [side.tolist() for side in observer.range()] == before


@pytest.mark.parametrize("name", ["ref", "torch"])
def test_a_gate_added_to_a_trained_model_changes_little(name):
    """sigmoid(logit(pi) + small) / pi is 1 + small: weights of 0.01 on unit-size inputs move the gate by a few
    percent."""
    module = BACKENDS[name]
    plain = init_params(SPEC, 0)
    params, spec = add_gate(plain, SPEC, pi=0.25, seed=1)
    assert spec.attention.gate is Gate.LINEAR and spec.attention.rescaled
    batch = padded_batch(3)
    gate = module.Model(spec, params).record(batch, ["layer.0.attn.gate"])["layer.0.attn.gate"][0]
    assert np.abs(gate / 0.25 - 1).max() < 0.15
    context = module.Model(SPEC, plain).record(batch, ["layer.0.attn.context"])["layer.0.attn.context"][0]
    gated = module.Model(spec, params).record(batch, ["layer.0.attn.gated"])["layer.0.attn.gated"][0]
    np.testing.assert_allclose(gated, context * np.repeat(gate * 4, 8, axis=-1), rtol=1e-5)  # three float32 roundings
