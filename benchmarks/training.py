"""Training steps (forward, backward, clipping, AdamW): ours against `transformers` and plain torch, and what clipped
softmax and a gate cost.

A step of bert-base at 4 x 128 tokens is about 270 billion multiplications: floor 2 * 3 * 86e6 * 512 / the rate of the
float32 units; its bytes are few beside that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import qtx_ref.backend
from qtx.engines.backend import MissingExtra, need
from qtx_ref.models.initial import init_params
from qtx_torch.backend import Model

from .harness import Call, Row, Skip, compare, compare_each, peak
from .plain import Plain
from .steps import (
    OPTIM,
    Arrays,
    compare_logits,
    compare_reference,
    make_trainer,
    make_transformers,
    random_batch,
    shape,
    torch_step,
)


@dataclass(frozen=True)
class Size:
    """What is trained; `layers` 0: the preset's number."""

    model: str
    batch: int
    length: int
    layers: int = 0
    dropout: float = 0.0


def make(size: Size, kind: str = "vanilla") -> tuple[object, Arrays, Arrays]:
    spec = shape(size.model, size.dropout, size.layers, kind)
    return spec, init_params(spec, 0), random_batch(spec, size.batch, size.length)


def make_other(way: str, size: Size) -> object:
    spec, params, _ = make(size)
    if way == "transformers":
        need("transformers", "bench", "benchmarks")
        return make_transformers(spec, params)
    model = Plain(spec)
    model.load(params)
    return model


def build(way: str, size: Size) -> Call:
    """A step: of `transformers`, `plain torch.nn`, the `reference`, or of ours with that attention; compiled where the
    way ends so."""
    name = way.removesuffix(", compiled")
    compiled = name != way
    if name in ("transformers", "plain torch.nn"):
        return torch_step(make_other(name, size), make(size)[2], compiled=compiled)
    spec, params, batch = make(size, "vanilla" if name in ("qtx", "reference") else name)
    if name == "reference":
        trainer = qtx_ref.backend.Trainer(qtx_ref.backend.Model(spec, params), OPTIM)
    else:
        trainer = make_trainer(spec, params, compiled=compiled)
    return lambda: trainer.step(batch)


def build_sized(way: str, *size: object) -> Call:
    """`build` with what JSON can carry."""
    return build(way, Size(*size))


def weigh(way: str, size: Size) -> float | None:
    given = (size.model, size.batch, size.length, size.layers, size.dropout)
    return peak(build_sized, way, *given, compiled=way.endswith("compiled"))


def check_against(way: str, size: Size) -> str:
    spec, params, batch = make(size)
    return compare_logits(Model(spec, params), make_other(way, size), batch)


def check_attention(kind: str, size: Size) -> str:
    return compare_reference(*make(size, kind))


def pair(ours: str, other: str, size: Size, rounds: int, name: str, bound: float | None = None) -> Row | Skip:
    """One against one, with memory; skipped where a package is not installed."""
    way = other.removesuffix(", compiled")
    try:
        return compare(
            name, build(ours, size), other, build(other, size),
            rounds=rounds, check=lambda: check_against(way, size), bound=bound,
            mib=weigh(ours, size), against_mib=weigh(other, size),
        )  # fmt: skip
    except MissingExtra as error:
        return Skip(name, str(error))


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """bert-base against transformers, and its attentions against vanilla."""
    rounds = 2 if quick else 5
    base = Size("bert-tiny", 2, 32) if quick else Size("bert-base", 4, 128)
    named = f"{base.model}, {base.batch} x {base.length}"
    for dropout, bound in ((0.0, 1.03), (0.1, 1.25)):
        size = Size(base.model, base.batch, base.length, dropout=dropout)
        yield pair("qtx", "transformers", size, rounds, f"{named}, dropout {dropout}", bound)
    kinds = ("vanilla", "clipped", "gated")
    yield from compare_each(
        named, {kind: build(kind, base) for kind in kinds}, "vanilla",
        rounds=rounds, checks={kind: lambda kind=kind: check_attention(kind, base) for kind in kinds},
        bounds={"clipped": 1.05, "gated": 1.03}, memory={kind: weigh(kind, base) for kind in kinds},
    )  # fmt: skip


def plain_rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Small models against plain torch.nn and transformers, eager and compiled, and the reference against torch."""
    rounds = 2 if quick else 15
    for model in ("bert-tiny",) if quick else ("bert-tiny", "opt-tiny"):
        size = Size(model, 2, 32, 1) if quick else Size(model, 16, 128)
        yield pair("qtx", "plain torch.nn", size, rounds, f"{model}, eager")
        if model.startswith("bert") and not quick:
            yield pair("qtx, compiled", "plain torch.nn, compiled", size, rounds, f"{model}, compiled")
            yield pair("qtx, compiled", "transformers, compiled", size, rounds, f"{model}, compiled")
        yield compare(
            f"{model}, the reference", build("reference", size), "qtx", build("qtx", size),
            rounds=min(rounds, 5), check=lambda size=size: check_attention("vanilla", size),
            mib=weigh("reference", size), against_mib=weigh("qtx", size),
        )  # fmt: skip


def gate_rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """What each attention adds to a forward pass, and the parameters that it adds."""
    size = Size("bert-tiny", 1, 32) if quick else Size("bert-base", 1, 128)
    kinds = (
        ("vanilla", "clipped") if quick else ("vanilla", "clipped", "softmax1", "head", "gated", "mlp", "elementwise")
    )
    counts = {kind: sum(value.size for value in make(size, kind)[1].values()) for kind in kinds}
    more = {kind: f"{kind}, {counts[kind] - counts['vanilla']:+d} parameters" for kind in kinds}
    more["vanilla"] = "vanilla"
    yield from compare_each(
        f"{size.model}, {size.batch} x {size.length}",
        {more[kind]: build_forward(kind, size) for kind in kinds}, "vanilla",
        rounds=2 if quick else 15, checks={more[kind]: lambda kind=kind: check_attention(kind, size) for kind in kinds},
    )  # fmt: skip


def build_forward(kind: str, size: Size) -> Call:
    spec, params, batch = make(size, kind)
    model = Model(spec, params)
    return lambda: model.forward(batch)
