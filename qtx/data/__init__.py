"""Data: `load` gives text or images, in three splits that never overlap, as batches that both backends take."""

from __future__ import annotations

from pathlib import Path

from qtx.data.corpus import load_text
from qtx.data.images import ImageData, digits
from qtx.data.splits import SPLITS, DataError
from qtx.data.text import Section, TextData, unigram_perplexity
from qtx_ref.spec import Family, Head, ModelSpec

__all__ = ["SPLITS", "DataError", "ImageData", "Section", "TextData", "load", "unigram_perplexity"]


def load(
    source: str | None,
    spec: ModelSpec,
    *,
    tokenizer: Path | str | None = None,
    vocab: int | None = None,
    seed: int = 0,
) -> TextData | ImageData:
    """The data that a model of `spec` trains on; `DataError` where they cannot be had or do not fit it.

    source: "books" (the default of text models), "digits" (of image models), or the path of a text file or of a folder
    of *.txt. A path's text trains a tokenizer of at most `vocab` entries (the model's own number if None) on its train
    split, or takes `tokenizer`, a tokenizer.json; both need the extra `text` (`MissingExtra`).
    seed: draws the division of the digits, nothing else; a model must be evaluated under the one it was trained under.
    """
    if spec.family is Family.VIT:
        if source not in (None, "digits"):
            raise DataError(f"data {source!r} is not images and the model is a vit: use 'digits', or a text model")
        if tokenizer is not None or vocab is not None:
            raise DataError(f"images have no words: leave out the {'vocab' if tokenizer is None else 'tokenizer'}")
        images = digits(seed)
        images.check(spec)
        return images
    if source == "digits":
        raise DataError(f"data 'digits' is images and the model is {spec.family}: use 'books', a path, or a vit model")
    if spec.head is Head.CLASSIFY:
        raise DataError("head 'classify' needs labelled text, which this data is not: use the head mlm")
    text = load_text(source, tokenizer, vocab, spec.vocab)
    for split in SPLITS:
        if text.token_count(split) < spec.length:
            raise DataError(
                f"{text.source} is too short: its {split} split has {text.token_count(split)} tokens and one window "
                f"takes {spec.length}; give more text or a smaller length"
            )
    return text
