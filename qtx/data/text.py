"""Text as token ids, and the batches cut from it.

A text is one source or a mixture of several. A source is a list of sections (chapters, files or blocks of paragraphs)
held in memory, or documents in shards (`shards`); each section or document is wholly in one split. A window is a run of
a split's tokens, in one section or across them (`packing`); a batch of a causal model has the tokens of its window and
the next as target, BERT's has [CLS] and [SEP] around it unless `begin` says otherwise.
Everything random comes from a named stream, so a batch depends on its seed and step alone, whichever backend takes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import Head, ModelSpec

from ..engines.protocols import Batch
from .spec import Begin, DataSpec, Order
from .splits import SPLITS, DataError, check_batch, check_split, describe_splits, digest, fingerprint
from .windows import Mixture, Reach, Tokens, Windows, order_epochs

# Devlin et al. 2019, section 3.1: of the tokens that are predicted 80% are hidden, 10% replaced, 10% kept
HIDDEN, REPLACED = 0.8, 0.1


@dataclass(frozen=True, eq=False)
class Section:
    """A chapter, file or block: the sha256 is that of its text in UTF-8, `tokens` (n,) its ids, without specials unless
    they begin a document."""

    title: str
    sha256: str
    split: str
    tokens: np.ndarray


@dataclass(frozen=True)
class Specials:
    """Ids of the special tokens; None where the tokenizer has none. `ids` are all ids that are never predicted by a
    masked model; `front` is what the tokenizer puts before a text."""

    pad: int | None
    cls: int | None
    sep: int | None
    mask: int | None
    ids: tuple[int, ...]
    front: int | None = None

    def around(self, causal: bool) -> tuple[int, int | None]:
        """What stands before and behind a document, or a window. Raises DataError where the tokenizer has none."""
        before, behind = (
            ((self.front if self.front is not None else self.cls), None) if causal else (self.cls, self.sep)
        )
        if before is None:
            raise DataError("the tokenizer has no token that begins a text ([BOS], <s>, </s>, [CLS]): leave out begin")
        return before, behind


@dataclass(frozen=True, eq=False)
class Part:
    """One source of a text: its tokens, hashes and fingerprint by split, and how many texts were left out because an
    earlier one is the same."""

    tokens: Mapping[str, Tokens]
    hashes: Mapping[str, list[str]]
    fingerprints: Mapping[str, str]
    dropped: int = 0
    weight: float = 1.0


def make_part(sections: Sequence[Section], dropped: int = 0, weight: float = 1.0) -> Part:
    """Sections as a source. Raises DataError for one that stands in two splits."""
    first: dict[str, Section] = {}
    for section in sections:
        twin = first.setdefault(section.sha256, section)
        if twin.split != section.split:
            raise DataError(
                f"section {section.title!r} of the {section.split} split is also in {twin.split}: remove one copy"
            )
    tokens, hashes = {}, {}
    for split in SPLITS:
        own = [section for section in sections if section.split == split]
        joined = np.concatenate([np.empty(0, np.int32), *(s.tokens for s in own)]).astype(np.int32)
        tokens[split] = Tokens([joined], [np.cumsum([len(s.tokens) for s in own], dtype=np.int64)])
        hashes[split] = [section.sha256 for section in own]
    return Part(tokens, hashes, {split: fingerprint(hashes[split]) for split in SPLITS}, dropped, weight)


class TextData:
    """Tokenized text. `dropped` counts sections or documents left out because an earlier one had the same text."""

    def __init__(
        self,
        source: str,
        sections: Sequence[Section],
        tokenizer_json: str,
        vocab: int,
        specials: Specials,
        dropped: int = 0,
        *,
        settings: DataSpec | None = None,
        parts: Sequence[Part] | None = None,
    ) -> None:
        """sections: of a text that is held in memory. settings: how windows are cut and come. parts: the sources, where
        they are not these sections alone."""
        self.source, self.sections, self.vocab = source, sections, vocab
        self.tokenizer_json, self.specials = tokenizer_json, specials
        self.settings = settings or DataSpec()
        self._parts = parts or [make_part(sections, dropped)]
        self.dropped = sum(part.dropped for part in self._parts)
        self._special = np.zeros(vocab, bool)  # by id
        self._special[list(specials.ids)] = True
        self._windows: dict[tuple[str, Reach], list[Windows]] = {}

    @cached_property
    def _ordinary(self) -> np.ndarray:
        """The ids that may stand in place of a masked token."""
        return np.flatnonzero(~self._special)

    def hashes(self, split: str) -> list[str]:
        """The sha256 of each of the split's sections, in order; of a source in shards the one of the whole split."""
        check_split(split)
        return [value for part in self._parts for value in part.hashes[split]]

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split."""
        check_split(split)
        known = [part.fingerprints[split] for part in self._parts]
        return known[0] if len(known) == 1 else fingerprint(known)

    def token_count(self, split: str) -> int:
        """Tokens in the split; specials are counted only where they begin or end documents."""
        check_split(split)
        return sum(part.tokens[split].count for part in self._parts)

    def describe(self) -> dict:
        """What a checkpoint keeps of its data, as JSON values."""
        return {
            "kind": "text",
            "source": self.source,
            "vocab": self.vocab,
            "tokenizer_sha256": digest(self.tokenizer_json.encode()),
            **describe_splits(self),
            **self.settings.describe(),
        }

    def length(self, spec: ModelSpec) -> int:
        """Tokens of a window with what stands around it, T. Raises DataError where the model takes no so long one."""
        return window_length(self.settings, spec)

    def check(self, spec: ModelSpec) -> Reach:
        """How far a window reaches; `DataError` if the model cannot take this text."""
        if self.vocab > spec.vocab:
            raise DataError(
                f"the text has {self.vocab} token ids, the model {spec.vocab}: set its vocab to {self.vocab}"
            )
        length, begin = self.length(spec), self.settings.begin
        if spec.causal:
            if begin is Begin.WINDOW:  # the first token is a target too
                self.specials.around(causal=True)
                return Reach(length, length)
            return Reach(length + 1, length)
        if length < 3:
            what = "model length" if self.settings.window is None else "data window"
            raise DataError(f"{what} is {length}: BERT needs at least 3, a token between [CLS] and [SEP]")
        for name in ("pad", "cls", "sep", *(("mask",) if spec.head is Head.MLM else ())):
            if getattr(self.specials, name) is None:
                raise DataError(f"the tokenizer has no [{name.upper()}] token: give one that has, or use an opt model")
        content = length - 2 if begin in (None, Begin.WINDOW) else length
        return Reach(content, content)

    def train_batches(
        self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Batches of windows of the train split, without end, from step `start` on, in the order of the settings.

        Batch `step` depends on (seed, step) alone, so resuming costs nothing. rows: those of a batch that are made;
        None: all. Random windows: each is as likely as any other; a section shorter than a window counts as one.
        """
        length, windows = self.length(spec), self._cut_windows("train", spec)
        check_batch(batch_size, sum(w.count for w in windows), f"train windows of {length} tokens")
        if not all(w.count for w in windows):
            raise DataError(f"a source of {self.source} has no train text: give it some, or leave it out")
        mixture = Mixture([part.weight for part in self._parts], seed) if len(windows) > 1 else None
        permuted = self.settings.order is Order.PERMUTATION
        choices = np.array([w.choices for w in windows]) if not permuted else np.empty(0, np.int64)
        own = rows or slice(None)

        def batches() -> Iterator[Batch]:
            step = start
            while True:
                rng = stream(seed, "batch", step)
                place = np.arange(step * batch_size, (step + 1) * batch_size)
                source, before = mixture.draw(place) if mixture else (np.zeros(batch_size, np.int64), place)
                if not permuted:
                    before = rng.integers(choices[source] if mixture else choices[0], size=batch_size)
                source, before = source[own], before[own]
                first, end = np.empty_like(before), np.empty_like(before)
                for number in np.unique(source):
                    here, these = source == number, windows[number]
                    if permuted:
                        drawn = these.adjoining(order_epochs(before[here], these.count, seed, int(number)))
                    else:
                        drawn = these.random(before[here])
                    first[here], end[here] = drawn
                batch = self._cut("train", spec, source, first, end)
                masked = spec.head is Head.MLM
                yield self._mask(batch, rng.random((3, batch_size, length))[:, own]) if masked else batch
                step += 1

        return batches()

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """The split once, in order, in adjoining windows; at most `limit` batches, the last one as small as it is. Of a
        mixture each source comes in proportion to its size.

        BERT's masks come from the stream (seed, split, window index): the same at any batch size. Without its MLM head
        it sees the text as it is.
        """
        length, windows = self.length(spec), self._cut_windows(split, spec)
        total = sum(w.count for w in windows)
        check_batch(batch_size, max(total, batch_size), f"{split} windows")
        count = total if limit is None else min(total, limit * batch_size)
        sources, places = spread([w.count for w in windows], count)

        def batches() -> Iterator[Batch]:
            for low in range(0, count, batch_size):
                high = min(low + batch_size, count)
                source = sources[low:high] if len(windows) > 1 else np.zeros(high - low, np.int64)
                place = places[low:high] if len(windows) > 1 else np.arange(low, high)
                first, end = np.empty_like(place), np.empty_like(place)
                for number in np.unique(source):
                    here = source == number
                    first[here], end[here] = windows[number].adjoining(place[here])
                batch = self._cut(split, spec, source, first, end)
                if spec.head is Head.MLM:
                    draws = [stream(seed, split, window).random((3, length)) for window in range(low, high)]
                    batch = self._mask(batch, np.stack(draws, axis=1))
                yield batch

        return batches()

    def target_counts(self, spec: ModelSpec) -> np.ndarray:
        """How often each id can be a target in the train split, (V,) int64 with the model's V."""
        reach = self.check(spec)
        counts = np.zeros(spec.vocab, np.int64)
        for part, windows in zip(self._parts, self._cut_windows("train", spec), strict=True):
            counts += part.tokens["train"].count_ids(spec.vocab)
            if reach.read > reach.step:  # what nothing stands before
                counts -= np.bincount(part.tokens["train"].take(windows.beginnings), minlength=spec.vocab)
        if not spec.causal:
            counts[list(self.specials.ids)] = 0
        return counts

    def _cut_windows(self, split: str, spec: ModelSpec) -> list[Windows]:
        """The windows of each source. Raises DataError as `check`."""
        check_split(split)
        key = split, self.check(spec)
        if key not in self._windows:
            packing = self.settings.packing
            self._windows[key] = [Windows(part.tokens[split], key[1], packing) for part in self._parts]
        return self._windows[key]

    def _cut(self, split: str, spec: ModelSpec, source: np.ndarray, first: np.ndarray, end: np.ndarray) -> Batch:
        """Windows of the sources (B,) that start at `first` (B,) and stop at the section's `end` (B,) at the latest;
        nothing masked yet."""
        at = first[:, None] + np.arange(self.check(spec).read)  # (B, read)
        real = at < end[:, None]
        at = np.minimum(at, end[:, None] - 1)
        ids = np.empty(at.shape, np.int64)
        for number in np.unique(source):
            here = source == number
            ids[here] = self._parts[number].tokens[split].take(at[here])
        pad = self.specials.pad or 0
        begin = self.settings.begin
        if spec.causal:
            if begin is Begin.WINDOW:
                front = np.full((len(at), 1), self.specials.around(causal=True)[0])
                ids, real = np.hstack([front, ids]), np.hstack([np.ones_like(front, bool), real])
            return {
                "tokens": np.where(real, ids, pad)[:, :-1],  # (B, T)
                "mask": real[:, :-1],
                "targets": np.where(real, ids, -1)[:, 1:],
            }
        tokens = np.where(real, ids, pad)  # (B, T)
        if begin in (None, Begin.WINDOW):
            cls, sep = self.specials.around(causal=False)
            count = real.sum(1)  # (B,)
            tokens = np.pad(tokens, ((0, 0), (1, 1)), constant_values=pad)
            tokens[:, 0] = cls
            tokens[np.arange(len(first)), count + 1] = sep
            real = np.arange(tokens.shape[1]) < count[:, None] + 2
        return {"tokens": tokens, "mask": real, "types": np.zeros_like(tokens)}

    def _mask(self, batch: Batch, draws: np.ndarray) -> Batch:
        """The batch with masked tokens, and their ids as targets, by `draws` (3, B, T), uniform in [0, 1).

        A row that has an ordinary token has at least one target.
        """
        tokens, hidden = batch["tokens"], self.specials.mask
        assert hidden is not None  # as `check` has seen
        choice, fate, word = draws
        choice = np.where(self._special[tokens], 2.0, choice)
        least = choice == choice.min(1, keepdims=True)  # a target even where it is not below the rate
        chosen = ((choice < self.settings.mask_rate) | least) & (choice < 1)
        other = self._ordinary[(word * len(self._ordinary)).astype(np.int64)]
        changed = np.where(fate < HIDDEN, hidden, np.where(fate < HIDDEN + REPLACED, other, tokens))
        return {**batch, "tokens": np.where(chosen, changed, tokens), "targets": np.where(chosen, tokens, -1)}


def window_length(settings: DataSpec, spec: ModelSpec) -> int:
    """Tokens of a window. Raises DataError where the model has no so many positions."""
    window = settings.window
    if window is not None and window > spec.length:
        raise DataError(f"data window is {window} tokens and the model's length {spec.length}: give at most that")
    return spec.length if window is None else window


def spread(counts: Sequence[int], first: int) -> tuple[np.ndarray, np.ndarray]:
    """The first so many of the windows of several sources, each source spread evenly over all: source and window, (N,)
    each."""
    if len(counts) == 1:  # the windows as they come, which nobody needs to hold
        return np.empty(0, np.int64), np.empty(0, np.int64)
    kept = [min(count, first) for count in counts]
    source = np.repeat(np.arange(len(counts)), kept)
    place = np.concatenate([np.arange(count) for count in kept])
    order = np.argsort((place + 0.5) / np.array(counts)[source], kind="stable")[:first]
    return source[order], place[order]


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
