"""Labelled texts: a CSV or JSONL file or the paragraphs of the bundled books, and the batches cut from them.

A row is `text`, `label` and, where the file divides itself, `split`. Class names are the labels, sorted as texts (whole
numbers by value); a class is its place in that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import Family, ModelSpec

from ..engines.protocols import Batch
from .corpus import BOOKS, read_books
from .rows import (
    TextRow,
    divide_rows,
    has_rows,
    join_names,
    read_rows,
    shorten,
)
from .splits import (
    SHORT,
    SPLITS,
    ClassifiedItems,
    DataError,
    check_batch,
    check_split,
    describe_splits,
    digest,
    fingerprint,
    iterate_passes,
)
from .tokenizing import encode_texts, open_tokenizer, read_bundled_tokenizer, read_tokenizer

LENGTH = 128  # tokens of a text with [CLS] and [SEP], unless said otherwise
MULTIPLE = 8  # a batch is as long as its longest text, rounded up to this
PARAGRAPH = 200  # characters of the shortest paragraph of a book


class LabelledText(ClassifiedItems):
    """Labelled texts as token ids. `dropped` counts rows left out because an earlier one has the same text."""

    def __init__(
        self,
        source: str,
        rows: Sequence[TextRow],
        tokenizer_json: str,
        *,
        length: int = LENGTH,
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        """rows: all divided, or none, and then divided here by `seed`, after equal texts were dropped. length: at most
        so many tokens of a text with [CLS] and [SEP]. names: the class names of a trained model; None: those of the
        rows.

        Raises:
            DataError: a text in two splits, a label not among `names`, fewer than two classes, too few rows to divide.
        """
        if length < 3:
            raise DataError(f"length is {length}: give at least 3, a token between [CLS] and [SEP]")
        self.source, self.length, self.seed, self.tokenizer_json = source, length, seed, tokenizer_json
        rows, self.dropped = divide_rows(source, rows, seed)
        self.names = name_classes(source, rows, names)
        self.classes = len(self.names)
        place = {name: index for index, name in enumerate(self.names)}
        tokenizer, self.specials, self.vocab = open_tokenizer(tokenizer_json)
        encoded = encode_texts(tokenizer, [row.text for row in rows])
        self._ids = [np.array(words.ids[: length - 2], np.int64) for words in encoded]
        self._sizes = np.array([len(ids) for ids in self._ids])
        self.labels = np.array([place[row.label] for row in rows], np.int64)
        self._hashes = [digest(row.text.encode())[:SHORT] for row in rows]
        splits = np.array([row.split for row in rows])
        order = stream(seed, "labelled", "order").permutation(len(rows))  # files are often sorted by label
        self._rows = {split: order[splits[order] == split] for split in SPLITS}

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split, labels included."""
        labels = [self.names[label] for label in self.labels_of(split)]
        return fingerprint([f"{text} {label}" for text, label in zip(self.hashes(split), labels, strict=True)])

    def describe(self) -> dict[str, object]:
        """What a checkpoint keeps of its data, as JSON values: enough to open it again with the same classes."""
        return {
            "kind": "labelled",
            "source": self.source,
            "classes": self.classes,
            "names": list(self.names),
            "length": self.length,
            "seed": self.seed,
            "vocab": self.vocab,
            "tokenizer_sha256": digest(self.tokenizer_json.encode()),
            **describe_splits(self),
        }

    def check(self, spec: ModelSpec) -> int:
        """The most tokens a text of a batch has; `DataError` if the model cannot take these texts."""
        if spec.family is not Family.BERT:
            raise DataError(f"{self.source} is labelled text and the model is {spec.family}: use a bert model")
        if self.vocab > spec.vocab:
            raise DataError(f"the text has {self.vocab} token ids, the model {spec.vocab}: give the model's tokenizer")
        if spec.classes and spec.classes < self.classes:
            raise DataError(f"{self.source} has {self.classes} classes and the model {spec.classes}: fine-tune it anew")
        for name in ("pad", "cls", "sep"):
            if getattr(self.specials, name) is None:
                raise DataError(f"the tokenizer has no [{name.upper()}] token: give one that has")
        if spec.length < 3:
            raise DataError(f"model length is {spec.length}: BERT needs at least 3, a token between [CLS] and [SEP]")
        return min(self.length, spec.length)

    def train_batches(
        self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Batches of the train split, without end, from step `start` on; every text once per pass, newly shuffled,
        texts of like length together.

        Batch `step` depends on (seed, step) alone. rows: those of a batch that are made, as long as the batch's longest
        text; None: all.
        """
        limit = self.check(spec)
        texts = self._rows["train"]
        check_batch(batch_size, len(texts), "train texts")
        own = rows or slice(None)
        batches = iterate_passes(texts, batch_size, seed, start, self._sizes)
        return (self._batch(chosen, limit, own) for chosen in batches)

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """The split once, in an order drawn when the data were loaded, so that its first batches have every class; at
        most `limit` batches, the last may be smaller. Nothing is drawn from `seed`. Raises DataError as `check`."""
        longest = self.check(spec)
        check_split(split)
        rows = self._rows[split]
        if not len(rows):
            raise DataError(f"{self.source} has no {split} rows: add some, or leave out its column split")
        check_batch(batch_size, max(len(rows), batch_size), f"{split} texts")
        rows = rows if limit is None else rows[: limit * batch_size]
        return (self._batch(rows[low : low + batch_size], longest) for low in range(0, len(rows), batch_size))

    def _batch(self, rows: np.ndarray, limit: int, own: slice = slice(None)) -> Batch:
        """[CLS] text [SEP] of the rows in `own`, cut to `limit` tokens, T the longest of all rows rounded up: tokens,
        mask, types (B, T)."""
        longest = min(int(self._sizes[rows].max()), limit - 2) + 2
        width = min(-(-longest // MULTIPLE) * MULTIPLE, limit)
        rows = rows[own]
        texts = [self._ids[row][: limit - 2] for row in rows]
        tokens = np.full((len(rows), width), self.specials.pad, np.int64)  # (B, T)
        size = np.array([len(text) + 2 for text in texts])
        for line, text in zip(tokens, texts, strict=True):
            line[: len(text) + 2] = [self.specials.cls, *text, self.specials.sep]
        mask = np.arange(width) < size[:, None]
        return {"tokens": tokens, "mask": mask, "types": np.zeros_like(tokens), "labels": self.labels[rows]}


def name_classes(source: str, rows: Sequence[TextRow], known: Sequence[str] | None) -> tuple[str, ...]:
    """The class names, sorted; those of a model, in its order, where it has some.

    Raises DataError for a label that is not among `known`, or for a single one.
    """
    counts = Counter(row.label for row in rows)
    if known is not None:
        for row in rows:
            if row.label not in known:
                raise DataError(f"{row.where} has the label {shorten(row.label)}; the model knows {join_names(known)}")
        return tuple(known)
    if len(counts) < 2:
        raise DataError(
            f"{source} has the label {join_names(list(counts))} alone: a classifier needs two classes at least"
        )
    whole = all(label.isascii() and label.removeprefix("-").isdigit() for label in counts)
    return tuple(sorted(counts, key=(lambda label: (int(label), label)) if whole else str))


def read_book_rows() -> list[TextRow]:
    """Paragraphs of the bundled books of at least 200 characters; label: the book; split: that of its chapter."""
    rows = []
    for passage in read_books():
        book = next(book for book in BOOKS.values() if passage.title.startswith(f"{book}: "))
        for number, paragraph in enumerate(passage.text.split("\n\n"), 1):
            text = " ".join(paragraph.split())
            if len(text) >= PARAGRAPH:
                rows.append(TextRow(f"{passage.title}, paragraph {number}", text, book, passage.split))
    return rows


def load_labelled(
    source: str | None,
    tokenizer: Path | str | None,
    *,
    length: int | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> LabelledText:
    """See `qtx.data.load`. Raises DataError where text other than the books has no tokenizer."""
    books = source in (None, "books")
    if source is not None and not books and not has_rows(source):
        raise DataError(f"data {source!r} is not labelled text: give books, or a .csv or .jsonl file of text and label")
    rows = read_book_rows() if books or source is None else read_rows(Path(source))
    if tokenizer is None and not books:
        raise DataError(f"{source} needs the model's tokenizer: give --tokenizer")
    tokenizer_json = read_tokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer or read_bundled_tokenizer()
    return LabelledText(
        source or "books", rows, tokenizer_json, length=LENGTH if length is None else length, names=names, seed=seed
    )
