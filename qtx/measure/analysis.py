"""Where the outliers are: statistics of every site in one pass over evaluation data, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import numpy as np

from qtx_ref.spec import ModelSpec
from qtx_ref.stats import BINS, DROPPED, SIGMAS, kurtosis, top_share

from ..engines.protocols import Batch, Data, Model
from ..progress import Progress
from ..recipes.sites import layer_inputs, residual_stream, sites
from .heads import RULE, HeadStatistics, HeadSums
from .marks import Kinds, find_marks, make_kinds

PERCENTILES = (99.0, 99.9, 99.99)
PERCENTILE_BOUND = 1 / 128  # relative: half a bin, whose width is 1/64 of its lower edge
LISTED = 10  # channels and token strings that are named


def pool_moments(moments: np.ndarray) -> np.ndarray:
    """Count, mean and sums of powers of deviations of several sets of numbers (U, 5) as one set's, (5,); float64.

    With d the distance of a set's mean from the common one: M2 = sum(m2 + n d^2), M3 = sum(m3 + 3 d m2 + n d^3),
    M4 = sum(m4 + 4 d m3 + 6 d^2 m2 + n d^4).
    """
    n, mean, m2, m3, m4 = moments.T
    count = n.sum()
    if not count:
        return np.zeros(5)
    common = (n * mean).sum() / count
    d = mean - common
    second, third = m2 + n * d**2, m3 + 3 * d * m2 + n * d**3
    return np.array([count, common, second.sum(), third.sum(), (m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4).sum()])


def bin_edges() -> np.ndarray:
    """Lower edge of each bin of |x|, and an upper one of the last, (BINS + 1,) float64; infinite where infinity and NaN
    are counted."""
    patterns = np.arange(BINS + 1, dtype=np.uint32) << DROPPED
    infinite = np.uint32(0xFF << 23)
    return np.where(patterns < infinite, np.minimum(patterns, infinite).view(np.float32).astype(np.float64), np.inf)


def percentile(histogram: np.ndarray, q: float) -> float:
    """The smallest |x| that at least q percent of the elements do not exceed, by its bin's middle: within
    PERCENTILE_BOUND of it, relatively, from the smallest normal float32 (2^-126) on. 0 without elements."""
    upto = np.cumsum(histogram)
    if not upto[-1]:
        return 0.0
    place = int(np.searchsorted(upto, q / 100 * upto[-1] * (1 - 1e-15)))
    low, high = bin_edges()[place : place + 2]
    return float((low + high) / 2) if place else 0.0


@dataclass(frozen=True)
class SiteStatistics:
    """One site over all batches. Norm and kurtoses are means over sequences unless they say otherwise."""

    site: str
    inf_norm: float  # of the largest |x|
    inf_norm_max: float  # the largest |x| of all
    lowest: float
    highest: float
    rms: float
    kurtosis: float  # m4 / m2^2
    kurtosis_published: float  # m4 / (s^4 + 1e-6), s unbiased
    kurtosis_pooled: float  # m4 / m2^2 of all elements together
    percentiles: dict[str, float]  # of |x|
    top_energy: float  # share of the energy in the top 1% of channels (at least one)
    top_energy_tenth: float  # and in the top 0.1%
    beyond_6_sigma: int  # elements farther than 6 deviations from the mean of their own sequence
    beyond_channels: tuple[int, ...]  # channels that have such elements
    channels: int
    elements: int


class SiteSums:
    """What is kept of one site: its size does not depend on the number of batches."""

    def __init__(self) -> None:
        self.units = 0
        self.means = dict.fromkeys(("inf_norm", "kurtosis", "kurtosis_published"), 0.0)  # sums until the end
        self.ends = [np.inf, -np.inf]
        self.moments = np.zeros(5)
        self.energy = np.zeros(1)  # (C,) from the first batch on, as the next
        self.beyond = np.zeros(1, np.int64)
        self.histogram = np.zeros(BINS, np.int64)

    def add(self, statistics: Mapping[str, np.ndarray]) -> None:
        """Takes one batch's statistics by sequence."""
        units = statistics["moments"]
        self.units += len(units)
        for name in self.means:
            self.means[name] += float(statistics[name].sum())
        self.ends[0] = min(self.ends[0], statistics["lowest"].min(initial=np.inf))
        self.ends[1] = max(self.ends[1], statistics["highest"].max(initial=-np.inf))
        self.moments = pool_moments(np.vstack([self.moments, units]))
        self.energy = self.energy + statistics["energy"]
        self.beyond = self.beyond + statistics["beyond_channels"]
        self.histogram += statistics["histogram"]

    @property
    def token_share(self) -> np.ndarray:
        """In what share of the tokens each channel is beyond 6 sigma, (C,)."""
        return self.beyond * len(self.beyond) / max(self.moments[0], 1)

    def result(self, site: str) -> SiteStatistics:
        """The statistics over all batches so far, under the site's name."""
        count, units = max(self.moments[0], 1), max(self.units, 1)
        low, high = self.ends if self.units else (0.0, 0.0)
        return SiteStatistics(
            site=site,
            **{name: total / units for name, total in self.means.items()},
            inf_norm_max=float(max(-low, high)),
            lowest=float(low),
            highest=float(high),
            rms=float(np.sqrt(self.energy.sum() / count)),
            kurtosis_pooled=float(kurtosis(self.moments)),
            percentiles={f"{q:g}": percentile(self.histogram, q) for q in PERCENTILES},
            top_energy=top_share(self.energy, 0.01),
            top_energy_tenth=top_share(self.energy, 0.001),
            beyond_6_sigma=int(self.beyond.sum()),
            beyond_channels=tuple(np.flatnonzero(self.beyond).tolist()),
            channels=len(self.energy),
            elements=int(self.moments[0]),
        )


@dataclass(frozen=True)
class Channel:
    """A channel of the residual stream: at how many of its sites and layers it has outliers, and in what share of
    tokens."""

    channel: int
    sites: int
    layers: int
    token_share: float  # mean over the sites of the stream
    largest_share: float
    largest_site: str


@dataclass(frozen=True)
class Carrier:
    """A kind of token, or one token's string: its share of all tokens and of the outliers of the residual stream."""

    name: str
    tokens: float
    outliers: float


class Growth(TypedDict):
    """A site of the residual stream, or (not `stream`) what is added to it there."""

    site: str
    stream: bool
    inf_norm: float
    ratio: float  # of the inf norm to the first site's
    rms: float
    kurtosis: float


@dataclass
class Analysis:
    """What `analyze` has measured. Arrays are for pictures."""

    sites: list[SiteStatistics]
    stream: tuple[str, ...]
    channels: list[Channel]
    kinds: list[Carrier]
    words: list[Carrier]
    heads: list[HeadStatistics]
    energy: dict[str, np.ndarray] = field(repr=False)  # per stream site, (C,): mean square
    histograms: dict[str, np.ndarray] = field(repr=False)  # per stream site, (BINS,)
    places: dict[str, np.ndarray] = field(repr=False)  # per stream site, (T,): outliers by position; images only
    image: np.ndarray | None = field(repr=False)  # the mean image (C, S, S)
    example: dict[str, np.ndarray] = field(repr=False)  # one sequence or image as a batch
    tokens: Kinds | None = field(repr=False)

    def by_site(self) -> dict[str, SiteStatistics]:
        """Every site's statistics by its name."""
        return {s.site: s for s in self.sites}

    def growth(self) -> list[Growth]:
        """The residual stream by depth, and what is added to it between."""
        known = self.by_site()
        first = known[self.stream[0]].inf_norm
        rows: list[Growth] = []
        for site in self.stream:
            added = [known[site.replace("residual", "output")]] if site.endswith(".residual") else []
            for s in (*added, known[site]):
                ratio = s.inf_norm / first if first else 0.0
                row = Growth(
                    site=s.site, stream=s.site == site, inf_norm=s.inf_norm, ratio=ratio, rms=s.rms, kurtosis=s.kurtosis
                )
                rows.append(row)
        return rows

    def to_json_values(self) -> dict[str, Any]:
        """All but the pictures' arrays as JSON values."""
        parts = {
            name: [asdict(part) for part in getattr(self, name)] for name in ("sites", "channels", "kinds", "words")
        }
        parts["heads"] = [asdict(head) | {"idle": head.idle, "reason": head.reason} for head in self.heads]
        places = {site: counts.tolist() for site, counts in self.places.items()}
        about = {"percentile_relative_bound": PERCENTILE_BOUND, "sigmas": SIGMAS} | {"idle": RULE}
        return {"about": about, "growth": self.growth(), "places": places, **parts}


class Carriers:
    """Which tokens the outliers of the residual stream fall on, over batches."""

    def __init__(self, spec: ModelSpec, data: Data) -> None:
        self.kinds = make_kinds(spec, data)
        self.stream = residual_stream(spec)
        self.by_kind = np.zeros((2, 0 if self.kinds is None else len(self.kinds.names)), np.int64)  # tokens, outliers
        self.by_id = np.zeros((2, spec.vocab), np.int64)
        self.places = {} if self.kinds else {site: np.zeros(spec.length, np.int64) for site in self.stream}
        self.image = np.zeros(1)  # the sum of all, (C, S, S) from the first batch on
        self.images = 0

    def add(self, batch: Batch, statistics: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Takes one batch, and its statistics by site."""
        counts = {site: statistics[site]["beyond_tokens"] for site in self.stream}  # (B, T)
        if self.kinds is None:
            self.image = self.image + batch["images"].sum(axis=0, dtype=np.float64)
            self.images += len(batch["images"])
            for site, count in counts.items():
                self.places[site] += count.sum(axis=0)
            return
        real, count = np.asarray(batch["mask"], bool), np.sum(list(counts.values()), axis=0)
        for into, values in ((self.by_kind, self.kinds.of(batch)), (self.by_id, batch["tokens"])):
            size = into.shape[1]
            into[0] += np.bincount(values[real], minlength=size)
            into[1] += np.bincount(values[real], weights=count[real], minlength=size).astype(np.int64)

    def list_kinds(self) -> list[Carrier]:
        """The kinds of tokens, or of patches, that occur."""
        if self.kinds is None:
            whole = np.sum(list(self.places.values()), axis=0)
            pairs = (("CLS", whole[:1]), ("patches", whole[1:]))
            return [Carrier(name, len(part) / len(whole), part.sum() / max(whole.sum(), 1)) for name, part in pairs]
        tokens, outliers = self.by_kind / np.maximum(self.by_kind.sum(axis=1, keepdims=True), 1)
        return [
            Carrier(*row) for row in zip(self.kinds.names, tokens.tolist(), outliers.tolist(), strict=True) if row[1]
        ]

    def list_words(self) -> list[Carrier]:
        """The token strings on which most outliers fall."""
        if self.kinds is None:
            return []
        tokens, outliers = self.by_id / np.maximum(self.by_id.sum(axis=1, keepdims=True), 1)
        most = [i for i in np.argsort(-outliers, kind="stable")[:LISTED] if outliers[i]]
        return [Carrier(self.kinds.word(i), float(tokens[i]), float(outliers[i])) for i in most]


def find_recurring(stream: Mapping[str, SiteSums]) -> list[Channel]:
    """The channels that are beyond 6 sigma in the most tokens, over all sites of the residual stream."""
    names = list(stream)
    shares = np.stack([sums.token_share for sums in stream.values()])  # (S, C)
    layers = np.array([int(name.split(".")[1]) + 1 if name.startswith("layer.") else 0 for name in names])
    count = np.stack([(shares[layers == i] > 0).any(axis=0) for i in np.unique(layers)]).sum(axis=0)  # (C,)
    order = np.argsort(-shares.mean(axis=0), kind="stable")[:LISTED]
    return [
        Channel(
            channel=int(c),
            sites=int((shares[:, c] > 0).sum()),
            layers=int(count[c]),
            token_share=float(shares[:, c].mean()),
            largest_share=float(shares[:, c].max()),
            largest_site=names[int(shares[:, c].argmax())],
        )
        for c in order
        if count[c]
    ]


def analyze(model: Model, data: Data, batches: Iterable[Batch], total: int) -> Analysis:
    """Statistics of every result site of a float model, in the order of the forward pass, and of every attention head.

    data: what the batches are of, for the strings of tokens. total: the number of batches, for the progress bar.
    """
    spec = model.spec
    units = dict.fromkeys(sites(spec).results, "sequence")
    sums = {site: SiteSums() for site in units}
    heads, carriers = HeadSums(spec), Carriers(spec, data)
    example: dict[str, np.ndarray] = {}
    with Progress("analyze", total) as bar:
        for batch in batches:
            example = example or {name: value[:1] for name, value in batch.items()}
            statistics = model.statistics(batch, units)
            for site, part in statistics.items():
                sums[site].add(part)
            carriers.add(batch, statistics)
            heads.add(model.attention(batch, find_marks(spec, carriers.kinds, batch), layer_inputs(spec)))
            bar.advance()
    stream = {site: sums[site] for site in residual_stream(spec)}
    return Analysis(
        sites=[part.result(site) for site, part in sums.items()],
        stream=tuple(stream),
        channels=find_recurring(stream),
        kinds=carriers.list_kinds(),
        words=carriers.list_words(),
        heads=heads.result(),
        energy={site: part.energy * len(part.energy) / max(part.moments[0], 1) for site, part in stream.items()},
        histograms={site: part.histogram for site, part in stream.items()},
        places=carriers.places,
        image=None if carriers.kinds else carriers.image / max(carriers.images, 1),
        example=example,
        tokens=carriers.kinds,
    )
