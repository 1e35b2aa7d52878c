"""From files to tokenized sections: reading, dividing, and training or taking a tokenizer."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from ..engines.backend import need
from .splits import SPLITS, DataError, digest, split_names
from .text import Section, Specials, TextData

BUNDLED = Path(__file__).parent / "bundled"
BOOKS = {  # files of bundled/text, in order
    "alice": "Alice's Adventures in Wonderland",
    "thursday": "The Man Who Was Thursday",
    "persuasion": "Persuasion",
    "sense": "Sense and Sensibility",
}
BUNDLED_VOCAB = 2048
HEADINGS = 10  # fewer heading lines than this, and a file is divided into blocks
BLOCKS = 50

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of a tokenizer trained here
SAME_AS = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}

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


def read_text(path: Path) -> str:
    """A file's text, newlines as \\n, no blanks at line ends; `DataError` if it is empty or not UTF-8 text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a file of text that can be read") from None
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


def chapters(text: str) -> list[tuple[str, str]]:
    """(heading, text with its heading) per heading line; what stands before the first heading belongs to the first."""
    found = list(HEADING.finditer(text))
    cuts = [0, *(match.start() for match in found[1:]), len(text)]
    return [(match[1], text[low:high].strip("\n")) for match, (low, high) in zip(found, pairwise(cuts), strict=False)]


def blocks(text: str) -> list[tuple[str, str]]:
    """About `BLOCKS` runs of whole paragraphs, equal in length as far as paragraphs allow.

    Paragraphs end at empty lines or, in a text that has few of those, at every line's end.
    """
    gap = "\n\n" if text.count("\n\n") >= BLOCKS else "\n"
    runs: list[list[str]] = [[]]
    done = 0
    for paragraph in filter(None, text.split(gap)):
        if done >= len(runs) * len(text) / BLOCKS:
            runs.append([])
        runs[-1].append(paragraph)
        done += len(paragraph) + len(gap)
    return [(f"block {number}", gap.join(run).strip("\n")) for number, run in enumerate(runs, 1)]


def divide(parts: list[tuple[str, str]], source: str) -> tuple[list[Passage], int]:
    """Parts with their splits, and how many were left out because an earlier part has the same text."""
    unique: dict[str, str] = {}  # text -> title
    for title, text in parts:
        unique.setdefault(text, title)
    if len(unique) < len(SPLITS):
        raise DataError(
            f"{source} is too short: it has {len(unique)} different part(s) and each of {', '.join(SPLITS)} needs one; "
            "give more paragraphs or files"
        )
    splits = split_names(len(unique))
    passages = [Passage(title, text, split) for (text, title), split in zip(unique.items(), splits, strict=True)]
    return passages, len(parts) - len(passages)


def read_source(path: Path) -> tuple[list[Passage], int]:
    """The passages of a text file, or of a folder's *.txt in order of path, and how many duplicates were left out.

    A folder of three files or more is divided by files; otherwise the text is divided by chapters, or by blocks.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no *.txt file: give a folder that does, or a text file")
    texts = [(file.relative_to(path).as_posix() if path.is_dir() else file.name, read_text(file)) for file in files]
    if len(texts) >= len(SPLITS):
        return divide(texts, str(path))
    text = "\n\n".join(text for _, text in texts)
    parts = chapters(text)
    return divide(parts if len(parts) >= HEADINGS else blocks(text), str(path))


def read_books() -> list[Passage]:
    """The bundled books' chapters, each book divided by itself so that every split has every author."""
    passages = []
    for name, book in BOOKS.items():
        parts = [(f"{book}: {title}", text) for title, text in chapters(read_text(BUNDLED / "text" / f"{name}.txt"))]
        passages += divide(parts, book)[0]
    return passages


def train_tokenizer(texts: list[str], vocab: int) -> str:
    """A lower-case WordPiece tokenizer with BERT's normalisation and at most `vocab` entries, as tokenizer.json."""
    lib = need("tokenizers", "text", "text other than the stored books")

    def wordpiece(known: dict[str, int] | None):
        tokenizer = lib.Tokenizer(lib.models.WordPiece(known, unk_token="[UNK]"))
        tokenizer.normalizer = lib.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = lib.pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = lib.decoders.WordPiece()
        return tokenizer

    # The trainer numbers '##x' pieces in the order of a randomly seeded hash table and breaks ties by number. Listing
    # them, sorted, among the special tokens gives the same tokenizer each time; the one returned does not list them.
    blank = wordpiece(None)
    words = {
        word for text in texts for word, _ in blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(text))
    }
    inner = ["##" + character for character in sorted(set("".join(word[1:] for word in words)))]
    trainer = lib.trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=[*SPECIAL_TOKENS, *inner], show_progress=False
    )
    blank.train_from_iterator(texts, trainer)
    if blank.get_vocab_size() > vocab:
        raise DataError(
            f"vocab {vocab} is too small: the text's characters alone need {blank.get_vocab_size()}; give at least that"
        )
    tokenizer = wordpiece(blank.get_vocab())
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer.to_str(pretty=True)


def open_tokenizer(tokenizer_json: str) -> tuple[Any, Specials, int]:
    """A tokenizer without truncation and padding, its special tokens, and its number of ids; `DataError` if it is none."""
    lib = need("tokenizers", "text", "text other than the stored books")
    try:
        tokenizer = lib.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"the tokenizer cannot be read ({error}): give a tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab()
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    named = {name: next((ids[t] for t in same if t in ids), None) for name, same in SAME_AS.items()}
    vocab = max(ids.values()) + 1
    # ids that no token has must never be drawn in place of a word, so they count as special
    unused = set(range(vocab)) - set(ids.values())
    specials = Specials(**named, ids=tuple(sorted(special | unused | {i for i in named.values() if i is not None})))
    return tokenizer, specials, vocab


def tokenize(source: str, passages: list[Passage], tokenizer_json: str, dropped: int = 0) -> TextData:
    """The passages as token ids, no special tokens added. `tokenizer_json` is the text of a tokenizer.json."""
    tokenizer, specials, vocab = open_tokenizer(tokenizer_json)
    encoded = tokenizer.encode_batch([p.text for p in passages], add_special_tokens=False)
    sections = [
        Section(p.title, digest(p.text.encode()), p.split, np.array(e.ids, np.int32))
        for p, e in zip(passages, encoded, strict=True)
    ]
    return TextData(source, sections, tokenizer_json, vocab, specials, dropped)


def bundled_books() -> TextData:
    """The bundled books from their stored token ids: needs neither the text nor the package tokenizers."""
    with safe_open(BUNDLED / "text.safetensors", "numpy") as file:
        tokens, starts = file.get_tensor("tokens"), file.get_tensor("starts")
        about = json.loads(file.metadata()["qtx"])
    sections = [
        Section(f"{c['book']}: {c['chapter']}", c["sha256"], c["split"], tokens[low:high].astype(np.int32))
        for c, (low, high) in zip(about["chapters"], pairwise(starts), strict=True)
    ]
    specials = Specials(**{**about["specials"], "ids": tuple(about["specials"]["ids"])})
    return TextData("books", sections, bundled_tokenizer(), about["vocab"], specials)


def bundled_tokenizer() -> str:
    """The text of the bundled tokenizer.json."""
    return (BUNDLED / "tokenizer.json").read_bytes().decode()


def load_text(source: str | None, tokenizer: Path | str | None, vocab: int | None, model_vocab: int) -> TextData:
    """See `qtx.data.load`. `model_vocab` bounds a tokenizer trained here when `vocab` is not given."""
    if tokenizer is not None and vocab is not None:
        raise DataError(f"vocab {vocab} and a tokenizer exclude each other: give one")
    if source == "":
        raise DataError("data is '': give books, a text file or a folder of *.txt")
    books = source in (None, "books")
    if books and vocab in (None, BUNDLED_VOCAB) and (tokenizer is None or tokenizer == bundled_tokenizer()):
        return bundled_books()
    passages, dropped = (read_books(), 0) if books else read_source(Path(source))
    if tokenizer is not None:
        tokenizer_json = tokenizer if isinstance(tokenizer, str) else read_text(tokenizer)
    else:
        tokenizer_json = train_tokenizer([p.text for p in passages if p.split == "train"], vocab or model_vocab)
    return tokenize("books" if books else str(source), passages, tokenizer_json, dropped)
