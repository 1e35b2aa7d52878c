"""What both forms of an exported graph share: inputs, indices, masks, weights, and which value is which site's."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from qtx_ref import models
from qtx_ref.numerics import Numerics
from qtx_ref.spec import Family, Granularity, QuantSpec, SpecError

from ..files.artifact import Artifact
from .export_graph import BATCH, LENGTH, Graph, Value, take_inputs

CENTRE = 128  # from signed to unsigned codes


def refuse_export(site: str, reason: str) -> NoReturn:
    """Raises SpecError: the site cannot be part of an exported graph, for that reason."""
    raise SpecError(f"site {site} cannot be exported to ONNX: {reason}")


class Wiring(Numerics[Value]):
    """A numerics whose values are tensors of a graph: a model that runs under it is written down.

    `sites`: the value that holds each site's codes, or accumulators; `quantized`: scale and zero point of those that
    are codes.
    """

    def __init__(self, graph: Graph, artifact: Artifact) -> None:
        self.graph = graph
        self.spec = artifact.spec
        self.constants = artifact.constants
        self.quants = artifact.quants
        self.profile = artifact.profile
        self.sites: dict[str, Value] = {}
        self.mask: str | None = None  # (B, 1, 1 or T, T), boolean
        self.inputs: dict[str, Value] = {}
        for site, spec in self.quants.items():
            if spec.granularity in (Granularity.GROUP, Granularity.CHANNEL) and not site.endswith(
                (".weight", ".value")
            ):
                refuse_export(site, f"its scales, one per {spec.granularity}, vary along a sum: use one per tensor")
            if spec.dynamic and not site.endswith(".weight"):
                refuse_export(site, "its scale is taken from the data as it runs: use a static range")

    def trace(self) -> Value:
        """The whole model, written into the graph."""
        self.inputs = take_inputs(self.graph, self.spec)
        if self.spec.family is not Family.VIT:
            self.mask = self.make_mask(self.inputs["mask"].name)
        one = np.zeros((1, 1), np.int64)  # a stand-in: what is made of it is made in the graph
        size = (1, self.spec.channels, self.spec.image_size, self.spec.image_size)
        batch = {"tokens": one, "types": one, "mask": one == 0, "images": np.zeros(size, np.float32)}
        return models.forward(self, self.spec, batch)

    def session(self) -> dict[str, str]:
        """The entries that an onnxruntime session needs for what the profile says; none by default."""
        return {}

    def make_mask(self, rows: str) -> str:
        """Which key each query may attend to, broadcasting to (B, H, T, T)."""
        g = self.graph
        g.place = "mask"
        keys = g.node("Unsqueeze", rows, np.array([1, 2], np.int64))  # (B, T) -> (B, 1, 1, T)
        if not self.spec.causal:
            return keys
        count = self.count_tokens()
        place = g.node("Range", np.int64(0), count, np.int64(1))
        below = g.node("LessOrEqual", place, g.node("Unsqueeze", place, np.array([1], np.int64)))  # (T, T)
        return g.node("And", keys, below)

    def count_tokens(self) -> str:
        """T, as a number of the graph."""
        return self.graph.node(
            "Gather", self.graph.node("Shape", self.inputs["tokens"].name), np.array(1, np.int64), axis=0
        )

    def index(self, site: str) -> tuple[str, Any]:
        """The rows that an embedding looks up, and their shape."""
        g, family = self.graph, self.spec.family
        kind = site.rpartition(".")[2]
        if kind in ("token", "type"):
            return self.inputs[f"{kind}s"].name, (BATCH, LENGTH)
        if family is Family.VIT:
            return g.constant(np.arange(self.spec.length)), (self.spec.length,)
        if family is Family.BERT:
            return g.node("Range", np.int64(0), self.count_tokens(), np.int64(1)), (LENGTH,)
        rows = g.cast(self.inputs["mask"].name, "int64")  # real tokens count from 0, padding is at -1
        count = g.node("Mul", g.node("CumSum", rows, np.array(1, np.int64)), rows)
        return g.node("Add", count, np.int64(self.spec.position_offset - 1)), (BATCH, LENGTH)

    def take_patches(self) -> tuple[str, Any]:
        """The images (B, C, S, S) as patches (B, N, C P P), and that shape."""
        g, spec = self.graph, self.spec
        n, size = spec.image_size // spec.patch_size, spec.patch_size
        cut = g.node("Reshape", self.inputs["images"].name, np.array([0, spec.channels, n, size, n, size], np.int64))
        cut = g.node("Transpose", cut, perm=[0, 2, 4, 1, 3, 5])
        shape = (n * n, spec.channels * size * size)
        return g.node("Reshape", cut, np.array([0, *shape], np.int64)), (BATCH, *shape)

    def record(self, site: str, value: Value) -> Value:
        """The value is what the reference shows under that name."""
        self.sites[site] = value
        return value

    def weight(self, name: str) -> tuple[np.ndarray, QuantSpec]:
        """The codes of a weight and their quantizer."""
        return self.constants[name], self.quants[name]

    def dropout(self, site: str, x: Value, rate: float) -> Value:
        """As it is: nothing is trained."""
        return x


def broadcast(a: Any, b: Any) -> Any:
    """The shape of two values combined element by element."""
    long, short = (a, b) if len(a) >= len(b) else (b, a)
    head = len(long) - len(short)
    return (*long[:head], *(y if x == 1 else x for x, y in zip(long[head:], short, strict=True)))
