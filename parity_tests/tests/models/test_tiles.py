"""Attention in tiles: what it stores, the sum that its gradient rests on, and that its cases see a fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.mirror.attention import build_attention, check_tiles, model_spec, put_value
from parity_tests.proof.case import Context
from parity_tests.subjects.attentions import SOFTMAXES, attention_inputs
from qtx_ref import ops as ref_ops
from qtx_ref.attention import probabilities
from qtx_ref.random import stream
from qtx_ref.spec import Granularity, QuantSpec, Range
from qtx_ref.tape import backward, const, leaf
from qtx_torch import attention, numerics, tiles
from qtx_torch.numerics import FakeQuant, Float
from qtx_torch.quant import quantizer


class Largest(TorchDispatchMode):
    """The most elements that a result has, views of what is there already left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x._base is None:
                self.count = max(self.count, x.numel())
        return result


@pytest.mark.parametrize("name", SOFTMAXES)
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_of_queries_times_keys_is_stored(name: str, causal: bool) -> None:
    tokens, block = 256, 2**12
    q, k, v = (torch.randn(1, 2, tokens, 8).requires_grad_() for _ in range(3))
    sink = torch.zeros(2).requires_grad_() if name == "sink" else None
    mask = attention.make_mask(None, tokens, tokens, causal, q)  # of a whole pass, a byte a pair
    drop = attention.Drop(1, 2, "a.probs", 0.1, 0)
    _ = mask.find_gamma(SOFTMAXES[name])
    with Largest() as largest:
        attention.attend_tiled(q, k, v, mask, SOFTMAXES[name], sink, drop, block=block).sum().backward()
    assert largest.count <= 4 * block < tokens * tokens  # four random words are drawn at once


def test_the_sum_of_the_clip_s_gradient_is_a_product_of_the_context() -> None:
    """`attend_tiled` derives it; here the reference's tape has the gradient of the scores, in float64."""
    inputs = attention_inputs("clipped", "padded", 4)
    spec, rng = inputs.spec, stream(0, "the clip's sum")
    q, k, v = (inputs.leaves[name] for name in "qkv")
    scores = leaf(4 * q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5)  # so large that the clip's top is reached
    p = ref_ops.softmax(scores, inputs.mask)
    keep = (rng.random(scores.shape) > 0.25) / 0.75
    g = rng.normal(size=v.shape)
    probs = ref_ops.mul(probabilities(scores, inputs.mask, spec), const(keep))
    total = ref_ops.total(ref_ops.mul(ref_ops.matmul(probs, const(v)), const(g)))
    (want,) = backward(total, [scores])

    span = spec.zeta - spec.gamma
    stretched = span * p.value + spec.gamma
    inside, top = (stretched >= 0) & (stretched <= 1), stretched > 1
    assert inside.any() and top.any() and (stretched < 0).any()
    o, u, w1 = ((weight * keep) @ v for weight in (np.clip(stretched, 0, 1), inside, top))
    rows = (g * (o - w1 - spec.gamma * u)).sum(axis=-1, keepdims=True)
    got = p.value * (span * inside * keep * (g @ v.swapaxes(-1, -2)) - rows)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize("name", SOFTMAXES)
def test_in_float64_they_are_what_the_whole_matrix_gives(name: str) -> None:
    """Value and every gradient beside autograd's through the stored probabilities, queries without keys among them;
    two passes have the same bits."""
    spec = SOFTMAXES[name]
    x = {part: torch.randn(2, 3, 24, 8, dtype=torch.float64).requires_grad_() for part in "qkv"}
    sink = torch.randn(3, dtype=torch.float64).requires_grad_() if name == "sink" else None
    with torch.no_grad():
        x["q"].mul_(4)  # so large that the clip's top is reached
    leaves = [*x.values(), *([] if sink is None else [sink])]
    rows = torch.arange(24) >= torch.tensor([[3], [20]])  # the first queries have no key
    mask = attention.make_mask(rows, 24, 24, True, x["q"])
    g = torch.randn(2, 3, 24, 8, dtype=torch.float64)

    def differentiate(attend: Callable[[], Tensor]) -> list[Tensor]:
        y = attend()
        return [y, *torch.autograd.grad(y, leaves, g)]

    def whole() -> Tensor:
        scores = mask.hide(x["q"] @ x["k"].mT * 8**-0.5)
        return attention.masked_probabilities(scores, mask, spec, sink) @ x["v"]

    def tiled() -> Tensor:
        return attention.attend_tiled(x["q"], x["k"], x["v"], mask, spec, sink, None, block=100)

    got, again, want = differentiate(tiled), differentiate(tiled), differentiate(whole)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_no_queries_and_no_keys(name: str, queries: int, keys: int) -> None:
    """A context of zeros, and no gradient."""
    q, k, v = (torch.ones(2, 3, n, 4).requires_grad_() for n in (queries, keys, keys))
    sink = torch.ones(3).requires_grad_() if name == "sink" else None
    mask = attention.make_mask(None, queries, keys, False, q)
    y = attention.attend_tiled(q, k, v, mask, SOFTMAXES[name], sink, None)
    leaves = [q, k, v, *([] if sink is None else [sink])]
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y.shape == q.shape and not y.any()
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))


def test_tiles_lie_where_their_tensors_do() -> None:
    """And not on the default device."""
    x = {part: torch.randn(2, 3, 24, 8).requires_grad_() for part in "qkv"}
    sink = torch.randn(3).requires_grad_()
    mask = attention.make_mask(None, 24, 24, True, x["q"])

    def differentiate() -> list[Tensor]:
        y = attention.attend_tiled(*x.values(), mask, SOFTMAXES["sink"], sink, None)
        return [y, *torch.autograd.grad(y, [*x.values(), sink], y.detach())]

    want = differentiate()
    with torch.device("meta"):
        got = differentiate()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_where_tiles_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 8, 4)
    assert not attention.can_tile(q, q)
    monkeypatch.setattr(attention, "LEAST", 0)
    assert attention.can_tile(q, q)
    compiled = torch.compile(lambda x: x + attention.can_tile(x, x), backend="eager", fullgraph=True)
    assert not compiled(q).any()  # a compiled graph stores the scores


TOKEN = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
QUANTS = {
    "per token": {"scores.lhs": TOKEN, "scores.rhs": TOKEN, "context.lhs": TOKEN, "context.rhs": TOKEN},
    "static": {"scores": QuantSpec(), "probs": QuantSpec(signed=False), "context.rhs": QuantSpec(symmetric=True)},
    "both": {"scores": QuantSpec(4), "probs": TOKEN, "context.lhs": QuantSpec(6, symmetric=True)},
}


@pytest.mark.parametrize("quants", QUANTS)
@pytest.mark.parametrize(("name", "situation", "rate"), [("clipped", "causal", 0.25), ("sink", "padded", 0.0)])
def test_quantized_they_have_the_codes_of_the_whole_matrix(
    quants: str, name: str, situation: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of scores and probabilities, the context and every gradient. q and k are whole numbers, so that no order of
    sums moves a score across a tie."""
    inputs = attention_inputs(name, situation, 8)
    batch, heads, tokens, width = inputs.leaves["q"].shape
    attn = build_attention(model_spec(inputs.spec, heads, width), Context())
    ends = {"scores": (-8.0, 8.0), "probs": (0.0, 1.0), "context.lhs": (-1.25, 1.25), "context.rhs": (-2.0, 2.0)}
    seen: dict[str, list[Tensor]] = {}
    for key, spec in QUANTS[quants].items():
        site, _, slot = key.partition(".")
        low, high = (torch.tensor(end).reshape(1, 1, 1, 1) for end in ends.get(key, (0.0, 0.0)))
        range = None if spec.dynamic else Range(low, high, *quantizer.scale_zero(low, high, spec))
        hook = FakeQuant(key, spec, range)
        setattr(getattr(attn, site), f"on_{slot or 'output'}", hook)

        def show(y: Tensor, key: str = key) -> Tensor:
            seen.setdefault(key, []).append(y.detach().flatten())
            return y

        monkeypatch.setattr(hook, "apply_to", lambda x, where, do=hook.apply_to, show=show: show(do(x, where)))
    x = {part: torch.tensor(value, dtype=torch.float32) for part, value in inputs.leaves.items()}
    x |= {part: (2 * x[part]).round() for part in "qk"}
    for value in x.values():
        value.requires_grad_()
    if "sink" in x:
        put_value(attn, "probs.sink", x["sink"])
    rows = None if inputs.rows is None else torch.tensor(inputs.rows)
    nx = Float(training=True, seed=1, step=2, first_row=3)
    nx.begin(rows)
    g = torch.tensor(stream(0, "g").normal(size=(batch, tokens, heads * width)), dtype=torch.float32)
    monkeypatch.setattr(numerics, "attend_tiled", partial(attention.attend_tiled, block=7 * tokens))
    results, codes = [], []
    for least in (0, 2**60):
        monkeypatch.setattr(attention, "LEAST", least)
        monkeypatch.setattr(numerics, "LEAST_QUANTIZED", least)
        seen.clear()
        mask = attention.make_mask(rows, tokens, tokens, situation == "causal", x["q"])
        y = nx.attention(attn, x["q"], x["k"], x["v"], mask, inputs.spec, rate)
        codes.append({key: torch.cat(parts) for key, parts in seen.items()})
        assert (max(map(len, seen.values())) > 1) is (least == 0)  # tiles, or all at once
        results.append([y.detach(), *torch.autograd.grad(y, list(x.values()), g)])
    for key, want in codes[1].items():
        assert torch.equal(codes[0][key], want), key
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * float(want.abs().max()))  # sums of 40 in other orders


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("hardtanh_backward_into", lambda g, *rest, grad_input: grad_input),  # passed where the clip is active
        ("find_kept", lambda rule, kept, tile, q, k: rule.keep(0, tile.size(tile.width))),  # another tile's words
        ("softmax_backward_into", lambda g, p, *rest, grad_input: torch.mul(g, p, out=grad_input)),  # without the sum
    ],
)
def test_a_planted_fault_is_seen(name: str, fault: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(verdict.ok for verdict in check_tiles("clipped", "causal", 0.25, Context()))
    monkeypatch.setattr(tiles, name, fault)
    assert not all(verdict.ok for verdict in check_tiles("clipped", "causal", 0.25, Context()))
