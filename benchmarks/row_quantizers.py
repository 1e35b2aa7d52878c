"""Fake quantization of rows by their own ranges against a copy of the same bytes, both into memory that is there.

Floors are in `qtx_torch.quant.blocks` (CPU) and `qtx_torch.kernels.fake_quantize` (CUDA). On a CPU the compiled form is
what a compiled step has; the eager one goes in blocks. A copy that stays in the last cache is the harder one to follow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qtx_ref.quant import affine, quantizer
from qtx_ref.spec import Granularity, QuantSpec
from qtx_torch.numerics import FakeQuant
from qtx_torch.quant import blocks

from .harness import Call, Row, Skip, compare, equal

SPEC = QuantSpec(granularity=Granularity.TOKEN, dynamic=True)
SIZES = {"cpu": ((2048, 768), (4096, 3072)), "cuda": ((65536, 2048), (16384, 2048), (16384, 8192))}
BOUNDS = {"cpu": 1 / 0.3, "cuda": 1 / 0.8}


def make_call(way: str, x: Tensor, out: Tensor) -> Call:
    """Writes x, or what its codes stand for, into out, and returns it."""
    hook = FakeQuant("a.site", SPEC, None)
    if way == "copy":
        return lambda: out.copy_(x)
    if way == "compiled":
        return torch.compile(lambda: out.copy_(hook(x, None)))
    return lambda: blocks.simulate_rows(x, SPEC, out)[0]


def check(call: Call, x: Tensor) -> str:
    """The values of a few rows are the reference's, to the bit."""
    array = x[:64].float().cpu().numpy()
    values, _ = affine.simulate(array, *quantizer.dynamic_scale(array, SPEC, None, False), SPEC)
    return equal(call()[:64], torch.tensor(values).to(x.dtype), "values")


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """On a GPU one kernel, eager; its result is new memory, which the allocator has. Where a copy takes less than a
    launch, as of 67 MB, it is the launch that is timed."""
    kind = device.partition(":")[0]
    cuda = kind == "cuda"
    if cuda and blocks.find_kernels(torch.zeros(1, 1, device=device)) is None:
        yield Skip("fake quantization in one kernel", "Triton is not installed, or does not run here")
        return
    sizes = ((64, 256),) if quick else SIZES[kind]
    for shape in sizes:
        for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
            x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
            out, copied = torch.empty_like(x), torch.empty_like(x)
            for way in ("eager",) if cuda or quick else ("compiled", "eager"):
                call = make_call(way, x, out)
                bound = BOUNDS[kind] if cuda or way == "compiled" else None
                title = f"{shape[0]} x {shape[1]}, {str(dtype).removeprefix('torch.')}, {way}"
                yield compare(
                    title, call, "copy", make_call("copy", x, copied),
                    rounds=2 if quick else 21, check=lambda call=call, x=x: check(call, x), device=device, bound=bound,
                )  # fmt: skip
