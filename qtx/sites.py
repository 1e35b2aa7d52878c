"""The sites of a model: every tensor that a recipe, a statistic or an audit can name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from qtx_ref.models import forward
from qtx_ref.models.initial import init_params
from qtx_ref.numerics import Float
from qtx_ref.spec import Family, ModelSpec
from qtx_ref.tape import Var, const


@dataclass(frozen=True)
class Sites:
    """Names in the order of the forward pass. Results are tensors where they are produced; operands are `<op>.input`, or
    `.lhs` and `.rhs`, where a matmul takes them in; weights are `<op>.weight` where they are used."""

    results: tuple[str, ...]
    operands: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.results + self.operands + self.weights


class Trace(Float):
    """Writes down the name of everything that passes a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, dict[str, None]] = {"results": {}, "operands": {}, "weights": {}}

    def operand(self, site: str, x: Var, where: np.ndarray | None = None) -> Var:
        self.seen["operands"][site] = None
        return x

    def weight(self, site: str, w: Var) -> Var:
        self.seen["weights"][site] = None
        return w

    def named(self, site: str, y: Var, where: np.ndarray | None = None) -> Var:
        self.seen["results"][site] = None
        return y


@cache
def sites(spec: ModelSpec) -> Sites:
    """The sites of a model, traced on one of the same structure and the smallest size."""
    image = spec.family is Family.VIT
    small = {"image_size": spec.patch_size} if image else {"vocab": 8, "length": 2}
    shape = replace(spec, width=spec.heads, hidden=1, embed_width=spec.embed_width and 1, **small)
    if image:
        batch = {"images": np.zeros((1, spec.channels, spec.patch_size, spec.patch_size), np.float32)}
    else:
        tokens = np.zeros((1, 2), np.int64)
        batch = {"tokens": tokens, "types": tokens, "mask": tokens == 0}
    trace = Trace()
    forward(trace, {name: const(value) for name, value in init_params(shape, 0).items()}, shape, batch)
    return Sites(**{kind: tuple(names) for kind, names in trace.seen.items()})


@dataclass(frozen=True)
class PaperSites:
    """The published metrics' sites, each with its unit (`sequence` or `token`)."""

    inf_norm: dict[str, str]
    kurtosis: dict[str, str]


def paper_sites(spec: ModelSpec) -> PaperSites:
    """Where Bondarenko et al. 2023 take "max inf norm" and "average kurtosis".

    BERT: each layer's FFN output and last norm's output, for the inf norm also that norm's input. OPT: the final norm and
    each layer's output, FFN output, both norms and attention output; the FFN output and the norm before the FFN arrive
    flattened to tokens there. ViT has no published code: FFN output, layer output and final norm are an assumption.
    """
    units: dict[str, str] = {}
    for i in range(spec.layers):
        attn, ffn = f"layer.{i}.attn", f"layer.{i}.ffn"
        if spec.family is Family.BERT:
            units |= {f"{ffn}.output": "sequence", f"{ffn}.norm": "sequence"}
        elif spec.family is Family.VIT:
            units |= {f"{ffn}.output": "sequence", f"{ffn}.residual": "sequence"}
        else:
            units |= {f"{attn}.norm": "sequence", f"{attn}.output": "sequence"}
            # the published code flattens to tokens before a norm that precedes the FFN, and back before one that follows
            units |= {f"{ffn}.norm": "token" if spec.pre_norm else "sequence", f"{ffn}.output": "token"}
            if spec.pre_norm:
                units |= {f"{ffn}.residual": "sequence"}
    if spec.final_norm:
        units["final.norm"] = "sequence"
    extra = {f"layer.{i}.ffn.residual": "sequence" for i in range(spec.layers)} if spec.family is Family.BERT else {}
    return PaperSites(units | extra, units)
