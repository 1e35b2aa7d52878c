"""Dynamic fake quantization by other libraries: the range of each row, its int8 codes, what they stand for, and the
straight-through gradient.

The floor is memory: forward reads the tensor twice and writes it once, backward copies the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qtx.engines.backend import MissingExtra, need
from qtx_ref.spec import Granularity, QuantSpec
from qtx_torch.numerics import FakeQuant

from .harness import Call, Row, Skip, compare, near, peak

WAYS = ("torch", "torchao QAT", "brevitas", "optimum-quanto")
SPEC = QuantSpec(symmetric=True, granularity=Granularity.TOKEN, dynamic=True)


def make_tensor(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).requires_grad_()


def make_quantizer(way: str, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Symmetric, a scale for each row."""
    if way == "qtx":
        quantizer = FakeQuant("x", SPEC, None)
        return lambda x: quantizer(x, None)
    if way == "torch":
        zero = torch.zeros(len(x), dtype=torch.int32)

        def by_torch(x: Tensor) -> Tensor:
            scale = x.detach().abs().amax(1) / 127
            return torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -128, 127)

        return by_torch
    if way == "torchao QAT":
        qat = need("torchao.quantization.qat", "bench", "benchmarks")
        axis = need("torchao.quantization.granularity", "bench", "benchmarks").PerAxis(0)
        return qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(torch.int8, axis, is_symmetric=True))
    if way == "brevitas":
        layers = need("brevitas.nn", "bench", "benchmarks")
        kind = need("brevitas.quant", "bench", "benchmarks").Int8WeightPerChannelFloat
        layer = layers.QuantLinear(x.shape[1], x.shape[0], bias=False, weight_quant=kind)
        layer.weight = torch.nn.Parameter(x.detach())
        return lambda x: layer.weight_quant(layer.weight).value
    quanto = need("optimum.quanto", "bench", "benchmarks")

    def by_quanto(x: Tensor) -> Tensor:
        scale = quanto.absmax_scale(x.detach(), quanto.qint8, axis=0)
        return quanto.quantize_weight(x, quanto.qint8, 0, scale).dequantize()

    return by_quanto


def build(way: str, backward: bool, rows: int, columns: int) -> Call:
    name = way.removesuffix(", compiled")
    x = make_tensor(rows, columns)
    quantize = make_quantizer(name, x)
    if name != way:
        quantize = torch.compile(quantize)
    gradient = torch.ones_like(x)

    def call() -> Tensor:
        y = quantize(x)
        if backward:
            y.backward(gradient)
            x.grad = None
        return y

    return call


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Ours against each, and compiled against the one that compiles."""
    shape = (64, 256) if quick else (1024, 3072)
    step = float(make_tensor(*shape).detach().abs().max()) / 127
    for backward in (False, True):
        what = f"{shape[0]} x {shape[1]}, " + ("forward and backward" if backward else "forward")
        pairs = [("qtx", way) for way in WAYS]
        if not quick:
            pairs.append(("qtx, compiled", "torchao QAT, compiled"))
        for ours, theirs in pairs:
            try:
                call, other = build(ours, backward, *shape), build(theirs, backward, *shape)
                yield compare(
                    f"{what}, {ours}", call, theirs, other,
                    rounds=2 if quick else 15,
                    # scales are by 127 or 127.5: values are a step apart at most
                    check=lambda call=call, other=other: near(call(), other(), step, "values"),
                    mib=peak(build, ours, backward, *shape, held=False),
                    against_mib=peak(build, theirs, backward, *shape, held=False),
                )  # fmt: skip
            except MissingExtra as error:
                yield Skip(theirs, str(error))
