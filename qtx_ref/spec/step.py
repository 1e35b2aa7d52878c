"""How one training step is computed. Nothing here changes what is learned, but for float noise where a line says so."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Name, Spec, SpecError, refuse

__all__ = ["PLAIN_STEP", "Sharding", "StepSpec", "check_rows", "divide_rows"]


class Sharding(Name):
    """What each of several processes holds."""

    NONE = "none"  # the whole model; gradients are summed over processes (DDP)
    FULL = "full"  # its share of every block's parameters, gradients and optimizer state (FSDP2)


@dataclass(frozen=True)
class StepSpec(Spec):
    """The parts of a step, and what is traded for memory or time."""

    # parts of a batch, one after another; gradients are summed in another order, and a dynamic range of more than a
    # token is of its part
    accumulate: int = 1
    recompute: bool = False  # a block's activations are not kept, but computed again for the gradient
    compiled: bool = False  # torch.compile; sums in another order
    # linears of symmetric codes, 8 bits at most, per token and channel, by int8 products; sums in another order
    int8: bool = False
    deterministic: bool = False  # refuse kernels whose sums have no fixed order
    sharding: Sharding = Sharding.NONE

    def check(self) -> None:
        if self.accumulate < 1:
            refuse("step accumulate", self.accumulate, "give a whole number of parts, at least 1")
        if self.compiled and self.sharding is not Sharding.NONE:
            refuse(
                "step sharding", str(self.sharding), "a compiled step has the whole model in one graph; leave one out"
            )


PLAIN_STEP = StepSpec()  # unless said otherwise


def divide_rows(rows: int, accumulate: int) -> list[slice]:
    """The parts of a batch: equal numbers of adjoining rows. Raises SpecError where `accumulate` does not divide it."""
    if rows % accumulate:
        refuse("step accumulate", accumulate, f"a batch of {rows} rows has no so many equal parts; give a divisor")
    size = rows // accumulate
    return [slice(start, start + size) for start in range(0, rows, size)]


def check_rows(rows: int, first: int, total: int | None) -> None:
    """Raises SpecError where rows `first` to `first + rows` are not all of a batch of `total` (None: so many): what one
    process computes by itself."""
    if first or (total is not None and total != rows):
        have = f"rows {first} to {first + rows} of a batch of {rows if total is None else total}"
        raise SpecError(f"{have}: one process computes the whole batch; start several with torchrun")
