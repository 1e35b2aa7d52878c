"""Windows: where each begins in a split's tokens, and the order of an epoch.

A split is one run of tokens in which documents follow one another. Its windows adjoin: window i begins `step` tokens
after window i - 1, within a document (packing by section) or in the whole run (packing as a stream).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from qtx_ref.random import stream

from .spec import Packing
from .splits import DataError

ROUNDS = 8  # of the Feistel network
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
BLOCK = 2**16  # windows of which each source of a mixture has the same number, to within one


class Tokens:
    """One split of a source: arrays of ids one after another, each of whole documents."""

    def __init__(self, arrays: Sequence[np.ndarray], ends: Sequence[np.ndarray]) -> None:
        """arrays: (n,) ids each, in memory or mapped; ends: where the documents of each end in it, (k,)."""
        self._arrays, self._local = arrays, ends
        self._base = np.cumsum([0, *(len(array) for array in arrays)])
        self.count = int(self._base[-1])

    @property
    def ends(self) -> np.ndarray:
        """Where each document ends, (documents,) int64."""
        parts = [ends + base for ends, base in zip(self._local, self._base, strict=False)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def take(self, at: np.ndarray) -> np.ndarray:
        """The ids at places of any shape, int64."""
        if len(self._arrays) == 1:
            return self._arrays[0][at].astype(np.int64)
        flat = at.ravel()
        which = np.searchsorted(self._base, flat, side="right") - 1
        ids = np.empty(len(flat), np.int64)
        for number in np.unique(which):
            here = which == number
            ids[here] = self._arrays[number][flat[here] - self._base[number]]
        return ids.reshape(at.shape)

    def count_ids(self, most: int) -> np.ndarray:
        """How often each id below `most` stands in it, (most,) int64."""
        return sum((np.bincount(array, minlength=most) for array in self._arrays), np.zeros(most, np.int64))


class Reach(NamedTuple):
    """How many tokens a window reads, and how many after its beginning the next one begins."""

    read: int
    step: int


class Windows:
    """The windows of a split's tokens."""

    def __init__(self, tokens: Tokens, reach: Reach, packing: Packing) -> None:
        """Packing by section holds 16 bytes for each document in memory, packing as a stream none."""
        self.reach = reach
        self._ends = tokens.ends if packing is Packing.SECTION else np.array([tokens.count])

    @cached_property
    def _adjoining(self) -> np.ndarray:
        """How many windows there are up to the end of each document."""
        fill = np.diff(self._ends, prepend=0) - (self.reach.read - self.reach.step)  # tokens at which one may begin
        return np.cumsum(np.maximum(-(-fill // self.reach.step), 0))

    @cached_property
    def _random(self) -> np.ndarray:
        """The same of windows that begin at any token."""
        sizes, ahead = np.diff(self._ends, prepend=0), self.reach.read - self.reach.step
        return np.cumsum(np.where(sizes > ahead, np.maximum(sizes - self.reach.read + 1, 1), 0))

    @property
    def beginnings(self) -> np.ndarray:
        """The first token of each document (or of the run) that has one."""
        sizes = np.diff(self._ends, prepend=0)
        return (self._ends - sizes)[sizes > 0]

    @property
    def count(self) -> int:
        """How many adjoining windows there are."""
        return int(self._adjoining[-1]) if len(self._ends) else 0

    @property
    def choices(self) -> int:
        """How many windows there are that begin at any token."""
        return int(self._random[-1]) if len(self._ends) else 0

    def adjoining(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token, and end of the document (or of the run), of windows 0 to below `count`, each (N,)."""
        return self._locate(self._adjoining, index, self.reach.step)

    def random(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same of windows that begin at any token, 0 to below `choices`; a document shorter than a window counts as
        one."""
        return self._locate(self._random, index, 1)

    def _locate(self, upto: np.ndarray, index: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        section = np.searchsorted(upto, index, side="right")
        before = np.where(section > 0, section - 1, 0)
        low = np.where(section > 0, self._ends[before], 0)
        place = index - np.where(section > 0, upto[before], 0)
        return low + place * step, self._ends[section]


def permute(index: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Where each of `index` (N,), 0 to below `count`, comes to stand: a permutation of 0 .. count - 1 by `keys`
    (`ROUNDS`,) uint64, of which no part is ever held.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of 2h bits; what falls outside is permuted again
    until it falls inside (cycle walking, Black and Rogaway 2002). The round function is the finalizer of SplitMix64
    (Steele et al. 2014).
    """
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    got = index.astype(np.uint64)
    todo = np.ones(len(got), bool)
    while todo.any():
        part = got[todo]
        left, right = part >> half, part & low
        for key in keys:
            mixed = right ^ key
            for shift, factor in zip((np.uint64(30), np.uint64(27)), MIX, strict=True):
                mixed = (mixed ^ (mixed >> shift)) * factor
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & low)
        got[todo] = left << half | right
        todo = got >= np.uint64(count)
    return got.astype(np.int64)


def order_epochs(place: np.ndarray, count: int, seed: int, source: int) -> np.ndarray:
    """The windows at places 0, 1, ... of a source's endless order, in which each epoch has each of `count` windows
    once, in an order of its own."""
    epoch, within = np.divmod(place, count)
    window = np.empty_like(within)
    for turn in np.unique(epoch).tolist():
        keys = stream(seed, "permutation", source, turn).integers(2**64, size=ROUNDS, dtype=np.uint64)
        window[epoch == turn] = permute(within[epoch == turn], count, keys)
    return window


class Mixture:
    """Which source each window of a run is of: drawn, and yet each source has its share of every block of windows."""

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.ldexp(weights, -np.frexp(max(weights))[1])  # the same ratios, of a finite sum
        self._bounds = np.cumsum(shares) / sum(shares)
        self._seed = seed
        even = np.searchsorted(self._bounds[:-1], (np.arange(BLOCK) + 0.5) / BLOCK, side="right")
        self._even = even  # (BLOCK,) the source of each of a block's places before they are drawn
        self._share = np.bincount(even, minlength=len(weights))
        for weight, share in zip(weights, self._share, strict=True):
            if not share:
                raise DataError(f"a source has the weight {weight:g} of {sum(weights):g}: give at least 1 in {BLOCK}")
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def draw(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of windows by their number in the run (B,): the source, and how many windows of that source came before."""
        block, place = np.divmod(number, BLOCK)
        self._known = {b: self._known[b] if b in self._known else self._make(b) for b in np.unique(block).tolist()}
        source, before = np.empty_like(number), np.empty_like(number)
        for b, (sources, ranks) in self._known.items():
            here = block == b
            source[here] = sources[place[here]]
            before[here] = ranks[place[here]] + b * self._share[source[here]]
        return source, before

    def _make(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's sources and, for each of its places, how many of the same source stand before it."""
        sources = stream(self._seed, "mixture", block).permutation(self._even)
        ranks = np.empty(BLOCK, np.int64)
        for source in range(len(self._share)):
            here = np.flatnonzero(sources == source)
            ranks[here] = np.arange(len(here))
        return sources, ranks
