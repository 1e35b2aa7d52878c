"""How a step is computed beyond its arithmetic: the loss scale of float16, compilation, sums in a fixed order.

Not in the reference: it computes a step in one way, and not in float16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from qtx_ref.spec import SpecError

from . import random
from .quant import int8
from .quant.compiled import ask_division

F = TypeVar("F", bound=Callable)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS reads it when it starts, and sums in one order under these values
FIRST, LEAST, PATIENCE = 2.0**16, 1.0, 2000


@dataclass
class LossScale:
    """What the loss is multiplied by before its gradient is taken, so that small gradients are numbers of float16; the
    rule and its constants are those of `torch.amp.GradScaler` (Micikevicius et al. 2018, section 3.2)."""

    value: float = FIRST
    good: int = 0  # steps with finite gradients since it last changed

    def update(self, norm: float) -> None:
        """After a step whose gradients had this norm: halved where it is not finite, but not below 1; doubled after
        2000 finite ones in a row."""
        if not math.isfinite(norm):
            self.value, self.good = max(LEAST, self.value / 2), 0
        elif self.good + 1 == PATIENCE:
            self.value, self.good = self.value * 2, 0
        else:
            self.good += 1


def compile_forward(forward: F) -> F:
    """A forward pass, called with a numerics and a batch, as one compiled graph for each shape of batch.

    A numerics whose step and first row are tensors has the same graph in every step and part.
    """
    for known in (random.number_site, random.has_kernels, int8.has_kernels):
        torch.compiler.assume_constant_result(known)
    return torch.compile(forward, fullgraph=True, options=ask_division() if torch.cuda.is_available() else None)


def check_deterministic(device: torch.device) -> None:
    """Raises SpecError where cuBLAS may sum in any order."""
    if device.type == "cuda" and os.environ.get(WORKSPACE) not in (":4096:8", ":16:8"):
        raise SpecError(f"step deterministic is True on {device}: set {WORKSPACE}=:4096:8 before qtx starts")


@contextmanager
def fixed_order(on: bool) -> Iterator[None]:
    """Within, where `on`, a kernel whose sums have no fixed order raises RuntimeError; then all is as before."""
    if not on:
        yield
        return
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
