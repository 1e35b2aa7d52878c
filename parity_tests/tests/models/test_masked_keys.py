"""What the keys and values of masked tokens may hold without a query noticing, as both `Float.attention`s promise it.

What masked scores may hold is in `test_outside_domain`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch

import qtx_ref.numerics
import qtx_torch.numerics
from qtx_ref.presets import SOFTMAXES, attention, preset
from qtx_ref.tape import const
from qtx_torch.attention import Mask
from qtx_torch.models.block import Attention

REF, TORCH = qtx_ref.numerics, qtx_torch.numerics


def attend(backend: ModuleType, kind: str, x: dict[str, np.ndarray], mask: np.ndarray, fused: bool) -> np.ndarray:
    """The context (B, T, H K) of q, k, v (B, H, T, K) in a backend; fused: in torch's kernel, where there is one."""
    spec, (_, heads, tokens, width) = attention(kind).with_length(4), x["q"].shape
    if backend is REF:
        nx = REF.Float()
        nx.load({"a.probs.sink": np.zeros(heads, np.float32)})
        return nx.attention("a", *map(const, x.values()), mask, spec, 0.0).value
    size = {"layers": 1, "width": heads * width, "heads": heads, "length": tokens}
    attn = Attention(replace(preset("bert-tiny"), **size, attention=spec))
    if not fused:
        attn.probs.on_output = TORCH.Record("probs", lambda site, value, where: None)
    causal = not mask[0, 0, 0, -2]
    with torch.no_grad():
        made = Mask(torch.tensor(mask), torch.float32, triangle=causal)
        return TORCH.Float().attention(attn, *map(torch.tensor, x.values()), made, spec, 0.0).numpy()


@pytest.mark.parametrize(("backend", "fused"), [(REF, False), (TORCH, False), (TORCH, True)])
@pytest.mark.parametrize("kind", SOFTMAXES)
@pytest.mark.parametrize("causal", [False, True])
def test_what_a_masked_key_may_hold(backend: ModuleType, fused: bool, kind: str, causal: bool) -> None:
    """The last key of the first head of the first sequence, masked as padding or as the future: finite numbers change
    no bit; NaN and infinity in v make NaN, in k NaN at most, and that in a fused kernel alone."""
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(2, 2, 6, 4)).astype(np.float32) for name in "qkv"}
    real = np.arange(6) < np.array([[5], [6]])
    mask = np.tril(np.ones((1, 1, 6, 6), bool)) if causal else real[:, None, None]
    want = attend(backend, kind, x, mask, fused)
    assert np.isfinite(want).all()
    kernel = fused and kind == "vanilla"  # others have none
    blind, apart = np.zeros(want.shape, bool), np.ones(want.shape, bool)
    blind[0, :5, :4] = True  # queries that the key is masked from
    apart[0, :, :4] = False  # another sequence or head
    for name, odd in product("kv", (1e30, -1e30, np.nan, np.inf, -np.inf)):
        given = {key: value.copy() for key, value in x.items()}
        given[name][0, 0, 5] = odd
        with np.errstate(invalid="ignore"):
            got = attend(backend, kind, given, mask, fused)
        np.testing.assert_array_equal(got[apart], want[apart])
        if np.isfinite(odd) or (name == "k" and not kernel):
            np.testing.assert_array_equal(got[blind], want[blind])
        elif name == "v":
            assert np.isnan(got[blind]).all()
        else:
            assert (np.isnan(got) | (got == want))[blind].all()
