"""The paper's compute-cost table (Bondarenko et al. 2023, appendix): what clipped softmax and each gate add to a
model."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import shapes
from qtx_ref.presets import attention
from qtx_ref.spec import (
    AttentionSpec,
    Head,
    ModelSpec,
    Softmax,
    SpecError,
    to_dict,
)

from ..progress import Progress
from .compare import Workers
from .inputs import synthesize, write_batch
from .worker import WARM

DEFAULT = "vanilla,clipped,head,gated,mlp,all_features,elementwise"
UNFUSED = "vanilla, no fused kernel"


def count_parameters(spec: ModelSpec) -> int:
    """How many numbers a model's parameters are."""
    return sum(prod(shape) for shape in shapes(spec).values())


def count_added_parameters(spec: ModelSpec, name: str) -> tuple[int, float]:
    """How many an attention adds to the vanilla model of the same shape, and in percent of it."""
    vanilla = count_parameters(replace(spec, attention=AttentionSpec()))
    added = count_parameters(replace(spec, attention=attention(name))) - vanilla
    return added, 100 * added / vanilla


def attention_cost(
    workers: Workers,
    spec: ModelSpec,
    names: tuple[str, ...],
    sizes: list[tuple[int, int]],
    rounds: int,
    folder: Path,
    *,
    training: bool,
) -> list[dict[str, Any]]:
    """Per attention and size: parameters added, and the median over rounds of the pass's ratio to vanilla's, which runs
    in the same rounds; of new parameters and random inputs, which the time does not depend on.

    On torch vanilla runs a second time without its fused kernel: what clipping loses by it alone.
    Raises SpecError where one cannot be measured.
    """
    if training and spec.head is Head.NONE:
        raise SpecError("--training needs a model with a head: without one there is no loss")
    names = ("vanilla", *(name for name in names if name != "vanilla"))
    for name in names:
        replace(spec, attention=attention(name))  # refuses what this family has not
    variants, unfused = {name: name for name in names}, []
    if workers.common["backend"] == "torch":
        variants, unfused = variants | {UNFUSED: "vanilla"}, [UNFUSED]
    cells = {}
    for size, length in sizes:
        cells[f"{size}x{length}"] = str(folder / f"{size}x{length}.inputs")
        write_batch(Path(cells[f"{size}x{length}"]), synthesize(spec, size, length))
    with Progress("attentions", len(variants) * len(cells) * (rounds + WARM) * (1 + training)) as bar:
        result = workers.run(
            "attentions",
            bar,
            spec=to_dict(spec),
            variants=variants,
            unfused=unfused,
            cells=cells,
            rounds=rounds,
            training=training,
        )
    if "error" in result:
        raise SpecError(f"the attentions could not be timed: {result['error']}")
    rows = []
    for cell in cells:
        for name, text in variants.items():
            added, share = count_added_parameters(spec, text)
            row = {
                "attention": name,
                "cell": cell,
                "parameters": added,
                "percent": share,
                "fused": attention(text).softmax is Softmax.PLAIN and name != UNFUSED and bool(unfused),
            }
            for kind in ("forward", "step"):
                if seconds := result[kind].get(cell):
                    base = np.array(seconds["vanilla"])
                    row[kind] = float(np.median(seconds[name]))
                    row[f"{kind}_ratio"] = float(np.median(np.array(seconds[name]) / base))
            rows.append(row)
    return rows
