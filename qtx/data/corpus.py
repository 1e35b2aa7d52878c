"""From files to tokenized sections: reading, dividing, and training or taking a tokenizer."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import safe_open

from qtx_ref.spec import ModelSpec

from .cache import read_hashes
from .documents import NOT_TEXT, Documents, open_documents
from .rows import TextRow, has_rows, keep_different, read_rows, read_text
from .shards import SAMPLE, VERSION, open_part, take_sample
from .spec import Begin, DataSpec, Source
from .splits import SHORT, SPLITS, DataError, digest, name_splits
from .store import Cache
from .text import Part, Section, Specials, TextData, make_part
from .tokenizing import (
    BUNDLED,
    BUNDLED_VOCAB,
    Tokenizer,
    encode_texts,
    open_tokenizer,
    read_bundled_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from .walking import list_files

BOOKS = {  # files of bundled/text, in order
    "alice": "Alice's Adventures in Wonderland",
    "thursday": "The Man Who Was Thursday",
    "persuasion": "Persuasion",
    "sense": "Sense and Sensibility",
}
HEADINGS = 10  # fewer heading lines than this, and a file is divided into blocks
BLOCKS = 50

HEADING = re.compile(
    r"""(?:\A|(?<=\n\n))[ \t]*  # after an empty line
    ((?:chapter|letter|canto)[ ]+(?:[ivxlcdm]+|\d+)(?:[.:][^\n]*)?)$  # 'CHAPTER IV', 'Letter 3: To a friend'""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)


class Passage(NamedTuple):
    """A section before it is tokenized."""

    title: str
    text: str
    split: str


def split_chapters(text: str) -> list[tuple[str, str]]:
    """(heading, text with its heading) per heading line; what stands before the first heading belongs to the first."""
    headings = list(HEADING.finditer(text))
    cuts = [0, *(match.start() for match in headings[1:]), len(text)]
    return [
        (match[1], text[low:high].strip("\n")) for match, (low, high) in zip(headings, pairwise(cuts), strict=False)
    ]


def split_blocks(text: str) -> list[tuple[str, str]]:
    """About `BLOCKS` runs of whole paragraphs, equal in length as far as paragraphs allow.

    Paragraphs end at empty lines or, in a text that has few of those, at every line's end.
    """
    gap = "\n\n" if text.count("\n\n") >= BLOCKS else "\n"
    return join_runs([part for part in text.split(gap) if part], gap, len(text))


def join_runs(parts: Sequence[str], gap: str, total: int) -> list[tuple[str, str]]:
    """(title, text) of about `BLOCKS` runs of whole parts, joined by `gap`; `total` characters in all."""
    runs: list[list[str]] = [[]]
    done = 0
    for part in parts:
        if done >= len(runs) * total / BLOCKS:
            runs.append([])
        runs[-1].append(part)
        done += len(part) + len(gap)
    return [(f"block {number}", gap.join(run).strip("\n")) for number, run in enumerate(runs, 1)]


def divide(parts: list[tuple[str, str]], source: str) -> tuple[list[Passage], int]:
    """Parts with their splits, and how many were left out because an earlier part has the same text.

    Raises DataError for fewer different parts than splits.
    """
    unique: dict[str, str] = {}  # text -> title
    for title, text in parts:
        unique.setdefault(text, title)
    if len(unique) < len(SPLITS):
        raise DataError(
            f"{source} is too short: it has {len(unique)} different part(s) and each of {', '.join(SPLITS)} needs one; "
            "give more paragraphs or files"
        )
    splits = name_splits(len(unique))
    passages = [Passage(title, text, split) for (text, title), split in zip(unique.items(), splits, strict=True)]
    return passages, len(parts) - len(passages)


def read_source(path: Path) -> tuple[list[Passage], int]:
    """The passages of a text file, of a .csv or .jsonl file's column text, or of a folder's *.txt in order of path, and
    how many duplicates were left out.

    A folder of three files or more is divided by files; otherwise the text is divided by chapters, or by blocks.
    Raises DataError for what cannot be read, holds no text, or is too short to divide.
    """
    if path.is_dir():
        files = list_files(path, (".txt",), say=False)  # `open_documents` has looked there
        if not files:
            raise DataError(f"{path} holds no *.txt file: give a folder that does, or a text file")
    elif has_rows(path):
        return join_rows(str(path), read_rows(path, labelled=False))
    elif path.suffix.lower() in NOT_TEXT and path.is_file():
        raise DataError(f"{path} is not plain text by its ending: {NOT_TEXT[path.suffix.lower()]}")
    else:
        files = [path]
    texts = [(file.relative_to(path).as_posix() if path.is_dir() else file.name, read_text(file)) for file in files]
    if len(texts) >= len(SPLITS):
        return divide(texts, str(path))
    text = "\n\n".join(text for _, text in texts)
    parts = split_chapters(text)
    return divide(parts if len(parts) >= HEADINGS else split_blocks(text), str(path))


def join_rows(source: str, rows: Sequence[TextRow]) -> tuple[list[Passage], int]:
    """Passages of whole rows in their order, an empty line between two, and how many rows were left out because an
    earlier one has the same text. Rows that have a split stay in it.

    Raises DataError as `keep_different`.
    """
    kept, dropped = keep_different(source, rows)

    def join(chosen: Sequence[TextRow]) -> list[tuple[str, str]]:
        return join_runs([row.text for row in chosen], "\n\n", sum(len(row.text) + 2 for row in chosen))

    if not kept[0].split:
        passages, twice = divide(join(kept), source)
        return passages, dropped + twice
    parts = [(split, [row for row in kept if row.split == split]) for split in SPLITS]
    return [Passage(f"{split} {title}", text, split) for split, some in parts if some for title, text in join(some)], 0


def read_books() -> list[Passage]:
    """The bundled books' chapters, each book divided by itself so that every split has every author."""
    passages = []
    for name, book in BOOKS.items():
        parts = [
            (f"{book}: {title}", text) for title, text in split_chapters(read_text(BUNDLED / "text" / f"{name}.txt"))
        ]
        passages += divide(parts, book)[0]
    return passages


def tokenize(source: str, passages: list[Passage], tokenizer_json: str, dropped: int = 0) -> TextData:
    """The passages as token ids, no special tokens added. `tokenizer_json` is the text of a tokenizer.json."""
    tokenizer, specials, vocab = open_tokenizer(tokenizer_json)
    return TextData(source, encode_passages(passages, tokenizer), tokenizer_json, vocab, specials, dropped)


def encode_passages(passages: Sequence[Passage], tokenizer: Tokenizer) -> list[Section]:
    """The passages as sections, no special tokens added."""
    encoded = encode_texts(tokenizer, [p.text for p in passages])
    return [
        Section(p.title, digest(p.text.encode()), p.split, np.array(e.ids, np.int32))
        for p, e in zip(passages, encoded, strict=True)
    ]


def load_bundled_books(settings: DataSpec, causal: bool) -> TextData:
    """The bundled books from their stored token ids: needs neither the text nor the package tokenizers."""
    with safe_open(BUNDLED / "text.safetensors", "numpy") as file:
        tokens, starts = file.get_tensor("tokens"), file.get_tensor("starts")
        about = json.loads(file.metadata()["qtx"])
    sections = [
        Section(f"{c['book']}: {c['chapter']}", c["sha256"], c["split"], tokens[low:high].astype(np.int32))
        for c, (low, high) in zip(about["chapters"], pairwise(starts), strict=True)
    ]
    specials = Specials(**{**about["specials"], "ids": tuple(about["specials"]["ids"])})
    sections = wrap(sections, specials, settings, causal)
    return TextData("books", sections, read_bundled_tokenizer(), about["vocab"], specials, settings=settings)


def wrap(sections: list[Section], specials: Specials, settings: DataSpec, causal: bool) -> list[Section]:
    """Sections with what stands before and behind each, where the settings say so."""
    if settings.begin is not Begin.DOCUMENT:
        return sections
    before, behind = ([] if one is None else [one] for one in specials.around(causal))
    return [replace(s, tokens=np.concatenate([before, s.tokens, behind]).astype(np.int32)) for s in sections]


def load_text(settings: DataSpec, model: ModelSpec, tokenizer: Path | str | None) -> TextData:
    """See `qtx.data.load`, errors included."""
    vocab = settings.vocab
    if tokenizer is not None and vocab is not None:
        raise DataError(f"vocab {vocab} and a tokenizer exclude each other: give one")
    sources = settings.sources or (Source("books"),)
    books = [source.path for source in sources] == ["books"]
    if books and vocab in (None, BUNDLED_VOCAB) and (tokenizer is None or tokenizer == read_bundled_tokenizer()):
        return load_bundled_books(settings, model.causal)
    opened = [open_source(source.path) for source in sources]
    if tokenizer is not None:
        tokenizer_json = tokenizer if isinstance(tokenizer, str) else read_tokenizer(tokenizer)
    else:
        tokenizer_json = train_on(opened, settings.held_out, vocab or model.vocab)
    library, specials, size = open_tokenizer(tokenizer_json)
    around = specials.around(model.causal) if settings.begin is Begin.DOCUMENT else None
    sections, parts = [], []
    for source, one in zip(sources, opened, strict=True):
        if isinstance(one, Documents):
            held_out, weight = settings.held_out, source.weight
            parts.append(open_part(one, tokenizer_json, library, size, around, held_out, weight))
        else:
            passages, dropped = one
            own = wrap(encode_passages(passages, library), specials, settings, model.causal)
            parts.append(make_part(own, dropped, source.weight))
            sections += own
    refuse_leaks([source.path for source in sources], parts)
    name = ", ".join(source.path for source in sources)
    return TextData(name, sections, tokenizer_json, size, specials, settings=settings, parts=parts)


def refuse_leaks(names: Sequence[str], parts: Sequence[Part]) -> None:
    """Raises DataError where a text stands in two sources of a mixture, and in another split of each."""
    if len(parts) < 2:
        return
    known = [{split: number_hashes(part.hashes[split]) for split in SPLITS} for part in parts]
    for one, two in permutations(range(len(parts)), 2):
        for a, b in combinations(SPLITS, 2):
            if len(shared := np.intersect1d(known[one][a], known[two][b])):
                raise DataError(
                    f"{len(shared)} text(s) of {names[one]} ({a}) are also in {names[two]} ({b}) (first "
                    f"hash {int(shared[0]):016x}): remove one copy"
                )


def number_hashes(hashes: Sequence[str]) -> np.ndarray:
    """The first 64 bits of the hash of each section, or of each document of a text in shards, uint64."""
    return np.concatenate([np.array([int(value[:SHORT], 16) for value in hashes], np.uint64), *read_hashes(hashes)])


def open_source(name: str) -> Documents | tuple[list[Passage], int]:
    """A source as documents that are yet to be read, or as passages and how many duplicates were left out."""
    if name == "books":
        return read_books(), 0
    return open_documents(name) or read_source(Path(name))


def train_on(opened: Sequence[Documents | tuple[list[Passage], int]], held_out: float, vocab: int) -> str:
    """A tokenizer trained on the train split, of documents on a sample; that of documents is kept in the cache."""
    large = [one for one in opened if isinstance(one, Documents)]
    texts = [p.text for one in opened if not isinstance(one, Documents) for p in one[0] if p.split == "train"]
    if not large:
        return train_tokenizer(texts, vocab)
    cache = Cache()
    prints = [cache.fingerprint(one) for one in large]
    rules = [VERSION, prints, [digest(text.encode()) for text in texts], held_out, vocab, SAMPLE]
    path = cache.folder / "tokenizers" / f"{digest(json.dumps(rules).encode())[:32]}.json"
    if known := cache.read_json(path):  # a cache may be whole and only to be read
        return known["tokenizer"]
    with cache.lock(path.stem):
        if known := cache.read_json(path):  # another process may have made it meanwhile
            return known["tokenizer"]
        for one in large:
            texts += take_sample(one, held_out, SAMPLE // len(large))
        size = sum(map(len, texts)) / 1e6
        sys.stderr.write(f"the tokenizer is trained on {size:.1f} million characters of the train split\n")
        tokenizer_json = train_tokenizer(texts, vocab)
        cache.write_json(path, {"tokenizer": tokenizer_json})
    return tokenizer_json
