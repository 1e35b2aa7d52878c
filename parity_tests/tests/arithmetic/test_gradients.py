"""Quantized gradient products: plain where switched off, a hand-written float64 form where on, unbiased, and the same
for a part of a batch as in the whole. Every code of both backends is compared in the table (`mirror/gradients.py`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qtx_ref.ops
import qtx_torch.ops
from qtx.recipes.training import read_gradients
from qtx_ref.quant import gradients as ref_gradients
from qtx_ref.random import bits, stream
from qtx_ref.spec import FloatFormat, FloatQuantSpec, Granularity, QuantSpec, SpecError
from qtx_ref.spec.gradients import Gradients, Operand
from qtx_ref.tape import Var, backward, leaf
from qtx_torch.quant import gradients

SHAPES = {"linear": ((3, 5, 8), (6, 8)), "heads": ((3, 5, 8), (2, 4, 4)), "matmul": ((3, 2, 5, 8), (3, 2, 8, 6))}
BACKENDS = ("ref", "torch")


def operands(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both factors and the gradient of the product, float32."""
    a, b = (stream(0, kind, i).normal(size=shape).astype(np.float32) for i, shape in enumerate(SHAPES[kind]))
    width = {"linear": (6,), "heads": (8,), "matmul": (6,)}[kind]
    return a, b, stream(0, kind, "gradient").normal(size=(*a.shape[:-1], *width)).astype(np.float32)


def products(
    backend: str, kind: str, given: Gradients | None, a: np.ndarray, b: np.ndarray, g: np.ndarray, **where: object
) -> tuple[np.ndarray, ...]:
    """The value and both gradients, of a backend; step 3 of seed 7 at site s."""
    first = where.pop("first_row", 0)
    if backend == "ref":
        how = None if given is None else ref_gradients.Backward(given, "s", 7, 3, first)
        x, w = leaf(a), leaf(b)
        if kind == "matmul":
            y = qtx_ref.ops.matmul(x, w) if how is None else ref_gradients.matmul(x, w, how, **where)
        else:
            y = qtx_ref.ops.linear(x, w) if how is None else ref_gradients.linear(x, w, None, how, **where)
        weighted = qtx_ref.ops.total(qtx_ref.ops.mul(y, Var(g)))
        return y.value, *backward(weighted, [x, w])
    how = None if given is None else gradients.Backward(given, "s", 7, 3, first)
    x, w = (torch.from_numpy(v.copy()).requires_grad_() for v in (a, b))
    held = {name: torch.from_numpy(v) for name, v in where.items()}
    if kind == "matmul":
        y = qtx_torch.ops.matmul(x, w) if how is None else gradients.matmul(x, w, how, **held)
    else:
        y = qtx_torch.ops.linear(x, w) if how is None else gradients.linear(x, w, None, how, **held)
    grads = torch.autograd.grad(y, [x, w], torch.from_numpy(g))
    return tuple(v.detach().numpy() for v in (y, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["linear", "matmul"])
def test_a_product_that_is_not_quantized_is_the_plain_one(backend: str, kind: str) -> None:
    """To the bit: the forward always, dX where only dW is quantized, and dW where only dX is."""
    given = operands(kind)
    y, dx, dw = products(backend, kind, None, *given)
    for text, same in (("8:dgrad", 2), ("8:wgrad", 1)):
        got = products(backend, kind, read_gradients(text), *given)
        assert np.array_equal(got[0], y)
        assert np.array_equal(got[same], (y, dx, dw)[same])
        assert not np.array_equal(got[3 - same], (y, dx, dw)[3 - same])


def naive_codes(x: np.ndarray, axis: int, bits_: int, words: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales as the page says, element by element."""
    largest = 2 ** (bits_ - 1) - 1
    codes, scales = np.zeros(x.shape), np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        row = tuple(slice(None) if i == axis % x.ndim else n for i, n in enumerate(place))
        scale = np.float32(np.abs(x[row]).max()) / np.float32(largest)
        ratio = x[place] / scale  # float32
        if words is None:
            code = float(np.rint(ratio))
        else:
            low = np.floor(ratio)
            code = float(low) + float(words[place] < (ratio - low) * np.float64(2**32))
        codes[place], scales[place] = np.clip(code, -largest - 1, largest), scale
    return codes, scales


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_products_of_codes_by_hand(backend: str, kind: str) -> None:
    """dX = dY W: dY a scale per token, W per input channel; dW = dY^T X: per output and per input channel."""
    a, b, g = operands(kind)
    words = bits(7, 3, "s.grad", g.size).reshape(g.shape)
    _, dx, dw = products(backend, kind, read_gradients("6"), a, b, g)
    if kind == "heads":
        parts = [(a[..., :4], b[0], g[..., :4], words[..., :4]), (a[..., 4:], b[1], g[..., 4:], words[..., 4:])]
    elif kind == "linear":
        parts = [(a, b, g, words)]
    else:
        index = np.ndindex(a.shape[:2])
        parts = [(a[i], b[i].T, g[i], words[i]) for i in index]
    dxs, dws = [], []
    for x, w, dy, word in parts:
        x, dy, word = (v.reshape(-1, v.shape[-1]) for v in (x, dy, word))
        (gc, gs), (wc, ws) = naive_codes(dy, -1, 6, word), naive_codes(w, 0, 6, None)
        dxs.append((gc @ wc) * gs[:, :1] * ws[:1])  # integers, then one scale a row and one a column
        (gc, gs), (xc, xs) = naive_codes(dy, 0, 6, word), naive_codes(x, 0, 6, None)
        dws.append((gc.T @ xc) * gs[:1].T * xs[:1])
    want_x = np.concatenate([v.reshape(*a.shape[:-1], -1) for v in dxs], -1) if kind != "matmul" else np.stack(dxs)
    want_w = np.stack([v.T for v in dws]) if kind == "matmul" else np.stack(dws)
    # float32 products of at most 15 terms of codes below 2^5
    np.testing.assert_allclose(dx, want_x.reshape(dx.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, want_w.reshape(dw.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_that_do_not_count_are_zero(backend: str) -> None:
    a, b, g = operands("linear")
    where = np.ones((3, 5, 1), bool)
    where[1, 3:] = False
    padded, masked = np.where(where, a, 1e6).astype(np.float32), np.where(where, g, 0).astype(np.float32)
    got = products(backend, "linear", read_gradients("8"), padded, b, masked, where=where)
    want = products(backend, "linear", read_gradients("8"), np.where(where, a, 0).astype(np.float32), b, masked)
    for i in (1, 2):
        assert np.array_equal(got[i], want[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SHAPES)
def test_a_part_of_the_batch_has_its_rows_words(backend: str, kind: str) -> None:
    """dX has a scale per token, and so its rows are those of the whole batch, whichever part they are computed in."""
    a, b, g = operands(kind)
    whole = products(backend, kind, read_gradients("8:gradient"), a, b, g)[1]
    rest = b[1:] if kind == "matmul" else b
    part = products(backend, kind, read_gradients("8:gradient"), a[1:], rest, g[1:], first_row=1)[1]
    np.testing.assert_allclose(part, whole[1:], rtol=0, atol=2e-6)  # sums of another shape may round elsewhere
    other = products(backend, kind, read_gradients("8:gradient"), a[1:], rest, g[1:])[1]
    assert np.abs(other - whole[1:]).max() > 1e-3  # planted: words of other rows


NOTHING = {  # shapes of the factors, one size of which is 0
    "no rows": ("linear", (0, 5, 8), (6, 8)),
    "no tokens": ("linear", (2, 0, 8), (6, 8)),
    "no inputs": ("linear", (2, 3, 0), (6, 0)),
    "no outputs": ("linear", (2, 3, 8), (0, 8)),
    "no rows, heads": ("heads", (0, 5, 8), (2, 4, 4)),
    "no sequences": ("matmul", (0, 2, 5, 8), (0, 2, 8, 6)),
    "no queries": ("matmul", (3, 2, 0, 8), (3, 2, 8, 6)),
    "no keys": ("matmul", (3, 2, 5, 8), (3, 2, 8, 0)),
    "no width": ("matmul", (3, 2, 5, 0), (3, 2, 0, 6)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", [None, "8", "8:dgrad", "fp8", "mxfp8"])
@pytest.mark.parametrize("case", NOTHING)
def test_a_sum_over_nothing_is_zero(backend: str, text: str | None, case: str) -> None:
    """Whatever is quantized: of nothing the shapes are as they would be, and all that is there is 0."""
    kind, *shapes = NOTHING[case]
    a, b = (np.ones(shape, np.float32) for shape in shapes)
    width = b.shape[-1] if kind == "matmul" else int(np.prod(b.shape[:-1]))
    g = np.ones((*a.shape[:-1], width), np.float32)
    results = products(backend, kind, None if text is None else read_gradients(text), a, b, g)
    assert [v.shape for v in results] == [g.shape, a.shape, b.shape] and not any(v.any() for v in results)


FORMS = {
    "8": QuantSpec(8, True, granularity=Granularity.TOKEN, dynamic=True),
    "4": QuantSpec(4, True, granularity=Granularity.TOKEN, dynamic=True),
    "e5m2": FloatQuantSpec(FloatFormat.E5M2, granularity=Granularity.TOKEN, dynamic=True),
    "e4m3": FloatQuantSpec(FloatFormat.E4M3, granularity=Granularity.TOKEN, dynamic=True),
}


@pytest.mark.parametrize(("form", "size"), [*((form, 1e-3) for form in FORMS), ("8", 1e-40), ("4", 1e-37), ("8", 5e37)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_unbiased(backend: str, form: str, size: float) -> None:
    """The exact expectation over all 2^32 words: the least word that rounds down is found by bisection, and the value
    is the upper one with probability word / 2^32. Within 2^-22 of |x| plus a step: x / scale and scale times
    code are rounded to float32, and so is what is left of a small negative number."""
    x = stream(0, "unbiased").normal(size=(4, 600)).astype(np.float32) * np.float32(size)
    x[0, :2] = 0, size * 1e-6

    def rounded(words: np.ndarray) -> np.ndarray:
        if backend == "ref":
            return ref_gradients.quantize_operand(x, -1, FORMS[form], words)[0]
        held = torch.from_numpy(words.astype(np.int64))
        return gradients.quantize_operand(torch.from_numpy(x), -1, FORMS[form], held)[0].numpy()

    ends = [rounded(np.full(x.shape, word, np.uint64)).astype(np.float64) for word in (2**32 - 1, 0)]
    low, high = np.zeros(x.shape, np.uint64), np.full(x.shape, 2**32, np.uint64)  # words that give ends[1], ends[0]
    while (low < high).any():
        middle = (low + high) // np.uint64(2)
        same = rounded(np.minimum(middle, np.uint64(2**32 - 1))).astype(np.float64) != ends[0]
        low, high = np.where(same & (low < high), middle + np.uint64(1), low), np.where(same, high, middle)
    share = low.astype(np.float64) / 2**32
    expected = ends[1] * share + ends[0] * (1 - share)
    step = np.abs(ends[1] - ends[0])
    bound = 2.0**-22 * (np.abs(x) + step)
    assert (np.abs(expected - x) <= bound).all()
    nearest = ref_gradients.quantize_operand(x, -1, FORMS[form])[0]
    assert (np.abs(nearest - x) > bound).mean() > 0.9  # planted: the nearest is biased


EDGES = {
    "largest": np.full((2, 32), np.finfo(np.float32).max),
    "smallest": np.full((2, 32), np.float32(2.0**-149)),
    "zero row": np.eye(3, 32, dtype=np.float32) * [[1], [0], [2]],
    "ties": np.arange(-32, 32).reshape(2, 32) + 0.5,
    "NaN": np.where(np.eye(3, 32, dtype=bool), np.nan, 1.5),
    "infinity": np.where(np.eye(3, 32, dtype=bool), -np.inf, 1.5),
}


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_are_the_same_to_the_bit(edge: str, turned: bool) -> None:
    x = EDGES[edge].astype(np.float32)
    words = bits(0, 0, "edge", x.size).reshape(x.shape)
    x, words = (np.ascontiguousarray(v.T).T if turned else v for v in (x, words))  # not contiguous
    ours = torch.from_numpy(x), torch.from_numpy(words.astype(np.int64))
    for name, quant in FORMS.items():
        for axis in (-1, -2):
            for drawn in (False, True):
                want = ref_gradients.quantize_operand(x, axis, quant, words if drawn else None)
                got = gradients.quantize_operand(ours[0], axis, quant, ours[1] if drawn else None)
                for a, b in zip(want, got, strict=True):
                    np.testing.assert_array_equal(b.numpy(), a, err_msg=f"{name} {axis} {drawn}", strict=True)
    finite = ref_gradients.quantize_operand(x, -1, FORMS["8"])[0]
    assert np.isnan(finite).any(axis=1).all() == (edge in ("NaN", "infinity"))


def test_spec_refuses() -> None:
    static = QuantSpec(8, True)
    for quant, named in (
        (static, "dynamic"),
        (QuantSpec(8, dynamic=True), "symmetric"),
        (QuantSpec(8, True, granularity=Granularity.CHANNEL, dynamic=True), "'channel'"),
        (QuantSpec(8, True, granularity=Granularity.BLOCK, block=2, dynamic=True), "'block'"),
        (QuantSpec(8, True, granularity=Granularity.TOKEN, dynamic=True, outliers=6.0), "channel apart"),
    ):
        with pytest.raises(SpecError, match=named):
            Operand(quant)
    with pytest.raises(SpecError, match="at least one"):
        Gradients()
