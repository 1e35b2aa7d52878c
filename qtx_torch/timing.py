"""Where a pass spends its time: each integer matmul and each fake quantizer, timed as it runs.

Differs from the reference: now: a device is waited for before its time is taken.

The timers cost a little themselves, so that the shares count and not the seconds: latency is measured without them.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .backend import Batch, IntegerModel, Model
from .integer.model import Code, Integer
from .integer.products import carrier
from .numerics import FakeQuant, Float

KERNELS = {
    torch.int8: "torch._int_mm",
    torch.float32: "float32 blocks (torch)",
    torch.float64: "float64 blocks (torch)",
}


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class TimedInteger(Integer):
    """`Integer` that notes each matmul: site, what carries its products, seconds."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model.constants, model.quants, model.profile, strict=model.strict)
        self.timed: list[tuple[str, str, float]] = []

    def matmul(self, site: str, a: Code, b: Code, bias: Tensor | None = None) -> Tensor:
        start = now(a.value.device)
        acc = super().matmul(site, a, b, bias)
        kernel = "integer loop" if self.strict else KERNELS[carrier(a.value, b.value, a.spec, b.spec)]
        self.timed.append((site, kernel, now(a.value.device) - start))
        return acc


def products(model: IntegerModel, batch: Batch) -> tuple[list[tuple[str, str, float]], float]:
    """(site, kernel, seconds) of every integer matmul of one pass, in its order, and the seconds of the pass."""
    nx = TimedInteger(model)
    inputs = model.accept(batch)
    start = now(model.device)
    model.compute(nx, inputs)
    return nx.timed, now(model.device) - start


@torch.no_grad()
def quantizers(model: Model, batch: Batch) -> tuple[list[tuple[str, float]], float]:
    """(site, seconds) of every fake quantizer of one pass, in its order, and the seconds of the pass."""
    timed: list[tuple[str, float]] = []
    begun: list[float] = []  # quantizers do not nest
    handles = []
    for hook in model.net.modules():
        if isinstance(hook, FakeQuant):
            handles.append(hook.register_forward_pre_hook(lambda *given: begun.append(now(model.device))))
            handles.append(
                hook.register_forward_hook(
                    lambda hook, *given: timed.append((hook.site, now(model.device) - begun[-1]))
                )
            )
    try:
        inputs = model.accept(batch)
        start = now(model.device)
        model.compute(Float(), inputs)
        return timed, now(model.device) - start
    finally:
        for handle in handles:
            handle.remove()
