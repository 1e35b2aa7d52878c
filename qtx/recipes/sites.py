"""The sites of a model: every tensor that a recipe, a statistic or an audit can name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import prod

import numpy as np

from qtx_ref.models import forward
from qtx_ref.models.initial import shapes
from qtx_ref.numerics import Float
from qtx_ref.spec import Family, ModelSpec
from qtx_ref.tape import Var

KEYS = (".scores", ".probs", ".context.lhs")  # sites whose last axis is the keys


@dataclass(frozen=True)
class Sites:
    """Names in the order of the forward pass. Results are tensors where they are produced; operands are `<op>.input`,
    or `.lhs` and `.rhs`, where a matmul takes them in; weights are `<op>.weight` where they are used."""

    results: tuple[str, ...]
    operands: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Results, then operands, then weights."""
        return self.results + self.operands + self.weights


class RecordShapes(Float):
    """Records the name and shape of everything that passes a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {"results": {}, "operands": {}, "weights": {}}

    def operand(self, site: str, x: Var, where: np.ndarray | None = None) -> Var:
        """Records what an op takes in."""
        self.shapes["operands"][site] = x.shape
        return x

    def weight(self, site: str, w: Var) -> Var:
        """Records a parameter where it is used."""
        self.shapes["weights"][site] = w.shape
        return w

    def named(self, site: str, y: Var, where: np.ndarray | None = None) -> Var:
        """Records a result."""
        self.shapes["results"][site] = y.shape
        return y


@cache
def sites(spec: ModelSpec) -> Sites:
    """The sites of a model, recorded on one of the same structure and the smallest size."""
    return Sites(**{kind: tuple(names) for kind, names in record_shapes(narrow_widths(spec, 1)).items()})


def narrow_widths(spec: ModelSpec, size: int) -> ModelSpec:
    """A model of the same structure and other widths: of a head, of the FFN, of the token embedding."""
    return replace(spec, width=size * spec.heads, hidden=size, embed_width=spec.embed_width and size)


def shorten_inputs(spec: ModelSpec) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """A model of the same widths for a short text or a small image, and a batch of one."""
    if spec.family is Family.VIT:
        shape = (1, spec.channels, spec.patch_size, spec.patch_size)
        return replace(spec, image_size=spec.patch_size), {"images": np.linspace(-1, 1, prod(shape)).reshape(shape)}
    tokens = np.arange(2)[None]
    return replace(spec, vocab=8, length=2), {"tokens": tokens, "types": 0 * tokens, "mask": tokens >= 0}


def record_shapes(spec: ModelSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """What passes the hooks in the forward pass of one short text or small image, by kind and name, with its shape."""
    shape, batch = shorten_inputs(spec)
    nx = RecordShapes()
    nx.load({name: np.zeros(size, np.float32) for name, size in shapes(shape).items()})
    forward(nx, shape, batch)
    return nx.shapes


@cache
def extents(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Channels of each site (what GROUP divides: an activation's last axis, a weight's rows) and its last axis (what
    BLOCK divides). Not of `scores`, `probs` and `context.lhs`, whose last axis is the keys."""
    sizes = shapes(spec)
    first: dict[str, tuple[int, int]] = {}  # of a model with one layer
    for kind, sized in record_shapes(replace(spec, layers=1)).items():
        for site, size in sized.items():
            if kind == "weights":  # head.decoder.weight may be the token table
                size = sizes.get(site, sizes.get("embed.token.weight", size))
            first[site] = (prod(size[:-1]) if kind == "weights" else size[-1], size[-1])
    if spec.family is not Family.VIT and "head.decoder" in first:
        first["head.decoder"] = (spec.vocab, spec.vocab)
    return {
        f"layer.{i}.{rest}" if layer else rest: extent
        for site, extent in first.items()
        if not site.endswith(KEYS)
        for layer, rest in [(site.startswith("layer."), site.removeprefix("layer.0."))]
        for i in range(spec.layers if layer else 1)
    }


def linears(spec: ModelSpec) -> tuple[str, ...]:
    """The linear layers, each of whose operand is `<linear>.input`, in the order of the forward pass."""
    return tuple(site.removesuffix(".input") for site in sites(spec).operands if site.endswith(".input"))


@dataclass(frozen=True)
class PaperSites:
    """The published metrics' sites. `inf_norm`: each with its unit (`sequence` or `token`). `kurtosis`: those that the
    average is taken over, all of them in `inf_norm`; a tensor that the published list names twice stands twice."""

    inf_norm: dict[str, str]
    kurtosis: tuple[str, ...]


def paper_sites(spec: ModelSpec) -> PaperSites:
    """Where Bondarenko et al. 2023 take "max inf norm" and "average kurtosis", as their scripts `validate_mlm.py` and
    `validate_clm.py` list them.

    BERT: each layer's FFN output and last norm's output, for the inf norm also that norm's input. OPT: five modules of
    each layer (the layer itself, FFN output, both norms, attention output), and the final norm where there is one. In a
    post-norm layer its last norm's output is the layer's output too, and counts twice. The FFN output, and a norm
    before the FFN, arrive flattened to tokens there. ViT has no published code: FFN output, layer output and final norm
    are an assumption.
    """
    units: dict[str, str] = {}
    listed: list[str] = []
    for i in range(spec.layers):
        attn, ffn = f"layer.{i}.attn", f"layer.{i}.ffn"
        if spec.family is Family.BERT:
            layer = {f"{ffn}.output": "sequence", f"{ffn}.norm": "sequence"}
            listed += layer
        elif spec.family is Family.VIT:
            layer = {f"{ffn}.output": "sequence", f"{ffn}.residual": "sequence"}
            listed += layer
        else:
            norm = "token" if spec.pre_norm else "sequence"
            layer = {f"{attn}.norm": "sequence", f"{attn}.output": "sequence"}
            layer |= {f"{ffn}.norm": norm, f"{ffn}.output": "token"}
            result = f"{ffn}.residual" if spec.pre_norm else f"{ffn}.norm"
            listed += [*layer, result]
            layer |= {result: "sequence"}
        units |= layer
    if spec.final_norm:
        units["final.norm"] = "sequence"
        listed.append("final.norm")
    extra = {f"layer.{i}.ffn.residual": "sequence" for i in range(spec.layers)} if spec.family is Family.BERT else {}
    return PaperSites(units | extra, tuple(listed))


def residual_stream(spec: ModelSpec) -> tuple[str, ...]:
    """The sites at which the residual stream stands, all D wide: the embedding, then each sum and, where the norm
    follows it, its norm."""
    parts = (
        ("attn.residual", "ffn.residual")
        if spec.pre_norm
        else ("attn.residual", "attn.norm", "ffn.residual", "ffn.norm")
    )
    begin = "embed.norm" if spec.family is Family.BERT else "embed.sum"
    return (begin, *(f"layer.{i}.{part}" for i in range(spec.layers) for part in parts))


def layer_inputs(spec: ModelSpec) -> tuple[str, ...]:
    """For each layer the site of the residual stream that its attention's output is added to."""
    stream = residual_stream(spec)
    return stream[: -1 : (len(stream) - 1) // spec.layers]
