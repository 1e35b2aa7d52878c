"""Cost against size: a forward pass of one layer as T, D, the batch and the bits grow, and the exponent of each.

The products of a layer are 12 B T D^2 multiplications, and attention's 2 B T^2 D: T grows as 1, then as 2; D as 2; B as
1; bits as 0, fake-quantized values being floats. `show` fits the exponents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qtx.recipes.named import recipe, resolve
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention
from qtx_ref.spec import Family, Head, ModelSpec
from qtx_torch.backend import Model

from .harness import Call, Row, Skip, compare, near, peak
from .steps import compare_reference, random_batch

WIDTH, LENGTH = 384, 128
BITS = (4, 6, 8)


def make_spec(kind: str, length: int, width: int) -> ModelSpec:
    spec = ModelSpec(Family.BERT, 1, width, max(1, width // 64), 4 * width, Head.MLM, vocab=128, length=length, types=2)
    return replace(spec, attention=attention(kind))


def build(kind: str, batch: int, length: int, width: int, bits: int = 0) -> Call:
    """A forward pass; with bits, fake-quantized with ranges of its own batch."""
    spec = make_spec(kind, length, width)
    data, model = random_batch(spec, batch, length), Model(spec, init_params(spec, 0))
    if bits:
        quants = resolve(recipe(f"w{bits}a8", spec), spec)
        model.bind(quants, model.calibrate([data], quants))
    return lambda: model.forward(data)


def pair(unit: str, size: int, quick: bool, batch: int = 1, length: int = LENGTH, width: int = WIDTH) -> Row:
    """Clipped against vanilla at one size."""
    given = (batch, length, width)
    ours, theirs = build("clipped", *given), build("vanilla", *given)
    longest = length >= 4096
    return compare(
        f"clipped, {unit} {size}", ours, f"vanilla, {unit} {size}", theirs,
        rounds=2 if quick or longest else 5, check=lambda: check(*given),
        mib=peak(build, "clipped", *given), against_mib=peak(build, "vanilla", *given),
    )  # fmt: skip


def check(batch: int, length: int, width: int) -> str:
    """Where T is long, at the first 512 positions: the reference has its scores in memory."""
    spec = make_spec("clipped", min(length, 512), width)
    return compare_reference(spec, init_params(spec, 0), random_batch(spec, min(batch, 4), spec.length))


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    for length in (64, 128) if quick else (128, 256, 512, 1024, 2048, 4096, 8192):
        yield pair("T", length, quick, length=length)
    for width in () if quick else (128, 256, 512, 1024, 2048):
        yield pair("D", width, quick, width=width)
    for batch in () if quick else (1, 2, 4, 8, 16, 32):
        yield pair("B", batch, quick, batch=batch)
    for bits in () if quick else BITS:
        given = ("vanilla", 8, LENGTH, WIDTH)
        ours, theirs = build(*given, bits), build(*given)
        yield compare(
            f"fake-quantized, bits {bits}", ours, "float", theirs,
            # outputs of a layer are below 4; 4 bits of weights move them most
            rounds=5, check=lambda ours=ours, theirs=theirs: near(ours(), theirs(), 2.0, "outputs"),
            mib=peak(build, *given, bits), against_mib=peak(build, *given),
        )  # fmt: skip
