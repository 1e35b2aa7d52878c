"""What a CPU does around each kernel.

Not in the reference: it has no kernels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager:
    """Where a kernel on tensors of a device is to be launched: Triton takes the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def sign_seed(seed: int) -> int:
    """A seed below 2^64 as the int64 of the same bits, which kernels and custom operators take."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
