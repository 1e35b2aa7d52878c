"""Where the outliers are: statistics of every site in one pass over evaluation data, and where attention goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtx_ref.stats import top_share

from .progress import Progress
from .sites import sites

TOP = 0.01  # the share of channels whose energy is reported


@dataclass(frozen=True)
class SiteStatistics:
    """One site over all batches. Norm and kurtoses are means over sequences; energy and counts are sums."""

    site: str
    inf_norm: float  # mean over sequences of the largest |x|
    inf_norm_max: float  # the largest |x| of all
    kurtosis: float  # m4 / m2^2
    kurtosis_published: float  # m4 / (s^4 + 1e-6), s unbiased
    top_energy: float  # share of the energy in the top 1% of channels (at least one)
    beyond_6_sigma: int  # elements farther than 6 deviations from the mean of their own sequence
    elements: int


@dataclass(frozen=True)
class HeadMass:
    """Mean attention probability that one layer's heads give to marked keys."""

    site: str
    mark: str  # "first" or "separator"
    heads: tuple[float, ...]


def marks(data: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keys to look at, (B, T) each: the first token, and [SEP] where the tokenizer has one and the text holds it."""
    if "tokens" not in batch:
        return {}
    tokens = batch["tokens"]
    first = np.zeros(tokens.shape, bool)
    first[:, 0] = True
    found = {"first": first}
    if data.specials.sep is not None and (tokens == data.specials.sep).any():
        found["separator"] = (tokens == data.specials.sep) & batch["mask"]
    return found


def analyze(
    model: Any, data: Any, batches: Iterable[Mapping[str, np.ndarray]], total: int
) -> tuple[list[SiteStatistics], list[HeadMass]]:
    """Statistics of every result site of a float model, in the order of the forward pass, and attention mass by head."""
    units = dict.fromkeys(sites(model.spec).results, "sequence")
    parts: dict[str, list[dict[str, np.ndarray]]] = {site: [] for site in units}
    masses: dict[tuple[str, str], list[np.ndarray]] = {}
    sizes: list[int] = []
    with Progress("analyze", total) as bar:
        for batch in batches:
            for site, found in model.statistics(batch, units).items():
                parts[site].append(found)
            chosen = marks(data, batch) if model.spec.vocab else {"first": first_token(batch, model.spec.length)}
            sizes.append(len(next(iter(batch.values()))))
            for site, by_mark in model.attention_mass(batch, chosen).items():
                for mark, heads in by_mark.items():
                    masses.setdefault((site, mark), []).append(heads)
            bar.advance()
    means = [
        HeadMass(site, mark, tuple(np.average(found, axis=0, weights=sizes).tolist()))
        for (site, mark), found in masses.items()
    ]
    return [combine(site, found) for site, found in parts.items()], means


def first_token(batch: Mapping[str, np.ndarray], length: int) -> np.ndarray:
    """The CLS token of images, (B, T)."""
    mark = np.zeros((len(batch["images"]), length), bool)
    mark[:, 0] = True
    return mark


def combine(site: str, parts: list[dict[str, np.ndarray]]) -> SiteStatistics:
    """One site's statistics of several batches as one record."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    energy = sum(part["energy"] for part in parts)
    norms = joined("inf_norm")
    return SiteStatistics(
        site=site,
        inf_norm=float(norms.mean()),
        inf_norm_max=float(norms.max()),
        kurtosis=float(joined("kurtosis").mean()),
        kurtosis_published=float(joined("kurtosis_published").mean()),
        top_energy=top_share(energy, TOP),
        beyond_6_sigma=int(joined("beyond").sum()),
        elements=int(joined("elements").sum()),
    )
