"""Parameter names, shapes and first values, the same for every backend: drawn in NumPy, one stream per name.

BERT and OPT: normal(0, init_std), biases 0, norms 1 and 0 (Devlin et al. 2019, Zhang et al. 2022; OPT's output weights
by 1 / sqrt(2 layers)). ViT: the same cut at two deviations, its class token at 1e-6 (Dosovitskiy et al. 2021 as in
timm). Gates: weights as torch draws a new linear layer, uniform within 1 / sqrt(inputs), as in the code of Bondarenko
et al.; biases 0, or logit(pi) for the linear form.

`Start.PUBLISHED` is what that code begins with. It has transformers build the model (normal(0, init_std), biases 0, the
padding token's row 0), then puts attention of its own in place, whose new linear layers nobody draws again: weights
and biases as torch draws them, uniform within 1 / sqrt(inputs). For BERT these are query, key and value, for OPT output
too; for either the MLP gate and that on all features, whereas the linear forms' biases are set to logit(pi). A ViT's
code is not published: there only the gates follow, which is assumed. `parity_tests.long.published_start` measures it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy import stats

from ..random import stream
from ..spec import (
    Family,
    Gate,
    Head,
    ModelSpec,
    Softmax,
    SpecError,
    Start,
)

__all__ = ["add_gate", "find_torch_inputs", "first_value", "gate_shapes", "init_params", "shapes"]

ADDED_GATE_STD = {Family.BERT: 0.01, Family.OPT: 0.001, Family.VIT: 0.01}
REPLACED = {Family.BERT: ("query", "key", "value"), Family.OPT: ("query", "key", "value", "output"), Family.VIT: ()}
PADDING = {Family.BERT: 0, Family.OPT: 1}  # the padding token's id in transformers' configurations


def gate_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Parameters that the gate adds to one layer, by site within `attn`."""
    h, k, d, m = spec.heads, spec.head_width, spec.width, spec.gate_hidden
    known: dict[Gate, dict[str, tuple[int, ...]]] = {
        Gate.NONE: {},
        Gate.HEAD: {"gate_logit.bias": (h,)},
        Gate.HEAD_CONDITIONAL: {"gate_logit.weight": (h, 1, k), "gate_logit.bias": (h, 1)},
        Gate.LINEAR: {"gate_logit.weight": (h, 1, k), "gate_logit.bias": (h, 1)},
        Gate.MLP: {
            "gate_hidden.weight": (h, m, k),
            "gate_hidden.bias": (h, m),
            "gate_logit.weight": (h, 1, m),
            "gate_logit.bias": (h, 1),
        },
        Gate.ALL_FEATURES: {"gate_logit.weight": (h, d), "gate_logit.bias": (h,)},
        Gate.ELEMENTWISE: {"gate_logit.weight": (d, d)},
    }
    return known[spec.attention.gate]


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, in the order of the forward pass."""
    d, f, e = spec.width, spec.hidden, spec.embed_width or spec.width
    known: dict[str, tuple[int, ...]] = {}

    def linear(site: str, outputs: int, inputs: int, bias: bool = True) -> None:
        known[f"{site}.weight"] = (outputs, inputs)
        if bias:
            known[f"{site}.bias"] = (outputs,)

    def norm(site: str, width: int) -> None:
        known[f"{site}.weight"] = (width,)
        known[f"{site}.bias"] = (width,)

    if spec.family is Family.VIT:
        linear("embed.patch", d, spec.channels * spec.patch_size**2)
        if spec.patch_norm:
            norm("embed.norm", d)
        known["embed.cls.weight"] = (d,)
    else:
        known["embed.token.weight"] = (spec.vocab, e)
    if spec.embed_width:
        linear("embed.project", d, e, bias=False)
    if spec.family is Family.BERT:
        known["embed.type.weight"] = (spec.types, d)
    known["embed.position.weight"] = (spec.length + spec.position_offset, d)
    if spec.family is Family.BERT:
        norm("embed.norm", d)
    for i in range(spec.layers):
        attn, ffn = f"layer.{i}.attn", f"layer.{i}.ffn"
        norm(f"{attn}.norm", d)
        for part in ("query", "key", "value", "output"):
            linear(f"{attn}.{part}", d, d)
        if spec.attention.softmax is Softmax.SINK:
            known[f"{attn}.probs.sink"] = (spec.heads,)
        known.update({f"{attn}.{name}": shape for name, shape in gate_shapes(spec).items()})
        norm(f"{ffn}.norm", d)
        linear(f"{ffn}.hidden", f, d)
        linear(f"{ffn}.output", d, f)
    if spec.final_norm:
        norm("final.norm", d)
    if spec.embed_width:
        linear("final.project", e, d, bias=False)
    if spec.head is Head.MLM:
        linear("head.transform", d, d)
        norm("head.norm", d)
        known["head.decoder.bias"] = (spec.vocab,)
    if spec.head is Head.CLASSIFY:
        if spec.family is Family.BERT:
            linear("head.pool", d, d)
        linear("head.classifier", spec.classes, d)
    return known


def init_params(spec: ModelSpec, seed: int) -> dict[str, np.ndarray]:
    """First values, float32, of every parameter of `shapes`."""
    return {name: first_value(spec, name, shape, seed) for name, shape in shapes(spec).items()}


def add_gate(
    params: dict[str, np.ndarray], spec: ModelSpec, pi: float, seed: int
) -> tuple[dict[str, np.ndarray], ModelSpec]:
    """A trained model, float32, with a linear gate that changes little at first: weights normal(0, 0.01), OPT's
    normal(0, 0.001), bias logit(pi), and the gate multiplied by 1 / pi (Bondarenko et al. 2023, appendix B.6; the
    deviations are their code's, a ViT's is assumed). Returns parameters and spec.

    Raises SpecError where the model has a gate already, or pi is not between 0 and 1.
    """
    if spec.attention.gate is not Gate.NONE:
        raise SpecError(f"the model has the gate {spec.attention.gate}: a gate is added to a model without one")
    gated = replace(spec, attention=replace(spec.attention, gate=Gate.LINEAR, pi=pi, rescaled=True))
    values = {}
    for name, shape in shapes(gated).items():
        if name in params:
            values[name] = params[name]
        elif name.endswith(".weight"):
            std = ADDED_GATE_STD[spec.family]
            values[name] = stream(seed, "gate", name).normal(0, std, shape).astype(np.float32)
        else:
            values[name] = first_value(gated, name, shape, seed)
    return values, gated


def first_value(spec: ModelSpec, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The first value of the parameter of that name and shape, float32; see the module for which distribution."""
    rng = stream(seed, "init", name)
    site, _, kind = name.rpartition(".")
    if kind == "sink":
        value = np.zeros(shape)
    elif (inputs := find_torch_inputs(spec, site)) is not None:
        value = rng.uniform(-1, 1, shape) / math.sqrt(inputs)
    elif kind == "bias":
        pi = spec.attention.pi if site.endswith("gate_logit") else None
        value = np.full(shape, math.log(pi / (1 - pi)) if pi else 0.0)
    elif site.endswith("norm"):
        value = np.ones(shape)
    elif ".gate_" in name:
        value = rng.uniform(-1, 1, shape) / math.sqrt(shape[-1])
    elif name == "embed.cls.weight":
        value = rng.normal(0, 1e-6, shape)
    elif spec.family is Family.VIT:
        value = spec.init_std * stats.truncnorm.ppf(rng.uniform(size=shape), -2, 2)
    else:
        last = spec.init_output_scaled and site.endswith((".attn.output", ".ffn.output"))
        value = rng.normal(0, spec.init_std / (math.sqrt(2 * spec.layers) if last else 1), shape)
    if name == "embed.token.weight" and (spec.family is Family.BERT or spec.start is Start.PUBLISHED):
        value[PADDING[spec.family]] = 0
    return value.astype(np.float32)


def find_torch_inputs(spec: ModelSpec, site: str) -> int | None:
    """The inputs of a linear layer whose weight and bias both are as torch draws them; None for every other site."""
    if spec.start is Start.OWN or ".attn." not in site:
        return None
    gate, part = spec.attention.gate, site.rpartition(".")[2]
    if part in REPLACED[spec.family] or (part, gate) == ("gate_logit", Gate.ALL_FEATURES):
        return spec.width
    if gate is Gate.MLP:
        return {"gate_hidden": spec.head_width, "gate_logit": spec.gate_hidden}.get(part)
    return None
