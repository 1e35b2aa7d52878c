"""How one training step is computed. Nothing here changes what is learned, but for float noise where a line says so."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Name, Spec, refuse

__all__ = ["Sharding", "StepSpec"]


class Sharding(Name):
    """What each of several processes holds."""

    NONE = "none"  # the whole model; gradients are summed over processes (DDP)
    FULL = "full"  # its share of every block's parameters, gradients and optimizer state (FSDP2)


@dataclass(frozen=True)
class StepSpec(Spec):
    """The parts of a step, and what is traded for memory or time."""

    accumulate: int = 1  # parts of a batch, one after another; gradients are summed (in another order)
    recompute: bool = False  # a block's activations are not kept, but computed again for the gradient
    compiled: bool = False  # torch.compile; sums in another order
    deterministic: bool = False  # refuse kernels whose sums have no fixed order
    sharding: Sharding = Sharding.NONE

    def check(self) -> None:
        if self.accumulate < 1:
            refuse("step accumulate", self.accumulate, "give a whole number of parts, at least 1")
