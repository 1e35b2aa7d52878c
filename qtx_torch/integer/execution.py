"""The execution form of a model in integers: compiled by `torch.compile`, on constants made ready when it is loaded.

Not in the reference: it says what comes out, not how a machine gets there fast.

`Execution` runs the wiring once on one token, eagerly, under `Proof`. That makes each product's weights ready
(`carriers.prepare`) and looks at all that the arithmetic looks at in constants; what it looks at in data, accumulators
and levels, is proved from the constants for all data, or the model is refused, naming the site. So no graph branches
on data, and `Ready`, under which graphs are traced, asks nothing.

Three kinds of graph: what lies before the layers, a layer, what lies behind them. A layer's graph takes its constants
as arguments, by names relative to the layer, so that layers of one recipe share it; so do batches of any size and
length, but for a batch of one, which has a graph of its own. What was compiled is kept on disk (`parts`): a second
start reads it. On CUDA all launches of a pass are captured as one CUDA graph.

A scale that comes from the data (one per token) is a float32, whose sums with others no constant bounds. Each graph
therefore gives the largest of them beside its result; where it is beyond `LARGEST_SCALE`, or NaN, the eager form runs
the batch anew, and raises what it raises.

Floors of a pass: the products' operations at the rate of the machine's int8 unit, and per code of each site some ten
vector operations.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtx_ref.spec import Family, Head, ModelSpec, Profile, QuantSpec

from ..attention import Mask
from ..compiler import find_compiler
from ..models.block import Block
from ..sites import name_sites
from .model import Code, Constants
from .parts import KINDS, Part
from .proof import LARGEST_SCALE, Proof, Ready


@dataclass(frozen=True)
class Edge:
    """What is known of the codes between two parts: their meaning, where it is the same in every batch."""

    spec: QuantSpec | None
    measured: bool
    unit: Tensor | None  # None where it comes with them
    zero_point: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether unit and zero point come with the codes."""
        return self.unit is None

    @property
    def meaning(self) -> tuple:
        """All of it that a graph depends on."""
        return self.spec, self.measured, self.whole

    @staticmethod
    def of(x: Code) -> Edge:
        own = x.unit.numel() > 1 or x.zero_point.numel() > 1 or x.measured
        return Edge(x.spec, x.measured, None if own else x.unit, None if own else x.zero_point)

    def complete(self, parts: Parts) -> dict[str, Tensor]:
        """Value, unit and zero point, those that are constants put in."""
        value, unit, zero = parts
        unit, zero = self.unit if unit is None else unit, self.zero_point if zero is None else zero
        return {"value": value, "unit": unit, "zero": zero}


Parts = tuple[Tensor, Tensor | None, Tensor | None]


def pack(x: Code, whole: bool) -> Parts:
    """What a part gives of its result; whole: with unit and zero point."""
    return (x.value, x.unit, x.zero_point) if whole else (x.value, None, None)


def make_execution(
    net: nn.Module,
    spec: ModelSpec,
    constants: Constants,
    quants: Mapping[str, QuantSpec],
    profile: Profile,
    device: torch.device,
) -> Execution | None:
    """The execution form; None, with a warning that says why, where nothing can be compiled. Raises SpecError as
    `Execution`."""
    if reason := find_compiler(device.type):
        warnings.warn(f"integers run without the compiled form: {reason}", stacklevel=3)
        return None
    return Execution(net, spec, constants, quants, profile, device)


class Execution:
    """A model in integers, compiled. Called with what `IntegerModel.accept` gave, it gives what its `compute` would, or
    None where only the eager form can: images that are not finite, scales of the data beyond `LARGEST_SCALE`."""

    def __init__(
        self,
        net: nn.Module,
        spec: ModelSpec,
        constants: Constants,
        quants: Mapping[str, QuantSpec],
        profile: Profile,
        device: torch.device,
        *,
        backend: str = "inductor",
    ) -> None:
        """backend: who compiles, as `torch.compile` names it. Raises SpecError for what cannot be proved of all data,
        naming the site."""
        self.net, self.spec, self.profile, self.device, self.backend = net, spec, profile, device, backend
        self.quants = quants
        proof = Proof(spec, constants, quants, profile)
        with torch.no_grad():
            x, mask = net.bottom(proof, smallest_batch(spec, device))
            self.edges = [Edge.of(x)]
            for block in net.layer:
                x, _ = block(proof, x, mask)
                self.edges.append(Edge.of(x))
            self.last = Edge.of(net.top(proof, x))
        self.parts: dict[str, Part] = {}  # by all in which they may differ
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, Tensor | None], tuple]] = {}
        self.replaying = threading.Lock()  # what a captured graph takes and gives lies in one place
        constants = proof.constants
        outer = {name: c for name, c in constants.items() if not name.startswith("layer.")}
        self.outer = outer, {site: p for site, p in proof.prepared.items() if not site.startswith("layer.")}
        self.layers = [
            (select(constants, f"layer.{i}."), select(proof.prepared, f"layer.{i}.")) for i in range(spec.layers)
        ]
        self.bottom = self.find_part("bottom", self.make_bottom, quants, self.outer, self.edges[0])
        self.top = self.find_part("top", self.make_top, quants, self.outer, self.edges[-1], self.last)
        self.steps = [self.find_layer(i) for i in range(spec.layers)]

    def find_part(self, name: str, make: Callable, quants: Mapping[str, QuantSpec], given: tuple, *edges: Edge) -> Part:
        """A part, which those that mean the same share: layers of one recipe."""
        shapes = [(key, describe(part)) for parts in given for key, part in parts.items()]  # constants, products
        meaning = repr((name, self.spec, self.profile, sorted(quants.items()), [e.meaning for e in edges], shapes))
        if meaning not in self.parts:
            number = len(self.parts)
            self.parts[meaning] = Part(make(quants, *edges), meaning, number, self.device, self.backend)
        return self.parts[meaning]

    def make_bottom(self, quants: Mapping[str, QuantSpec], after: Edge) -> Callable:
        net, profile, whole = self.net, self.profile, after.whole

        def bottom(data: dict[str, Tensor | None], constants: dict, prepared: dict) -> tuple:
            nx = Ready(constants, prepared, quants, profile)
            x, mask = net.bottom(nx, data)
            size = x.shape[0], 1, *mask.allowed.shape[-2:]
            return pack(x, whole), mask.allowed.expand(size).to(torch.uint8), nx.largest

        return bottom

    def find_layer(self, i: int) -> Part:
        """The part that layer i shares with those that are made alike."""
        quants = select(self.quants, f"layer.{i}.")
        return self.find_part("layer", self.make_layer, quants, self.layers[i], self.edges[i], self.edges[i + 1])

    def make_layer(self, quants: Mapping[str, QuantSpec], before: Edge, after: Edge) -> Callable:
        profile, spec, measured, whole = self.profile, before.spec, before.measured, after.whole
        with torch.device("meta"):
            block = Block(self.spec)
        name_sites(block)  # relative to the layer

        def layer(data: dict[str, Tensor | None], constants: dict, prepared: dict) -> tuple:
            nx = Ready(constants, prepared, quants, profile)
            nx.begin(data["mask"])
            x = Code(data["value"], data["unit"], data["zero"], spec, measured)
            x, _ = block(nx, x, Mask(data["allowed"] != 0, torch.bool))
            return pack(x, whole), nx.largest

        return layer

    def make_top(self, quants: Mapping[str, QuantSpec], before: Edge, after: Edge) -> Callable:
        net, profile, spec, measured, whole = self.net, self.profile, before.spec, before.measured, after.whole

        def top(data: dict[str, Tensor | None], constants: dict, prepared: dict) -> tuple:
            nx = Ready(constants, prepared, quants, profile)
            nx.begin(data["mask"])
            x = net.top(nx, Code(data["value"], data["unit"], data["zero"], spec, measured))
            return pack(x, whole), nx.largest

        return top

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor | None]) -> Code | None:
        """The output; None where the eager form is to compute it: images that are not finite, scales of the data that
        are too large."""
        batch = {name: inputs.get(name) for name in ("tokens", "mask", "types", "images")}
        images = batch["images"]
        if images is not None and not torch.isfinite(images).all():
            return None
        parts, largest = self.replay(batch) if self.device.type == "cuda" else self.forward(batch)
        if largest and not bool((torch.stack(largest) < LARGEST_SCALE).all()):
            return None
        out = self.last.complete(parts)
        return Code(out["value"], out["unit"], out["zero"], self.last.spec, self.last.measured)

    def forward(self, batch: dict[str, Tensor | None]) -> tuple[Parts, list[Tensor]]:
        """What the last part gives, and the largest scale of the data in each part that has one."""
        rows = batch["mask"]
        parts, allowed, most = self.bottom(batch, *self.outer)
        scales = [most]
        for run, edge, made in zip(self.steps, self.edges, self.layers, strict=False):
            parts, most = run({**edge.complete(parts), "allowed": allowed, "mask": rows}, *made)
            scales.append(most)
        if self.has_top:
            parts, most = self.top({**self.edges[-1].complete(parts), "mask": rows}, *self.outer)
            scales.append(most)
        return parts, [scale for scale in scales if scale is not None]

    def replay(self, batch: dict[str, Tensor | None]) -> tuple[Parts, list[Tensor]]:
        """`forward` on CUDA, all launches of it as one graph for each kind of batch, captured at its first call. The
        graphs share their memory, which is why what they give is copied."""
        kind = tuple((name, x.shape, x.dtype) for name, x in batch.items() if x is not None)
        if kind not in self.captured and len(self.captured) == KINDS:
            return self.forward(batch)
        with torch.cuda.device(self.device), self.replaying:
            if kind not in self.captured:
                given = {name: None if x is None else x.clone() for name, x in batch.items()}
                self.forward(given)  # compiles
                pool = next((graph.pool() for graph, *_ in self.captured.values()), None)
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), pool):
                    made = self.forward(given)
                self.captured[kind] = graph, given, made
            graph, given, (parts, largest) = self.captured[kind]
            for name, x in batch.items():
                if x is not None:
                    given[name].copy_(x)
            graph.replay()
            return tuple(None if part is None else part.clone() for part in parts), [scale.clone() for scale in largest]

    @property
    def has_top(self) -> bool:
        """Whether anything lies behind the layers."""
        return self.spec.head is not Head.NONE or self.spec.final_norm or self.spec.embed_width is not None


def smallest_batch(spec: ModelSpec, device: torch.device) -> dict[str, Tensor | None]:
    """One token, or one image of zeros."""
    if spec.family is Family.VIT:
        return {"images": torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device=device)}
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return {"tokens": token, "types": token, "mask": None}


def select(by_name: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What is below a prefix, by the rest of its name."""
    return {name.removeprefix(prefix): x for name, x in by_name.items() if name.startswith(prefix)}


def describe(part: Any) -> Any:
    """What of a constant or a prepared product is in the graph: of a tensor its shape, strides and dtype."""
    if isinstance(part, tuple):
        return tuple(map(describe, part))
    return (part.shape, part.stride(), part.dtype) if isinstance(part, Tensor) else part
