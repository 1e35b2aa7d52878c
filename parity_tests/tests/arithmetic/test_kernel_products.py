"""Triton's product of integer codes, under its interpreter where there is no GPU, to the bit against the reference."""

import importlib.util
import os
import subprocess
import sys

import pytest

PRODUCTS = """
import numpy as np, torch
from itertools import product
from qtx_ref.integer import fixed_point, products
from qtx_ref.random import stream
from qtx_ref.spec import ONE_ROUNDING, QuantSpec
from qtx_torch.integer import carriers, machine
from qtx_torch.integer.machine import Way

device = "cuda" if torch.cuda.is_available() else "cpu"
machine.choose_way = lambda largest, device, plain: Way.TRITON
import qtx_torch.kernels.integer_matmul

assert machine.is_exact(machine.multiply_by_kernel, 127, device)
S8, S16 = (QuantSpec(bits=bits, symmetric=True) for bits in (8, 16))
U4, U8, U16 = (QuantSpec(bits=bits) for bits in (4, 8, 16))
for spec, (m, k, n) in product((S8, U8, U4, S16, U16), ((1, 5, 3), (17, 130, 70), (130, 64, 129), (0, 3, 2))):
    rng = stream(m, "kernel")
    kind = {True: (np.int8, np.int16), False: (np.uint8, np.int32)}[spec.has_sign][spec.bits > 8]
    ends = rng.choice([spec.code_min, spec.code_max], (m, k))
    x = np.where(rng.random((m, k)) < 0.3, ends, rng.integers(spec.code_min, spec.code_max + 1, (m, k))).astype(kind)
    w, bias = rng.choice([-128, 127, 5], (k, n)).astype(np.int8), rng.integers(-(10**6), 10**6, n)
    zero, bits = np.array(0 if spec.has_sign else 7), 64 if spec.bits > 8 else 32
    want = products.matmul(x, w, spec, S8, zero, None, bias, bits)
    tx, tw, tzero, tbias = (torch.from_numpy(each).to(device) for each in (x, w, zero, bias))
    prepared = carriers.prepare(tw, S8, spec, None, tzero, tbias, bits)
    got = carriers.multiply(tx, prepared).cpu().numpy()
    assert got.dtype == want.dtype and np.array_equal(got, want), (spec, m, k, n)
    assert carriers.takes_codes(prepared, ONE_ROUNDING) == (bits == 32)
    for several in (False, True) if bits == 32 else ():
        real = rng.uniform(1e-9, 1e-3, n if several else ())
        want_codes = fixed_point.requantize(want, np.asarray(real), np.array(13), U8)
        scaling = fixed_point.quantize_multiplier(np.asarray(real))
        scaling = (torch.from_numpy(np.asarray(each)).to(device) for each in scaling)
        code = carriers.multiply_to_codes(tx, prepared, *scaling, torch.tensor(13, device=device), U8, torch.uint8)
        assert code.dtype is torch.uint8 and np.array_equal(code.cpu().numpy(), want_codes), (spec, m, k, n, several)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_products_and_their_codes_in_one_pass_are_the_references() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    import torch

    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PRODUCTS], env=os.environ | interpret, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
