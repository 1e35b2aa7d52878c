"""The published outlier metrics of a float model: max inf norm and average kurtosis."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..engines.protocols import Batch, Model
from ..recipes.sites import paper_sites


@dataclass(frozen=True)
class Outliers:
    """The published metrics: the largest over sites of the mean inf norm, where, and the kurtosis averaged over
    sites."""

    max_inf_norm: float
    max_inf_norm_site: str
    average_kurtosis: float
    max_kurtosis: float
    max_kurtosis_site: str


def measure_outliers(model: Model, batches: Iterable[Batch]) -> Outliers:
    """The published metrics of a float model: per site the mean over units of all batches, then over sites."""
    chosen = paper_sites(model.spec)
    sums: dict[str, dict[str, tuple[float, int]]] = {"inf_norm": {}, "kurtosis_published": {}}
    for batch in batches:
        for site, statistics in model.statistics(batch, chosen.inf_norm, tuple(sums)).items():
            for name, values in statistics.items():
                total, count = sums[name].get(site, (0.0, 0))
                sums[name][site] = (total + float(values.sum()), count + values.size)
    mean = {name: {site: total / count for site, (total, count) in parts.items()} for name, parts in sums.items()}
    norms = mean["inf_norm"]
    kurtoses = mean["kurtosis_published"]
    largest, peak = max(norms, key=norms.__getitem__), max(chosen.kurtosis, key=kurtoses.__getitem__)
    average = sum(kurtoses[site] for site in chosen.kurtosis) / len(chosen.kurtosis)
    return Outliers(norms[largest], largest, average, kurtoses[peak], peak)
