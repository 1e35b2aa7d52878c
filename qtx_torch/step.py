"""How a step is computed beyond its arithmetic: the loss scale of float16.

Not in the reference: it computes a step in one way, and not in float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
