"""Small models of every family, attention, gate and head, with parameters far from their quiet first values."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from parity_tests.subjects.attentions import GATES, SOFTMAXES
from qtx_ref.models.initial import shapes
from qtx_ref.random import stream
from qtx_ref.spec import (
    Activation,
    AttentionSpec,
    Family,
    Gate,
    Head,
    ModelSpec,
    Softmax,
)

SIZE = {"layers": 2, "width": 16, "heads": 2, "hidden": 24}
TEXT = SIZE | {"vocab": 23, "length": 7}
BERT = ModelSpec(Family.BERT, **TEXT, head=Head.MLM, types=2, norm_eps=1e-12)
OPT = ModelSpec(
    Family.OPT, **TEXT, head=Head.CAUSAL, activation=Activation.RELU, pre_norm=True, final_norm=True, position_offset=2
)
IMAGE = SIZE | {"classes": 5, "image_size": 4, "patch_size": 2, "channels": 2}
VIT = ModelSpec(Family.VIT, **IMAGE, head=Head.CLASSIFY, pre_norm=True, final_norm=True, norm_eps=1e-6, patch_norm=True)


def _attentions() -> dict[str, AttentionSpec]:
    attentions = dict(SOFTMAXES)
    attentions |= {f"gate_{kind}": AttentionSpec(gate=kind) for kind in GATES}
    attentions["clipped_alpha"] = AttentionSpec(softmax=Softmax.CLIPPED, alpha=0.7)
    attentions["sink_and_mlp"] = AttentionSpec(softmax=Softmax.SINK, gate=Gate.MLP, gate_hidden=3)
    return attentions


def specs() -> dict[str, ModelSpec]:
    """Every family x attention x gate that exists, then heads and shapes that differ."""
    named = {}
    for family in (BERT, OPT, VIT):
        for name, attention in _attentions().items():
            if not (family.causal and attention.gate is Gate.HEAD_CONDITIONAL):
                named[f"{family.family}_{name}"] = replace(family, attention=attention)
    named["bert_classify"] = replace(BERT, head=Head.CLASSIFY, classes=4)
    named["bert_headless"] = replace(BERT, head=Head.NONE)
    named["opt_post_norm_projected"] = replace(OPT, embed_width=10, pre_norm=False, final_norm=False)  # as opt-350m
    named["opt_headless"] = replace(OPT, head=Head.NONE)
    named["vit_without_patch_norm"] = replace(VIT, patch_norm=False)
    named["vit_headless"] = replace(VIT, head=Head.NONE)
    return named


@dataclass(frozen=True)
class SmallModel:
    spec: ModelSpec
    params: dict[str, np.ndarray]  # float32
    batch: dict[str, np.ndarray]


def build(name: str, batch_size: int = 3) -> SmallModel:
    spec = specs()[name]
    params = {key: _parameter(key, shape) for key, shape in shapes(spec).items()}
    return SmallModel(spec, params, make_batch(spec, batch_size))


def make_batch(spec: ModelSpec, size: int) -> dict[str, np.ndarray]:
    """Random tokens with padding behind all sequences but the first, or random images."""
    rng = stream(0, "small batch", spec.family, size)
    if spec.family is Family.VIT:
        images = rng.normal(size=(size, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)
        return {"images": images, "labels": rng.integers(0, max(spec.classes, 2), size)}
    tokens = rng.integers(0, spec.vocab, (size, spec.length))
    real = np.maximum(spec.length - 2 * np.arange(size), 1)
    mask = np.arange(spec.length) < real[:, None]
    batch = {"tokens": tokens, "mask": mask}
    if spec.family is Family.BERT:
        batch["types"] = rng.integers(0, spec.types, tokens.shape)
    if spec.head is Head.CLASSIFY:
        return batch | {"labels": rng.integers(0, spec.classes, size)}
    counted = mask & (rng.uniform(size=tokens.shape) < (1.0 if spec.causal else 0.5))
    counted[:, 0] = True
    return batch | {"targets": np.where(counted, rng.integers(0, spec.vocab, tokens.shape), -1)}


def _parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    x = stream(0, "small parameter", name).normal(size=shape)
    site, _, kind = name.rpartition(".")
    if kind == "weight" and site.endswith("norm"):
        return (1 + 0.2 * x).astype(np.float32)
    spread = 1.0 if site.startswith("embed") else 1.2 / shape[-1] ** 0.5 if kind == "weight" else 0.3
    return (spread * x).astype(np.float32)
