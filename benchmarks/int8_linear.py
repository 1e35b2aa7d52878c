"""A linear trained by int8 products, forward and backward, against the same in float, both compiled.

Forward is one product and backward two; floors are in `qtx_torch.quant.int8`. Gradients are rounded stochastically, as
under w8a8+grad8. On a GPU each is timed as it is launched, kernel by kernel, and captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from qtx.engines.backend import MissingExtra, need
from qtx_ref.spec import Gradients, Granularity, Operand, QuantSpec
from qtx_torch.numerics import FakeQuant
from qtx_torch.quant import gradients, int8
from qtx_torch.step import compile_forward

from .harness import Call, Row, Skip, compare, near

TOKEN = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True)
CHANNEL = replace(TOKEN, granularity=Granularity.CHANNEL)
NEAREST, DRAWN = Operand(TOKEN, False), Operand(TOKEN, True)
GRAD8 = Gradients(dgrad_gradient=DRAWN, dgrad_weight=NEAREST, wgrad_gradient=DRAWN, wgrad_input=NEAREST)
BOUND = 1 / 1.3


def build(way: str, device: str, dtype: str, tokens: int, inputs: int, outputs: int, compiled: bool) -> Call:
    """`way`: int8, fake (the same by values), torchao's int8 training or float. Returns the result and both
    gradients."""
    made = torch.Generator(device).manual_seed(0)
    kind = getattr(torch, dtype)
    shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    x, w, g = (torch.randn(shape, generator=made, device=device).to(kind) for shape in shapes)
    x.requires_grad_()
    w.requires_grad_()
    if way == "torchao":
        w = convert(w)
    how = gradients.Backward(GRAD8, "a.site", 0, 0)
    hooks = FakeQuant("a.site.input", TOKEN, None), FakeQuant("a.site.weight", CHANNEL, None)

    def multiply(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if way == "int8":
            return int8.linear(x, w, None, (TOKEN, CHANNEL), how)
        if way == "fake":
            return gradients.linear(hooks[0](x, None), hooks[1](w, None), None, how)
        return torch.nn.functional.linear(x, w)

    run = compile_forward(multiply) if compiled else multiply  # one graph forward, one backward, as a compiled step has

    def call() -> tuple[torch.Tensor, ...]:
        y = run(x, w)
        return y.detach(), *torch.autograd.grad(y, (x, w), g)

    return call


def convert(w: torch.Tensor) -> torch.nn.Parameter:
    """A weight whose three products torchao takes in int8, with scales of rows."""
    training = need("torchao.prototype.quantized_training", "bench", "benchmarks")
    layer = torch.nn.Sequential(torch.nn.Linear(*w.shape[::-1], bias=False))
    layer[0].weight = torch.nn.Parameter(w.detach())
    config = training.Int8MixedPrecisionTrainingConfig(output=True, grad_input=True, grad_weight=True)
    need("torchao.quantization", "bench", "benchmarks").quantize_(layer, training.int8_mixed_precision_training(config))
    return layer[0].weight


def capture(call: Call) -> Call:
    """All its launches as one CUDA graph: the kernels' own time, whatever a host takes to launch them."""
    call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        call()
    return graph.replay


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """On a CPU float32, without a bound; on a GPU bfloat16, 1.3b's width."""
    cuda = device.startswith("cuda")
    if not cuda and not torch.cpu._is_vnni_supported():
        yield Skip("linear by int8 products", "this CPU has no VNNI")
        return
    dtype = "bfloat16" if cuda else "float32"
    sizes = ((4096, 2048, 8192), (4096, 8192, 2048)) if cuda else ((512, 384, 1536), (1024, 768, 3072))
    rounds = 2 if quick else 9
    for size in ((32, 64, 128),) if quick else sizes:
        given = (device, dtype, *size, not quick)
        call, other = build("int8", *given), build("float", *given)
        small = (device, dtype, 64, *size[1:], False)

        def check(small: tuple = small) -> str:
            # the same codes: sums in another order, and in bfloat16 values of codes that are rounded
            limit = 0.02 if dtype == "bfloat16" else 1e-5
            return compare_results(build("int8", *small), build("fake", *small), limit)

        title = f"{size[0]} x {size[1]} to {size[2]}, {dtype}, int8"
        yield compare(title, call, f"{dtype} linear", other, rounds=rounds, check=check, device=device)
        if cuda:
            yield compare(
                f"{title}, captured", capture(call), f"{dtype} linear, captured", capture(other),
                rounds=9, check=lambda: "as above", device=device, bound=BOUND,
            )  # fmt: skip
        try:
            theirs = build("torchao", *given)
        except MissingExtra as error:
            yield Skip("torchao int8 training", str(error))
            continue
        # each rounds to codes of its own, gradients at random here: as near as int8 is
        agree = partial(compare_results, call, theirs, 0.05)
        yield compare(title, call, "torchao int8 training", theirs, rounds=rounds, check=agree, device=device)


def compare_results(call: Call, other: Call, limit: float) -> str:
    """Holds the result and each gradient to `limit` of the largest."""
    pairs = zip(("result", "dX", "dW"), call(), other(), strict=True)
    return "; ".join(near(ours, theirs, limit * float(theirs.abs().max()), name) for name, ours, theirs in pairs)
