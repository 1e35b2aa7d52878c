"""Linears trained by int8 products, against the same linears by the values of their codes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from qtx.prepare.calibration import bind
from qtx.recipes.named import training_recipe
from qtx_ref import backend as ref_backend
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.quant import gradients as ref_gradients
from qtx_ref.spec import Granularity, Operand, OptimSpec, QuantSpec, SpecError, StepSpec
from qtx_torch import backend
from qtx_torch.numerics import FakeQuant, has_int8
from qtx_torch.quant import gradients, int8
from qtx_torch.step import compile_forward

TOKEN = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True)
CHANNEL = replace(TOKEN, granularity=Granularity.CHANNEL)
SPEC = replace(preset("bert-tiny"), layers=1, dropout=0.1, attention_dropout=0.1)
GRADIENTS = training_recipe("w8a8+grad8", SPEC).gradients
OPTIM = OptimSpec(lr=1e-3, steps=10, warmup=1)


def draw(*shape: int) -> Tensor:
    rng = np.random.default_rng(sum(shape))
    return torch.tensor(rng.standard_t(3, shape) * 10.0 ** rng.integers(-2, 2, (*shape[:-1], 1)), dtype=torch.float32)


def close(ours: Tensor, theirs: Tensor, terms: int) -> bool:
    """Both sum the same terms, one in integers: float32's own error of a sum, in the root mean square."""
    gap = (ours.double() - theirs.double()).square().mean().sqrt()
    return bool(gap <= 2.0**-24 * terms**0.5 * 4 * theirs.double().square().mean().sqrt())


@pytest.mark.parametrize("quantized", [False, True], ids=["float gradients", "grad8"])
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "some rows"])
def test_a_linear_and_its_gradients(quantized: bool, masked: bool) -> None:
    how = gradients.Backward(GRADIENTS, "a.site", 3, 5) if quantized else None
    where = (torch.arange(14).reshape(2, 7, 1) % 3 > 0) if masked else None
    results = []
    for ways in (False, True):
        x, w, b = (draw(*shape).requires_grad_() for shape in ((2, 7, 40), (24, 40), (24,)))
        if ways:
            y = int8.linear(x, w, b, (TOKEN, CHANNEL), how, where)
        else:
            fake = FakeQuant("a.input", TOKEN, None)(x, None), FakeQuant("a.weight", CHANNEL, None)(w, None)
            y = torch.nn.functional.linear(*fake, b) if how is None else gradients.linear(*fake, b, how, where)
        y.backward(draw(2, 7, 24))
        results.append((y, x.grad, w.grad, b.grad))
    for theirs, ours, terms in zip(*results, (40, 24, 14, 14), strict=True):
        assert ours.dtype == theirs.dtype and close(ours, theirs, terms)


@pytest.mark.parametrize("stochastic", [False, True])
def test_codes_are_the_reference_s(stochastic: bool) -> None:
    """Its values are code times scale: whole numbers once divided, for codes have 8 bits and quotients 24."""
    x = draw(9, 40)
    x[0] = 0
    words = np.random.default_rng(0).integers(0, 2**32, x.shape) if stochastic else None
    values, scale = ref_gradients.quantize_operand(x.numpy(), -1, TOKEN, words)
    ours = int8.encode(x, gradients.find_scale(x, TOKEN), TOKEN, None if words is None else torch.tensor(words))
    assert ours.dtype == torch.int8 and np.array_equal(ours.numpy(), np.rint(values / scale))


def test_sums_longer_than_an_accumulator_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (
        torch.randint(-128, 128, (n, 50), dtype=torch.int8, generator=torch.Generator().manual_seed(n)) for n in (3, 5)
    )
    monkeypatch.setattr(int8, "LONGEST", 16)
    assert torch.equal(int8.sum_products(a, b), a.float() @ b.float().t())  # below 2^24: exact


def test_sums_of_one_term() -> None:
    """torch's own product of such codes leaves what was in memory."""
    a, b = torch.tensor([[3], [-4]], dtype=torch.int8), torch.tensor([[2], [0], [-5]], dtype=torch.int8)
    assert int8.sum_products(a, b).tolist() == [[6, 0, -15], [-8, 0, 20]]


def test_not_a_number_in_a_gradient_shows() -> None:
    x, w = draw(6, 16).requires_grad_(), draw(8, 16).requires_grad_()
    g = draw(6, 8)
    g[2, 3] = float("inf")
    int8.linear(x, w, None, (TOKEN, CHANNEL), gradients.Backward(GRADIENTS, "a.site", 0, 0)).backward(g)
    assert x.grad[2].isnan().all() and not x.grad[1].isnan().any() and w.grad[3].isnan().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile makes a Function
@pytest.mark.parametrize("products", [True, False], ids=["int8", "values"])
def test_a_backward_pass_is_traced(products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words, scales and products, whole: `torch.compile` alone runs what it cannot trace op by op and says nothing."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    how = gradients.Backward(GRADIENTS, "a.site", 3, 5)

    def run(a: Tensor, b: Tensor) -> Tensor:
        return int8.linear(a, b, None, (TOKEN, CHANNEL), how) if products else gradients.linear(a, b, None, how)

    results = []
    for traced in (True, False):
        a, b = (draw(*shape).requires_grad_() for shape in ((6, 16), (8, 16)))
        y = (compile_forward(run) if traced else run)(a, b)
        y.backward(draw(6, 8))
        results.append((y, a.grad, b.grad))
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def make(quant: str, step: StepSpec) -> backend.Trainer:
    model = backend.Model(SPEC, init_params(SPEC, 0))
    if quant:
        bind(model, training_recipe(quant, SPEC), {})
    return backend.Trainer(model, OPTIM, seed=1, step=step)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="int8 training on a CPU needs VNNI")
@pytest.mark.parametrize("quant", ["w8a8", "w8a8+grad8"])
def test_a_step_by_int8_products_is_the_fake_quantized_one(quant: str) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SPEC.vocab, (2, 12))
    mask = np.arange(12) < np.array([[12], [9]])
    targets = np.where(mask & (rng.random(tokens.shape) < 0.3), tokens, -1)
    batch = {"tokens": tokens, "types": np.zeros_like(tokens), "mask": mask, "targets": targets}
    (loss, norm), (want, want_norm) = (make(quant, StepSpec(int8=on)).step(batch) for on in (True, False))
    # float noise flips the codes of what is near a tie, and of gradients by a step of theirs
    assert loss == pytest.approx(want, rel=1e-5) and norm == pytest.approx(want_norm, rel=1e-3)
    assert (loss, norm) != (want, want_norm)  # it was another sum


@pytest.mark.parametrize(
    ("quant", "said"),
    [
        ("", "no linear has"),
        ("w4a16", "no linear has"),
        ("fp8", "no linear has"),
        ("w8a8+gradfp8", "not all gradients have symmetric"),
    ],
)
def test_what_has_no_int8_products_is_refused(quant: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)  # a CPU without is refused first
    with pytest.raises(SpecError, match=said):
        make(quant, StepSpec(int8=True))


def test_the_reference_has_none() -> None:
    with pytest.raises(SpecError, match="step int8 is True: the reference has none"):
        ref_backend.Trainer(ref_backend.Model(SPEC, init_params(SPEC, 0)), OPTIM, step=StepSpec(int8=True))


def test_one_scale_for_a_tensor_has_no_products() -> None:
    whole = Operand(replace(TOKEN, granularity=Granularity.TENSOR), False)
    assert int8.has_products(GRADIENTS) and int8.has_products(None)
    assert not int8.has_products(replace(GRADIENTS, wgrad_input=whole))
    assert not int8.has_products(replace(GRADIENTS, wgrad_input=None))


def test_a_scale_of_an_input_s_channel_has_no_products() -> None:
    """Of an activation it varies along the sum, of a weight it is a row's."""
    module = backend.Model(SPEC, init_params(SPEC, 0)).net.layer[0].ffn.hidden
    for given, has in ((TOKEN, True), (CHANNEL, False)):
        module.on_input, module.on_weight = FakeQuant("a", given, None), FakeQuant("a.weight", CHANNEL, None)
        assert has_int8(module, module.weight) is has


@pytest.mark.parametrize("quantized", [False, True], ids=["float gradients", "grad8"])
@pytest.mark.parametrize("shape", [(0, 16, 8), (2, 0, 16, 8), (3, 5, 0, 8), (3, 5, 16, 0)], ids=str)
def test_nothing_to_sum(quantized: bool, shape: tuple[int, ...]) -> None:
    """As the float linear: no rows, no inputs (the bias is all there is), no outputs."""
    how = gradients.Backward(GRADIENTS, "a.site", 3, 5) if quantized else None
    *rows, inputs, outputs = shape
    results = []
    for ours in (True, False):
        x, w, b = (torch.ones(part).requires_grad_() for part in ((*rows, inputs), (outputs, inputs), (outputs,)))
        y = int8.linear(x, w, b, (TOKEN, CHANNEL), how) if ours else torch.nn.functional.linear(x, w, b)
        y.sum().backward()
        results.append((y, x.grad, w.grad, b.grad))
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
