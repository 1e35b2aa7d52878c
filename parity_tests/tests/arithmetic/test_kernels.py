"""Triton's kernels, under its interpreter where there is no GPU, against the reference."""

import importlib.util
import os
import subprocess
import sys

import pytest

PHILOX = """
import zlib
import numpy as np, torch
from qtx_ref import random
from qtx_torch.kernels.philox import write_words

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
place = zlib.crc32(b"layer.0.attn.probs")
cases = [(0, 0, 1, 0), (5, 1, 1023, 2), (2**63 + 11, 2**32 - 1, 5000, 7), (2**64 - 1, 70000, 300, 2**34 + 3)]
for seed, step, count, first in [*cases, (1, 1, 0, 0)]:
    want = random.bits(seed, step, "layer.0.attn.probs", count, first)
    got = write_words(seed, step, place, count, first, device, None)
    assert got.dtype == torch.int64 and np.array_equal(got.cpu().numpy(), want), (seed, step, count, first)
    keep = random.keep_mask(seed, step, "layer.0.attn.probs", (count,), 0.1, first)
    assert np.array_equal(write_words(seed, step, place, count, first, device, round(0.1 * 2**32)).cpu().numpy(), keep)
"""


FAKE = """
import warnings
warnings.simplefilter("ignore", RuntimeWarning)  # NumPy says them of NaN
import numpy as np, torch
from itertools import product
from dataclasses import replace
from qtx_ref.quant import affine, quantizer
from qtx_ref.spec import QTX, Granularity, QuantSpec
from qtx_torch.kernels import fake_quantize as k

device = "cuda" if torch.cuda.is_available() else "cpu"
rng = np.random.default_rng(0)
rule = QTX.scale

def bits(a, b):
    a, b = a.detach().float().cpu().numpy(), np.asarray(b, np.float32)
    return np.array_equal(a.view(np.int32), b.view(np.int32))

def narrow_to(want, dtype):
    # Triton's interpreter cuts float32 to bfloat16 where a GPU rounds
    want = torch.tensor(want)
    if dtype is torch.bfloat16 and device == "cpu":
        return (want.view(torch.int32) & -65536).view(torch.float32)
    return want.to(dtype).float()

def draw(shape, dtype):
    x = rng.standard_t(2, shape) * 10.0 ** rng.integers(-4, 4, (*shape[:-1], 1))
    x[0], x[1], x[2], x[3, 0], x[3, 1], x[4], x[4, 0], x[4, 1] = 0, abs(x[1]), -abs(x[2]), 0.0, -0.0, 1, -1.5, 253.5
    return torch.tensor(x, dtype=torch.float32).to(dtype).to(device)

shape = (9, 40)
for dtype, widest in ((torch.float32, 16384), (torch.float32, 16), (torch.bfloat16, 16384), (torch.float16, 16384)):
    k.WIDEST = widest
    x, g = draw(shape, dtype), torch.tensor(rng.standard_normal(shape)).to(dtype).to(device)
    for n, symmetric, narrow in product((2, 8, 16), (False, True), (False, True)):
        spec = QuantSpec(n, symmetric=symmetric, narrow=narrow, granularity=Granularity.TOKEN, dynamic=True)
        array = x.float().cpu().numpy()
        s, z = quantizer.dynamic_scale(array, spec, None, False)
        want, inside = affine.simulate(array, s, z, spec)
        y, scale, zero = k.quantize_rows(x, spec, rule.floor, rule.empty)
        assert bits(scale, s) and bits(zero, z), (dtype, spec)
        assert y.dtype == dtype and bits(y, narrow_to(want, dtype)), (dtype, spec)
        assert bits(k.quantize(x, scale, zero, spec, g), np.where(inside, g.float().cpu().numpy(), 0)), (dtype, spec)
        for form in ((1, 1), (1, 40), (9, 1)):
            s = rng.uniform(0.001, 1, form).astype(np.float32)
            z = rng.integers(spec.code_min, spec.code_max + 1, form).astype(np.int32) * (not symmetric)
            want, inside = affine.simulate(array, s, z, spec)
            given = torch.tensor(s, device=device), torch.tensor(z, device=device).float()
            assert bits(k.quantize(x, *given, spec), narrow_to(want, dtype)), (dtype, spec, form)
            passed = k.quantize(x, *given, spec, g)
            assert bits(passed, np.where(inside, g.float().cpu().numpy(), 0)), (dtype, spec, form)
# beside every tie of a row's own scale, and scales down to the smallest: quotients are IEEE's
top = (10.0 ** rng.uniform(-44, 37, 96)).astype(np.float32)
for n, symmetric in product((8, 16), (False, True)):
    spec = QuantSpec(n, symmetric=symmetric, granularity=Granularity.TOKEN, dynamic=True)
    x = np.zeros((96, 512), np.float32)
    x[:, 1] = top
    s, _ = quantizer.dynamic_scale(x, spec, None, False)
    x[:, 2:] = (rng.integers(0, spec.code_max, (96, 510)) + 0.5).astype(np.float32) * s
    for _ in range(3):
        x[:, 2:] = np.nextafter(x[:, 2:], np.float32(rng.choice((0, np.inf), (96, 510))))
    x[:, 2:] = np.minimum(x[:, 2:], top[:, None])
    s, z = quantizer.dynamic_scale(x, spec, None, False)
    y, scale, zero = k.quantize_rows(torch.tensor(x, device=device), spec, rule.floor, rule.empty)
    assert bits(scale, s) and bits(zero, z) and bits(y, affine.simulate(x, s, z, spec)[0]), spec
x = torch.ones(6, 40, device=device)
x[1, 3], x[2, 5], x[3, 7] = float("nan"), float("inf"), -float("inf")
y, scale, _ = k.quantize_rows(x, QuantSpec(granularity=Granularity.TOKEN, dynamic=True), rule.floor, rule.empty)
bad = torch.tensor([False, True, True, True, False, False], device=device)
for nan in (y.isnan().all(1), y.isnan().any(1), scale.isnan()[:, 0]):
    assert torch.equal(nan, bad)

# the names that a model uses
from qtx_torch.numerics import FakeQuant
from qtx_torch.quant import blocks, straight_through

k.WIDEST = 16384
blocks.find_kernels = lambda x: k
calls = []
whole, rows = k.quantize, k.quantize_rows
k.quantize = lambda *given: calls.append("quantize") or whole(*given)
k.quantize_rows = lambda *given: calls.append("rows") or rows(*given)
x = draw((8, 24), torch.float32).reshape(2, 4, 2, 12)
for made in (x, x.transpose(1, 2)):
    for spec in (QuantSpec(granularity=Granularity.TOKEN, dynamic=True), QuantSpec(dynamic=True)):
        leaf, g = made.detach().clone(memory_format=torch.preserve_format).requires_grad_(), torch.randn_like(made)
        y = FakeQuant("a.site", spec, None)(leaf, None)
        y.backward(g)
        array = leaf.detach().cpu().numpy()
        want, inside = affine.simulate(array, *quantizer.dynamic_scale(array, spec, None, False), spec)
        assert bits(y, want) and bits(leaf.grad, np.where(inside, g.cpu().numpy(), 0)), spec
assert calls.count("rows") == 1 and calls.count("quantize") == 7, calls
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_philox_in_one_pass_has_the_words_of_the_reference() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    import torch

    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PHILOX], env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_fake_quantization_in_one_kernel_has_the_bits_of_the_reference() -> None:
    import torch

    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", FAKE], env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
