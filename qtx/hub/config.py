"""The configuration of Hugging Face's BERT, OPT and ViT: to a `ModelSpec` and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtx_ref.spec import (
    Activation,
    AttentionSpec,
    Family,
    Head,
    ModelSpec,
    SpecError,
)
from qtx_ref.spec.base import is_number

from ..data.rows import LABEL, shorten

LARGEST = 2**53  # of a size; more is no model's, and no error would be one short line

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


def find_head(family: Family, config: Mapping[str, object], plain: Iterable[str], prefixed: bool) -> Head:
    """The head that the configuration names or, where it names none, the tensors show.

    Raises SpecError for a class of transformers that has no counterpart here.
    """
    known, given = ARCHITECTURES[family], config.get("architectures")
    head = Head.NONE
    if given:
        if not isinstance(given, list) or not isinstance(given[0], str) or given[0] not in known:
            raise SpecError(f"architectures is {shorten(given)}: known are {', '.join(known)}")
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


@dataclass(frozen=True)
class Settings:
    """A configuration, read with types; every error names the key and its value."""

    values: Mapping[str, Any]

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number, at least 1. Raises SpecError naming the key."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise SpecError(f"{key} is {shorten(value)}: it must be a whole number, at least 1, at most {LARGEST}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number. Raises SpecError naming the key."""
        value = self.values.get(key, default)
        if not is_number(value) or abs(value) > 1e30:
            raise SpecError(f"{key} is {shorten(value)}: it must be a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises SpecError naming the key."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise SpecError(f"{key} is {shorten(value)}: it must be true or false")
        return value

    def only(self, key: str, allowed: object) -> None:
        """Refuses another value than the one that the models here have."""
        value = self.values.get(key)
        if value is not None and (value != allowed or type(value) is not type(allowed)):
            raise SpecError(f"{key} is {shorten(value)}: only {allowed!r} is supported")

    def side(self, key: str, default: int) -> int:
        """A length in pixels, or two equal ones."""
        value = self.values.get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        return Settings({key: value}).whole(key)

    def activation(self, key: str, default: str, head: Head) -> Activation:
        """An activation that a model of this head may have. Raises SpecError naming the key."""
        value = self.values.get(key, default)
        allowed = ("gelu",) if head is Head.MLM else ("gelu", "relu")
        if value not in allowed:
            raise SpecError(f"{key} is {shorten(value)}: with head {head} it must be {' or '.join(allowed)}")
        return Activation(value)

    def classes(self) -> int:
        """How many classes there are. Raises SpecError naming the key."""
        labels = self.values.get("id2label")
        if labels is None:
            return self.whole("num_labels", 2)
        if not isinstance(labels, dict):
            raise SpecError(f"id2label is {shorten(labels)}: it must be an object of names by number")
        return len(labels)


def read_labels(config: Mapping[str, object]) -> list[str] | None:
    """The classes' names in order, where the configuration has some other than transformers' LABEL_0, LABEL_1, ..."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(len(labels))}:
        return None
    names = [labels[str(i)] for i in range(len(labels))]
    told_apart = all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    return names if told_apart and names != [f"LABEL_{i}" for i in range(len(names))] else None


def write_labels(names: Sequence[str]) -> dict[str, Any]:
    """The classes' names as a configuration has them."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def read_family(config: Mapping[str, object]) -> Family:
    """The family. Raises SpecError for a model type that is not among them."""
    kind = config.get("model_type")
    if kind not in [str(family) for family in Family]:
        raise SpecError(f"model_type is {shorten(kind)}: supported are {', '.join(Family)}")
    if config.get("quantization_config") is not None:
        raise SpecError("quantization_config is given: only float models are supported")
    return Family(kind)


def check_problem(config: Mapping[str, object], head: Head) -> None:
    """Raises SpecError for a classifier whose scores are not those of one class among several, as a softmax takes them,
    and for names of classes that are too long to be shown."""
    if head is not Head.CLASSIFY:
        return
    given = Settings(config)
    given.only("problem_type", "single_label_classification")
    if given.classes() == 1:
        raise SpecError(
            "there is one label, which transformers takes for regression: only classes, two at least, are known"
        )
    for name in read_labels(config) or []:
        if len(name) > LABEL:
            raise SpecError(f"id2label has a name of {len(name)} characters: give at most {LABEL}")


def read_ties(config: Mapping[str, object]) -> bool:
    """tie_word_embeddings; transformers' default is true. Raises SpecError for another type."""
    return config.get("tie_word_embeddings") is None or Settings(config).flag("tie_word_embeddings", True)


def read_config(config: Mapping[str, object], head: Head) -> ModelSpec:
    """The spec of a configuration. Raises SpecError for a wrong type and for what the models here do not do."""
    family, given = read_family(config), Settings(config)
    given.only("pruned_heads", {})
    classes = given.classes() if head is Head.CLASSIFY else 0
    size: dict[str, Any] = {
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
    encoder: dict[str, Any] = {
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


# --- and back ---------------------------------------------------------------------------------------------------------


def check_expressible(spec: ModelSpec) -> None:
    """Raises SpecError naming what a model has that no model of transformers has."""
    given, plain = spec.attention, AttentionSpec()
    why = None
    if given.softmax is not plain.softmax:
        why = f"its attention is {given.softmax}, and theirs has the plain softmax"
    elif given.gate is not plain.gate:
        why = f"its attention has the gate {given.gate}, and theirs has none"
    elif spec.patch_norm:
        why = "it has a norm after the patch embedding (patch_norm), and theirs has none"
    elif spec.head is Head.MLM and spec.activation is not Activation.GELU:
        why = f"its activation is {spec.activation} and its head's is gelu, and theirs are one"
    elif spec.family is Family.OPT and (spec.norm_eps, spec.position_offset) != (1e-5, 2):
        why = f"norm_eps {spec.norm_eps} and position_offset {spec.position_offset} are fixed in theirs: 1e-05 and 2"
    elif spec.family is Family.OPT and spec.final_norm and not spec.pre_norm:
        why = "it is post-norm with a final norm, and theirs has that before layers only"
    elif spec.family is not Family.OPT and (spec.position_offset or spec.embed_width):
        why = "position_offset and embed_width are OPT's"
    elif spec.family is not Family.OPT and {spec.pre_norm, spec.final_norm} != {spec.family is Family.VIT}:
        why = f"pre_norm {spec.pre_norm} and final_norm {spec.final_norm} are not as in theirs"
    if why:
        raise SpecError(f"transformers has no such {spec.family}: {why}")


def write_config(
    spec: ModelSpec, dtype: str, tokens: Mapping[str, int | None], labels: Sequence[str] | None
) -> dict[str, Any]:
    """The configuration under which transformers builds the model; `tokens` are ids of pad, cls and sep, `labels` the
    classes' names.

    Raises SpecError where it has no such model.
    """
    check_expressible(spec)
    classes = {name: head for name, head in ARCHITECTURES[spec.family].items() if head is spec.head}
    config: dict[str, Any] = {
        "architectures": [next(iter(classes))],
        "model_type": str(spec.family),
        "dtype": dtype,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
    }
    if spec.head is Head.CLASSIFY:
        config |= write_labels(labels or [f"LABEL_{i}" for i in range(spec.classes)])
    if spec.family is not Family.VIT:
        config |= {
            "vocab_size": spec.vocab,
            "max_position_embeddings": spec.length,
            "tie_word_embeddings": True,
            "pad_token_id": tokens.get("pad"),
            "bos_token_id": tokens.get("cls"),
            "eos_token_id": tokens.get("sep"),
        }
    if spec.family is Family.OPT:
        return config | {
            "ffn_dim": spec.hidden,
            "activation_function": str(spec.activation),
            "do_layer_norm_before": spec.pre_norm,
            "_remove_final_layer_norm": not spec.final_norm,
            "word_embed_proj_dim": spec.embed_width or spec.width,
            "dropout": spec.dropout,
            "attention_dropout": spec.attention_dropout,
            "init_std": spec.init_std,
        }
    config |= {
        "intermediate_size": spec.hidden,
        "hidden_act": str(spec.activation),
        "layer_norm_eps": spec.norm_eps,
        "hidden_dropout_prob": spec.dropout,
        "attention_probs_dropout_prob": spec.attention_dropout,
        "initializer_range": spec.init_std,
    }
    if spec.family is Family.BERT:
        return config | {"type_vocab_size": spec.types}
    return config | {"image_size": spec.image_size, "patch_size": spec.patch_size, "num_channels": spec.channels}
