"""Rows of a CSV or JSONL file: `text`, `label` where there is one and, where the file divides itself, `split`."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from qtx_ref.random import stream

from .reading import TEXT_BYTES, read_regular
from .splits import SPLITS, DataError, name_splits

SUFFIXES = (".csv", ".jsonl")
KEYS = ("text", "label", "split")
PAIRS = (
    "text_pair",
    "text_b",
    "text2",
    "sentence2",
    "sentence_b",
    "hypothesis",
    "premise",
    "question",
)  # second texts, which change the first
LABEL = 200  # characters of the longest label


class TextRow(NamedTuple):
    """A text before it is tokenized. `where` names its place in the file; `label` and `split` are "" where it has
    none."""

    where: str
    text: str
    label: str
    split: str


def has_rows(source: str | Path) -> bool:
    """Whether a name's ending says that the file holds rows, not running text."""
    return Path(source).suffix.lower() in SUFFIXES


def read_text(path: Path, most: int = TEXT_BYTES) -> str:
    """A file's text, newlines as \\n, no blanks at line ends.

    Raises DataError: no regular file, above `most` bytes, empty, or not UTF-8 text.
    """
    try:
        raw = read_regular(path, most)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file of text that can be read") from None
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16: convert it to UTF-8")
    if b"\0" in raw:
        raise DataError(f"{path} holds NUL bytes, so it is not text: give plain UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8") from None
    text = "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")).strip("\n")
    if not text:
        raise DataError(f"{path} is empty: give text, or remove the file")
    return text


def read_rows(path: Path, labelled: bool = True) -> list[TextRow]:
    """The rows of a .csv or .jsonl file; says on stderr which of its columns are not read.

    labelled: every row must have a label; else it is not read.

    Raises:
        DataError: the file cannot be read, or a row cannot be used; it names the row.
    """
    text = read_text(path)
    needed = KEYS[:2] if labelled else KEYS[:1]
    given = iterate_csv(path, text, needed) if path.suffix.lower() == ".csv" else iterate_json(path, text.split("\n"))
    rows: list[TextRow] = []
    ignored: set[str] = set()
    for where, values in given:
        rows.append(make_row(where, values, labelled))
        ignored |= values.keys() - {*needed, "split"}
    if not rows:
        raise DataError(f"{path} has no rows: give {' and '.join(needed)}")
    if ignored:
        names = sorted(str(name) for name in ignored)
        sys.stderr.write(f"{path}: not read are the columns {join_names(names)}\n")
    return rows


def iterate_csv(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """(place in words, cells by column) of each row; the first line must name the columns in `needed`. DataError names
    the row that has other cells than the first line."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a whole review may be one field
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        for name in needed:
            if name not in columns:
                named = "text, label" if "label" in needed else "text"
                raise DataError(f"{path} has no column {name}: its first line must name {named} and, if any, split")
        for name in (*KEYS, *PAIRS):
            if columns.count(name) > 1:
                raise DataError(f"{path} has {columns.count(name)} columns {name}: keep one")
        for number, values in enumerate(reader, 1):
            if None in values or None in values.values():
                raise DataError(f"{path} row {number} has not as many cells as the first line names")
            yield f"{path} row {number}", dict(values)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num} is no CSV ({error}): quote texts that hold commas") from None


def iterate_json(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """(place in words, values by key) of each line that is not blank. DataError names the line that is no object."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(line, object_pairs_hook=refuse_repeated)
        except DataError as error:
            raise DataError(f"{where} {error}") from None
        except (json.JSONDecodeError, RecursionError):
            raise DataError(f"{where} is no JSON: give one object per line") from None
        except ValueError:  # Python's bound on the digits of a whole number
            raise DataError(f"{where} holds a number of thousands of digits: give it as a text, or remove it") from None
        if not isinstance(values, dict):
            raise DataError(f"{where} is no object: give text and label")
        yield where, values


def refuse_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON. Raises DataError where one of our keys stands twice, of which Python would take the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        for name in KEYS:
            if keys.count(name) > 1:
                raise DataError(f"has {keys.count(name)} values of {name}: keep one")
    return values


def make_row(where: str, values: Mapping[str, object], labelled: bool = True) -> TextRow:
    """A row of its values. Raises DataError: no text, a second text, a label or a split that is none."""
    text, label, split = values.get("text"), values.get("label"), values.get("split") or ""
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where} has no text: remove the row, or give it one")
    for name, content in (("text", text), ("label", label)):
        if isinstance(content, str) and any("\ud800" <= character <= "\udfff" for character in content):
            raise DataError(f"{where}: {name} holds half a surrogate pair, which is no character: remove it")
    for name in values:
        if name.lower() in PAIRS and values[name] not in (None, ""):
            raise DataError(f"{where} has a {name}: pairs of texts are not read; give one text a row, as text")
    if not isinstance(split, str) or (split and split not in SPLITS):
        raise DataError(f"{where} has the split {shorten(split)}: choose one of {', '.join(SPLITS)}")
    if not labelled:
        return TextRow(where, text, "", split)
    if isinstance(label, bool) or not isinstance(label, (str, int)) or not str(label).strip():
        raise DataError(f"{where} has the label {shorten(label)}: give a text or a whole number")
    name = str(label).strip()
    if len(name) > LABEL:
        raise DataError(f"{where} has a label of {len(name)} characters: give at most {LABEL}")
    return TextRow(where, text, name, split)


def shorten(value: object) -> str:
    """A value as Python writes it, for an error's one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def join_names(names: Sequence[str], most: int = 8) -> str:
    """The first few names, each at most 80 characters, for people."""
    first = ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:most])
    return first + (f" and {len(names) - most} more" if len(names) > most else "")


def keep_different(source: str, rows: Sequence[TextRow]) -> tuple[list[TextRow], int]:
    """Rows of which all have a split, or none; and how many were dropped. Rows that have a split all stay; of others
    the first with a text.

    Raises:
        DataError: some rows have a split and others none, a text in two splits or, where one of them would be dropped,
            under two labels, or fewer different texts than splits.
    """
    first: dict[str, TextRow] = {}
    divided = all(row.split for row in rows)
    doubtful = []
    for row in rows:
        if row.split and not divided:
            raise DataError(f"{row.where} has a split and other rows have none: give every row one, or none")
        twin = first.setdefault(row.text, row)
        if twin.split != row.split:
            raise DataError(
                f"{row.where} of the {row.split} split has the text of {twin.where} of {twin.split}: remove one"
            )
        if twin.label != row.label:
            doubtful.append((row, twin))
    if doubtful:
        row, twin = doubtful[0]
        labels = f"labels {shorten(row.label)} and {shorten(twin.label)}"
        if not divided:
            raise DataError(f"{row.where} has the text of {twin.where}, with {labels}: remove one")
        count = len(doubtful)
        sys.stderr.write(
            f"{source}: {count} row{'s' * (count > 1)} with the text of an earlier one and another label, the first "
            f"{row.where} ({labels}); all are kept\n"
        )
    if divided:
        return list(rows), 0
    if len(first) < len(SPLITS):
        raise DataError(f"{source} has {len(first)} different text(s) and each of {', '.join(SPLITS)} needs one")
    return list(first.values()), len(rows) - len(first)


def divide_rows(source: str, rows: Sequence[TextRow], seed: int) -> tuple[list[TextRow], int]:
    """Rows with their splits, and how many were dropped. Rows that have a split keep it; others are divided by `seed`.

    Raises DataError as `keep_different`.
    """
    kept, dropped = keep_different(source, rows)
    if kept and kept[0].split:
        return kept, dropped
    order = stream(seed, "labelled", "split").permutation(len(kept))
    names = [""] * len(kept)
    for at, split in zip(order, name_splits(len(kept)), strict=True):
        names[at] = split
    return [row._replace(split=split) for row, split in zip(kept, names, strict=True)], dropped
