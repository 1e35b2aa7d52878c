"""Gates on an attention's output (Bondarenko et al. 2023, eq. 5)."""

from __future__ import annotations

from .. import ops
from ..numerics import Numerics
from ..spec import Gate, ModelSpec
from ..tape import V

__all__ = ["gate"]


def gate(nx: Numerics[V], x: V, context: V, spec: ModelSpec, name: str) -> V:
    """sigmoid(logit) * context (times 1 / pi where rescaled), as the spec's gate says.

    The logit is made from the attention's input x (B, T, D). context (B, T, D) has its heads side by side. Every form
    but ELEMENTWISE has one logit per head.
    """
    kind, hidden, logit = spec.attention.gate, f"{name}.gate_hidden", f"{name}.gate_logit"
    if kind is Gate.NONE:
        return context
    if kind is Gate.HEAD:
        z = nx.parameter(logit)  # (H,)
    elif kind is Gate.MLP:
        h = nx.activation(hidden, nx.linear(hidden, x, named=False), "relu")  # (B, T, D) -> (B, T, H m)
        z = nx.linear(logit, h)  # (B, T, H m) -> (B, T, H)
    elif kind is Gate.HEAD_CONDITIONAL:
        z = nx.mean(logit, nx.linear(logit, x, named=False))  # (B, T, H) -> (B, 1, H)
    else:
        z = nx.linear(logit, x)  # (B, T, D) -> (B, T, H), or (B, T, D) elementwise
    g = nx.activation(f"{name}.gate", z, "sigmoid")
    if spec.attention.rescaled and spec.attention.pi:
        g = nx.scale(g, 1 / spec.attention.pi)
    if kind is not Gate.ELEMENTWISE:
        g = ops.spread_heads(g, spec.head_width)  # (..., H) -> (..., D)
    return nx.mul(f"{name}.gated", context, g)
