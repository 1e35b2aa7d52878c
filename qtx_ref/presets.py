"""Named model shapes and attentions.

Published shapes: BERT-base (Devlin et al. 2019), OPT (Zhang et al. 2022, as released), ViT-S/16 (Dosovitskiy et al.
2021, Touvron et al. 2021). `paper-*` are the OPTs that Bondarenko et al. 2023 trained, with their start. The `-tiny`
ones train on two cores; their data set fixes vocabulary or image size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .spec import (
    Activation,
    AttentionSpec,
    Family,
    Gate,
    Head,
    ModelSpec,
    Softmax,
    SpecError,
    Start,
)

__all__ = ["GATES", "PRESETS", "SOFTMAXES", "attention", "preset", "shrink_text"]

BERT_BASE = ModelSpec(
    family=Family.BERT,
    layers=12,
    width=768,
    heads=12,
    hidden=3072,
    head=Head.MLM,
    vocab=30522,
    length=512,
    types=2,
    norm_eps=1e-12,
    dropout=0.1,
    attention_dropout=0.1,
)
OPT_125M = ModelSpec(
    family=Family.OPT,
    layers=12,
    width=768,
    heads=12,
    hidden=3072,
    head=Head.CAUSAL,
    activation=Activation.RELU,
    pre_norm=True,
    final_norm=True,
    dropout=0.1,
    init_std=0.006,
    init_output_scaled=True,
    vocab=50272,
    length=2048,
    position_offset=2,
)
# What the published code of Bondarenko et al. 2023 builds: transformers' default OPT configuration, whose token
# embedding stays 768 wide, with width, heads, layers, hidden units and positions set afterwards (model_configs/*.yaml).
PAPER_OPT_125M = replace(OPT_125M, length=512, start=Start.PUBLISHED, init_output_scaled=False)
VIT_S16 = ModelSpec(
    family=Family.VIT,
    layers=12,
    width=384,
    heads=6,
    hidden=1536,
    head=Head.CLASSIFY,
    pre_norm=True,
    final_norm=True,
    norm_eps=1e-6,
    classes=1000,
    image_size=224,
    patch_size=16,
    channels=3,
    patch_norm=True,
)


def shrink_text(spec: ModelSpec) -> ModelSpec:
    """A published text model at a size that trains on two cores."""
    return replace(spec, layers=4, width=128, heads=4, hidden=512, vocab=2048, length=128, dropout=0.0)


PRESETS: dict[str, ModelSpec] = {
    "bert-base": BERT_BASE,
    "bert-6l": replace(BERT_BASE, layers=6),
    "opt-125m": OPT_125M,
    "opt-350m": replace(
        OPT_125M, layers=24, width=1024, heads=16, hidden=4096, embed_width=512, pre_norm=False, final_norm=False
    ),
    "opt-1.3b": replace(OPT_125M, layers=24, width=2048, heads=32, hidden=8192),
    "paper-opt-125m": PAPER_OPT_125M,
    "paper-opt-350m": replace(
        PAPER_OPT_125M, layers=24, width=1024, heads=16, hidden=4096, length=1024, embed_width=768
    ),
    "paper-opt-1.3b": replace(
        PAPER_OPT_125M, layers=24, width=2048, heads=32, hidden=8192, length=1024, embed_width=768
    ),
    "vit-s16": VIT_S16,
    "bert-tiny": replace(shrink_text(BERT_BASE), attention_dropout=0.0),
    "opt-tiny": replace(shrink_text(OPT_125M), init_std=0.02, init_output_scaled=False),
    "vit-tiny": replace(
        VIT_S16, layers=4, width=64, heads=4, hidden=256, classes=10, image_size=8, patch_size=2, channels=1
    ),
}

# alpha = 1 clips about half of a uniform row. A tiny model's attention begins uniform, and from alpha = 2 on (the
# published commands have 3.2 and 12) every probability of a bidirectional row is clipped to 0: no gradient reaches
# query and key.
SOFTMAXES: dict[str, AttentionSpec] = {
    "vanilla": AttentionSpec(),
    "clipped": AttentionSpec(softmax=Softmax.CLIPPED, alpha=1.0),
    "clipped_row": AttentionSpec(softmax=Softmax.CLIPPED_ROW, alpha=1.0),
    "softmax1": AttentionSpec(softmax=Softmax.PLUS_ONE),
    "sink": AttentionSpec(softmax=Softmax.SINK),
}
GATES: dict[str, Gate] = {"gated": Gate.LINEAR} | {str(gate): gate for gate in Gate if gate is not Gate.NONE}
NUMBERS = {"gamma": float, "zeta": float, "alpha": float, "pi": float, "gate_hidden": int}


def preset(name: str) -> ModelSpec:
    """The model shape of that name. Raises SpecError for an unknown one."""
    if name not in PRESETS:
        raise SpecError(f"unknown model {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def attention(text: str) -> AttentionSpec:
    """The attention that a text such as `clipped:gamma=-0.025`, `mlp:gate_hidden=16` or `clipped+gated:pi=0.25` names.

    Parts are joined by `+`: at most one softmax and one gate, each followed by `:key=value` settings. `clipped` alone
    has alpha = 1, `gated` is the linear gate. Raises SpecError naming the part it cannot read.
    """
    fields: dict[str, Any] = {}
    for part in text.split("+"):
        name, *settings = part.strip().split(":")
        if name in SOFTMAXES and "softmax" not in fields:
            given = SOFTMAXES[name]
            fields |= {"softmax": given.softmax}
            if given.alpha is not None and not any(s.startswith("gamma=") for s in settings):
                fields |= {"alpha": given.alpha}
        elif name in GATES and "gate" not in fields:
            fields |= {"gate": GATES[name]}
        else:
            known = ", ".join([*SOFTMAXES, *GATES])
            raise SpecError(
                f"attention {text!r} has part {part!r}: name one softmax and one gate at most, from {known}"
            )
        if len({setting.partition("=")[0] for setting in settings}) < len(settings):
            raise SpecError(f"attention {text!r} gives a setting twice: give each once")
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in NUMBERS:
                raise SpecError(f"attention {text!r} sets {key!r}: known settings are {', '.join(NUMBERS)}")
            try:
                fields[key] = NUMBERS[key](value)
            except ValueError:
                raise SpecError(f"attention {text!r} sets {key} to {value!r}: give a number") from None
    return AttentionSpec(**fields)
