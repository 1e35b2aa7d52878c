"""The tensors of Hugging Face's BERT, OPT and ViT: their names and shapes for the parameters of ours."""

from __future__ import annotations

import re

from qtx_ref.models.initial import shapes
from qtx_ref.spec import Family, Head, ModelSpec

PREFIX = {Family.BERT: "bert.", Family.OPT: "model.decoder.", Family.VIT: "vit."}  # of a model with a head
LAYER = {Family.BERT: "encoder.layer", Family.OPT: "layers", Family.VIT: "encoder.layer"}
HEADS = ("cls.", "classifier.", "lm_head.")  # names that take no prefix
MODULES: dict[Family, dict[str, str]] = {  # ours to theirs: a site, a part of a layer, or a whole name
    Family.BERT: {
        "embed.token": "embeddings.word_embeddings",
        "embed.type": "embeddings.token_type_embeddings",
        "embed.position": "embeddings.position_embeddings",
        "embed.norm": "embeddings.LayerNorm",
        "attn.query": "attention.self.query",
        "attn.key": "attention.self.key",
        "attn.value": "attention.self.value",
        "attn.output": "attention.output.dense",
        "attn.norm": "attention.output.LayerNorm",
        "ffn.hidden": "intermediate.dense",
        "ffn.output": "output.dense",
        "ffn.norm": "output.LayerNorm",
        "head.transform": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.decoder": "cls.predictions",
        "head.pool": "pooler.dense",
        "head.classifier": "classifier",
    },
    Family.OPT: {
        "embed.token": "embed_tokens",
        "embed.project": "project_in",
        "embed.position": "embed_positions",
        "attn.norm": "self_attn_layer_norm",
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.output": "self_attn.out_proj",
        "ffn.norm": "final_layer_norm",
        "ffn.hidden": "fc1",
        "ffn.output": "fc2",
        "final.norm": "final_layer_norm",
        "final.project": "project_out",
    },
    Family.VIT: {
        "embed.patch": "embeddings.patch_embeddings.projection",
        "embed.cls.weight": "embeddings.cls_token",
        "embed.position.weight": "embeddings.position_embeddings",
        "attn.norm": "layernorm_before",
        "attn.query": "attention.attention.query",
        "attn.key": "attention.attention.key",
        "attn.value": "attention.attention.value",
        "attn.output": "attention.output.dense",
        "ffn.norm": "layernorm_after",
        "ffn.hidden": "intermediate.dense",
        "ffn.output": "output.dense",
        "final.norm": "layernorm",
        "head.classifier": "classifier",
    },
}
VIT_MODULES = {  # as transformers 5 names the modules of a layer in memory
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
BUFFERS = ("position_ids", "token_type_ids")  # integers that count or are 0
Shapes = dict[str, list[tuple[int, ...]]]  # those that a tensor may have, by its name


def shorten_name(family: Family, name: str) -> str:
    """A tensor's name in a file without the model's prefix, and today's word for one of old."""
    if family is Family.OPT:
        return name.removeprefix("model.").removeprefix("decoder.")
    name = name.removeprefix(PREFIX[family])
    if family is Family.BERT:
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        index, module, kind = match.groups()
        return f"encoder.layer.{index}.{VIT_MODULES.get(module, module)}.{kind}"
    return name


def name_parameters(spec: ModelSpec) -> dict[str, str]:
    """Their plain name for each parameter of ours."""
    modules = MODULES[spec.family]

    def name(ours: str) -> str:
        if ours in modules:
            return modules[ours]
        site, _, kind = ours.rpartition(".")
        if site.startswith("layer."):
            _, index, part = site.split(".", 2)
            return f"{LAYER[spec.family]}.{index}.{modules[part]}.{kind}"
        return f"{modules[site]}.{kind}"

    return {ours: name(ours) for ours in shapes(spec)}


def lengthen_name(spec: ModelSpec, plain: str) -> str:
    """The name under which transformers writes it today."""
    if plain.startswith(HEADS):
        return plain
    prefix = PREFIX[spec.family]
    return (prefix if spec.head is not Head.NONE else prefix.partition(".")[2]) + plain


def list_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Their shape of each parameter of ours: as many values in the same order."""
    theirs = shapes(spec)
    if spec.family is Family.VIT:
        d, c, p = spec.width, spec.channels, spec.patch_size
        theirs |= {
            "embed.patch.weight": (d, c, p, p),  # a convolution's
            "embed.cls.weight": (1, 1, d),
            "embed.position.weight": (1, spec.length, d),
        }
    return theirs


def list_tied(spec: ModelSpec) -> dict[str, str]:
    """Plain names of copies that a file may hold, with the parameter of ours that each must equal."""
    if spec.head is Head.CAUSAL:
        return {"lm_head.weight": "embed.token.weight"}
    if spec.head is Head.MLM:
        return {
            "cls.predictions.decoder.weight": "embed.token.weight",
            "cls.predictions.decoder.bias": "head.decoder.bias",
        }
    return {}


def list_unused(spec: ModelSpec) -> Shapes:
    """Plain names of tensors that a file may hold and our model has no use for, with the shapes they may have."""
    d, t = spec.width, spec.length
    pooler: Shapes = {"pooler.dense.weight": [(d, d)], "pooler.dense.bias": [(d,)]}
    if spec.family is Family.BERT:
        nsp: Shapes = {"cls.seq_relationship.weight": [(2, d)], "cls.seq_relationship.bias": [(2,)]}
        buffers: Shapes = {f"embeddings.{name}": [(1, t), (t,)] for name in BUFFERS}
        return buffers | (nsp if spec.head is Head.MLM else {}) | ({} if spec.head is Head.CLASSIFY else pooler)
    return pooler | {"embeddings.mask_token": [(1, 1, d)]} if spec.family is Family.VIT else {}
