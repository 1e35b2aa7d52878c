"""Gates on an attention's output (Bondarenko et al. 2023, eq. 5).

Differs from the reference: gate_sites, name, attn: a gate's parameters are in the modules of its sites.
Differs from the reference: open_gate: a kernel multiplies by it.
"""

from __future__ import annotations

from torch import Tensor, nn

from qtx_ref.spec import Gate, ModelSpec

from .. import ops
from ..numerics import Float
from ..sites import Linear, SiteModule


def gate_sites(spec: ModelSpec) -> dict[str, SiteModule]:
    """The sites that the spec's gate adds to an attention, by name within it."""
    kind, h, k, d, m = spec.attention.gate, spec.heads, spec.head_width, spec.width, spec.gate_hidden
    if kind is Gate.NONE:
        return {}
    sites: dict[str, SiteModule] = {}
    if kind is Gate.HEAD:
        sites["gate_logit"] = SiteModule(bias=(h,))
    elif kind is Gate.MLP:
        sites["gate_hidden"] = Linear(m, k, heads=h)
        sites["gate_logit"] = Linear(1, m, heads=h)
    elif kind is Gate.ALL_FEATURES:
        sites["gate_logit"] = Linear(h, d)
    elif kind is Gate.ELEMENTWISE:
        sites["gate_logit"] = Linear(d, d, bias=False)
    else:
        sites["gate_logit"] = Linear(1, k, heads=h)
    return sites | {"gate": SiteModule(), "gated": SiteModule()}


def gate(nx: Float, attn: nn.Module, x: Tensor, context: Tensor, spec: ModelSpec) -> Tensor:
    """sigmoid(logit) * context (times 1 / pi where rescaled), as the spec's gate says.

    The logit is made from the attention's input x (B, T, D). context (B, T, D) has its heads side by side. Every form
    but ELEMENTWISE has one logit per head.
    """
    kind = spec.attention.gate
    if kind is Gate.NONE:
        return context
    g = open_gate(nx, attn, x, spec)
    if kind is not Gate.ELEMENTWISE:
        g = ops.spread_heads(g, spec.head_width)  # (..., H) -> (..., D)
    return nx.mul(attn.gated, context, g)


def open_gate(nx: Float, attn: nn.Module, x: Tensor, spec: ModelSpec) -> Tensor:
    """What `gate` multiplies by: (H,), (B, 1, H) or (B, T, H); ELEMENTWISE: (B, T, D)."""
    kind = spec.attention.gate
    if kind is Gate.HEAD:
        z = nx.parameter(attn.gate_logit)  # (H,)
    elif kind is Gate.MLP:
        h = nx.activation(
            attn.gate_hidden, nx.linear(attn.gate_hidden, x, named=False), "relu"
        )  # (B, T, D) -> (B, T, H m)
        z = nx.linear(attn.gate_logit, h)  # (B, T, H m) -> (B, T, H)
    elif kind is Gate.HEAD_CONDITIONAL:
        z = nx.mean(attn.gate_logit, nx.linear(attn.gate_logit, x, named=False))  # (B, T, H) -> (B, 1, H)
    else:
        z = nx.linear(attn.gate_logit, x)  # (B, T, D) -> (B, T, H), or (B, T, D) elementwise
    g = nx.activation(attn.gate, z, "sigmoid")
    return nx.scale(g, 1 / spec.attention.pi) if spec.attention.rescaled else g
