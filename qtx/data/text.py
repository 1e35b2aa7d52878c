"""Text as token ids, and the batches cut from it.

A text is a list of sections (chapters, files or blocks of paragraphs), each wholly in one split. A window is a run of
tokens inside one section: `spec.length` tokens for a causal model, [CLS], `spec.length - 2` tokens and [SEP] for BERT.
Everything random comes from a named stream, so a batch depends on its seed and step alone, whichever backend takes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import Head, ModelSpec

from ..engines.protocols import Batch
from .splits import (
    SPLITS,
    DataError,
    check_batch,
    check_split,
    digest,
    fingerprint,
)

# Devlin et al. 2019, section 3.1: 15% of the tokens are predicted; of these 80% are hidden, 10% replaced, 10% kept
CHOSEN, HIDDEN, REPLACED = 0.15, 0.8, 0.1


@dataclass(frozen=True, eq=False)
class Section:
    """A chapter, file or block: the sha256 is that of its text in UTF-8, `tokens` (n,) its ids without specials."""

    title: str
    sha256: str
    split: str
    tokens: np.ndarray


@dataclass(frozen=True)
class Specials:
    """Ids of the special tokens; None where the tokenizer has none. `ids` are all ids that are never predicted."""

    pad: int | None
    cls: int | None
    sep: int | None
    mask: int | None
    ids: tuple[int, ...]


class TextData:
    """Sections of tokenized text. `dropped` counts sections left out because an earlier one had the same text."""

    def __init__(
        self,
        source: str,
        sections: list[Section],
        tokenizer_json: str,
        vocab: int,
        specials: Specials,
        dropped: int = 0,
    ) -> None:
        self.source, self.sections, self.vocab = source, sections, vocab
        self.tokenizer_json, self.specials, self.dropped = tokenizer_json, specials, dropped
        first: dict[str, Section] = {}
        for section in sections:
            twin = first.setdefault(section.sha256, section)
            if twin.split != section.split:
                raise DataError(
                    f"section {section.title!r} of the {section.split} split is also in {twin.split}: remove one copy"
                )
        self._special = np.zeros(vocab, bool)  # by id
        self._special[list(specials.ids)] = True
        self._ordinary = np.flatnonzero(~self._special)
        self._tokens, self._begin, self._end = {}, {}, {}
        for split in SPLITS:
            parts = [s.tokens for s in sections if s.split == split]
            self._tokens[split] = np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)
            self._end[split] = np.cumsum([len(part) for part in parts], dtype=np.int64)
            self._begin[split] = self._end[split] - [len(part) for part in parts]

    def hashes(self, split: str) -> list[str]:
        """The sha256 of each of the split's sections, in order."""
        check_split(split)
        return [section.sha256 for section in self.sections if section.split == split]

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split."""
        return fingerprint(self.hashes(split))

    def token_count(self, split: str) -> int:
        """Tokens in the split, specials not counted."""
        check_split(split)
        return len(self._tokens[split])

    def describe(self) -> dict:
        """What a checkpoint keeps of its data, as JSON values."""
        return {
            "kind": "text",
            "source": self.source,
            "vocab": self.vocab,
            "tokenizer_sha256": digest(self.tokenizer_json.encode()),
            "hashes": {split: self.hashes(split) for split in SPLITS},
            "fingerprints": {split: self.fingerprint(split) for split in SPLITS},
        }

    def check(self, spec: ModelSpec) -> tuple[int, int]:
        """(tokens per window, tokens looked ahead for targets); `DataError` if the model cannot take this text."""
        if self.vocab > spec.vocab:
            raise DataError(
                f"the text has {self.vocab} token ids, the model {spec.vocab}: set its vocab to {self.vocab}"
            )
        if spec.causal:
            return spec.length, 1
        if spec.length < 3:
            raise DataError(f"model length is {spec.length}: BERT needs at least 3, a token between [CLS] and [SEP]")
        for name in ("pad", "cls", "sep", *(("mask",) if spec.head is Head.MLM else ())):
            if getattr(self.specials, name) is None:
                raise DataError(f"the tokenizer has no [{name.upper()}] token: give one that has, or use an opt model")
        return spec.length - 2, 0

    def train_batches(
        self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Batches of random windows of the train split, without end, from step `start` on.

        Every window is as likely as any other; a section shorter than a window counts as one. Batch `step` depends on
        (seed, step) alone, so resuming costs nothing. rows: those of a batch that are made; None: all.
        """
        content, ahead = self.check(spec)
        check_batch(batch_size, len(self._starts("train", spec)[0]), f"train windows of {spec.length} tokens")
        begin, end = self._begin["train"], self._end["train"]
        size = end - begin
        choices = np.where(size > ahead, np.maximum(size - content - ahead + 1, 1), 0)  # windows per section
        upto = np.cumsum(choices)
        own = rows or slice(None)

        def batches() -> Iterator[Batch]:
            step = start
            while True:
                rng = stream(seed, "batch", step)
                draw = rng.integers(upto[-1], size=batch_size)[own]
                section = np.searchsorted(upto, draw, side="right")
                first = begin[section] + draw - (upto[section] - choices[section])
                batch = self._cut("train", spec, first, end[section])
                masked = spec.head is Head.MLM
                yield self._mask(batch, rng.random((3, batch_size, spec.length))[:, own]) if masked else batch
                step += 1

        return batches()

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """The split once, in order, in adjoining windows; at most `limit` batches, the last one as small as it is.

        BERT's masks come from the stream (seed, split, window index): the same at any batch size. Without its MLM head
        it sees the text as it is.
        """
        first, end = self._starts(split, spec)
        check_batch(batch_size, max(len(first), batch_size), f"{split} windows")
        count = len(first) if limit is None else min(len(first), limit * batch_size)

        def batches() -> Iterator[Batch]:
            for low in range(0, count, batch_size):
                high = min(low + batch_size, count)
                batch = self._cut(split, spec, first[low:high], end[low:high])
                if spec.head is Head.MLM:
                    draws = [stream(seed, split, window).random((3, spec.length)) for window in range(low, high)]
                    batch = self._mask(batch, np.stack(draws, axis=1))
                yield batch

        return batches()

    def target_counts(self, spec: ModelSpec) -> np.ndarray:
        """How often each id can be a target in the train split, (V,) int64 with the model's V."""
        _, ahead = self.check(spec)
        tokens = [section.tokens[ahead:] for section in self.sections if section.split == "train"]
        counts = np.bincount(np.concatenate(tokens), minlength=spec.vocab)
        if not spec.causal:
            counts[list(self.specials.ids)] = 0
        return counts

    def _starts(self, split: str, spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
        """First token and section end of each adjoining window, (N,) and (N,). A causal window has a target."""
        check_split(split)
        content, ahead = self.check(spec)
        first, end = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for low, high in zip(self._begin[split], self._end[split], strict=True):
            first.append(np.arange(low, high - ahead, content))
            end.append(np.full(len(first[-1]), high))
        return np.concatenate(first), np.concatenate(end)

    def _cut(self, split: str, spec: ModelSpec, first: np.ndarray, end: np.ndarray) -> Batch:
        """Windows that start at `first` (B,) and stop at the section's `end` (B,) at the latest; nothing masked yet."""
        content, ahead = self.check(spec)
        at = first[:, None] + np.arange(content + ahead)  # (B, content + ahead)
        real = at < end[:, None]
        ids = self._tokens[split][np.minimum(at, end[:, None] - 1)].astype(np.int64)
        pad = self.specials.pad or 0
        if spec.causal:
            return {
                "tokens": np.where(real, ids, pad)[:, :-1],  # (B, T)
                "mask": real[:, :-1],
                "targets": np.where(real, ids, -1)[:, 1:],
            }
        tokens = np.full((len(first), spec.length), pad)  # (B, T)
        tokens[:, 0] = self.specials.cls
        tokens[:, 1:-1] = np.where(real, ids, pad)
        count = real.sum(1)  # (B,)
        tokens[np.arange(len(first)), count + 1] = self.specials.sep
        mask = np.arange(spec.length) < count[:, None] + 2
        return {"tokens": tokens, "mask": mask, "types": np.zeros_like(tokens)}

    def _mask(self, batch: Batch, draws: np.ndarray) -> Batch:
        """The batch with masked tokens, and their ids as targets, by `draws` (3, B, T), uniform in [0, 1).

        A row that has an ordinary token has at least one target.
        """
        tokens, hidden = batch["tokens"], self.specials.mask
        assert hidden is not None  # as `check` has seen
        choice, fate, word = draws
        choice = np.where(self._special[tokens], 2.0, choice)
        least = choice == choice.min(1, keepdims=True)  # a target even where it is not below the rate
        chosen = ((choice < CHOSEN) | least) & (choice < 1)
        other = self._ordinary[(word * len(self._ordinary)).astype(np.int64)]
        changed = np.where(fate < HIDDEN, hidden, np.where(fate < HIDDEN + REPLACED, other, tokens))
        return {**batch, "tokens": np.where(chosen, changed, tokens), "targets": np.where(chosen, tokens, -1)}


def unigram_perplexity(
    data: TextData, spec: ModelSpec, seed: int, batch_size: int = 16, limit: int | None = None
) -> float:
    """Perplexity, on the targets of `split_batches("evaluation", ...)`, of a model that knows word frequencies alone.

    Frequencies are those of the train split's possible targets, plus one for each of the V ids (Laplace).
    """
    counts = data.target_counts(spec) + 1
    logs = np.log(counts / counts.sum())
    batches = data.split_batches("evaluation", spec, batch_size, seed, limit)
    targets = np.concatenate([batch["targets"].ravel() for batch in batches])
    return math.exp(-logs[targets[targets >= 0]].mean())
