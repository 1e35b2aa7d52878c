"""The folder where tokenized texts are kept, and what is found there by a fingerprint."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import numpy as np


def cache_folder() -> Path:
    """`QTX_CACHE`, or qtx in the system's place for what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QTX_CACHE") or Path(base) / "qtx")


def hashes_path(known: str) -> Path:
    """Where the hashes of the documents of a split are, which has a fingerprint that begins with `known`."""
    return cache_folder() / "documents" / f"{known}.npy"


def read_hashes(known: Collection[str]) -> list[np.ndarray]:
    """The first 64 bits of the sha256 of each of those documents, sorted, uint64: of every one of these splits that is
    here."""
    found: list[np.ndarray] = []
    try:
        here = {name.removesuffix(".npy") for name in os.listdir(hashes_path("").parent)}
    except OSError:
        return found
    for value in sorted(here.intersection(known)):
        with suppress(OSError, ValueError, EOFError):  # damaged: the others still count
            found.append(np.load(hashes_path(value), allow_pickle=False))
    return found
