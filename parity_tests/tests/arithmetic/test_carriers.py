"""Prepared and batched products: every code as the reference's `matmul`, whatever carries them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from qtx_ref.integer import products as reference
from qtx_ref.random import stream
from qtx_ref.spec import QTX, Granularity, MatmulRule, Overflow, Products, QuantSpec

torch = pytest.importorskip("torch")

from qtx_torch.integer import batched, carriers, machine, products  # noqa: E402
from qtx_torch.integer.machine import Way  # noqa: E402

S4, S7, S8, S16 = (QuantSpec(bits=bits, symmetric=True) for bits in (4, 7, 8, 16))
U4, U8, U16 = (QuantSpec(bits=bits) for bits in (4, 8, 16))
TOKEN = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
SHAPES = ((1, 5, 3), (3, 64, 8), (2, 1500, 5), (1, 1, 4), (4, 1, 3), (4, 3, 1), (0, 3, 2))


def codes(rng: np.random.Generator, spec: QuantSpec, *shape: int) -> np.ndarray:
    """Codes of a spec, a third of them at its ends, in a dtype that torch computes in."""
    kinds = (np.int8, np.int16) if spec.has_sign else (np.uint8, np.int32)
    code = rng.integers(spec.code_min, spec.code_max + 1, shape)
    ends = rng.choice([spec.code_min, spec.code_max], shape)
    return np.where(rng.random(shape) < 1 / 3, ends, code).astype(kinds[spec.bits > 8])


def tensor(x: np.ndarray | None) -> torch.Tensor | None:
    return None if x is None else torch.from_numpy(x)


@pytest.fixture(params=[Way.BYTES, Way.HALVES, Way.FLOAT32, Way.FLOAT64], ids=lambda way: way.name)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Each way that a machine might choose; weights beyond 8 bits and none of them take float64."""
    largest = {Way.BYTES: 127, Way.HALVES: machine.HALF}.get(request.param)
    if largest is not None and not machine.exact_bytes("cpu", largest):
        pytest.skip("torch._int_mm saturates pairs of such products on this CPU")
    monkeypatch.setattr(machine, "choose_way", lambda largest, device, plain: request.param)
    return request.param


@pytest.mark.parametrize("x_spec", [S4, U4, S8, U8, S16, U16, TOKEN], ids=lambda s: f"x{s.bits}{s.granularity}")
@pytest.mark.parametrize("w_spec", [S4, S7, S8, U8, S16], ids=lambda s: f"w{s.bits}{'s' if s.has_sign else 'u'}")
def test_a_prepared_product_is_the_references(x_spec: QuantSpec, w_spec: QuantSpec, way: Way) -> None:
    for (m, k, n), several in product(SHAPES, (False, True)):
        rng = stream(m * k + n, "carriers")
        x, w = codes(rng, x_spec, m, k), codes(rng, w_spec, k, n)
        rows = (m, 1) if x_spec.dynamic else ()
        x_zero = None if x_spec.symmetric else np.array(codes(rng, x_spec, *rows))
        w_zero = None if w_spec.symmetric else np.array(codes(rng, w_spec, *((n,) if several else ())))
        bias, bits = rng.integers(-(10**6), 10**6, n), 64 if max(x_spec.bits, w_spec.bits) > 8 else 32
        want = reference.matmul(x, w, x_spec, w_spec, x_zero, w_zero, bias, bits)
        known = None if x_spec.dynamic else tensor(x_zero)
        prepared = carriers.prepare(tensor(w), w_spec, x_spec, tensor(w_zero), known, tensor(bias), bits)
        got = carriers.multiply(tensor(x), prepared, tensor(x_zero) if x_spec.dynamic else None).numpy()
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("b_spec", [S4, S8, U8], ids=lambda s: f"b{s.bits}{'s' if s.has_sign else 'u'}")
@pytest.mark.parametrize("a_spec", [S4, S8, U8, S16, U16], ids=lambda s: f"a{s.bits}{'s' if s.has_sign else 'u'}")
@pytest.mark.parametrize("bytes_", [True, False])
def test_a_batched_product_is_the_references(
    a_spec: QuantSpec, b_spec: QuantSpec, bytes_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also longer than a float32 sums exactly: 258 products of unsigned bytes."""
    if bytes_ and not machine.exact_bytes("cpu", 127):
        pytest.skip("torch._int_mm saturates pairs on this CPU")
    monkeypatch.setattr(batched, "multiplies_bytes", lambda device: bytes_)
    monkeypatch.setattr(batched, "SMALL", 1000)
    for m, k, n in ((1, 5, 3), (3, 259, 4), (33, 40, 7), (34, 600, 2)):
        rng, specs = stream(m * k + n, "carriers"), (a_spec, b_spec)
        a, b = codes(rng, specs[0], 2, 3, m, k), codes(rng, specs[1], 2, 3, k, n)
        a_zero = None if specs[0].symmetric else np.array(codes(rng, specs[0], 2, 3, m, 1))
        b_zero = None if specs[1].symmetric else np.array(codes(rng, specs[1]))
        bits = 64 if max(spec.bits for spec in specs) > 8 else 32
        want = reference.matmul(a, b, *specs, a_zero, b_zero, None, bits)
        got = batched.multiply(tensor(a), tensor(b), *specs, tensor(a_zero), tensor(b_zero), bits).numpy()
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_a_machine_is_tried_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a product that saturates pairs in int16, as oneDNN's does without VNNI, and one that does not."""

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        moved = (a.int() + 128).to(torch.uint8)
        sums = products.matmul_pairs16(moved, b) - 128 * b.int().sum(0)
        return sums.int()

    trial, exact = machine.exact_bytes.__wrapped__, lambda a, b: a.int() @ b.int()
    for product_, want in ((saturating, [False, True]), (exact, [True, True])):
        monkeypatch.setattr(torch, "_int_mm", product_)
        assert [trial("cpu", 127), trial("cpu", machine.HALF)] == want


@pytest.mark.parametrize("exact", [{127: True, 64: True}, {127: False, 64: True}, {127: False, 64: False}])
@pytest.mark.parametrize("quick", [True, False])
def test_the_fastest_exact_way_is_chosen(exact: dict[int, bool], quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 bits, 8, and 9; whatever the probe says, nothing that is not exact."""
    seconds = dict.fromkeys(Way, 1.0) | {Way.FLOAT64: 2.0} | ({Way.BYTES: 0.1, Way.HALVES: 0.2} if quick else {})
    seconds = seconds if quick else seconds | {Way.BYTES: 50.0, Way.HALVES: 100.0}
    monkeypatch.setattr(machine, "exact_bytes", lambda device, largest: exact[largest])
    monkeypatch.setattr(machine, "probe", lambda device: {(way, machine.SHAPES[-1]): s for way, s in seconds.items()})
    want = [Way.FLOAT32, Way.FLOAT32]
    if quick and exact[64]:
        want = [Way.BYTES, Way.BYTES if exact[127] else Way.HALVES]
    assert [machine.choose_way(largest, "cpu", plain=True) for largest in (64, 128)] == want
    assert machine.choose_way(255, "cpu", plain=True) is Way.FLOAT32
    assert machine.choose_way(255, "cpu", plain=False) is Way.FLOAT64


def test_the_probe_times_each_way_that_is_exact() -> None:
    seconds = machine.probe("cpu")
    assert {way for way, _ in seconds} == set(machine.list_ways("cpu"))
    assert {shape for _, shape in seconds} == set(machine.SHAPES)
    assert all(0 < s < 1 for s in seconds.values())
    lines = machine.describe("cpu")
    assert [line.partition(":")[0] for line in lines] == ["1 x 768 x 768", "64 x 384 x 384", "128 x 768 x 768"]
    assert all(f"{way.value} " in lines[0] for way in machine.list_ways("cpu"))


def test_what_is_not_proven_is_refused() -> None:
    w = torch.full((4, 1), 127, dtype=torch.int8)
    with pytest.raises(ValueError, match="pairs of these weights may saturate"):
        carriers.prepare(w, S8, U8, rule=MatmulRule(Products.PAIRS16, 1, Overflow.WRAP))
    carriers.prepare(
        torch.full((4, 1), 64, dtype=torch.int8), S8, U8, rule=MatmulRule(Products.PAIRS16, 1, Overflow.WRAP)
    )
    bias = torch.tensor([2**31 - 1 - 4 * 127 * 127])  # the largest sum is 4 * 127 * 127, of codes 127
    carriers.prepare(w, S8, S8, bias=bias)
    with pytest.raises(ValueError, match=r"accumulators may run from .* to 2147483648, beyond int32"):
        carriers.prepare(w, S8, S8, bias=bias + 1)
    with pytest.raises(ValueError, match="accumulators may reach 2\\^62"):
        carriers.prepare(w, S8, S8, bias=torch.tensor([2**62]), accumulator=64)
    pairs = MatmulRule(Products.PAIRS16, 1, Overflow.REPORT)
    with pytest.raises(ValueError, match="pairs of these operands may saturate"):
        batched.multiply(torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int8), U8, S8, rule=pairs)
    deep = torch.zeros(1, 40000, dtype=torch.uint8)
    with pytest.raises(ValueError, match="may leave int32: use 64 bits"):
        batched.multiply(deep, deep.mT, U8, U8)


def test_bounds_are_those_of_weights_less_their_zero_point() -> None:
    """200, 210, 0 and 255 less 100 are 100, 110, -100 and 155."""
    w, zero = torch.tensor([[200], [210], [0], [255]], dtype=torch.uint8), torch.tensor([100], dtype=torch.int32)
    most = S8.code_max * (100 + 110 + 155) - S8.code_min * 100
    bias = torch.tensor([2**31 - 1 - most])
    carriers.prepare(w, U8, S8, zero, bias=bias)
    with pytest.raises(ValueError, match=r"accumulators may run from .* to 2147483648, beyond int32"):
        carriers.prepare(w, U8, S8, zero, bias=bias + 1)
    with pytest.raises(ValueError, match=r"accumulators may run from -2147483649 to"):
        least = S8.code_min * (100 + 110 + 155) - S8.code_max * 100
        carriers.prepare(w, U8, S8, zero, bias=torch.tensor([-(2**31) - 1 - least]))


def test_sums_that_int32_does_not_hold_are_whole() -> None:
    x = torch.full((8_421_505, 1), 255, dtype=torch.int32)
    assert carriers.add_up(x, 255).tolist() == [2_147_483_775]
    assert carriers.add_up(x[:8_421_504], 255).tolist() == [2_147_483_520]


@pytest.mark.parametrize("overflow", [Overflow.WRAP, Overflow.SATURATE])
def test_sums_beyond_int32_wrap_or_saturate_as_the_references(overflow: Overflow, way: Way) -> None:
    rule = MatmulRule(QTX.matmul.products, 1, overflow)
    x, w, bias = (
        np.full((1, 4), 127, np.int8),
        np.array([[127, -127]] * 4, np.int8),
        np.array([2**31 - 9, -(2**31) + 9]),
    )
    want = reference.matmul(x, w, S8, S8, bias=bias, rule=rule)
    got = carriers.multiply(tensor(x), carriers.prepare(tensor(w), S8, S8, bias=tensor(bias), rule=rule)).numpy()
    np.testing.assert_array_equal(got, want)
