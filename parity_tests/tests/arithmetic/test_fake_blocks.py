"""Fake quantization in blocks of rows, and compiled: every value and gradient is the reference's."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from qtx_ref.quant import affine as ref_affine
from qtx_ref.quant import quantizer as ref_quantizer
from qtx_ref.spec import Granularity, QuantSpec
from qtx_torch.numerics import FakeQuant
from qtx_torch.quant import affine, blocks, straight_through

SPECS = [
    QuantSpec(bits, symmetric=symmetric, granularity=granularity, dynamic=True, narrow=narrow)
    for bits, symmetric, granularity, narrow in product(
        (2, 4, 8, 16), (False, True), (Granularity.TOKEN, Granularity.CHANNEL, Granularity.TENSOR), (False, True)
    )
]
OTHERS = [
    QuantSpec(8, signed=True, granularity=Granularity.TOKEN, dynamic=True),
    QuantSpec(8, mirrored=True, granularity=Granularity.TOKEN, dynamic=True),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 40)
    monkeypatch.setattr(blocks, "RANGED", 130)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of many sizes, one of zeros, one of positive and one of negative numbers, and zeros of both signs."""
    x = rng.standard_t(2, shape) * 10.0 ** rng.integers(-4, 4, (*shape[:-1], 1))
    rows = x.reshape(-1, shape[-1])
    rows[0], rows[1], rows[2], rows[3, 0], rows[3, 1] = 0, abs(rows[1]), -abs(rows[2]), 0.0, -0.0
    return torch.tensor(x, dtype=torch.float32).to(dtype)


def same_bits(a: Tensor, b: np.ndarray) -> bool:
    a = a.detach().float().numpy()
    return np.array_equal(a.view(np.int32), b.astype(np.float32).view(np.int32))


def expect(x: Tensor, spec: QuantSpec, weight: bool = False) -> tuple[np.ndarray, np.ndarray]:
    array = x.detach().float().numpy()
    values, inside = ref_affine.simulate(array, *ref_quantizer.dynamic_scale(array, spec, None, weight), spec)
    return values, inside


@pytest.mark.parametrize("spec", SPECS + OTHERS, ids=str)
def test_own_ranges_in_blocks(spec: QuantSpec) -> None:
    rng = np.random.default_rng(1)
    for site, shape in (("a.site", (3, 7, 12)), ("a.site.weight", (23, 9)), ("a.site", (4, 100))):
        x = draw(rng, shape).requires_grad_()
        y = FakeQuant(site, spec, None)(x, None)
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        y.backward(g)
        values, inside = expect(x, spec, site.endswith("weight"))
        assert same_bits(y, values)
        assert np.array_equal(x.grad.numpy(), np.where(inside, g.numpy(), 0))


def test_one_row_without_others() -> None:
    """A tensor with one axis is a row."""
    x = torch.linspace(-1, 2, 50).requires_grad_()
    assert blocks.has_rows(x, SPECS[0], False)
    y = FakeQuant("a.site", SPECS[0], None)(x, None)
    y.sum().backward()
    values, inside = expect(x, SPECS[0])
    assert y.shape == (50,) and same_bits(y, values) and np.array_equal(x.grad.numpy(), inside.astype(np.float32))


def test_rows_take_the_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above are of what they say."""
    x, token = draw(np.random.default_rng(0), (9, 12)), SPECS[0]
    assert token.granularity is Granularity.TOKEN and blocks.has_rows(x, token, False)
    assert not blocks.has_rows(x, replace(token, granularity=Granularity.CHANNEL), False)
    assert blocks.has_rows(x, replace(token, granularity=Granularity.CHANNEL), True)
    assert not blocks.has_rows(x[:3], token, False)  # as small as a block
    monkeypatch.setattr(blocks, "simulate_rows", lambda *_: pytest.fail("one pass"))
    with pytest.raises(pytest.fail.Exception, match="one pass"):
        FakeQuant("a.site", token, None)(x, None)


def test_a_row_that_rounding_clamps() -> None:
    """-1.5 and 253.5 of scale 1: the zero point is 2, and 253.5 has level 254 + 2, one above the last code."""
    spec = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
    rows = torch.full((8, 12), 1.0)
    rows[:, 0], rows[:, 1] = -1.5, 253.5
    rows[0] = torch.linspace(0, 255, 12)
    x = rows.clone().requires_grad_()
    *_, clamped = blocks.simulate_rows(x.detach(), spec)
    FakeQuant("a.site", spec, None)(x, None).sum().backward()
    _, inside = expect(x, spec)
    assert clamped and (~inside).sum() == 7 and np.array_equal(x.grad.numpy(), inside.astype(np.float32))
    *_, clamped = blocks.simulate_rows(rows[:1].repeat(8, 1), spec)
    assert not clamped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_given_ranges_in_blocks(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    whole = draw(rng, (2, 5, 3, 8), dtype)
    layouts = {
        "rows": whole,
        "heads": whole.transpose(1, 2),
        "columns": whole.reshape(10, 24).t(),
        "every other": whole[..., ::2],
    }
    for name, x in layouts.items():
        for spec, axes in product((SPECS[0], QuantSpec(8), QuantSpec(16, symmetric=True)), ((), (-1,), (0,), (0, 1))):
            shape = [x.shape[i] if i - x.ndim in axes or i in axes else 1 for i in range(x.ndim)] if axes else []
            scale = torch.tensor(rng.uniform(0.001, 1, shape), dtype=torch.float32)
            zero = torch.tensor(rng.integers(spec.code_min, spec.code_max + 1, shape) * (not spec.symmetric)).int()
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = straight_through.fake_quantize(leaf, scale, zero, spec)
            g = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            y.backward(g)
            values, inside = ref_affine.simulate(x.float().numpy(), scale.numpy(), zero.numpy(), spec)
            assert y.dtype == dtype and same_bits(y, torch.tensor(values).to(dtype).float().numpy()), name
            assert np.array_equal(leaf.grad.float().numpy(), np.where(inside, g.float().numpy(), 0)), name


def test_blocks_lie_where_their_tensor_does() -> None:
    """And not on the default device."""
    x, spec = draw(np.random.default_rng(0), (9, 12), torch.bfloat16), SPECS[0]
    values, scale, zero, _ = blocks.simulate_rows(x, spec)
    with torch.device("meta"):
        assert torch.equal(blocks.simulate_rows(x, spec)[0], values)
        assert blocks.pass_gradient(x.float(), x, scale, zero, spec).device.type == "cpu"


def test_not_a_number_shows_everywhere() -> None:
    spec = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
    for bad in (math.nan, math.inf):
        x = torch.ones(9, 12)
        x[4, 2] = bad
        assert FakeQuant("a.site", spec, None)(x, None).isnan().all()
        y = straight_through.fake_quantize(x, torch.tensor(0.5), torch.tensor(3), spec)
        assert y.isnan().sum() == math.isnan(bad)


@pytest.mark.parametrize("row", [0, 29])
def test_a_range_that_is_not_finite_is_the_tensor_s(row: int) -> None:
    """Not that of the rows that lie in the cache together: the message is the reference's."""
    spec = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
    x = draw(np.random.default_rng(7), (30, 12))
    x[15, 1], x[20, 2], x[row, 4] = -1e9, 1e8, math.inf
    assert blocks.has_rows(x, spec, False) and x.numel() > 2 * blocks.RANGED
    with pytest.raises(ValueError, match="not finite") as theirs:
        ref_quantizer.dynamic_scale(x.numpy(), spec, None, False)
    with pytest.raises(ValueError, match="not finite") as ours:
        blocks.simulate_rows(x, spec)
    assert str(ours.value) == str(theirs.value)


def test_spared_rows_stay() -> None:
    spec = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
    x = draw(np.random.default_rng(3), (3, 4, 12))
    spared = torch.tensor([[True, False, False, False]] * 3)[:, :, None]
    y = FakeQuant("a.site", spec, None)(x, None, spared)
    values, _ = expect(x, spec)
    assert same_bits(y, np.where(spared.numpy(), x.numpy(), values))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile makes a Function
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs a C++ compiler")
def test_compiled_rows_with_gradients() -> None:
    """A row that is clamped by rounding, zeros of both signs, all at once and in one graph."""
    spec = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
    hook = FakeQuant("a.site", spec, None)
    x = draw(np.random.default_rng(4), (8, 40))
    x[4], x[4, 0], x[4, 1] = 1.0, -1.5, 253.5
    leaf, g = x.clone().requires_grad_(), torch.arange(320.0).reshape(8, 40) - 100
    y = torch.compile(lambda v: hook(v, None), fullgraph=True)(leaf)
    y.backward(g)
    values, inside = expect(x, spec)
    assert same_bits(y, values) and not inside[4, 1]
    assert np.array_equal(leaf.grad.numpy(), np.where(inside, g.numpy(), 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs a C++ compiler")
def test_compiled_ranges_are_the_reference_s() -> None:
    """By way of the bits of floats: zeros of both signs, denormal numbers, infinities, and NaN of both signs, which
    is at both ends."""
    rng = np.random.default_rng(5)
    rows = rng.standard_t(2, (40, 48)).astype(np.float32)
    rows.ravel()[::7] = rng.choice(np.float32([0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 3.4e38, -3.4e38]), 275)
    rows[1], rows[2], rows[3, 5], rows[4, 47], rows[5, :2] = -1e-45, 0.0, math.inf, -math.inf, (math.inf, -math.inf)
    rows[6, 16], rows[7, 31] = np.uint32([0x7FC00001, 0xFFFFFFFF]).view(np.float32)
    rows[8] = np.nextafter(np.float32(-1), np.float32([-2, -1]).repeat(24))  # two that differ in one bit, the last
    rows[8, 0] = -5
    x, where = torch.tensor(rows), torch.tensor(rng.random((40, 1)) < 0.7)
    doubled = x.double() * 2  # beyond float32
    cases = [
        (x, (1,), None),
        (x[:6], (0, 1), None),
        (x, (0, 1), None),
        (x[:6], (0, 1), where[:6]),
        (doubled, (1,), None),
    ]
    cases += [(x[8:].reshape(4, 8, 48), (0, 2), where[8:].reshape(4, 8, 1))]

    def find() -> list[tuple[Tensor, Tensor]]:
        return [affine.min_max(*case) for case in cases]

    for ours, (array, axes, keep) in zip(torch.compile(find, fullgraph=True)(), cases, strict=True):
        theirs = ref_affine.min_max(array.numpy(), axes, None if keep is None else keep.numpy())
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype is torch.float32 and one.shape == other.shape
            assert np.array_equal(one.numpy(), other, equal_nan=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs a C++ compiler")
def test_compiled_codes_of_ties_and_denormal_numbers() -> None:
    specs = [QuantSpec(symmetric=on, granularity=Granularity.TOKEN, dynamic=True) for on in (False, True)]
    hooks = [FakeQuant("a.site", spec, None) for spec in specs]
    x = draw(np.random.default_rng(6), (12, 48))
    ties = torch.arange(48) + 0.5
    for row, scale in enumerate((1.0, 2.0**-100, 2.0**-126, 2.0**-140, 2.0**100)):
        x[row + 4] = torch.cat((torch.tensor([-127.0, 127.0, 0.0]), ties[3:])) * scale
    x[10, 3] = math.inf
    results = torch.compile(lambda v: [hook(v, None) for hook in hooks], fullgraph=True)(x)
    for y, spec in zip(results, specs, strict=True):
        values, _ = expect(x[:10], spec)
        assert np.array_equal(y[:10].numpy(), values) and y[10].isnan().all()
