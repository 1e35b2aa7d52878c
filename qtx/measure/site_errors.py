"""How far each quantizer of a model is from the tensor that it is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from qtx_ref.numerics import is_weight
from qtx_ref.ops import hadamard
from qtx_ref.quant import quantizer as quantizers
from qtx_ref.spec import InputTransform, Quant, Range
from qtx_ref.tape import const

from ..engines.protocols import Batch, Model
from ..prepare.prepare import Prepared


def measure_site_errors(
    model: Model,
    batch: Batch,
    quants: Mapping[str, Quant],
    prepared: Prepared,
) -> dict[str, float]:
    """Of each quantizer fed the float model's own tensor: squared error over squared tensor, largest first. That of a
    weight counts from before it was rewritten. Codes are the reference's, whichever backend recorded the tensors."""
    weights = [site for site in quants if is_weight(site)]
    errors = {}
    for some in group_by_layer(site for site in quants if not is_weight(site)):  # a layer's tensors are held at a time
        for site, (x, where) in model.record(batch, some).items():
            change = prepared.transforms.get(site.removesuffix(".input")) if site.endswith(".input") else None
            x = transform_input(x, change) if change else x
            errors[site] = measure_relative_error(x, where, quants[site], prepared.ranges.get(site))
    for site in weights:
        name = site if site in prepared.params else "embed.token.weight"  # a head tied to the token table
        own = None if prepared.before is None else prepared.before[name]
        errors[site] = measure_relative_error(
            prepared.params[name], None, quants[site], prepared.ranges.get(site), True, own
        )
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def group_by_layer(names: Iterable[str]) -> list[list[str]]:
    """Sites of each layer, and those of none, apart."""
    layers: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        layers.setdefault(parts[1] if parts[0] == "layer" else "", []).append(name)
    return list(layers.values())


def transform_input(x: np.ndarray, change: InputTransform) -> np.ndarray:
    """A linear's input as its quantizer sees it."""
    x = x if change.divisor is None else x / change.divisor
    return hadamard(const(x), change.block).value if change.block else x


def measure_relative_error(
    x: np.ndarray,
    where: np.ndarray | None,
    quant: Quant,
    range: Range | None,
    weight: bool = False,
    wanted: np.ndarray | None = None,
) -> float:
    """Squared error over squared tensor of the elements that count; 0 of a tensor of zeros. wanted: what x stands for,
    x itself unless given."""
    scale, zero_point = (
        quantizers.dynamic_scale(x, quant, where, weight) if range is None else (range.scale, range.zero_point)
    )
    y, _ = quantizers.fake_quantize(x, scale, zero_point, quant)
    keep = True if where is None else np.broadcast_to(where, x.shape)
    wanted = x if wanted is None else wanted
    size = np.square(wanted, dtype=np.float64).sum(where=keep)
    return float(np.square(np.subtract(y, wanted, dtype=np.float64)).sum(where=keep) / size) if size else 0.0
