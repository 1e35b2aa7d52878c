"""A linear's int8 kernels, under Triton's interpreter where there is no GPU: codes against the reference, the linear
against its plain form."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from parity_tests.long import int8_division

BEGIN = """
import warnings
warnings.simplefilter("ignore", RuntimeWarning)  # NumPy says them of NaN
from dataclasses import replace
import numpy as np, torch
from triton.runtime import interpreter
from qtx_ref.spec import Gradients, Granularity, Operand, QuantSpec
from qtx_torch.kernels import int8_codes, int8_training as k
from qtx_torch.quant import gradients, int8, rounding

device = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True)

def fuse(self, *given):  # Triton 3.6 rounds twice
    x, y, z = (torch.from_numpy(np.broadcast_to(each.data, given[2].data.shape).copy()) for each in given)
    return interpreter.TensorHandle(rounding.fused_multiply_add(x, y, z).numpy(), given[2].dtype.scalar)

interpreter.InterpreterBuilder.create_fma = fuse
"""

CODES = """
import zlib
from qtx_ref import random
from qtx_ref.quant import gradients as ref

rng = np.random.default_rng(0)
place = zlib.crc32(b"a.site.grad")

def draw(shape, dtype):
    x = rng.standard_t(3, shape) * 10.0 ** rng.integers(-3, 3, (shape[0], 1))
    if shape[0] > 8:
        x[1], x[2], x[3], x[4], x[:, 1] = 0, x[2] * 1e-30, x[3] * 1e-5, -abs(x[4]), 0
        x[6, 3], x[7, 2] = np.nan, -np.inf
    return torch.tensor(x, dtype=torch.float32).to(dtype)

def check(codes, scale, x, axis, spec, words, what):
    values, want = ref.quantize_operand(x.float().numpy(), axis, spec, words)
    values, lines = np.moveaxis(values, axis, -1), codes.shape[0]
    good = np.isfinite(want[:, 0])
    assert np.array_equal(scale.cpu().numpy().view(np.int32)[good], want.view(np.int32)[good]), ("scales", *what)
    assert np.isnan(scale.cpu().numpy()[~good]).all(), ("scales that are not finite", *what)
    wanted = np.rint(values[good] / want[good])
    assert np.array_equal(codes.cpu().numpy()[good, : values.shape[1]], wanted), ("codes", *what)
    assert codes.shape[1] % 16 == 0 and not codes.cpu().numpy()[good, values.shape[1] :].any(), ("padding", *what)

int8_codes.SIDES = (32, 32)
int8_codes.WIDEST = 64  # wider rows are read twice
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for m, n in ((1, 5), (20, 36), (33, 67)):
        for spec in (TOKEN,) if m > 20 else (TOKEN, replace(TOKEN, bits=4, narrow=True)):
            x, first, ends = draw((m, n), dtype), 4 * n, [spec.code_min, spec.code_max]
            codes, scale = int8_codes.encode_rows(x.to(device), *ends)
            check(codes, scale, x, -1, spec, None, (dtype, m, n, spec))
            words = random.bits(2**63 + 5, 7, "a.site.grad", m * n, first).reshape(m, n)
            for ways in ((2, 2), (1, 2), (2, 0), (0, 1)):
                drawn = [5 - 2**63, 7, place, first]  # the seed as it is signed
                made = int8_codes.encode(x.to(device), None, None, dtype, n, list(ways), ends * 2, drawn, None)
                for axis, way, codes, scale in zip((-1, 0), ways, made[::2], made[1::2], strict=True):
                    if way:
                        check(codes, scale, x, axis, spec, words if way == 2 else None, (dtype, m, n, spec, ways, axis))
        # of codes along rows, whose numbers are rounded to the dtype, and some of whose rows do not count
        codes, scale = int8_codes.encode_rows(x.to(device), -128, 127)
        where = torch.arange(m) % 3 != 1
        values = torch.where(where[:, None], (codes[:, :n].cpu() * scale.cpu()).to(dtype), 0)
        address = torch.tensor([7, first], device=device)
        made = int8_codes.encode(
            codes, scale, where.to(device), dtype, n, [0, 2], [-128, 127] * 2, [drawn[0], 0, place, 0], address
        )
        check(*made[2:], values, 0, TOKEN, words, (dtype, m, n, "of codes"))
"""

LINEAR = """
import qtx_torch.random
CHANNEL = replace(TOKEN, granularity=Granularity.CHANNEL)
NEAREST, DRAWN = Operand(TOKEN, False), Operand(TOKEN, True)
MIXED = Gradients(dgrad_gradient=NEAREST, dgrad_weight=DRAWN, wgrad_gradient=DRAWN, wgrad_input=DRAWN)
GRAD8 = Gradients(dgrad_gradient=DRAWN, dgrad_weight=NEAREST, wgrad_gradient=DRAWN, wgrad_input=NEAREST)
k.TILE = k.LONG_TILE = (32, 32, 32, 4, 2)

def train(by_kernels, dtype, shape, outputs, how, where, run=None):
    int8.has_kernels = lambda device: by_kernels
    torch.compiler.assume_constant_result(int8.has_kernels)
    torch.compiler.assume_constant_result(qtx_torch.random.number_site)
    made = torch.Generator().manual_seed(1)
    shapes = (shape, (outputs, shape[-1]), (outputs,), (*shape[:-1], outputs))
    x, w, b, g = (torch.randn(each, generator=made).to(device, dtype) for each in shapes)
    b = torch.stack([b, -b], 1)[:, 0]  # every second one in memory
    leaves = [each.requires_grad_() for each in (x, w, b)]
    y = (run or int8.linear)(x, w, b, (TOKEN, CHANNEL), how, where)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]

def check(ours, theirs, what):
    for name, a, b in zip(("result", "dX", "dW", "db"), ours, theirs):
        assert a.dtype == b.dtype and torch.equal(a, b), (name, *what)

some = (torch.arange(14).reshape(2, 7, 1) % 3 > 0).to(device)
apart = torch.stack([some[0], ~some[0]], 1)[None, :, 0]
assert apart.stride(1) == 2
step = [torch.tensor(n, device=device) for n in (5, 2)]
single, half = torch.float32, torch.float16
masked = (single, (2, 7, 40), 24, some), (single, (1, 7, 5), 3, apart)
cases = (*masked, (single, (1, 1, 5), 3, None), (half, (33, 20), 35, None))
for dtype, shape, outputs, where in cases:
    for seed, numbers, kinds in ((3, (5, 2), GRAD8), (2**63 + 3, step, MIXED), (0, None, None)):
        how = kinds and gradients.Backward(kinds, "a.site", seed, *numbers)
        given = (dtype, shape, outputs, how, where)
        check(train(True, *given), train(False, *given), given)

how = gradients.Backward(GRAD8, "a.site", 3, *step)
run = torch.compile(int8.linear, backend="aot_eager", fullgraph=True)
given = (torch.float32, (2, 7, 40), 24, how, some)
check(train(True, *given, run), train(False, *given), ("compiled",))

made = torch.Generator().manual_seed(0)
codes = [torch.randint(-128, 128, (n, 208), dtype=torch.int8, generator=made) for n in (40, 50)]
a, b = (each.to(device) for each in codes)
s, t = torch.rand(40, 1, device=device), torch.rand(50, 1, device=device)
want = (codes[0].double() @ codes[1].double().t()).float().to(device) * s * t.t()
for k.LONGEST in (2**16, 64):  # below 2^24 sums of parts are exact
    assert torch.equal(k.multiply(a, s, b, t, None, torch.float32), want), k.LONGEST
"""


def run(script: str) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    import torch

    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], env=os.environ | interpret, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_codes_are_the_reference_s() -> None:
    run(CODES)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_linear_and_its_gradients_are_the_plain_one_s() -> None:
    run(LINEAR)


def test_one_remainder_divides() -> None:
    """A slice of `parity_tests.long.int8_division`, on which `divide` rests."""
    scales = np.concatenate(
        [np.arange(512), 2**23 - 1 - np.arange(512), np.random.default_rng(0).integers(0, 2**23, 512)]
    )
    for bits in (8, 11):
        numbers = np.arange(0, 2 ** (bits - 1), 3)
        assert int8_division.count_wrong(numbers, bits, scales) == 0
        assert int8_division.count_wrong(numbers, bits, scales, remainder=False) > 0
