"""Recipes: which site is quantized and how, as data. `recipe(name, spec)` makes one, `resolve` fits it to a model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from qtx_ref.spec import (
    Family,
    FloatQuantSpec,
    Gate,
    Granularity,
    ModelSpec,
    ObserverKind,
    ObserverSpec,
    Quant,
    QuantSpec,
    Recipe,
    Rule,
    SpecError,
    from_dict,
)
from qtx_ref.spec.limits import refuse_integer

from ..data.reading import read_regular
from . import remedies, training
from .parts import FLOATS, MSE_GRID, MX_BLOCK, MX_TEXT, OPERANDS, TABLES, Parts
from .remedies import RUNNING
from .sites import KEYS, extents, sites

SIM = "published simulator (code of arXiv 2306.12929)"
PADDING = "padded positions enter ranges there (its own data have none), never here"
LOOKUPS = ("embed.token", "embed.type", "embed.position")
LM_HEAD = ("head.decoder", "head.decoder.weight")
BATCHES = 16  # of calibration
FP8_TEXT = "arXiv 2209.05433, section 3: one scale per tensor that takes the largest magnitude to the largest value"
NAMES = (
    f"wXaY (w8a8, w6a6, w4a8, ...), linear-wXaY, either with remedies (w8a8-p99.9, w8a8-peg4p, ...: {remedies.NAMES}), "
    f"token-wXaY, lsq-wXaY, {', '.join(FLOATS)}, paper-bert, paper-opt, paper-vit, {training.NAMES}, "
    f"with quantized gradients {training.GRADIENT_NAMES} (NAME as above, or float), "
    "or a .json file such as qtx recipes --json writes"
)


def post_training(weight_bits: int, activation_bits: int, learned: bool = False) -> Parts:
    """Static per-tensor ranges everywhere: symmetric weights, asymmetric activations, running min-max over 16
    batches."""
    weights = QuantSpec(bits=weight_bits, symmetric=True, learned=learned)
    activations = QuantSpec(bits=activation_bits, observer=RUNNING, learned=learned)
    bits = f"w{weight_bits}a{activation_bits}"
    return everywhere(
        f"lsq-{bits}" if learned else bits,
        Rule(("*",), activations, "arXiv 2306.12929, section 5: asymmetric activations, static ranges"),
        Rule(("*.weight",), weights, "arXiv 2306.12929, section 5: symmetric weights"),
    )


def per_token(base: Parts, bits: int) -> Parts:
    """The layers' norms, context and gated output with a scale per token, taken from the data: they feed products that
    sum over channels. Tables (GELU, sigmoid, softmax), values and what the head takes need static ranges."""
    rows = QuantSpec(bits=bits, symmetric=True, granularity=Granularity.TOKEN, dynamic=True)
    source = "ZeroQuant (Yao et al. 2022), section 4: activations per token where a linear layer takes them"
    token_sites = ("embed.norm", "layer.*norm", "*.attn.context", "*.attn.gated")
    return replace(base.add_special(Rule(token_sites, rows, source)), name=f"token-{base.name}")


def linears(weight_bits: int, activation_bits: int) -> Parts:
    """The operands of the linear layers alone, static and per tensor; all else in float, as in GPTQ's, SmoothQuant's
    and LLM.int8's simulations."""
    source = "Xiao et al. 2023, section 4: int8 linear layers, norms, softmax and sums in floats"
    return Parts(
        f"linear-w{weight_bits}a{activation_bits}",
        activations=Rule(("*.input",), QuantSpec(bits=activation_bits, observer=RUNNING), source),
        weights=Rule(("*.weight",), QuantSpec(bits=weight_bits, symmetric=True), source),
        floats=(
            Rule(("*norm.weight", *TABLES), None, "not an operand of a linear layer"),
            Rule(("head.*",), None, "arXiv 2306.12929, section 5: the final linear layer stays in float"),
        ),
        batches=BATCHES,
    )


def everywhere(name: str, activations: Rule, weights: Rule) -> Parts:
    """Static ranges of every tensor where it is produced, and of every weight, but for the language-model head."""
    return Parts(
        name,
        activations,
        weights,
        floats=(
            Rule(OPERANDS, None, "a tensor is quantized once, where it is produced"),
            Rule(LOOKUPS, None, "a row of a quantized table is quantized already"),
            Rule(LM_HEAD, None, "arXiv 2306.12929, section 5: the final linear layer of BERT and OPT stays in float"),
        ),
        batches=BATCHES,
    )


def small_float(name: str) -> Parts:
    """FP8 with a static scale per tensor, running min-max over 16 batches."""
    activations = FloatQuantSpec(FLOATS[name], observer=RUNNING)
    return everywhere(
        name,
        Rule(("*",), activations, FP8_TEXT),
        Rule(("*.weight",), FloatQuantSpec(FLOATS[name]), FP8_TEXT),
    )


def microscaling(name: str, spec: ModelSpec) -> Recipe:
    """MX blocks in both operands of every linear and of the scores, whose last axis is the one summed over.

    The other product of attention sums over the keys, and stays in float.
    """
    blocks = FloatQuantSpec(FLOATS[name], granularity=Granularity.BLOCK, dynamic=True, block=MX_BLOCK)
    undivided = tuple(site for site, (_, last) in extents(spec).items() if last % MX_BLOCK)
    return Recipe(
        name=name,
        rules=(
            Rule(("*.input", "*.weight", "*.scores.lhs", "*.scores.rhs"), blocks, MX_TEXT),
            Rule(("*norm.weight", *TABLES), None, "not an operand of a matmul"),
            Rule(
                ("head.decoder.input", "head.decoder.weight"),
                None,
                "arXiv 2306.12929, section 5: the final linear layer of BERT and OPT stays in float",
            ),
            Rule(undivided, None, f"the last axis has no whole number of blocks of {MX_BLOCK}"),
        ),
    )


def paper(family: Family, spec: ModelSpec) -> Recipe:
    """The published simulator site by site (BERT, OPT); for ViT, which has no published code, the paper's text.

    Raises SpecError for a model of another family.
    """
    if family is not spec.family:
        raise SpecError(f"recipe paper-{family} for a model of family {spec.family}: use paper-{spec.family}")
    if family is Family.VIT:
        base = post_training(8, 8)
        rules: tuple[Rule, ...] = (
            Rule(
                ("*",),
                base.activations.quant,
                "section 5: all activations, asymmetric, static; running min-max assumed",
            ),
            Rule(("*.weight",), base.weights.quant, "section 5: all weights, symmetric; min-max assumed"),
            Rule((*OPERANDS, *LOOKUPS), None, "assumed as in the BERT simulator"),
        )
        return Recipe("paper-vit", rules, batches=16, quantize_while_calibrating=True, masked_scores=True)
    gated = spec.attention.gate is not Gate.NONE
    if family is Family.BERT:
        weights = QuantSpec(mirrored=True)
        activations = QuantSpec(observer=RUNNING)
        context, other = ("gated", "context") if gated else ("context", "gated")
        context_source = f"{SIM}: the context is quantized after the gate"
        head = Rule(("head.*",), None, f"{SIM}: the whole MLM head stays in float")
        batches = 16
        differences = f"; {PADDING}"
    else:
        weights = QuantSpec(mirrored=True, observer=MSE_GRID)
        tails = ObserverSpec(kind=ObserverKind.RUNNING_PERCENTILE, momentum=0.9, percentile=99.999)
        activations = QuantSpec(observer=tails)
        context, other = "context", "gated"
        context_source = f"{SIM}: the context is quantized before the gate, the gated output not at all"
        head = Rule(LM_HEAD, None, f"{SIM}: quant_setup fp32_head, the README's command")
        batches = 4
        differences = f"; {PADDING}; percentiles and their running means are float64 there, float32 here"
    rules = (
        Rule(("*",), activations, f"{SIM}: asymmetric activations{differences}"),
        Rule(
            ("*.weight",),
            weights,
            f"{SIM}: symmetric weights per tensor, tables and norm gains included; unsigned where none is negative",
        ),
        Rule((*OPERANDS, *LOOKUPS), None, f"{SIM}: lookups have no activation quantizer"),
        Rule(("*.ffn.hidden",), None, f"{SIM}: the FFN's first linear and its activation share one quantizer"),
        Rule(("*.gate*",), None, f"{SIM}: the gate's predictor stays in float, weights included"),
        Rule((f"*.attn.{other}",), None, context_source),
        Rule((f"*.attn.{context}",), activations, context_source),
        head,
    )
    return Recipe(f"paper-{family}", rules, batches=batches, quantize_while_calibrating=True, masked_scores=True)


def read_recipe(path: Path) -> Recipe:
    """The recipe of a JSON file: a recipe itself, or what `qtx recipes` prints, which has the sites beside it.

    Raises:
        SpecError: no such file, or one that holds no recipe.
    """
    try:
        data = json.loads(read_regular(path).decode())
        printed = isinstance(data, dict) and data.keys() - {"format"} == {"recipe", "sites"}
        return from_dict(Recipe, data["recipe"] if printed else data)
    except OSError as error:
        raise SpecError(f"recipe file {path} cannot be read ({error.strerror}): give one that qtx wrote") from None
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError and a SpecError are ValueErrors too
        raise SpecError(f"recipe file {path}: {error}") from None


def recipe(name: str, spec: ModelSpec) -> Recipe:
    """The recipe of that name for a model, or that of a JSON file (`read_recipe`).

    Raises:
        SpecError: an unknown name, bits outside 2 to 16, or a file that is no recipe.
    """
    if name.endswith(".json"):
        return read_recipe(Path(name))
    base, more_text, gradients = name.partition("+grad")
    if more_text:
        return training.add_gradients(Recipe(base, ()) if base == "float" else recipe(base, spec), gradients)
    if name.startswith("train-"):
        return training.quantize_matmuls(name.removeprefix("train-"), spec)
    if match := re.fullmatch(
        r"(|lsq-|token-|linear-)w([0-9]{1,4})a([0-9]{1,4})((?:-(?:float\[[^\]]+\]|[a-z0-9.]+))*)", name
    ):
        kind, bits = match[1], (int(match[2]), int(match[3]))
        more = re.findall(r"-(float\[[^\]]+\]|[a-z0-9.]+)", match[4])
        if kind == "lsq-" and not more:
            return post_training(*bits, learned=True).recipe()
        if kind == "token-" and set(more) <= {"r16"}:
            return per_token(remedies.apply(post_training(*bits), spec, more), bits[1]).recipe()
        if kind in ("", "linear-"):
            return remedies.apply(linears(*bits) if kind else post_training(*bits), spec, more).recipe()
    if name in FLOATS:
        return microscaling(name, spec) if name.startswith("mx") else small_float(name).recipe()
    if name in ("paper-bert", "paper-opt", "paper-vit"):
        return paper(Family(name.removeprefix("paper-")), spec)
    raise SpecError(f"recipe {name!r} is not known: choose {NAMES}")


def training_recipe(name: str, spec: ModelSpec) -> Recipe:
    """The recipe of `--train-quant`: `w8a8` and `fp8` stand for `train-w8a8` and `train-fp8`, quantized matmuls with
    dynamic ranges; also with `-tensor` and quantized gradients, as `w8a8+grad8`.

    Raises SpecError as `recipe`, for one that rewrites weights, and for one that quantizes nothing.
    """
    short = re.fullmatch(r"(w[0-9]+a[0-9]+|fp8)(-tensor)?(\+grad.*)?", name)
    chosen = recipe(f"train-{name}" if short else name, spec)
    if chosen.transforms or chosen.rewrite:
        raise SpecError(f"recipe {chosen.name} rewrites weights, which training moves: train without it, then quantize")
    resolve(chosen, spec)
    return chosen


def resolve(chosen: Recipe, spec: ModelSpec) -> dict[str, Quant]:
    """The quantizer of each site of a model. Raises SpecError where the recipe touches none, and for channels, groups
    and blocks that a site does not have."""
    quants = {site: quant for site in sites(spec).all if (quant := chosen.quant(site)) is not None}
    for site, quant in quants.items():
        kind = quant.granularity
        if kind in (Granularity.CHANNEL, Granularity.GROUP, Granularity.BLOCK) and site.endswith(KEYS):
            raise SpecError(
                f"recipe {chosen.name} has a range per {kind} at {site}, whose last axis is the keys: use tensor"
            )
        groups = quant.groups if isinstance(quant, QuantSpec) else None
        if groups is not None and (channels := extents(spec)[site][0]) % groups:
            raise SpecError(
                f"recipe {chosen.name} has groups {groups} at {site}, which do not divide its {channels} channels"
            )
        if quant.block is not None and (last := extents(spec)[site][1]) % quant.block:
            raise SpecError(
                f"recipe {chosen.name} has block {quant.block} at {site}, which does not divide its last axis of {last}"
            )
    if not quants and chosen.gradients is None:
        raise SpecError(f"recipe {chosen.name} matches no site of this model: see `qtx recipes` for site names")
    return quants


def resolve_integers(chosen: Recipe, spec: ModelSpec) -> dict[str, QuantSpec]:
    """As `resolve`, of a recipe of integer codes alone. Raises SpecError naming a site of small floats, too."""
    quants: dict[str, QuantSpec] = {}
    for site, quant in resolve(chosen, spec).items():
        if isinstance(quant, QuantSpec):
            quants[site] = quant
        else:
            refuse_integer(site, f"{quant.format} is a float format")
    return quants
