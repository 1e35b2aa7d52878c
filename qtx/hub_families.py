"""BERT, OPT and ViT in the words of Hugging Face: configuration and tensor names, to a `ModelSpec` and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qtx_ref.models.initial import shapes
from qtx_ref.spec import Activation, Family, Head, ModelSpec, SpecError
from qtx_ref.spec.base import is_number

ARCHITECTURES: dict[Family, dict[str, Head]] = {
    Family.BERT: {
        "BertModel": Head.NONE,
        "BertForMaskedLM": Head.MLM,
        "BertForPreTraining": Head.MLM,
        "BertForSequenceClassification": Head.CLASSIFY,
    },
    Family.OPT: {"OPTModel": Head.NONE, "OPTForCausalLM": Head.CAUSAL},
    Family.VIT: {"ViTModel": Head.NONE, "ViTForImageClassification": Head.CLASSIFY},
}
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


# --- names ------------------------------------------------------------------------------------------------------------


def plain_name(family: Family, name: str) -> str:
    """A tensor's name in a file without the model's prefix, and today's word for one of old."""
    if family is Family.OPT:
        return name.removeprefix("model.").removeprefix("decoder.")
    name = name.removeprefix(PREFIX[family])
    if family is Family.BERT:
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if found := re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
        index, module, kind = found.groups()
        return f"encoder.layer.{index}.{VIT_MODULES.get(module, module)}.{kind}"
    return name


def names(spec: ModelSpec) -> dict[str, str]:
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


def full_name(spec: ModelSpec, plain: str) -> str:
    """The name under which transformers writes it today."""
    if plain.startswith(HEADS):
        return plain
    prefix = PREFIX[spec.family]
    return (prefix if spec.head is not Head.NONE else prefix.partition(".")[2]) + plain


def their_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Their shape of each parameter of ours: as many values in the same order."""
    found = shapes(spec)
    if spec.family is Family.VIT:
        d, c, p = spec.width, spec.channels, spec.patch_size
        found |= {
            "embed.patch.weight": (d, c, p, p),  # a convolution's
            "embed.cls.weight": (1, 1, d),
            "embed.position.weight": (1, spec.length, d),
        }
    return found


def tied(spec: ModelSpec) -> dict[str, str]:
    """Plain names of copies that a file may hold, with the parameter of ours that each must equal."""
    if spec.head is Head.CAUSAL:
        return {"lm_head.weight": "embed.token.weight"}
    if spec.head is Head.MLM:
        return {
            "cls.predictions.decoder.weight": "embed.token.weight",
            "cls.predictions.decoder.bias": "head.decoder.bias",
        }
    return {}


def unused(spec: ModelSpec) -> dict[str, list[tuple[int, ...]]]:
    """Plain names of tensors that a file may hold and our model has no use for, with the shapes they may have."""
    d, t = spec.width, spec.length
    pooler: dict[str, list[tuple[int, ...]]] = {"pooler.dense.weight": [(d, d)], "pooler.dense.bias": [(d,)]}
    if spec.family is Family.BERT:
        nsp = {"cls.seq_relationship.weight": [(2, d)], "cls.seq_relationship.bias": [(2,)]}
        buffers = {f"embeddings.{name}": [(1, t), (t,)] for name in BUFFERS}
        return buffers | (nsp if spec.head is Head.MLM else {}) | ({} if spec.head is Head.CLASSIFY else pooler)
    return pooler | {"embeddings.mask_token": [(1, 1, d)]} if spec.family is Family.VIT else {}


BUFFERS = ("position_ids", "token_type_ids")  # integers that count or are 0


def find_head(family: Family, config: Mapping[str, Any], plain: Iterable[str], prefixed: bool) -> Head:
    """The head that the configuration names or, where it names none, the tensors show.

    Raises SpecError for a class of transformers that has no counterpart here.
    """
    known, given = ARCHITECTURES[family], config.get("architectures")
    head = Head.NONE
    if given:
        if not isinstance(given, list) or given[0] not in known:
            raise SpecError(f"architectures is {given!r}: known are {', '.join(known)}")
        head = known[given[0]]
    elif family is Family.OPT and prefixed:
        head = Head.CAUSAL
    if head is Head.NONE:
        for name in plain:
            if family is Family.BERT and name.startswith("cls.predictions."):
                return Head.MLM
            if family is Family.OPT and name == "lm_head.weight":
                return Head.CAUSAL
            if family is not Family.OPT and name == "classifier.weight":
                return Head.CLASSIFY
    return head


# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """A configuration, read with types; every error names the key and its value."""

    values: Mapping[str, Any]

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SpecError(f"{key} is {value!r}: it must be a whole number, at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if not is_number(value) or abs(value) > 1e30:
            raise SpecError(f"{key} is {value!r}: it must be a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise SpecError(f"{key} is {value!r}: it must be true or false")
        return value

    def only(self, key: str, allowed: Any) -> None:
        """Refuses another value than the one that the models here have."""
        value = self.values.get(key, allowed)
        if value != allowed or type(value) is not type(allowed):
            raise SpecError(f"{key} is {value!r}: only {allowed!r} is supported")

    def side(self, key: str, default: int) -> int:
        """A length in pixels, or two equal ones."""
        value = self.values.get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        return Settings({key: value}).whole(key)

    def activation(self, key: str, default: str, head: Head) -> Activation:
        value = self.values.get(key, default)
        allowed = ("gelu",) if head is Head.MLM else ("gelu", "relu")
        if value not in allowed:
            raise SpecError(f"{key} is {value!r}: with head {head} it must be {' or '.join(allowed)}")
        return Activation(value)

    def classes(self) -> int:
        labels = self.values.get("id2label")
        if labels is None:
            return self.whole("num_labels", 2)
        if not isinstance(labels, dict):
            raise SpecError(f"id2label is {labels!r}: it must be an object of names by number")
        return len(labels)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family. Raises SpecError for a model type that is not among them."""
    kind = config.get("model_type")
    if kind not in [str(family) for family in Family]:
        raise SpecError(f"model_type is {kind!r}: supported are {', '.join(Family)}")
    if config.get("quantization_config") is not None:
        raise SpecError("quantization_config is given: only float models are supported")
    return Family(kind)


def read_config(config: Mapping[str, Any], head: Head) -> ModelSpec:
    """The spec of a configuration. Raises SpecError for a wrong type and for what the models here do not do."""
    family, given = family_of(config), Settings(config)
    given.only("tie_encoder_decoder", False)
    given.only("pruned_heads", {})
    classes = given.classes() if head is Head.CLASSIFY else 0
    size = {
        "family": family,
        "layers": given.whole("num_hidden_layers"),
        "width": given.whole("hidden_size"),
        "heads": given.whole("num_attention_heads"),
        "head": head,
        "classes": classes,
    }
    if family is Family.OPT:
        given.only("enable_bias", True)
        given.only("layer_norm_elementwise_affine", True)
        before = given.flag("do_layer_norm_before", True)
        narrow = config.get("word_embed_proj_dim")
        return ModelSpec(
            **size,
            hidden=given.whole("ffn_dim"),
            activation=given.activation("activation_function", "relu", head),
            pre_norm=before,
            final_norm=before and not given.flag("_remove_final_layer_norm", False),
            dropout=given.number("dropout", 0.1),
            attention_dropout=given.number("attention_dropout", 0.0),
            init_std=given.number("init_std", 0.02),
            vocab=given.whole("vocab_size"),
            length=given.whole("max_position_embeddings"),
            position_offset=2,
            embed_width=None if narrow in (None, size["width"]) else given.whole("word_embed_proj_dim"),
        )
    encoder = {
        "hidden": given.whole("intermediate_size"),
        "activation": given.activation("hidden_act", "gelu", head),
        "norm_eps": given.number("layer_norm_eps", 1e-12),
        "dropout": given.number("hidden_dropout_prob", 0.1 if family is Family.BERT else 0.0),
        "attention_dropout": given.number("attention_probs_dropout_prob", 0.1 if family is Family.BERT else 0.0),
        "init_std": given.number("initializer_range", 0.02),
    }
    if family is Family.BERT:
        given.only("position_embedding_type", "absolute")
        given.only("is_decoder", False)
        given.only("add_cross_attention", False)
        return ModelSpec(
            **size,
            **encoder,
            vocab=given.whole("vocab_size"),
            length=given.whole("max_position_embeddings"),
            types=given.whole("type_vocab_size", 2),
        )
    given.only("qkv_bias", True)
    return ModelSpec(
        **size,
        **encoder,
        pre_norm=True,
        final_norm=True,
        image_size=given.side("image_size", 224),
        patch_size=given.side("patch_size", 16),
        channels=given.whole("num_channels", 3),
    )
