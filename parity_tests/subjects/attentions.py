"""Inputs for every softmax variant and gate: what the cases about attention, in both backends, run over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qtx_ref.attention import attention_mask
from qtx_ref.models.gate import gate
from qtx_ref.models.initial import gate_shapes
from qtx_ref.numerics import Float
from qtx_ref.random import stream
from qtx_ref.spec import (
    AttentionSpec,
    Family,
    Gate,
    Head,
    ModelSpec,
    Softmax,
)
from qtx_ref.tape import Var

SOFTMAXES = {
    "plain": AttentionSpec(),
    "clipped": AttentionSpec(softmax=Softmax.CLIPPED, gamma=-0.1, zeta=1.1),
    "clipped_row": AttentionSpec(softmax=Softmax.CLIPPED_ROW, alpha=0.5),
    "softmax1": AttentionSpec(softmax=Softmax.PLUS_ONE),
    "sink": AttentionSpec(softmax=Softmax.SINK),
}
SITUATIONS = ("full", "causal", "padded", "empty_rows", "one_token", "one_head")
GATES = tuple(gate for gate in Gate if gate is not Gate.NONE)


@dataclass(frozen=True)
class AttentionInputs:
    """q, k, v (B, H, T, K) and, for a learned sink, (H,); mask (..., T, T); rows (B, T), None where all are real."""

    spec: AttentionSpec
    mask: np.ndarray
    rows: np.ndarray | None
    leaves: dict[str, np.ndarray]

    def reference(self, x: dict[str, Var]) -> Var:
        nx = Float()
        nx.load({"a.probs.sink": x["sink"]} if "sink" in x else {})
        return nx.attention("a", x["q"], x["k"], x["v"], self.mask, self.spec, 0.0)


@dataclass(frozen=True)
class GateInputs:
    """x and context (B, T, D) and the gate's parameters by site name; rows (B, T) is true at real tokens."""

    spec: ModelSpec
    rows: np.ndarray
    leaves: dict[str, np.ndarray]

    def reference(self, x: dict[str, Var]) -> Var:
        nx = Float()
        nx.load(x)
        nx.begin(self.rows)
        return gate(nx, x["x"], x["context"], self.spec, "layer.0.attn")


def attention_inputs(softmax: str, situation: str, n: int) -> AttentionInputs:
    """n = 1: small enough for central differences; larger: 5 n tokens and heads of width 4 n."""
    rng = stream(0, "attention", softmax, situation, n)
    batch, heads, tokens, width = (
        2,
        1 if situation == "one_head" else 3,
        1 if situation == "one_token" else 5 * n,
        4 * n,
    )
    rows = None
    if situation in ("padded", "empty_rows"):
        real = np.array([tokens, tokens - 2 * n]) if situation == "padded" else np.array([tokens - n, 0])
        rows = np.arange(tokens) < real[:, None]
    mask = attention_mask(rows, tokens, tokens, causal=situation == "causal")
    leaves = {name: rng.normal(size=(batch, heads, tokens, width)) for name in ("q", "k", "v")}
    leaves["q"] *= 1.5 / n**0.5  # probabilities far from equal, some of them clipped
    if softmax == "sink":
        leaves["sink"] = rng.normal(size=heads)
    return AttentionInputs(SOFTMAXES[softmax], mask, rows, leaves)


def gate_inputs(kind: Gate, n: int) -> GateInputs:
    """Two heads of width 4 n on 3 n tokens, the last n of the second sequence padding."""
    rng = stream(0, "gate", kind, n)
    batch, tokens, width = 2, 3 * n, 8 * n
    size = {"layers": 1, "width": width, "heads": 2, "hidden": width, "vocab": 5, "length": tokens, "types": 2}
    spec = ModelSpec(Family.BERT, **size, head=Head.NONE, attention=AttentionSpec(gate=kind))
    leaves = {name: rng.normal(size=(batch, tokens, width)) for name in ("x", "context")}
    leaves |= {f"layer.0.attn.{name}": rng.normal(size=shape) / n**0.5 for name, shape in gate_shapes(spec).items()}
    return GateInputs(spec, np.arange(tokens) < np.array([[tokens], [tokens - n]]), leaves)
