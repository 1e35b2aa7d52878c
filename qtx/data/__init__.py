"""Data: `load` gives text or images, in three splits that never overlap, as batches that both backends take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qtx_ref.spec import Family, Head, ModelSpec

from .corpus import load_text
from .images import ImageData, load_digits, load_folder
from .labelled import LabelledText, load_labelled
from .rows import has_rows
from .splits import SPLITS, DataError
from .text import Section, TextData, unigram_perplexity

__all__ = [
    "SPLITS",
    "DataError",
    "ImageData",
    "LabelledText",
    "Section",
    "TextData",
    "load",
    "unigram_perplexity",
]


def load(
    source: str | None,
    spec: ModelSpec,
    *,
    tokenizer: Path | str | None = None,
    vocab: int | None = None,
    seed: int = 0,
    length: int | None = None,
    names: Sequence[str] | None = None,
    scaling: Mapping[str, object] | None = None,
    labelled: bool = False,
) -> TextData | ImageData | LabelledText:
    """The data that a model of `spec` trains on; `DataError` where they cannot be had or do not fit it.

    source: "books" (the default of text models), "digits" (of image models), or the path of a text file or of a folder
    of *.txt. A path's text trains a tokenizer of at most `vocab` entries (the model's own number if None) on its train
    split, or takes `tokenizer`, a tokenizer.json; both need the extra `text` (`MissingExtra`).
    A classifier of text takes a .csv or .jsonl of text and label, or the books' paragraphs; a headless BERT either
    kind. An image model takes a folder of pictures per class too (extra `images`).
    seed: draws the division of digits, pictures and undivided rows, nothing else; a model must be evaluated under the
    one it was trained under. length: most tokens of a labelled text. names: the classes of a trained model. scaling:
    its images' mean and std. labelled: for a classifier still to be made of the model, whatever its head and classes.
    """
    if labelled:
        spec = replace(spec, head=Head.NONE, classes=0)
    if spec.family is Family.VIT:
        if tokenizer is not None or vocab is not None:
            raise DataError(f"images have no words: leave out the {'vocab' if tokenizer is None else 'tokenizer'}")
        if source in (None, "digits"):
            images = load_digits(seed)
        elif Path(source).is_dir():
            images = load_folder(Path(source), spec, names=names, scaling=scaling, seed=seed)
        else:
            raise DataError(f"data {source!r} is not images and the model is a vit: use 'digits', or a text model")
        images.check(spec)
        return images
    if source == "digits":
        raise DataError(f"data 'digits' is images and the model is {spec.family}: use 'books', a path, or a vit model")
    rows = source is not None and has_rows(source)
    if labelled or spec.head is Head.CLASSIFY or (rows and spec.family is Family.BERT and spec.head is Head.NONE):
        if vocab is not None:
            raise DataError(f"vocab {vocab}: labelled text takes the model's own tokenizer; leave it out")
        texts = load_labelled(source, tokenizer, length=length, names=names, seed=seed)
        texts.check(spec)
        return texts
    text = load_text(source, tokenizer, vocab, spec.vocab)
    for split in SPLITS:
        if text.token_count(split) < spec.length:
            raise DataError(
                f"{text.source} is too short: its {split} split has {text.token_count(split)} tokens and one window "
                f"takes {spec.length}; give more text or a smaller length"
            )
    return text
