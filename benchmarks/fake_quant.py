"""A training step whose matmuls are fake-quantized, per token and weight channel, against the float step."""

from __future__ import annotations

from collections.abc import Iterator

from qtx.recipes.named import resolve, training_recipe
from qtx_ref.backend import Model as ReferenceModel
from qtx_ref.models.initial import init_params
from qtx_torch.backend import Model

from .harness import Call, Row, Skip, compare, near, peak
from .steps import make_trainer, random_batch, shape

BOUND = 1.15


def build(quant: str, compiled: bool, model: str, layers: int, batch: int, length: int) -> Call:
    """A step; `quant` as --train-quant of `qtx train`, empty: in float."""
    spec = shape(model, 0.0, layers)
    trainer = make_trainer(spec, init_params(spec, 0), quant=quant, compiled=compiled)
    data = random_batch(spec, batch, length)
    return lambda: trainer.step(data)


def check(quant: str, model: str, layers: int, batch: int, length: int) -> str:
    """The fake-quantized forward pass is the reference's."""
    spec = shape(model, 0.0, layers)
    params, data = init_params(spec, 0), random_batch(spec, batch, length)
    outputs = []
    for kind in (Model, ReferenceModel):
        bound = kind(spec, params)
        bound.bind(resolve(training_recipe(quant, spec), spec), {})
        outputs.append(bound.forward(data))
    # a code that falls to the other side of a tie moves what follows by a step of its quantizer
    return near(*outputs, 0.1, "to the reference")


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Without dropout, the harder case: then the float step has fused attention, and the quantized one has not."""
    size = ("bert-tiny", 1, 2, 32) if quick else ("bert-base", 2, 8, 128)
    named = f"{size[0]} of {size[1]} layers, {size[2]} x {size[3]}, w8a8"
    for compiled in (False,) if quick else (False, True):
        ours, theirs = build("w8a8", compiled, *size), build("", compiled, *size)
        yield compare(
            f"{named}, {'compiled' if compiled else 'eager'}", ours, "float", theirs,
            rounds=2 if quick else 5, check=lambda: check("w8a8", *size), bound=BOUND,
            mib=peak(build, "w8a8", compiled, *size, compiled=compiled),
            against_mib=peak(build, "", compiled, *size, compiled=compiled),
        )  # fmt: skip
