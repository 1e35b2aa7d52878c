"""What a model may be given and asked: batches, tokens to go on from, masks of elements, the limits of generation.

Each rule stands here once and speaks of shapes, kinds of dtype and ends of ranges alone; arrays are NumPy's, known by
those attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import SpecError
from .model import Family, Head, ModelSpec
from .quant import Quant, is_local

__all__ = [
    "MASKS",
    "READ",
    "check_batch",
    "check_generation",
    "check_marks",
    "check_tokens",
    "check_where",
    "check_whole",
]

KEYS = {
    Family.BERT: ("tokens", "types", "mask"),
    Family.OPT: ("tokens", "mask"),
    Family.VIT: ("images",),
}
MASKS = "give booleans, or an additive mask of 0 (attend) and -10000 or below"
# the keys of a batch that anything reads; others are left alone
READ = ("tokens", "types", "mask", "images", "spared", "targets", "labels", "soft_labels")


def check_batch(spec: ModelSpec, batch: Mapping[str, Any], *, integer: bool = False) -> None:
    """Raises SpecError where arrays are not a batch of this model, naming the first that is not. integer: of a model in
    integers, which spares no token.

    `tokens` (B, T): whole numbers from 0 to below `vocab`; B >= 1 and T from 1 to the model's length. `types` (B, T),
    of BERT: to below `types`. `mask` (B, T): its values are read by `attention.boolean_mask`. `images`
    (B, channels, S, S): numbers, NaN and infinities among them. `targets` (B, T) of a language model, to below
    `vocab`, and `labels` (B,) of a classifier, to below `classes`: whole numbers, negative where nothing is asked.
    `soft_labels` (B, classes), beside `labels`: the weights that a loss gives the classes, numbers. `spared` (B, T):
    booleans, true at tokens whose activations quantizers leave in float and ranges do not see; of a ViT's places the
    first is the class token, and patches count from where it stands before them.
    """
    for key in KEYS[spec.family]:
        if key not in batch:
            raise SpecError(f"batch has no {key}: {spec.family} takes {', '.join(KEYS[spec.family])}")
    if spec.family is Family.VIT:
        images = batch["images"]
        want = (spec.channels, spec.image_size, spec.image_size)
        if len(images.shape) != 4 or images.shape[1:] != want or not images.shape[0]:
            raise SpecError(
                f"images have shape {images.shape}: give (images, {', '.join(map(str, want))}), one or more"
            )
        if images.dtype.kind not in "biuf":
            raise SpecError(f"images are {images.dtype}: give numbers")
        rows = images.shape[:1]
    else:
        check_tokens(spec, batch["tokens"])
        rows = batch["tokens"].shape
        if batch["mask"].shape != rows:
            raise SpecError(f"mask has shape {batch['mask'].shape} beside tokens {rows}: give one value per token")
        if spec.family is Family.BERT:
            check_whole("types", batch["types"], rows, 0, spec.types)
    if "spared" in batch:
        if integer:
            raise SpecError("batch has spared tokens, which stay in float: a model in integers has none; leave it out")
        check_marks(spec, batch, {"spared": batch["spared"]})
    if "targets" in batch and spec.head in (Head.MLM, Head.CAUSAL):
        check_whole("targets", batch["targets"], rows, None, spec.vocab)
    if "labels" in batch and spec.head is Head.CLASSIFY:
        check_whole("labels", batch["labels"], rows[:1], None, spec.classes)
        if "soft_labels" in batch:
            soft, shape = batch["soft_labels"], (*rows[:1], spec.classes)
            if soft.shape != shape or soft.dtype.kind != "f":
                raise SpecError(f"soft_labels are {soft.dtype} of shape {soft.shape}: give floats of shape {shape}")


def check_tokens(spec: ModelSpec, tokens: Any) -> None:
    """Raises SpecError where an array is not tokens (B, T) of this model, as `check_batch` says."""
    if len(tokens.shape) != 2 or 0 in tokens.shape:
        raise SpecError(f"tokens have shape {tokens.shape}: give (sequences, tokens), one or more of each")
    if tokens.shape[1] > spec.length:
        raise SpecError(f"tokens have shape {tokens.shape}: the model's length is {spec.length}; cut the text")
    check_whole("tokens", tokens, tokens.shape, 0, spec.vocab)


def check_whole(name: str, x: Any, want: tuple[int, ...], low: int | None, limit: int) -> None:
    """Raises SpecError where x has another shape, is not of whole numbers, or one is below `low` or not below
    `limit`."""
    if x.shape != want:
        raise SpecError(f"{name} have shape {x.shape}: give {want}")
    if x.dtype.kind not in "iu":
        raise SpecError(f"{name} are {x.dtype}: give whole numbers, such as int64")
    first, last = int(x.min()), int(x.max())
    below = low is not None and first < low
    if below or last >= limit:
        raise SpecError(
            f"{name} hold {first if below else last}: give {'at most' if low is None else f'{low} to'} {limit - 1}"
        )


def check_marks(spec: ModelSpec, batch: Mapping[str, Any], marks: Mapping[str, Any]) -> None:
    """Raises SpecError where a mark is not boolean with one value per place of the batch, (B, T)."""
    want = (len(batch["images"]), spec.length) if spec.family is Family.VIT else batch["tokens"].shape
    for name, mark in marks.items():
        if mark.shape != want or mark.dtype.kind != "b":
            raise SpecError(f"mark {name} is {mark.dtype} of shape {mark.shape}: give booleans of shape {want}")


def check_where(boolean: bool, where: tuple[int, ...], values: tuple[int, ...]) -> None:
    """Raises ValueError where a mask of this shape is not boolean or does not broadcast to the shape of its values."""
    if not boolean:
        raise ValueError("a mask of elements that count is boolean")
    fits = all(n in (1, size) for n, size in zip(reversed(where), reversed(values), strict=False))
    if len(where) > len(values) or not fits:
        raise ValueError(f"a mask of shape {where} does not broadcast to values of shape {values}")


def check_generation(spec: ModelSpec, quants: Mapping[str, Quant], length: int) -> None:
    """Raises SpecError where a model cannot generate `length` tokens in all under these quantizers."""
    if spec.family is not Family.OPT:
        raise SpecError(f"model family is {spec.family}: only a causal model (opt) generates")
    if length > spec.length:
        have = f"text of {length} tokens, given and new: the model's length is {spec.length}"
        raise SpecError(f"{have}; ask for fewer tokens, or give a shorter text")
    for site, quant in quants.items():
        local = is_local(quant) and quant.outliers is None  # a channel of outliers is one for all tokens
        if quant.dynamic and not local and not site.endswith(".weight"):
            raise SpecError(
                f"site {site} has a dynamic range over more than one token, so it would see the future: "
                "use a static range, or one per token or block"
            )
