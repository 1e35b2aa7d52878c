"""Remedies: what post-training quantization changes about a recipe so that outliers hurt less, each as data.

A recipe's name is a kind, the bits, and remedies applied from left to right: `w8a8-p99.9`, `w8a8-peg4p`,
`w4a16-channel-gptq`, `linear-w8a8-smooth0.5`. A base recipe's first rule is its activations, its second its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from math import gcd

from qtx_ref.spec import (
    Granularity,
    ModelSpec,
    ObserverKind,
    ObserverSpec,
    Quant,
    QuantSpec,
    Recipe,
    Rewrite,
    Rule,
    SpecError,
    Transform,
    TransformKind,
)

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
GROUPS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256)
STRENGTHS = (0.25, 0.5, 0.75, 0.9)


def is_weights(rule: Rule) -> bool:
    return all(pattern.endswith(".weight") for pattern in rule.sites)


def changed(base: Recipe, weights: bool, change: Callable[[QuantSpec], Quant], source: str) -> Recipe:
    """A recipe with the quantizers of its weights, or of its activations, changed."""
    rules = tuple(
        rule if rule.quant is None or is_weights(rule) != weights else replace(rule, quant=change(rule.quant), source=source)
        for rule in base.rules
    )  # fmt: skip
    return replace(base, rules=rules)


def varied(base: Recipe, rule: Rule) -> Recipe:
    """A recipe whose activations are different at some sites, whatever was said of them before."""
    place = next(i for i, known in enumerate(base.rules) if is_weights(known))
    return replace(base, rules=(*base.rules[:place], rule, *base.rules[place:]))


def ffn_sites(spec: ModelSpec) -> tuple[str, ...]:
    """The FFN's input, output and residual sum."""
    return ("layer.*.ffn.norm" if spec.pre_norm else "layer.*.attn.norm", "layer.*.ffn.output", "layer.*.ffn.residual")


# --- one remedy each: (base recipe, model, the match of its name) -> recipe ---------------------------------------------


def percentile(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    observer = ObserverSpec(kind=ObserverKind.PERCENTILE, percentile=float(name[1]))
    source = "Kaliaperumal 2026 (arXiv 2603.04308): two-sided percentile of all calibration values"
    return changed(base, False, lambda quant: replace(quant, observer=observer), source)


def least_squares(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    observer = ObserverSpec(kind=ObserverKind.MSE_GOLDEN)
    source = f"{BONDARENKO}, section 5: the range of least squared error"
    for weights in (False, True):
        base = changed(base, weights, lambda quant: replace(quant, observer=observer), source)
    return base


def channel(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    source = "Krishnamoorthi 2018 (arXiv 1806.08342), section 2.5: weights with a scale per output channel"
    return changed(base, True, lambda quant: replace(quant, granularity=Granularity.CHANNEL), source)


def token(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    source = "ZeroQuant (Yao et al. 2022), section 4: a scale per token, taken from the data"
    rows = {"granularity": Granularity.TOKEN, "dynamic": True, "observer": ObserverSpec()}
    return changed(base, False, lambda quant: replace(quant, **rows), source)


def wide_residual(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    wide = QuantSpec(bits=16, symmetric=True, observer=RUNNING)
    source = f"{BONDARENKO}, section 4: 16 bits for the residual sum"
    return varied(base, Rule(("*.residual", "embed.pair", "embed.sum"), wide, source))


def wide_ffn(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    wide = QuantSpec(bits=16, symmetric=True, observer=RUNNING)
    return varied(base, Rule(ffn_sites(spec), wide, f"{BONDARENKO}, section 4: 16 bits for FFN input, output and sum"))


def float_ffn(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    return varied(base, Rule(ffn_sites(spec), None, "the same sites in float"))


def float_sites(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    patterns = tuple(name[1].split("+"))
    for pattern in patterns:
        if not any(fnmatchcase(site, pattern) for site in sites(spec).all):
            raise SpecError(
                f"float[{name[1]}]: {pattern!r} matches no site of this model; see qtx recipes for their names"
            )
    return replace(base, rules=(*base.rules, Rule(patterns, None, "chosen by hand")))


def llm_int8(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    source = "LLM.int8 (Dettmers et al. 2022), section 3: vector-wise, channels from magnitude 6 on in float"
    rows = {"granularity": Granularity.TOKEN, "dynamic": True, "symmetric": True, "observer": ObserverSpec()}
    base = changed(base, False, lambda quant: replace(quant, **rows, outliers=LLM_INT8), source)
    return changed(base, True, lambda quant: replace(quant, granularity=Granularity.CHANNEL), source)


def groups(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    count, permuted = int(name[1]), bool(name[2])
    grouped = replace(base.rules[0].quant, granularity=Granularity.GROUP, groups=count, permute=permuted)
    order = "channels sorted by range" if permuted else "neighbouring channels"
    return varied(base, Rule(CHANNELS, grouped, f"{BONDARENKO}, section 4: per-embedding-group, {order}"))


def smooth(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    source = "SmoothQuant (Xiao et al. 2023), eq. 4: the linears that a norm feeds"
    return replace(base, transforms=(Transform(NORM_FED, TransformKind.SMOOTH, source, strength=float(name[1])),))


def hadamard(base: Recipe, spec: ModelSpec, name: re.Match) -> Recipe:
    source = "QuaRot (Ashkboos et al. 2024), section 3: a Hadamard rotation before each linear"
    return replace(base, transforms=(Transform(LINEARS, TransformKind.HADAMARD, source),))


def rewritten(kind: Rewrite) -> Callable[[Recipe, ModelSpec, re.Match], Recipe]:
    return lambda base, spec, name: replace(base, rewrite=kind)


REMEDIES: dict[str, Callable[[Recipe, ModelSpec, re.Match], Recipe]] = {
    r"r16": wide_residual,
    r"p(\d+(?:\.\d+)?)": percentile,
    r"mse": least_squares,
    r"channel": channel,
    r"token": token,
    r"ffn16": wide_ffn,
    r"ffnfloat": float_ffn,
    r"float\[(.+)\]": float_sites,
    r"llmint8": llm_int8,
    r"peg(\d+)(p?)": groups,
    r"smooth(\d(?:\.\d+)?)": smooth,
    r"hadamard": hadamard,
    r"bias": rewritten(Rewrite.BIAS),
    r"gptq": rewritten(Rewrite.GPTQ),
    r"adaround": rewritten(Rewrite.ADAROUND),
}
NAMES = (
    "r16, p99.9, mse, channel, token, ffn16, ffnfloat, float[layer.*.ffn.output+...], llmint8, peg4, "
    "peg4p, smooth0.5, hadamard, bias, gptq, adaround"
)


def remedied(base: Recipe, spec: ModelSpec, names: list[str]) -> Recipe:
    """A recipe with the remedies of these names, in order. Raises SpecError for one that does not exist, that changes
    nothing of this model, or that quantizes what the recipe leaves in float."""
    for name in names:
        found = next(((match, apply) for text, apply in REMEDIES.items() if (match := re.fullmatch(text, name))), None)
        if found is None:
            raise SpecError(f"remedy {name!r} in recipe {'-'.join([base.name, *names])!r} is not known: choose {NAMES}")
        match, apply = found
        before, base = base, replace(apply(base, spec, match), name=f"{base.name}-{name}")
        pairs = {site: (before.quant(site), base.quant(site)) for site in sites(spec).all}
        added = [site for site, (was, now) in pairs.items() if was is None and now is not None]
        rest = [(one.transforms, one.rewrite) for one in (before, base)]
        if added or (all(was == now for was, now in pairs.values()) and rest[0] == rest[1]):
            what = (
                f"quantizes {added[0]}, which {before.name} leaves in float" if added else "changes none of its sites"
            )
            raise SpecError(f"recipe {base.name}: {name} {what}; leave it out")
    return base


def group_counts(spec: ModelSpec) -> tuple[int, ...]:
    """Numbers of groups that divide the model's and the FFN's width, up to the largest."""
    largest = gcd(spec.width, spec.hidden)
    return (*(count for count in GROUPS if largest % count == 0 and count < largest), largest)


def standard(spec: ModelSpec) -> tuple[str, ...]:
    """The recipes that `qtx ptq` compares, by name, beside float."""
    counts = group_counts(spec)
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
