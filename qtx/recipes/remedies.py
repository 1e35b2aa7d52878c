"""Remedies: what post-training quantization changes about a recipe so that outliers hurt less, each as data.

A recipe's name is a kind, the bits, and remedies applied from left to right: `w8a8-p99.9`, `w8a8-peg4p`,
`w4a16-channel-gptq`, `linear-w8a8-smooth0.5`. Each changes the `Parts` of a recipe by their roles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import gcd

from qtx_ref.spec import (
    Granularity,
    ModelSpec,
    ObserverKind,
    ObserverSpec,
    QuantSpec,
    Recipe,
    Rewrite,
    Rule,
    SpecError,
    Transform,
    TransformKind,
)

from .parts import MSE_GRID, Parts, change_rule
from .sites import sites

RUNNING = ObserverSpec(kind=ObserverKind.RUNNING, momentum=0.9)
BONDARENKO = "Bondarenko et al. 2021 (arXiv 2109.12948)"
LLM_INT8 = 6.0  # the magnitude from which a channel counts as an outlier, Dettmers et al. 2022, section 3.2
CHANNELS = (  # tensors whose last axis is the model's or the FFN's width
    *(f"embed.{name}" for name in ("pair", "sum", "norm", "cls", "patch")),
    *(f"layer.*.attn.{name}" for name in ("norm", "query", "key", "value", "context", "gated", "output", "residual")),
    *(f"layer.*.ffn.{name}" for name in ("norm", "hidden", "activation", "output", "residual")),
    "final.norm",
)
NORM_FED = tuple(f"layer.*.{name}" for name in ("attn.query", "attn.key", "attn.value", "ffn.hidden"))
LINEARS = (*NORM_FED, "layer.*.attn.output", "layer.*.ffn.output")
WIDENED = tuple(site for site in CHANNELS if not site.endswith(("query", "key", "value", "ffn.hidden")))
GROUPS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256)
STRENGTHS = (0.25, 0.5, 0.75, 0.9)
Remedy = Callable[[Parts, ModelSpec, "re.Match[str]"], Parts]


def list_ffn_sites(spec: ModelSpec) -> tuple[str, ...]:
    """The FFN's input, output and residual sum."""
    return ("layer.*.ffn.norm" if spec.pre_norm else "layer.*.attn.norm", "layer.*.ffn.output", "layer.*.ffn.residual")


# --- one remedy each: (a recipe's parts, model, the match of its name) -> parts
# -------------------------------------------


def percentile(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """Activations from the percentile of all calibration values that the name gives."""
    observer = ObserverSpec(kind=ObserverKind.PERCENTILE, percentile=float(name[1]))
    source = "Kaliaperumal 2026 (arXiv 2603.04308): two-sided percentile of all calibration values"
    return base.change_activations(lambda quant: replace(quant, observer=observer), source)


def least_squares(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """Ranges of least squared error, of activations and of weights."""
    observer = ObserverSpec(kind=ObserverKind.MSE_GOLDEN)
    source = f"{BONDARENKO}, section 5: the range of least squared error"

    def change(quant: QuantSpec) -> QuantSpec:
        return replace(quant, observer=observer)

    return base.change_activations(change, source).change_weights(change, source)


def least_squares_weights(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """Weights' ranges as the published simulator finds those of OPT, also for its low bits; activations keep theirs."""
    source = "code of arXiv 2306.12929: weights by the least squared error among fractions of their extremes"
    return base.change_weights(lambda quant: replace(quant, observer=MSE_GRID), source)


def channel(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """A scale for each output channel of a weight."""
    source = "Krishnamoorthi 2018 (arXiv 1806.08342), section 2.5: weights with a scale per output channel"
    return base.change_weights(lambda quant: replace(quant, granularity=Granularity.CHANNEL), source)


def token(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """A scale for each token, taken from the data."""
    source = "ZeroQuant (Yao et al. 2022), section 4: a scale per token, taken from the data"

    def change(quant: QuantSpec) -> QuantSpec:
        return replace(quant, granularity=Granularity.TOKEN, dynamic=True, observer=ObserverSpec())

    return base.change_activations(change, source)


def wide_residual(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """The residual stream in 16 bits."""
    wide = QuantSpec(bits=16, symmetric=True, observer=RUNNING)
    source = f"{BONDARENKO}, section 4: 16 bits for the residual sum"
    return base.add_special(Rule(("*.residual", "embed.pair", "embed.sum"), wide, source))


def wide_ffn(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """The FFN's input, output and sum in 16 bits."""
    wide = QuantSpec(bits=16, symmetric=True, observer=RUNNING)
    return base.add_special(
        Rule(list_ffn_sites(spec), wide, f"{BONDARENKO}, section 4: 16 bits for FFN input, output and sum")
    )


def float_ffn(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """The FFN's input, output and sum in float."""
    return base.add_special(Rule(list_ffn_sites(spec), None, "the same sites in float"))


def float_sites(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """The sites in float that the name's patterns match. Raises SpecError for a pattern that matches none."""
    patterns = tuple(name[1].split("+"))
    for pattern in patterns:
        if not any(fnmatchcase(site, pattern) for site in sites(spec).all):
            raise SpecError(
                f"float[{name[1]}]: {pattern!r} matches no site of this model; see qtx recipes for their names"
            )
    return base.add_floats(Rule(patterns, None, "chosen by hand"))


def llm_int8(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """A scale for each token and output channel, and channels that hold large values in float."""
    source = "LLM.int8 (Dettmers et al. 2022), section 3: vector-wise, channels from magnitude 6 on in float"

    def change(quant: QuantSpec) -> QuantSpec:
        rows = replace(quant, granularity=Granularity.TOKEN, dynamic=True, observer=ObserverSpec())
        return replace(rows, symmetric=True, outliers=LLM_INT8)

    base = base.change_activations(change, source)
    return base.change_weights(lambda quant: replace(quant, granularity=Granularity.CHANNEL), source)


def groups(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """Groups of channels with a scale each, as many as the name says."""
    count, permuted = int(name[1]), bool(name[2])
    order = "channels sorted by range" if permuted else "neighbouring channels"
    source = f"{BONDARENKO}, section 4: per-embedding-group, {order}"
    rule = replace(base.activations, sites=CHANNELS)

    def change(quant: QuantSpec) -> QuantSpec:
        return replace(quant, granularity=Granularity.GROUP, groups=count, permute=permuted)

    return base.add_special(change_rule(rule, change, source))


def wide_channels(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """The channels of the largest magnitude, as many as the name says, in 16 bits beside the others. Raises SpecError
    where the model has no more channels."""
    count = int(name[1])
    if not 1 <= count < min(spec.width, spec.hidden):
        raise SpecError(f"remedy out{count}: give 1 to {min(spec.width, spec.hidden) - 1} channels of this model")
    source = "LLM.int8 (Dettmers et al. 2022), section 3: outlier channels apart; here chosen at calibration, 16 bits"
    rule = replace(base.activations, sites=WIDENED)

    def change(quant: QuantSpec) -> QuantSpec:
        return replace(quant, granularity=Granularity.GROUP, wide=count)

    return base.add_special(change_rule(rule, change, source))


def smooth(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """Divisors that take outliers from the linears' inputs to their weights."""
    source = "SmoothQuant (Xiao et al. 2023), eq. 4: the linears that a norm feeds"
    return replace(base, transforms=(Transform(NORM_FED, TransformKind.SMOOTH, source, strength=float(name[1])),))


def hadamard(base: Parts, spec: ModelSpec, name: re.Match[str]) -> Parts:
    """A Hadamard rotation of each linear's input."""
    source = "QuaRot (Ashkboos et al. 2024), section 3: a Hadamard rotation before each linear"
    return replace(base, transforms=(Transform(LINEARS, TransformKind.HADAMARD, source),))


def rewrite_by(kind: Rewrite) -> Remedy:
    """The remedy that has weights or biases rewritten so."""
    return lambda base, spec, name: replace(base, rewrite=kind)


REMEDIES: dict[str, Remedy] = {
    r"r16": wide_residual,
    r"p(\d+(?:\.\d+)?)": percentile,
    r"mse": least_squares,
    r"wmse": least_squares_weights,
    r"channel": channel,
    r"token": token,
    r"ffn16": wide_ffn,
    r"ffnfloat": float_ffn,
    r"float\[(.+)\]": float_sites,
    r"llmint8": llm_int8,
    r"peg(\d+)(p?)": groups,
    r"out(\d+)": wide_channels,
    r"smooth(\d(?:\.\d+)?)": smooth,
    r"hadamard": hadamard,
    r"bias": rewrite_by(Rewrite.BIAS),
    r"gptq": rewrite_by(Rewrite.GPTQ),
    r"adaround": rewrite_by(Rewrite.ADAROUND),
}
NAMES = (
    "r16, p99.9, mse, wmse, channel, token, ffn16, ffnfloat, float[layer.*.ffn.output+...], llmint8, peg4, "
    "peg4p, out8, smooth0.5, hadamard, bias, gptq, adaround"
)


def apply(base: Parts, spec: ModelSpec, names: Sequence[str]) -> Parts:
    """A recipe's parts after the remedies of these names, in order. Raises SpecError for one that does not exist, that
    changes nothing of this model, or that quantizes what the recipe leaves in float."""
    for name in names:
        matches = ((re.fullmatch(text, name), remedy) for text, remedy in REMEDIES.items())
        match, remedy = next((pair for pair in matches if pair[0]), (None, None))
        if match is None or remedy is None:
            raise SpecError(f"remedy {name!r} in recipe {'-'.join([base.name, *names])!r} is not known: choose {NAMES}")
        before, base = base, replace(remedy(base, spec, match), name=f"{base.name}-{name}")
        refuse_idle(before.recipe(), base.recipe(), spec, name)
    return base


def refuse_idle(before: Recipe, after: Recipe, spec: ModelSpec, name: str) -> None:
    """Raises SpecError where the remedy `name` changed nothing, or quantizes what was left in float."""
    pairs = {site: (before.quant(site), after.quant(site)) for site in sites(spec).all}
    added = [site for site, (was, now) in pairs.items() if was is None and now is not None]
    same = (before.transforms, before.rewrite) == (after.transforms, after.rewrite)
    if added or (same and all(was == now for was, now in pairs.values())):
        what = f"quantizes {added[0]}, which {before.name} leaves in float" if added else "changes none of its sites"
        raise SpecError(f"recipe {after.name}: {name} {what}; leave it out")


def count_groups(spec: ModelSpec) -> tuple[int, ...]:
    """Numbers of groups that divide the model's and the FFN's width, up to the largest."""
    largest = gcd(spec.width, spec.hidden)
    return (*(count for count in GROUPS if largest % count == 0 and count < largest), largest)


def list_standard(spec: ModelSpec) -> tuple[str, ...]:
    """The recipes that `qtx ptq` compares, by name, beside float."""
    counts = count_groups(spec)
    return (
        "w8a8",
        *(f"w8a8-p{q}" for q in ("99", "99.9", "99.99", "99.999")),
        "w8a8-mse",
        "w8a8-channel",
        "w8a8-token",
        "w8a8-ffn16",
        "w8a8-ffnfloat",
        *(f"w8a8-peg{count}" for count in counts),
        *(
            f"w8a8-peg{count}p" for count in counts if 1 < count < spec.width
        ),  # of one, or of one each, order is nothing
        *(("w8a8-out8",) if min(spec.width, spec.hidden) > 8 else ()),
        "w8a8-bias",
        "linear-w8a8",
        "linear-w8a8-llmint8",
        *(f"linear-w8a8-smooth{strength}" for strength in STRENGTHS),
        "linear-w8a8-hadamard",
        "w8a16",
        "w6a8",
        "w6a6",
        "w4a8",
        "w4a4",
        "linear-w4a4",
        "linear-w4a4-smooth0.5",
        "linear-w4a4-hadamard",
        "w4a16-channel",
        "w4a16-channel-gptq",
        "w4a16-channel-adaround",
    )
