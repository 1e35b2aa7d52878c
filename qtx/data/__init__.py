"""Data: `load` gives text or images, in three splits that never overlap, as batches that both backends take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qtx_ref.spec import Family, Head, ModelSpec

from .chains import CHAINS, ChainData, open_chain
from .corpus import load_text
from .images import ImageData, load_digits, load_folder
from .labelled import LabelledText, load_labelled
from .rows import has_rows
from .spec import Augmentation, DataSpec, Source
from .splits import SPLITS, DataError
from .text import Section, TextData, unigram_perplexity

__all__ = [
    "SPLITS",
    "ChainData",
    "DataError",
    "DataSpec",
    "ImageData",
    "LabelledText",
    "Section",
    "Source",
    "TextData",
    "load",
    "unigram_perplexity",
]


def load(
    source: DataSpec | str | None,
    spec: ModelSpec,
    *,
    tokenizer: Path | str | None = None,
    vocab: int | None = None,
    seed: int = 0,
    length: int | None = None,
    names: Sequence[str] | None = None,
    scaling: Mapping[str, object] | None = None,
    labelled: bool = False,
) -> TextData | ChainData | ImageData | LabelledText:
    """The data that a model of `spec` trains on; `DataError` where they cannot be had or do not fit it.

    source: what a run's file says of its data, or one source alone: "books" (the default of text models), "digits" (of
    image models), "backcopy" or "unigram" (drawn, of an OPT), or a path: a text file, .jsonl, .csv or .parquet, a
    folder of these but .csv, or hub:NAME. Its text
    trains a tokenizer of at most `vocab` entries (the model's own number if None) on its train split, or takes
    `tokenizer`, a tokenizer.json or the text of one; both need the extra `text`, and what is not text or JSONL the
    extra `data` (`MissingExtra`).
    A classifier of text takes a .csv or .jsonl of text and label, or the books' paragraphs; a headless BERT either
    kind. An image model takes a folder of pictures per class too (extra `images`).
    seed: draws the division of digits, pictures and undivided rows, nothing else; a model must be evaluated under the
    one it was trained under. length: most tokens of a labelled text, as `window`. names: the classes of a trained
    model. scaling: its images' mean and std. labelled: for a classifier still to be made of the model, whatever its
    head and classes.
    """
    if labelled:
        spec = replace(spec, head=Head.NONE, classes=0)
    settings = source if isinstance(source, DataSpec) else DataSpec(sources=name_source(source))
    settings = settings if vocab is None else replace(settings, vocab=vocab)
    if tokenizer is None and settings.tokenizer is not None:
        tokenizer = Path(settings.tokenizer)
    paths = [one.path for one in settings.sources]
    only = paths[0] if len(paths) == 1 else None
    if spec.family is Family.VIT:
        images = load_images(settings, spec, only, tokenizer, seed, names, scaling)
        images.check(spec)
        return images
    if settings.augment != Augmentation():
        raise DataError(f"data augment belongs to images and the model is {spec.family}: leave it out")
    if "digits" in paths:
        raise DataError(f"data 'digits' is images and the model is {spec.family}: use 'books', a path, or a vit model")
    if not set(CHAINS).isdisjoint(paths):
        return open_chain(settings, spec, tokenizer)
    rows = only is not None and has_rows(only)
    if labelled or spec.head is Head.CLASSIFY or (rows and spec.family is Family.BERT and spec.head is Head.NONE):
        if settings.vocab is not None:
            raise DataError(f"vocab {settings.vocab}: labelled text takes the model's own tokenizer; leave it out")
        refuse_settings(replace(settings, window=None), "labelled text")
        length = settings.window if length is None else length
        texts = load_labelled(only, tokenizer, length=length, names=names, seed=seed)
        texts.check(spec)
        return texts
    text = load_text(settings, spec, tokenizer)
    wanted = text.length(spec)
    for split in SPLITS:
        if text.token_count(split) < wanted:
            raise DataError(
                f"{text.source} is too short: its {split} split has {text.token_count(split)} tokens and one window "
                f"takes {wanted}; give more text or a smaller length"
            )
    return text


def name_source(source: str | None) -> tuple[Source, ...]:
    """The sources of a name; none for None. Raises DataError for the empty one."""
    if source == "":
        raise DataError("data is '': give books, a text file or a folder of *.txt")
    return () if source is None else (Source(source),)


def refuse_settings(settings: DataSpec, what: str) -> None:
    """Raises DataError for settings of running text, and for several sources, where the data are something else; their
    order is a permutation whatever is said."""
    if len(settings.sources) > 1:
        raise DataError(f"data are {len(settings.sources)} sources, and {what} has one: give one")
    plain = DataSpec()
    for name in ("window", "packing", "begin", "mask_rate", "held_out"):
        if (value := getattr(settings, name)) != getattr(plain, name):
            raise DataError(f"data {name} is {value}: it belongs to running text, and this is {what}; leave it out")


def load_images(
    settings: DataSpec,
    spec: ModelSpec,
    source: str | None,
    tokenizer: Path | str | None,
    seed: int,
    names: Sequence[str] | None,
    scaling: Mapping[str, object] | None,
) -> ImageData:
    """See `load`."""
    if tokenizer is not None or settings.vocab is not None:
        raise DataError(f"images have no words: leave out the {'vocab' if tokenizer is None else 'tokenizer'}")
    refuse_settings(settings, "a set of images")
    if source in (None, "digits"):
        return load_digits(seed, settings.augment)
    if Path(source).is_dir():
        return load_folder(Path(source), spec, names=names, scaling=scaling, seed=seed, augment=settings.augment)
    raise DataError(f"data {source!r} is not images and the model is a vit: use 'digits', or a text model")
