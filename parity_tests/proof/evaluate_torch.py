"""Running torch: NumPy arrays in, values and gradients in NumPy out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from parity_tests.proof.case import Context
from parity_tests.proof.evaluate_ref import Leaves, cotangent


def tensor(value: np.ndarray, context: Context) -> Tensor:
    """On the context's device; floating point in its dtype."""
    made = torch.from_numpy(np.array(value)).to(context.device)
    return made.to(getattr(torch, context.dtype)) if made.is_floating_point() else made


def array(value: Tensor) -> np.ndarray:
    """Back in NumPy; bfloat16, which NumPy does not have, as float32."""
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def round_leaves(leaves: Leaves, context: Context) -> Leaves:
    """The leaves as the context's dtype holds them, in float64: what the truth is computed from."""
    return {name: array(tensor(value, context).double()) for name, value in leaves.items()}


def value_and_gradients(
    function: Callable[[dict[str, Tensor]], Tensor], leaves: Leaves, context: Context
) -> tuple[np.ndarray, Leaves]:
    """function(leaves), and the gradient of sum(cotangent * value) by each leaf; 0 where there is none."""
    held = {name: tensor(value, context).requires_grad_() for name, value in leaves.items()}
    y = function(held)
    back = torch.from_numpy(cotangent(tuple(y.shape))).to(y.device, y.dtype)
    grads = torch.autograd.grad(y, list(held.values()), back, allow_unused=True)
    dense = [torch.zeros_like(x) if g is None else g for x, g in zip(held.values(), grads, strict=True)]
    return array(y), {name: array(g) for name, g in zip(held, dense, strict=True)}
