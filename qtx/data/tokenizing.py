"""Tokenizers: one is trained, read or opened here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ..engines.backend import need
from .reading import JSON_BYTES
from .rows import read_text
from .splits import DataError
from .text import Specials

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_VOCAB = 2048
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of a tokenizer trained here
SAME_AS = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}
FRONT = ("[BOS]", "<bos>", "<s>", "<|endoftext|>", "</s>")  # begin a text where the template adds nothing
SPARE = 1024  # ids without a token that any vocabulary may have, beside three for each token


class Encoding(Protocol):
    """What a tokenizer makes of a text: ids, and 1 for each that its template added."""

    ids: list[int]
    special_tokens_mask: list[int]


class Tokenizer(Protocol):
    """What is used here of the package tokenizers' class of that name."""

    def encode(self, sequence: str) -> Encoding:
        """A text's ids, with what the template adds."""

    def encode_batch(self, input: Sequence[str], add_special_tokens: bool = True) -> list[Encoding]:
        """The same of several texts."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def get_vocab(self) -> Mapping[str, int]:
        """Ids by token."""


def read_tokenizer(path: Path) -> str:
    """The text of a tokenizer.json. Raises DataError where the file cannot be read; what it says is not looked at."""
    return read_text(path, JSON_BYTES)


def read_bundled_tokenizer() -> str:
    """The text of the bundled tokenizer.json."""
    return (BUNDLED / "tokenizer.json").read_bytes().decode()


def train_tokenizer(texts: list[str], vocab: int) -> str:
    """A lower-case WordPiece tokenizer with BERT's normalisation and at most `vocab` entries, as tokenizer.json.

    Raises DataError where `vocab` is less than the text's characters need, MissingExtra without the package tokenizers.
    """
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


def open_tokenizer(
    tokenizer_json: str, what: str = "text other than the stored books"
) -> tuple[Tokenizer, Specials, int]:
    """A tokenizer without truncation and padding, its special tokens, and its number of ids.

    `what` needs it, for the error where the package is missing.

    Raises:
        DataError: it is none, has no token, or its ids are far more than its tokens.
        MissingExtra: without the package tokenizers.
    """
    lib = need("tokenizers", "text", what)
    read_vocabulary(tokenizer_json)  # before the library sees ids that it would count up to
    try:
        tokenizer = lib.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"the tokenizer cannot be read ({error}): give a tokenizer.json") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.get_vocab()
    check_ids(ids)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    named = {name: next((ids[t] for t in same if t in ids), None) for name, same in SAME_AS.items()}
    vocab = max(ids.values()) + 1
    # ids that no token has must never be drawn in place of a word, so they count as special
    unused = set(range(vocab)) - set(ids.values())
    fixed = special | unused | {i for i in named.values() if i is not None}
    front = [*encode_prompt(tokenizer, ""), *(ids[token] for token in FRONT if token in ids)]
    specials = Specials(
        **named, ids=tuple(sorted(fixed)), front=front[0] if front[:1] != [named["cls"]] and front else None
    )
    return tokenizer, specials, vocab


def read_vocabulary(tokenizer_json: str) -> dict[int, str]:
    """Strings by id, as they stand in the file (WordPiece, BPE, WordLevel: a mapping; Unigram: a list), and added
    tokens.

    Raises DataError where the file is no tokenizer.json, or its ids are as `check_ids` refuses them.
    """
    try:
        content = json.loads(tokenizer_json)
        vocab = content.get("model", {}).get("vocab", {})
        pairs = enumerate(pair[0] for pair in vocab) if isinstance(vocab, list) else ((i, w) for w, i in vocab.items())
        words = dict(pairs) | {added["id"]: added["content"] for added in content.get("added_tokens", [])}
        fine = all(type(i) is int and i >= 0 and isinstance(word, str) for i, word in words.items())
    except (AttributeError, KeyError, TypeError, IndexError, ValueError, RecursionError):
        fine = False
    if not fine:
        raise DataError("the tokenizer cannot be read (its vocabulary is damaged): give a tokenizer.json")
    check_ids({word: i for i, word in words.items()})
    return words


def map_bytes() -> dict[str, int]:
    """The bytes behind the characters of a byte-level vocabulary (GPT-2): printable ones are themselves, the others are
    counted from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def check_ids(ids: Mapping[str, int]) -> None:
    """Raises DataError for a vocabulary that is empty, or whose largest id is no vocabulary's of so many tokens: tables
    by id would take the machine's memory."""
    if not ids:
        raise DataError("the tokenizer cannot be read (it has no token): give a tokenizer.json")
    token, most = max(ids.items(), key=lambda item: item[1])
    if most >= 4 * len(ids) + SPARE:
        raise DataError(
            f"the tokenizer has {len(ids)} tokens and gives {token!r} the id {most}: number them without gaps"
        )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Texts as they are, without what the template adds. Raises DataError where the tokenizer has no token for what it
    does not know."""
    try:
        # the same ids, no places in the text
        return getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)(texts, add_special_tokens=False)
    except Exception as error:  # the library raises a bare Exception
        raise refuse_text(error) from None


def refuse_text(error: Exception) -> DataError:
    """What is said where a tokenizer makes no ids of a text."""
    said = " ".join(str(error).split())
    return DataError(f"the tokenizer does not take the text ({said}): give one with a token for what it does not know")


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a text that a model goes on from: with what the tokenizer puts before a text (OPT's </s>), as transformers
    does, and without what it puts behind one. Raises DataError as `encode_texts`."""
    try:
        encoded = tokenizer.encode(prompt)
    except Exception as error:  # the library raises a bare Exception
        raise refuse_text(error) from None
    size = len(encoded.ids)
    while size and encoded.special_tokens_mask[size - 1]:
        size -= 1
    return encoded.ids[:size]
