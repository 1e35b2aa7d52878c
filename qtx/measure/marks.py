"""Kinds of tokens: specials, punctuation and the rest, from a tokenizer.json alone; and an image's background
patches."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cached_property
from typing import cast

import numpy as np

from qtx_ref.spec import Family, ModelSpec

from ..data.chains import ChainData
from ..data.labelled import LabelledText
from ..data.text import Specials, TextData
from ..data.tokenizing import map_bytes, read_vocabulary
from ..engines.protocols import Batch, Data

PLAIN = 0.25  # a background patch: its pixels deviate less than this share of the whole image's deviation


def read_word(word: str, byte_level: bool) -> str:
    """A token's text, without the marks of subwords."""
    if byte_level:
        table = map_bytes()
        return bytes(table.get(c, 63) for c in word).decode("utf-8", "replace").strip()
    return word.removeprefix("##").replace("\u2581", "")


def is_punctuation(text: str) -> bool:
    """Whether a text is made of punctuation marks and symbols alone."""
    return bool(text) and all(unicodedata.category(c)[0] in "PS" for c in text)


class Kinds:
    """The kind of each token of a text, and the words of a vocabulary."""

    names = ("[CLS]", "[SEP]", "[MASK]", "first", "punctuation", "other")

    def __init__(self, specials: Specials, tokenizer_json: str, *, causal: bool) -> None:
        """causal: texts begin with an ordinary token, `first`, not with [CLS]."""
        self.specials, self.causal = specials, causal
        self.words = read_vocabulary(tokenizer_json)
        # GPT-2's alphabet writes a space as U+0120; no other kind of vocabulary holds words that begin with it
        self.byte_level = any(word.startswith("\u0120") for word in self.words.values())

    @cached_property
    def table(self) -> np.ndarray:
        """Kind by id, (V,)."""
        table = np.full(max(self.words, default=0) + 1, self.names.index("other"))
        for i, word in self.words.items():
            if i not in self.specials.ids and is_punctuation(read_word(word, self.byte_level)):
                table[i] = self.names.index("punctuation")
        for name, special in (
            ("[MASK]", self.specials.mask),
            ("[SEP]", self.specials.sep),
            ("[CLS]", self.specials.cls),
        ):
            if special is not None:
                table[special] = self.names.index(name)
        return table

    def of(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Kind of each token, (B, T); a sequence's first one is `first` where the model is causal or it is not
        [CLS]."""
        known = np.minimum(batch["tokens"], len(self.table) - 1)
        kinds = np.where(known == batch["tokens"], self.table[known], self.names.index("other"))
        begin = np.asarray(batch["mask"], bool).argmax(axis=1)[:, None]  # the first real token
        first = (np.arange(kinds.shape[1]) == begin) & (self.causal | (kinds != self.names.index("[CLS]")))
        return np.where(first, self.names.index("first"), kinds)

    def marks(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The real tokens that an idle head may look at, by kind: its first token, [CLS] or not, and
        delimiters."""
        kinds, real = self.of(batch), np.asarray(batch["mask"], bool)
        begin = "first" if self.causal else "[CLS]"
        return {name: (kinds == self.names.index(name)) & real for name in (begin, "[SEP]", "punctuation")}

    def word(self, token: int) -> str:
        """A token's string for people."""
        word = self.words.get(int(token), f"id {token}")
        return read_word(word, True) or "space" if self.byte_level and token not in self.specials.ids else word


def make_kinds(spec: ModelSpec, data: Data) -> Kinds | None:
    """The kinds of tokens of a model's data; None of images."""
    if spec.family is Family.VIT:
        return None
    words = cast(TextData | ChainData | LabelledText, data)
    return Kinds(words.specials, words.tokenizer_json, causal=spec.causal)


def find_background(images: np.ndarray, size: int) -> np.ndarray:
    """Patches (B, T) of images (B, C, S, S) whose pixels hardly differ; place 0 is CLS and never one."""
    b, c, s, _ = images.shape
    n = s // size
    patches = images.reshape(b, c, n, size, n, size).transpose(0, 2, 4, 1, 3, 5).reshape(b, n * n, -1)
    spread = images.reshape(b, -1).astype(np.float64).std(axis=1)[:, None]
    return np.concatenate([np.zeros((b, 1), bool), patches.astype(np.float64).std(axis=2) < PLAIN * spread], axis=1)


def find_marks(spec: ModelSpec, kinds: Kinds | None, batch: Batch) -> dict[str, np.ndarray]:
    """The keys that an idle head may look at, by name, (B, T) each: of text those of `Kinds.marks`, of images CLS and
    background patches."""
    if kinds is not None:
        return kinds.marks(batch)
    background = find_background(batch["images"], spec.patch_size)
    return {"CLS": np.arange(spec.length)[None] == np.zeros((len(background), 1)), "background": background}
