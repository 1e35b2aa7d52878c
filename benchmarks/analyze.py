"""Statistics and calibration against a float forward pass of the same batch, which they include; and the reference.

Calibration is by running minimum and maximum. Tokens are random. The floor of statistics is one reading of every site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from qtx.engines.backend import backend
from qtx.recipes.sites import paper_sites, sites
from qtx_ref.backend import Model as ReferenceModel
from qtx_ref.models.initial import init_params
from qtx_ref.spec import ModelSpec, QuantSpec
from qtx_torch.backend import Model

from .harness import Call, Row, Skip, compare, compare_each, near, peak
from .steps import Arrays, compare_reference, random_batch, shape


def make(model: str, layers: int, batch: int, length: int) -> tuple[ModelSpec, Arrays, Arrays]:
    spec = shape(model, 0.0, layers)
    return spec, init_params(spec, 0), random_batch(spec, batch, length)


def list_calls(spec: ModelSpec, model: Model, batch: Arrays) -> dict[str, Callable[[], object]]:
    named = sites(spec)
    every, paper = dict.fromkeys(named.results, "sequence"), paper_sites(spec).inf_norm
    results, operands = ({site: QuantSpec() for site in part} for part in (named.results, named.operands))
    return {
        "float forward": lambda: model.forward(batch),
        f"statistics, all {len(every)} sites": lambda: model.statistics(batch, every),
        f"statistics, the paper's {len(paper)} sites": lambda: model.statistics(batch, paper),
        "published metrics there": lambda: model.statistics(batch, paper, ("inf_norm", "kurtosis_published")),
        f"calibration, {len(results)} results": lambda: model.calibrate([batch], results),
        f"calibration, {len(operands)} operands too": lambda: model.calibrate([batch], results | operands),
    }


def build(name: str, *size: object) -> Call:
    spec, params, batch = make(*size)
    return list_calls(spec, Model(spec, params), batch)[name]


def compare_statistics(*size: object) -> str:
    """The largest magnitude and the kurtosis at all sites are the reference's."""
    spec, params, batch = make(*size)
    every = dict.fromkeys(sites(spec).results, "sequence")
    ours, theirs = (kind(spec, params).statistics(batch, every) for kind in (Model, ReferenceModel))
    logs = []
    for found in (ours, theirs):
        values = [np.ravel(found[site][name]) for site in every for name in ("inf_norm", "kurtosis")]
        logs.append(np.log(np.maximum(np.concatenate(values), 1e-6)))
    return near(*logs, 1e-3, "to the reference, logarithms")


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    size = ("bert-tiny", 1, 2, 32) if quick else ("bert-base", 6, 16, 64)
    spec, params, batch = make(*size)
    calls = list_calls(spec, Model(spec, params), batch)
    agreed = compare_statistics(*size)
    yield from compare_each(
        f"{size[0]} of {size[1]} layers, {size[2]} x {size[3]}", calls, "float forward",
        rounds=2 if quick else 7, checks={name: lambda: agreed for name in calls},
        bounds={name: 2.0 for name in calls if name.startswith("statistics, all")},
        memory={name: peak(build, name, *size) for name in calls},
    )  # fmt: skip


def build_forward(library: str, *size: object) -> Call:
    spec, params, batch = make(*size)
    model = backend(library).Model(spec, params)
    return lambda: model.forward(batch)


def reference_rows(device: str, quick: bool) -> Iterator[Row]:
    """The NumPy reference's forward pass against torch's."""
    sizes = [("bert-tiny", 1, 2, 32)] if quick else [("bert-base", 0, 1, 128), ("bert-base", 0, 8, 128)]
    for size in sizes:
        yield compare(
            f"{size[0]}, {size[2]} x {size[3]}, NumPy", build_forward("ref", *size),
            "torch", build_forward("torch", *size),
            rounds=2 if quick else 7, bound=1.3, check=lambda size=size: compare_reference(*make(*size)),
            mib=peak(build_forward, "ref", *size), against_mib=peak(build_forward, "torch", *size),
        )  # fmt: skip
