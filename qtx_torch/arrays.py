"""The way from NumPy to a device and back.

Not in the reference: its arrays are NumPy's already.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qtx_ref.spec import READ, SpecError

from .attention import boolean_mask

Batch = Mapping[str, np.ndarray]


def to_tensors(batch: Batch, device: torch.device) -> dict[str, Tensor | None]:
    """What a model reads of a batch, on the device: whole numbers int64; a boolean mask, or None without padding, which
    spares the kernels a mask; spared tokens, or None where there are none. Raises ValueError for a mask that is neither
    boolean nor additive."""
    tensors: dict[str, Tensor | None] = {}
    for name in READ:
        if name == "mask" and name in batch:
            rows = boolean_mask(torch.tensor(make_native(np.asarray(batch[name]))))
            tensors[name] = None if rows.all() else rows
        elif name == "spared" and name in batch:
            spared = torch.tensor(make_native(np.asarray(batch[name])))
            tensors[name] = spared if spared.any() else None
        elif name in batch:
            value = make_native(np.asarray(batch[name]))
            tensors[name] = torch.tensor(value if name in ("images", "soft_labels") else value.astype(np.int64))
    return {name: None if value is None else value.to(device) for name, value in tensors.items()}


def make_native(x: np.ndarray) -> np.ndarray:
    """The same numbers in an order and a dtype that torch has: no negative strides, no bytes the other way round,
    float64 for a wider float."""
    wide = x.dtype.kind == "f" and x.dtype.itemsize > 8
    return np.array(x, np.float64 if wide else x.dtype.newbyteorder("="), order="C")


def find_device(name: str) -> torch.device:
    """The device of that name. Raises SpecError where torch cannot compute on it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SpecError(f"device is {name!r}: torch knows no such device; use --device cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise SpecError(f"device is {name!r}: this backend runs on cpu and cuda; use one of them")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SpecError(f"device is {name!r} but torch finds no CUDA device; use --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise SpecError(f"device is {name!r} but torch finds {torch.cuda.device_count()}; use --device cuda:0")
        torch.set_float32_matmul_precision("highest")  # no TF32: float32 means float32
    return device


def to_numpy(x: Tensor) -> np.ndarray:
    """A copy; bfloat16, which NumPy does not have, and float16 as float32."""
    x = x.detach()
    return (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).cpu().numpy().copy()
