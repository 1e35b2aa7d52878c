"""What text and images share: the three splits, how many items each gets, and how items are identified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import SpecError

from ..engines.protocols import Calibration
from .cache import read_hashes

SHORT = 16  # hexadecimal digits by which sections, texts and pictures are told apart
BATCH = 16  # sequences or images of an evaluation or calibration batch
SORTED = 16  # batches whose rows are sorted by size together
SPLITS = ("train", "calibration", "evaluation")


class DataError(ValueError):
    """Data that cannot be used. The message is one line: it names the value and the remedy."""


def digest(data: bytes) -> str:
    """The identity of a section, an image or a tokenizer: sha256, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(hashes: list[str]) -> str:
    """One hash over the hashes of a split, in order."""
    return digest("\n".join(hashes).encode())


class Splits(Protocol):
    """Data in splits."""

    def hashes(self, split: str) -> list[str]: ...

    def fingerprint(self, split: str) -> str: ...


def describe_splits(data: Splits) -> dict[str, dict[str, Any]]:
    """What a checkpoint keeps of them, as JSON values: the sha256s of each split, and one for the whole of it."""
    hashes = {split: data.hashes(split) for split in SPLITS}
    return {"hashes": hashes, "fingerprints": {split: data.fingerprint(split) for split in SPLITS}}


def name_splits(count: int) -> list[str]:
    """The split of each of `count` >= 3 items in order: the last tenth evaluates, the tenth before it calibrates.

    A tenth is rounded and at least one item.
    """
    held = max(1, round(count / 10))
    return ["train"] * (count - 2 * held) + ["calibration"] * held + ["evaluation"] * held


def check_split(split: str) -> None:
    """Refuses a name that is not one of `SPLITS`."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} does not exist: choose one of {', '.join(SPLITS)}")


def check_batch(batch_size: int, available: int, what: str) -> None:
    """Refuses a batch size below 1, or above the `available` items; `what` says what they are."""
    if batch_size < 1:
        raise DataError(f"batch size is {batch_size}: give at least 1")
    if available < batch_size:
        raise DataError(f"{available} {what} do not fill one batch of {batch_size}: give more data or a smaller batch")


class ClassifiedItems:
    """Items of which each has a hash and a class, in three splits."""

    labels: np.ndarray  # (N,) int64
    _hashes: list[str]  # of all N
    _rows: dict[str, np.ndarray]  # of each split, in its order

    def hashes(self, split: str) -> list[str]:
        """The sha256 of each of the split's items, or its first 16 digits, in order. Raises DataError for another
        split."""
        check_split(split)
        return [self._hashes[row] for row in self._rows[split]]

    def labels_of(self, split: str) -> np.ndarray:
        """The class of each of the split's items, in order, int64. Raises DataError for another split."""
        check_split(split)
        return self.labels[self._rows[split]]


def iterate_passes(
    rows: np.ndarray, batch_size: int, seed: int, start: int, sizes: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """The rows of batch `start`, `start` + 1, ... without end: every row once per pass, newly shuffled.

    sizes: by row; rows of like size then share a batch, so that little of it is padding: each run of `SORTED` batches
    of the shuffled rows is sorted by size, and its batches are shuffled. Batch `step` depends on (seed, step) alone.
    """

    def order(turn: int) -> np.ndarray:
        rng = stream(seed, "pass", turn)
        shuffled = rng.permutation(rows)
        if sizes is None:
            return shuffled
        for low in range(0, len(rows) - batch_size + 1, SORTED * batch_size):
            part = shuffled[low : low + SORTED * batch_size]
            part = part[np.argsort(sizes[part], kind="stable")]
            whole = len(part) // batch_size * batch_size
            mixed = rng.permutation(part[:whole].reshape(-1, batch_size)).ravel()
            shuffled[low : low + len(part)] = np.concatenate([mixed, part[whole:]])
        return shuffled

    known: dict[int, np.ndarray] = {}
    step = start
    while True:
        turn, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(rows))
        known = {t: known[t] if t in known else order(t) for t in np.unique(turn).tolist()}
        yield np.array([known[t][p] for t, p in zip(turn.tolist(), place, strict=True)])
        step += 1


def refuse_overlap(meta: Mapping[str, Any], data: Calibration, split: str) -> None:
    """Raises SpecError where a section or document of `split` is among those that the model, or a model that it began
    with, was trained on, or that it was calibrated on.

    A text in shards is known by one hash for each of its splits; its documents are compared where the cache still has
    their hashes.
    """
    hashes = meta.get("data", {}).get("hashes", {})
    known = {"train": hashes.get("train", []), "calibration": meta.get("calibration", hashes.get("calibration", []))}
    known["earlier train"] = meta.get("trained_on", [])
    theirs = {value[:SHORT] for value in data.hashes(split)}
    for use in known:
        own = {value[:SHORT] for value in known[use]}
        if use != split and (shared := (own & theirs) or find_shared(own, theirs)):
            raise SpecError(
                f"{len(shared)} section(s) of the {split} data are this model's {use} data (first hash "
                f"{sorted(shared)[0][:12]}): give other data"
            )


def find_shared(one: set[str], two: set[str]) -> set[str]:
    """The documents that two sets of texts in shards have in common, as far as the cache has their hashes."""
    shared = [np.intersect1d(a, b) for a in read_hashes(one) for b in read_hashes(two)]
    return {f"{int(number):016x}" for numbers in shared for number in numbers}
