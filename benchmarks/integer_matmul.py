"""Exact integer products as compiled models run them, against the float product of the same shape.

The operands are codes of 8 bits where not said, with a zero point, and codes come out: requantization is in the time
of ours. Floors of M x K x N: 2 M K N operations at the rate of the int8 unit, which with AVX512-VNNI is four times
float32's, on a GPU twice bfloat16's; K N + 2 M N bytes at the memory's, for few rows a quarter of float32's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from qtx_ref.integer import products as reference
from qtx_ref.random import stream
from qtx_ref.spec import ONE_ROUNDING, QuantSpec
from qtx_torch.integer import batched, carriers, fixed_point, machine
from qtx_torch.integer.carriers import Prepared

from .harness import Call, Row, Skip, compare, equal

U8, S16 = QuantSpec(), QuantSpec(bits=16, symmetric=True)
KINDS = {"8 bits": (U8, 8), "7-bit weights": (U8, 7), "16-bit activations": (S16, 8)}  # of x, and bits of the weights
SHAPES = ((1, 768, 768), (64, 384, 1536), (128, 768, 3072), (1024, 768, 3072))
CHECKED = 128  # rows whose codes are compared
HEADS = ((64, 32), (128, 64), (512, 64), (1024, 64))  # tokens, width; 12 of them
GPU_SHAPES = ((1, 2048, 8192), (16, 2048, 8192), (4096, 2048, 2048), (4096, 2048, 8192), (4096, 8192, 2048))  # OPT-1.3b


def to_codes(acc: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    level = fixed_point.multiply_exact(acc, multiplier, shift, ONE_ROUNDING)
    return (level + 100).clamp(0, 255).int().to(torch.uint8)


def linear(x: Tensor, prepared: Prepared, multiplier: Tensor, shift: Tensor) -> Tensor:
    if carriers.takes_codes(prepared, ONE_ROUNDING):
        zero = torch.full((), 100, dtype=torch.int32, device=x.device)
        return carriers.multiply_to_codes(x, prepared, multiplier, shift, zero, U8, torch.uint8)
    return to_codes(carriers.multiply(x, prepared), multiplier, shift)


def heads(a: Tensor, b: Tensor, zero: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    return to_codes(batched.multiply(a, b, U8, U8, zero, zero), multiplier, shift)


def draw(*shape: int, spec: QuantSpec) -> Tensor:
    """Codes of a spec."""
    kind = (torch.int8 if spec.bits <= 8 else torch.int16) if spec.has_sign else torch.uint8
    codes = stream(sum(shape), "integer matmul").integers(spec.code_min, spec.code_max + 1, shape)
    return torch.from_numpy(codes).to(kind)


def scaling(device: str) -> tuple[Tensor, Tensor]:
    multiplier, shift = fixed_point.quantize_multiplier(torch.tensor(3e-5, dtype=torch.float64))
    return multiplier.to(device), shift.to(device)


def compile_call(call: Call) -> Call:
    """Compiled for any number of rows, as a layer of a compiled model is."""
    batched.hold_settings()
    return torch.compile(call, fullgraph=True, dynamic=True)


def make_linear(kind: str, m: int, k: int, n: int, device: str, compiled: bool) -> tuple[Call, Call, Call]:
    """Our product, the float one, and one whose codes the reference's accumulators give."""
    x_spec, bits = KINDS[kind]
    w_spec = QuantSpec(bits=bits, symmetric=True, narrow=True)
    x, w = draw(m, k, spec=x_spec), draw(k, n, spec=w_spec)
    zero = None if x_spec.has_sign else torch.tensor(100)
    accumulator = 32 if x_spec.bits <= 8 else 64
    prepared = carriers.prepare(w, w_spec, x_spec, None, zero, None, accumulator, device=device)
    given, float_kind = (x.to(device), prepared, *scaling(device)), torch.float32 if device == "cpu" else torch.bfloat16
    call = compile_call(linear) if compiled else linear
    real, weight = x.to(device, float_kind), w.T.to(device, float_kind).contiguous()

    def want() -> Tensor:  # of the first rows: each is by itself
        zeros = None if zero is None else zero.numpy()
        acc = reference.matmul(x[:CHECKED].numpy(), w.numpy(), x_spec, w_spec, zeros, accumulator=accumulator)
        return to_codes(torch.from_numpy(acc), *scaling("cpu"))

    return lambda: call(*given), lambda: torch.nn.functional.linear(real, weight), want


def make_heads(which: str, tokens: int, width: int, compiled: bool) -> tuple[Call, Call, Call]:
    """The same of one of attention's products, for 12 heads."""
    k = draw(1, tokens, 12, width, spec=U8).transpose(1, 2)
    a, b = (k.clone(), k.mT) if which == "q k" else (draw(1, 12, tokens, tokens, spec=U8), k)
    given = (a, b, torch.tensor(100), *scaling("cpu"))
    call = compile_call(heads) if compiled else heads
    real = a.float(), b.float()

    def want() -> Tensor:
        zero = given[2].numpy()
        return to_codes(torch.from_numpy(reference.matmul(a.numpy(), b.numpy(), U8, U8, zero, zero)), *given[3:])

    return lambda: call(*given), lambda: real[0] @ real[1], want


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """The chosen way for each kind of product and shape, and attention's two products on a CPU."""
    compiled, rounds = not quick, 2 if quick else 9
    other = "float32" if device == "cpu" else "bfloat16"
    shapes = ((4, 64, 64),) if quick else SHAPES if device == "cpu" else GPU_SHAPES
    for kind, shape in product(KINDS, shapes):
        ours, theirs, want = make_linear(kind, *shape, device, compiled)
        yield compare(
            f"{' x '.join(map(str, shape))}, {kind}", ours, other, theirs, rounds=rounds, device=device,
            check=lambda ours=ours, want=want: equal(ours()[:CHECKED], want()), notes=describe_way(kind, device),
        )  # fmt: skip
    sizes = () if device != "cpu" else ((32, 32),) if quick else HEADS
    for which, (tokens, width) in product(("q k", "p v"), sizes):
        ours, theirs, want = make_heads(which, tokens, width, compiled)
        yield compare(
            f"{which}, {tokens} tokens, 12 heads of {width}", ours, other, theirs, rounds=rounds,
            check=lambda ours=ours, want=want: equal(ours(), want()),
        )  # fmt: skip


def describe_way(kind: str, device: str) -> str:
    """The way that the probe chooses for weights of this kind."""
    plain = device == "cpu" and torch.get_float32_matmul_precision() == "highest"
    return machine.choose_way(63 if kind.startswith("7") else 127, device, plain=plain).value


def probe_rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """What the probe measured in this process, each way to the float that is quickest."""
    for shape in machine.SHAPES:
        times = {way: seconds for (way, one), seconds in machine.probe(device).items() if one == shape}
        least = min((way for way in times if way.value.startswith("float")), key=times.__getitem__)
        for way, seconds in times.items():
            ratio = seconds / times[least]
            name = f"{' x '.join(map(str, shape))}, {way.value}"
            yield Row(name, least.value, ratio, ratio, ratio, 1000 * seconds, 1000 * times[least], notes="exact; least")
