"""Documents, one after another in bounded memory, from a text file of any size, JSONL, Parquet, a folder of these, a
data set that the library `datasets` saved, or one of the hub.

A document is a line of JSONL, a row of Parquet or of a data set, a file of a folder. One of more than `LONGEST`
characters, as a large text file is, is cut into blocks at the ends of its paragraphs or lines.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..engines.backend import need
from .chains import CHAINS
from .reading import open_regular, read_regular
from .rows import has_rows, iterate_json, make_row
from .splits import SPLITS, DataError
from .walking import list_files

BUNDLED_NAMES = ("books", "digits", *CHAINS)
HUB = "hub:"  # begins the name of a data set of the Hugging Face hub
LARGE = 2**24  # bytes of text files beyond which they are read as documents, and not whole
LONGEST = 2**20  # characters of a document
BLOCK = 2**16  # characters of a block, at least; four times as many at most
READ = 2**20  # characters or bytes read at once
LINE = 2**28  # bytes of a line of JSONL
SAVED = ("dataset_info.json", "state.json")  # in a folder that datasets.save_to_disk made
MANY = "dataset_dict.json"  # in one of several
SUFFIXES = (".txt", ".jsonl", ".parquet")
NOT_TEXT = {  # endings of files that hold text as something else; any other is taken for text
    ".json": "give .jsonl, one object with a text on each line",
    ".ndjson": "name it .jsonl",
    ".gz": "unpack it first",
    **dict.fromkeys((".zip", ".bz2", ".xz", ".zst", ".7z", ".tar"), "unpack it first"),
    **dict.fromkeys(
        (".arrow", ".feather", ".tsv", ".xlsx"), "write it as .csv, .jsonl or .parquet, with a column text"
    ),
    **dict.fromkeys((".html", ".htm", ".xml", ".pdf", ".docx", ".ipynb"), "take its plain text"),
}


class Document(NamedTuple):
    """A text and its place in words; `split` is "" where the source does not say it."""

    where: str
    text: str
    split: str = ""


@dataclass(frozen=True)
class Documents:
    """A source that is read as documents. `files` are those that hold it, () for one of the hub."""

    source: str
    files: tuple[Path, ...]

    def read(self) -> Iterator[Document]:
        """Every document in order, also those that are empty. Raises DataError where one cannot be read, naming it, and
        MissingExtra without the package that reads it."""
        if self.source.startswith(HUB):
            return read_hub(self.source.removeprefix(HUB))
        if is_saved(Path(self.source)):
            return read_saved(Path(self.source))
        return (document for file in self.files for document in read_file(file))

    def count_bytes(self) -> int:
        """About how many bytes of text there are, to tell how far the reading is; 0 where that is not known."""
        return sum(count_parquet(f) if f.suffix.lower() == ".parquet" else f.stat().st_size for f in self.files)

    def fingerprint(self) -> str:
        """The sha256 of its content, whatever its files are called; of the hub's, of its name and version."""
        if self.source.startswith(HUB):
            return hashlib.sha256(f"{self.source} {hub_version(self.source.removeprefix(HUB))}".encode()).hexdigest()
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(f"{file.suffix.lower()} {hash_file(file)}\n".encode())
        return whole.hexdigest()


def open_documents(source: str) -> Documents | None:
    """A source that is read as documents; None for one that is read whole: running text, CSV or JSONL up to `LARGE`.

    Raises DataError where it cannot be looked at, or is several sets in one.
    """
    if source.startswith(HUB):
        if not source.removeprefix(HUB):
            raise DataError(f"data {source!r} names no data set: give hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
        return Documents(source, ())
    path = Path(source)
    if (path / MANY).is_file():
        names = sorted(item.name for item in path.iterdir() if is_saved(item))
        raise DataError(f"{path} holds the data sets {', '.join(names)}: give one of them, such as {path / names[0]}")
    if is_saved(path):
        return Documents(source, list_saved(path))
    files = [path]
    if path.is_dir():
        files = list_files(path, SUFFIXES)
        if files and (others := list_files(path, (".csv", *NOT_TEXT), say=False)):
            sys.stderr.write(
                f"{path}: not read: {len(others)} file(s) that are no {', '.join(SUFFIXES)}, "
                f"{others[0].relative_to(path)} first\n"
            )
    try:
        size = sum(file.stat().st_size for file in files)
    except OSError:
        return None  # whoever reads it says what is wrong
    endings = {file.suffix.lower() for file in files}
    if not files or endings & {".csv", *NOT_TEXT}:
        return None
    known = {".txt"} if path.is_dir() else endings - {".parquet"}
    if endings <= known and size <= LARGE:
        return None
    return Documents(source, tuple(files))


def is_there(source: str) -> bool:
    """Whether a source can be looked for under its name: bundled, of the hub, or a file or folder that exists."""
    return source in BUNDLED_NAMES or source.startswith(HUB) or Path(source).exists()


def is_saved(path: Path) -> bool:
    """Whether a folder is what `datasets.Dataset.save_to_disk` makes."""
    return all((path / name).is_file() for name in SAVED)


def list_saved(path: Path) -> tuple[Path, ...]:
    """The files of a data set that was saved, in the order in which it has their rows. Raises DataError."""
    try:
        return tuple(path / one["filename"] for one in json.loads(read_regular(path / SAVED[1]))["_data_files"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise DataError(f"{path} cannot be opened as a data set ({SAVED[1]} is damaged): save it again") from None


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file, by its ending. Raises DataError and MissingExtra."""
    if path.suffix.lower() == ".parquet":
        return cut_long(read_parquet(path))
    if has_rows(path):
        return cut_long(read_lines(path))
    return read_running(path)


def read_running(path: Path) -> Iterator[Document]:
    """A file of running text: one document, or its blocks where it is longer."""
    try:
        with open_regular(path) as raw:
            if raw.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):  # type: ignore[attr-defined]
                raise DataError(f"{path} is UTF-16: convert it to UTF-8")
            yield from cut(str(path), decode(path, raw))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file of text that can be read") from None


def decode(path: Path, raw: Iterable[bytes]) -> Iterator[str]:
    """The text of an open file, in pieces of `READ` characters. Raises DataError where it is none."""
    with io.TextIOWrapper(raw, encoding="utf-8-sig") as text:  # type: ignore[type-var]
        while True:
            before = raw.tell()  # type: ignore[attr-defined]
            try:
                piece = text.read(READ)
            except UnicodeDecodeError as error:
                where = before + error.start
                raise DataError(f"{path} is not UTF-8 (near byte {where}): convert it to UTF-8") from None
            if "\0" in piece:
                raise DataError(f"{path} holds NUL bytes, so it is not text: give plain UTF-8 text")
            if not piece:
                return
            yield piece


def cut(where: str, pieces: Iterable[str]) -> Iterator[Document]:
    """A text that comes in pieces: as one document, or as blocks where it has more than `LONGEST` characters. Blanks at
    line ends are left out.

    A block ends where the first paragraph ends after `BLOCK` characters or, where that is too far, the first line or
    word.
    """
    buffer, number = "", 0
    for piece in pieces:
        buffer += piece
        low = 0
        while len(buffer) - low > LONGEST:
            number, high = number + 1, find_end(buffer, low)
            yield Document(f"{where} block {number}", strip_lines(buffer[low:high]))
            low = high
        buffer = buffer[low:]
    low = 0
    while number and len(buffer) - low > 4 * BLOCK:
        number, high = number + 1, find_end(buffer, low)
        yield Document(f"{where} block {number}", strip_lines(buffer[low:high]))
        low = high
    yield Document(f"{where} block {number + 1}" if number else where, strip_lines(buffer[low:]))


def find_end(text: str, low: int) -> int:
    """Where the block ends that begins at `low`."""
    for gap in ("\n\n", "\n", " "):
        at = text.find(gap, low + BLOCK, low + 4 * BLOCK)
        if at >= 0:
            return at + len(gap)
    return low + 4 * BLOCK


def strip_lines(text: str) -> str:
    """A text without blanks at line ends, and without empty lines around it."""
    return "\n".join(map(str.rstrip, text.split("\n"))).strip("\n")


def cut_long(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents, of which those of more than `LONGEST` characters are cut into blocks; these keep their split."""
    for document in documents:
        if len(document.text) <= LONGEST:
            yield document
        else:
            for block in cut(document.where, [document.text]):
                yield block._replace(split=document.split)


def read_lines(path: Path) -> Iterator[Document]:
    """A file of JSONL. Raises DataError naming the line that is no object or has no text."""
    try:
        with open_regular(path) as raw:
            for where, values in iterate_json(path, decode_lines(path, raw)):
                yield take_text(where, values)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file that can be read") from None


def decode_lines(path: Path, raw: Iterable[bytes]) -> Iterator[str]:
    """The lines of an open file. Raises DataError where one is too long or no text."""
    number = 0
    while line := raw.readline(LINE + 1):  # type: ignore[attr-defined]
        number += 1
        if len(line) > LINE:
            raise DataError(f"{path} line {number} has more than {LINE} bytes: is it JSONL?")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path} line {number} is not UTF-8: convert it to UTF-8") from None


def take_text(where: str, values: dict[str, object]) -> Document:
    """The document of a row. One whose text is empty or null is empty. Raises DataError where it has no text at all,
    a second one, or a split that is none."""
    if "text" not in values:
        raise DataError(f"{where} has no text: give it one, under the name text, or remove it")
    if values["text"] is None or (isinstance(values["text"], str) and not values["text"].strip()):
        return Document(where, "")
    row = make_row(where, values, labelled=False)
    return Document(where, row.text, row.split)


def read_parquet(path: Path) -> Iterator[Document]:
    """The column text of a Parquet file, and its split where it has one. Raises DataError naming the file."""
    parquet = need("pyarrow.parquet", "data", "a Parquet file")
    lib = need("pyarrow", "data", "a Parquet file")
    try:
        number = 0
        with open_regular(path) as raw:
            file = parquet.ParquetFile(raw)
            check_columns(str(path), file.schema_arrow)
            columns = [name for name in ("text", "split") if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield take_text(f"{path} row {number}", values)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}): give a whole Parquet file") from None
    except lib.ArrowException as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}): give a whole Parquet file") from None
    except UnicodeDecodeError:  # the format says UTF-8, and nothing checked it when the file was written
        raise DataError(f"{path} holds a text after row {number} that is not UTF-8: convert it to UTF-8") from None


def count_parquet(path: Path) -> int:
    """The bytes of a Parquet file's column text, unpacked; 0 where it cannot be read, which its reader says."""
    parquet = need("pyarrow.parquet", "data", "a Parquet file")
    lib = need("pyarrow", "data", "a Parquet file")
    try:
        about = parquet.read_metadata(path)
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        columns = [group.column(at) for group in groups for at in range(group.num_columns)]
        return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
    except (OSError, lib.ArrowException):
        return 0


def check_columns(source: str, schema: Iterable[object]) -> None:
    """Raises DataError where a table has no column text of strings."""
    kinds = {field.name: str(field.type) for field in schema}  # type: ignore[attr-defined]
    if "text" not in kinds:
        raise DataError(f"{source} has no column text, and has {', '.join(sorted(kinds)) or 'none'}: rename one")
    if kinds["text"] not in ("string", "large_string", "string_view"):
        raise DataError(f"{source}: the column text holds {kinds['text']}: give strings")


def read_saved(path: Path) -> Iterator[Document]:
    """A data set that the library datasets saved. Raises DataError where it cannot be read."""
    lib = need("datasets", "data", f"the data set {path}")
    try:
        rows = lib.load_from_disk(str(path))
        check_columns(str(path), rows.features.arrow_schema)
        rows = rows.select_columns([name for name in ("text", "split") if name in rows.column_names])
        for number, values in enumerate(rows, 1):
            yield from cut_long([take_text(f"{path} row {number}", values)])
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # whatever a damaged folder leads to
        raise DataError(f"{path} cannot be opened as a data set ({shorten_error(error)}): save it again") from None


def read_hub(name: str) -> Iterator[Document]:
    """The train rows of a data set of the hub, OWNER/NAME or OWNER/NAME:CONFIGURATION, streamed. Raises DataError where
    it cannot be had."""
    lib = need("datasets", "data", f"the data set {name} of the hub")
    try:
        rows = lib.load_dataset(*name.split(":", 1), split="train", streaming=True)
        for number, values in enumerate(rows, 1):
            yield from cut_long([take_text(f"{HUB}{name} row {number}", values)])
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # the library's and its network's many
        raise DataError(
            f"{HUB}{name} cannot be read ({shorten_error(error)}): check its name and the network"
        ) from None


def hub_version(name: str) -> str:
    """Which commit a data set of the hub is at. Raises DataError where the hub does not say."""
    hub = need("huggingface_hub", "data", f"the data set {name} of the hub")
    try:
        return str(hub.HfApi().dataset_info(name.partition(":")[0]).sha)
    except Exception as error:
        raise DataError(
            f"{HUB}{name} cannot be found ({shorten_error(error)}): check its name and the network"
        ) from None


def shorten_error(error: Exception) -> str:
    """An error of a library in one line of at most 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def hash_file(path: Path) -> str:
    """The sha256 of a file. Raises DataError where it cannot be read."""
    got = hashlib.sha256()
    try:
        with open_regular(path) as raw:
            while piece := raw.read(READ):
                got.update(piece)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file that can be read") from None
    return got.hexdigest()


def stamp(files: Sequence[Path]) -> str:
    """What tells that files are as they were when they were last hashed: names, sizes, times and places on the disk."""
    got = hashlib.sha256()
    for file in files:
        status = os.stat(file)
        about = (str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
        got.update(f"{about}\n".encode())
    return got.hexdigest()


def choose_split(number: int, held_out: float) -> str:
    """The split of a document by the 64 bits of its hash: the share `held_out` evaluates, as much again calibrates."""
    share = number / 2**64
    if share < held_out:
        return SPLITS[2]
    return SPLITS[1] if share < 2 * held_out else SPLITS[0]
