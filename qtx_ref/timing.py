"""Where a pass spends its time: each integer matmul and each fake quantizer, timed as it runs.

The timers cost a little themselves, so that the shares count and not the seconds: latency is measured without them.
"""

from __future__ import annotations

import time

import numpy as np

from .backend import Batch, IntegerModel, Model
from .integer.model import Code, Integer
from .integer.products import block_length
from .numerics import FakeQuant
from .tape import Var

__all__ = ["TimedFakeQuant", "TimedInteger", "products", "quantizers"]


class TimedInteger(Integer):
    """`Integer` that notes each matmul: site, what carries its products, seconds."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model.constants, model.quants, model.profile, strict=model.strict)
        self.timed: list[tuple[str, str, float]] = []

    def matmul(self, site: str, a: Code, b: Code, bias: np.ndarray | None = None) -> np.ndarray:
        """As `Integer`, timed."""
        start = time.perf_counter()
        acc = super().matmul(site, a, b, bias)
        carrier = block_length(a.spec, b.spec)[1].__name__
        kernel = "integer loop" if self.strict else f"{carrier} blocks (NumPy)"
        self.timed.append((site, kernel, time.perf_counter() - start))
        return acc


class TimedFakeQuant(FakeQuant):
    """`FakeQuant` that notes each quantizer: site and seconds."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.quants, model.ranges(), masked_scores=model.masked_scores, transforms=model.transforms)
        self.timed: list[tuple[str, float]] = []

    def apply(self, site: str, x: Var, where: np.ndarray | None) -> Var:
        """As `FakeQuant`, timed."""
        start = time.perf_counter()
        y = super().apply(site, x, where)
        self.timed.append((site, time.perf_counter() - start))
        return y


def products(model: IntegerModel, batch: Batch) -> tuple[list[tuple[str, str, float]], float]:
    """(site, kernel, seconds) of every integer matmul of one pass, in its order, and the seconds of the pass. Raises as
    `IntegerModel.run`."""
    nx = TimedInteger(model)
    start = time.perf_counter()
    model.compute(nx, model.accept(batch))
    return nx.timed, time.perf_counter() - start


def quantizers(model: Model, batch: Batch) -> tuple[list[tuple[str, float]], float]:
    """(site, seconds) of every fake quantizer of one pass, in its order, and the seconds of the pass. Raises as
    `Model.forward`."""
    nx = TimedFakeQuant(model)
    start = time.perf_counter()
    model.compute(nx, model.accept(batch))
    return nx.timed, time.perf_counter() - start
