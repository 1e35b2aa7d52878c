"""Ranges that are calibrated once for several recipes of the same float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from qtx_ref.quant import quantizer as quantizers
from qtx_ref.spec import FloatQuantSpec, Granularity, ObserverKind, Quant, Range, Recipe

from ..engines.protocols import Batch, Model


class Calibrated:
    """Ranges that several recipes share: what an observer found depends neither on the bits (but for least squares) nor
    on how channels are grouped. It does depend, in its last bits, on which sites are quantized: a backend may fuse ops
    between which nobody looks."""

    def __init__(self, model: Model, batches: Callable[[], Iterable[Batch]]) -> None:
        self.model = model
        self.batches = batches
        self.known: dict[frozenset[str], dict[tuple[str, object], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def of(self, chosen: Recipe, quants: Mapping[str, Quant]) -> dict[str, Range] | None:
        """The static ranges of a recipe; None where they depend on more than the float model."""
        if chosen.transforms or chosen.quantize_while_calibrating or chosen.masked_scores:
            return None
        static = {site: quant for site, quant in quants.items() if not quant.dynamic}
        known = self.known.setdefault(frozenset(quants), {})
        if any((site, identify_ends(quant)) not in known for site, quant in static.items()):
            for site, ends in self.model.calibrate(self.batches(), quants).items():
                known[site, identify_ends(quants[site])] = ends.low, ends.high, quantizers.was_silent(ends)
        ranges = {site: known[site, identify_ends(quant)] for site, quant in static.items()}
        return {
            site: Range(low, high, *quantizers.static_scale(low, high, silent, quants[site]))
            for site, (low, high, silent) in ranges.items()
        }


def identify_ends(quant: Quant) -> object:
    """What the low and high ends of a range depend on, beside the tensor."""
    if quant.observer.kind in (ObserverKind.MSE_GRID, ObserverKind.MSE_GOLDEN) or isinstance(quant, FloatQuantSpec):
        return quant
    grouped = quant.granularity is Granularity.GROUP  # united from the ends of its channels
    return quant.observer, quant.axis, Granularity.CHANNEL if grouped else quant.granularity
