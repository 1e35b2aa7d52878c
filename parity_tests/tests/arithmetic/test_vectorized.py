"""What the compiler is given in place of integer division and Newton's root: the same integers, at every edge."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from qtx_torch.integer import ops, vectorized

ROWS = 30_000  # of random cases each; the proofs stand in the docstrings


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def integers(generator: torch.Generator, low: int, high: int, count: int = ROWS) -> torch.Tensor:
    return torch.randint(low, high, (count,), generator=generator)


def test_bit_lengths(generator):
    """Powers of two and their neighbours, runs of ones, and anything."""
    edges = [(1 << k) + d for k in range(62) for d in range(-3, 4)] + [((1 << 62) - 1) >> k for k in range(62)]
    edges += [(1 << k) - (1 << j) for k in range(62) for j in range(k)]
    x = torch.cat([torch.tensor([e for e in edges if 0 < e < 1 << 62]), integers(generator, 1, 2**62)])
    want = [int(v).bit_length() for v in x.tolist()]
    assert vectorized.bit_length(x).tolist() == want and ops.bit_length(x).tolist() == want


def test_roots(generator):
    """Every square's neighbours at both ends and in between, and anything."""
    roots = torch.cat(
        [torch.arange(2**30, 2**30 + 20_000), torch.arange(2**31 - 20_000, 2**31), integers(generator, 2**30, 2**31)]
    )
    middle = math.isqrt(2**61)  # where a float64's step doubles
    roots = torch.cat([roots, torch.arange(middle - 10_000, middle + 10_000)])
    x = torch.cat([roots * roots + d for d in (-2, -1, 0, 1, 2)] + [integers(generator, 2**60, 2**62)])
    x = torch.cat([x[(x >= 2**60) & (x < 2**62)], torch.tensor([2**60, 2**61 - 1, 2**61, 2**62 - 1])])
    root = vectorized.square_root(x)
    assert ((root * root <= x) & ((root + 1) * (root + 1) > x)).all()
    assert torch.equal(ops.square_root(x), root)


def agree(n: torch.Tensor, shift: int | torch.Tensor, d: torch.Tensor) -> None:
    assert n.numel() and torch.equal(vectorized.half_up_shifted(n, shift, d), ops.half_up(n << shift, d))


def beside_ties(d: torch.Tensor, shift: int, distance: int) -> torch.Tensor:
    """n for which 2 n 2^shift is an odd multiple of d less `distance`, both odd: as near a tie as there is."""
    inverse = d.clone()
    for _ in range(6):  # of d modulo 2^64, by Newton's method
        inverse = inverse * (2 - d * inverse)
    odd = (distance * inverse) & ((1 << (shift + 1)) - 1)
    return (odd * d - distance) >> (shift + 1)


@pytest.mark.parametrize("shift", range(16, 47, 3))
def test_quotients_of_a_norm(generator, shift):
    """Denominators in [2^30, 2^31), quotients up to 2^28: those beside a tie, at each size."""
    d = integers(generator, 2**30, 2**31)
    d[:20] = torch.tensor([2**30, 2**30 + 1, 2**31 - 1, 2**31 - 2]).repeat(5)
    size = 2.0 ** torch.randint(1, 29, (ROWS,), generator=generator)
    quotient = (torch.rand(ROWS, dtype=torch.float64, generator=generator) * 2 - 1) * size
    tie = ((quotient.floor() + 0.5) * d / 2.0**shift).round().long()
    for n in (tie - 1, tie, tie + 1, quotient.round().long()):
        held = (n.abs() < 2**31) & (n.double().abs() * 2.0**shift <= 2.0**28 * d)
        agree(n[held], shift, d[held])
    for distance in (-3, -1, 1, 3) if shift <= 28 else ():
        near = d | 1
        n = beside_ties(near, shift, distance)
        assert ((2 * (n << shift) + distance) % near == 0).all()
        agree(n, shift, near)
        agree(-n, shift, near)


@pytest.mark.parametrize("top", [24, 31, 36, 41, 48.9])
def test_quotients_of_a_softmax(generator, top):
    """Exponentials up to 1.00028 2^24, and sums from one of them to 2^49: beside ties, and the largest."""
    e = integers(generator, 1, 2**24 + 1)
    e[:30] = torch.tensor([1, 2, 2**24 - 1, 2**24, 16781911, 16781910]).repeat(5)
    total = 2.0 ** (24 + (top - 24) * torch.rand(ROWS, dtype=torch.float64, generator=generator))
    agree(e, 28, torch.maximum(total.long(), e))
    odd = 2 * (2.0 ** (28 * torch.rand(ROWS, dtype=torch.float64, generator=generator))).long() - 1
    for step in (-1, 0, 1):  # e 2^28 / d near odd / 2
        d = (e * 2.0**29 / odd).round().long() + step
        held = (d >= e) & (d < 2**49)
        agree(e[held], 28, d[held])
    for distance in (-3, -1, 1, 3):
        d = integers(generator, 2**24, 2**27) | 1
        n = beside_ties(d, 28, distance)
        held = n <= 16781911
        agree(n[held], 28, d[held])


def test_small_quotients_all():
    n, d = torch.meshgrid(torch.arange(-500, 501), torch.arange(1, 400), indexing="ij")
    agree(n, 0, d)


def test_a_planted_fault_is_seen(generator, monkeypatch):
    """With a plain reciprocal of 53 bits, without its second part, ties go wrong."""
    monkeypatch.setattr(vectorized, "HIGH_BITS", 53)
    with pytest.raises(AssertionError):
        test_quotients_of_a_norm(generator, 28)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as its compiler is imported
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_operations(generator):
    """One compilation of all: the integers of the eager form, which has no float."""

    def compute(code: torch.Tensor, eps: torch.Tensor, mask: torch.Tensor, table: torch.Tensor) -> tuple:
        scores = code.reshape(2, 4, 8, -1)
        return ops.normalize(code, eps), ops.softmax(scores, mask, table), ops.sigmoid_polynomial(code.int() * 997)

    code = torch.randint(-128, 128, (64, 96), generator=generator).to(torch.int8)
    code[0], code[1, 1:] = 5, -128
    mask = torch.rand(2, 1, 1, 96, generator=generator) < 0.7
    table = torch.round(torch.exp(-0.05 * torch.arange(256)) * 2**24).int()
    arguments = (code, torch.tensor(1000), mask, table)
    for got, want in zip(torch.compile(compute)(*arguments), compute(*arguments), strict=True):
        assert torch.equal(got, want)
