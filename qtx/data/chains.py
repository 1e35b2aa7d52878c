"""Endless text from a Markov chain, with a [BOS] in front of every sequence.

backcopy: the Bigram-Backcopy task of Guo et al. 2024 (arXiv 2410.13835). A token follows from the one before it as the
bytes of the bundled books follow one another, but for the three most frequent ones, the triggers: behind a trigger
comes the token that stood before it. A head is of use on triggers alone, and idle on every other token.
unigram: independent draws by how frequent the bytes are, where no head is ever of use.

The published task has another text's characters. Here the first token is never a trigger, so that [BOS] is never copied
and no two triggers adjoin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import ModelSpec

from ..engines.protocols import Batch
from .spec import Begin, DataSpec
from .splits import DataError, check_batch, check_split, describe_splits, digest, fingerprint
from .text import Specials, window_length
from .tokenizing import BUNDLED, map_bytes

CHAINS = ("backcopy", "unigram")
VOCAB = 64  # [BOS] and the most frequent bytes
TRIGGERS = 3
HELD = 1024  # sequences of a split that is gone through once
BOS = 0


@dataclass(frozen=True, eq=False)
class Chain:
    """Which token follows which: counts (V, V) int64 of the next one, by row for the one before it, [BOS] included;
    trigger (V,) bool, the tokens behind which the one before them is copied."""

    counts: np.ndarray
    trigger: np.ndarray

    def draw(self, uniform: np.ndarray) -> np.ndarray:
        """Sequences by `uniform` (B, T), in [0, 1): (B, T + 1) int64, [BOS] first."""
        upto = self.counts.cumsum()  # of whole numbers, so that every machine draws the same
        total = self.counts.sum(axis=1)
        below = total.cumsum() - total
        ids = np.full((uniform.shape[1] + 1, len(uniform)), BOS)
        for t, draws in enumerate(uniform.T):
            now = ids[t]
            drawn = np.searchsorted(upto, below[now] + (draws * total[now]).astype(np.int64), side="right")
            ids[t + 1] = np.where(self.trigger[now], ids[t - 1], drawn - now * len(total))
        return ids.T

    def entropy(self, length: int) -> float:
        """The least mean loss that any model has on the `length` tokens after [BOS], in nats: what a token tells of the
        next one, nothing where it is a trigger."""
        share = self.counts / self.counts.sum(axis=1, keepdims=True)
        logs = np.log(share, out=np.zeros_like(share), where=share > 0)
        own = -(share * logs).sum(axis=1)  # (V,)
        plain = np.eye(len(own))[BOS]  # (V,) how likely each token stands here and is no trigger
        copied = np.zeros_like(own)  # how likely each stands before a trigger that stands here
        nats = 0.0
        for _ in range(length):
            nats += plain @ own
            fires = plain * share[:, self.trigger].sum(axis=1)
            plain, copied = np.where(self.trigger, 0.0, plain @ share) + copied, fires
        return float(nats / length)


@cache
def read_bytes() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of ids 1, 2, ..., most frequent first, and how often each is followed by each in the bundled books, by
    id, (V, V) int64."""
    books = [np.frombuffer(p.read_bytes(), np.uint8) for p in sorted((BUNDLED / "text").glob("*.txt"))]
    often = sum(np.bincount(book, minlength=256) for book in books)
    kept = np.argsort(-np.asarray(often), kind="stable")[: VOCAB - 1]
    ids = np.full(256, VOCAB)
    ids[kept] = np.arange(1, VOCAB)
    pairs = np.zeros((VOCAB + 1) ** 2, np.int64)
    for book in books:
        own = ids[book]
        pairs += np.bincount(own[:-1] * (VOCAB + 1) + own[1:], minlength=len(pairs))
    return kept, pairs.reshape(VOCAB + 1, -1)[:VOCAB, :VOCAB]


@cache
def make_chain(name: str) -> Chain:
    """The chain of one of `CHAINS`."""
    _, pairs = read_bytes()
    counts, trigger = pairs.copy(), np.zeros(VOCAB, bool)
    if name == "backcopy":
        trigger[1 : TRIGGERS + 1] = True
        counts[BOS] = np.where(trigger, 0, pairs.sum(axis=1))
    else:
        counts[:] = pairs.sum(axis=1)
    return Chain(counts, trigger)


@cache
def make_tokenizer() -> str:
    """A tokenizer.json whose tokens are these bytes, written as GPT-2 writes bytes, and [BOS] in front of a text."""
    letters = {byte: letter for letter, byte in map_bytes().items()}
    words = ["[BOS]", *(letters[byte] for byte in read_bytes()[0].tolist())]
    parts = [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
    ]
    special = {"id": BOS, "content": words[BOS], "special": True, "normalized": False}
    begin = [{"SpecialToken": {"id": words[BOS], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": begin,
            "pair": [*begin, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {words[BOS]: {"id": words[BOS], "ids": [BOS], "tokens": [words[BOS]]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[BOS]},
    }
    return json.dumps(content, ensure_ascii=False, indent=1)


class ChainData:
    """Sequences of a chain, in three splits that are drawn from streams of their own; the train split never ends."""

    vocab = VOCAB
    specials = Specials(None, None, None, None, (BOS,), BOS)

    def __init__(self, source: str, settings: DataSpec) -> None:
        self.source, self.settings, self.chain = source, settings, make_chain(source)
        self.tokenizer_json = make_tokenizer()

    def hashes(self, split: str) -> list[str]:
        """One sha256, that of the chain and the split's name: nothing is in two splits. Raises DataError for another
        split."""
        check_split(split)
        return [digest(f"{self.source} {split} {digest(self.chain.counts.astype('<i8').tobytes())}".encode())]

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split."""
        return fingerprint(self.hashes(split))

    def describe(self) -> dict[str, object]:
        """What a checkpoint keeps of its data, as JSON values."""
        return {
            "kind": "chain",
            "source": self.source,
            "vocab": self.vocab,
            "tokenizer_sha256": digest(self.tokenizer_json.encode()),
            **describe_splits(self),
            **self.settings.describe(),
        }

    def length(self, spec: ModelSpec) -> int:
        """Tokens of a sequence with its [BOS], T. Raises DataError where the model cannot take it."""
        if self.vocab > spec.vocab:
            raise DataError(f"{self.source} has {self.vocab} token ids, the model {spec.vocab}: give it as many")
        return window_length(self.settings, spec)

    def entropy(self, spec: ModelSpec) -> float:
        """The mean loss of the best model there can be on a model's windows, in nats."""
        return self.chain.entropy(self.length(spec))

    def train_batches(
        self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0, rows: slice | None = None
    ) -> Iterator[Batch]:
        """New sequences without end, from step `start` on; batch `step` depends on (seed, step) alone. rows: those of a
        batch that are made; None: all."""
        length, own = self.length(spec), rows or slice(None)
        check_batch(batch_size, batch_size, "sequences")

        def batches() -> Iterator[Batch]:
            step = start
            while True:
                uniform = stream(seed, self.source, "train", step).random((length, batch_size))
                yield self._cut(uniform.T[own])
                step += 1

        return batches()

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """The first `HELD` sequences of the split, in order; at most `limit` batches. They are the same whatever the
        seed and the batch size."""
        check_split(split)
        check_batch(batch_size, batch_size, f"{split} sequences")
        length = self.length(spec)
        count = HELD if limit is None else min(HELD, limit * batch_size)

        def batches() -> Iterator[Batch]:
            for low in range(0, count, batch_size):
                numbers = range(low, min(low + batch_size, count))
                yield self._cut(np.stack([stream(0, self.source, split, n).random(length) for n in numbers]))

        return batches()

    def _cut(self, uniform: np.ndarray) -> Batch:
        """The sequences that are drawn by `uniform` (B, T), each token's next one as its target."""
        ids = self.chain.draw(uniform)  # (B, T + 1)
        return {"tokens": ids[:, :-1], "mask": np.ones(uniform.shape, bool), "targets": ids[:, 1:]}


def open_chain(settings: DataSpec, model: ModelSpec, tokenizer: Path | str | None) -> ChainData:
    """The chain that the settings name, for a model that predicts the next token. tokenizer: the one that a checkpoint
    keeps, if any. Raises DataError for settings of other data."""
    source, *others = (one.path for one in settings.sources)
    name = source if source in CHAINS else next(one for one in others if one in CHAINS)
    if others:
        raise DataError(f"data {name!r} cannot be mixed with others: give it alone")
    if not model.causal:
        raise DataError(
            f"data {name!r} is to be gone on with from token to token: use an opt model, not {model.family}"
        )
    if tokenizer is not None and tokenizer != make_tokenizer():
        raise DataError(f"data {name!r} has a tokenizer of its own: leave out the tokenizer")
    if settings.begin not in (None, Begin.WINDOW):
        raise DataError(f"data begin is {settings.begin}: every sequence of {name!r} begins with [BOS]; leave it out")
    rest = replace(settings, sources=(), window=None, tokenizer=None, begin=None)
    for field in fields(rest):
        if (value := getattr(rest, field.name)) != getattr(DataSpec(), field.name):
            raise DataError(f"data {field.name} is {value}: {name!r} is drawn, not read, and has none; leave it out")
    return ChainData(name, settings)
