"""Small models of transformers with every parameter random, what they say of a batch, and the bytes of their files."""

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="its models are the expected values")
transformers.utils.logging.disable_progress_bar()
TEXT = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
}
BERT_SIZE = TEXT | {"intermediate_size": 24, "num_labels": 3}
OPT_SIZE = TEXT | {"ffn_dim": 24, "pad_token_id": 1}
OPT_350M = OPT_SIZE | {"word_embed_proj_dim": 10, "do_layer_norm_before": False, "_remove_final_layer_norm": True}
VIT_SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": 3,
}
MODELS = {
    "bert": ("BertModel", BERT_SIZE),
    "bert relu": ("BertModel", BERT_SIZE | {"hidden_act": "relu"}),
    "bert mlm": ("BertForMaskedLM", BERT_SIZE),
    "bert pretraining": ("BertForPreTraining", BERT_SIZE),
    "bert classify": ("BertForSequenceClassification", BERT_SIZE),
    "opt": ("OPTModel", OPT_SIZE),
    "opt causal": ("OPTForCausalLM", OPT_SIZE),
    "opt causal gelu": ("OPTForCausalLM", OPT_SIZE | {"activation_function": "gelu", "_remove_final_layer_norm": True}),
    "opt projected causal": ("OPTForCausalLM", OPT_SIZE | {"word_embed_proj_dim": 10}),  # as paper-opt-1.3b
    "opt-350m": ("OPTModel", OPT_350M),
    "opt-350m causal": ("OPTForCausalLM", OPT_350M),
    "vit": ("ViTModel", VIT_SIZE),
    "vit classify": ("ViTForImageClassification", VIT_SIZE),
}


def make(name, folder, dtype=torch.float32):
    """A model with every parameter random, far from 0, saved in a folder."""
    kind, settings = MODELS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**settings)).eval()
    draw = torch.Generator().manual_seed(len(name))
    for key, value in model.named_parameters():
        norm = "norm" in key.lower() and key.endswith("weight")
        spread = 0.3 if key.endswith("bias") or norm else 1.5 / value.shape[-1] ** 0.5
        value.data = float(norm) + spread * torch.randn(value.shape, generator=draw)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def inputs(model):
    """A batch of ours, the same for transformers, and which outputs count."""
    draw = np.random.default_rng(1)
    config = model.config
    if config.model_type == "vit":
        images = draw.normal(size=(3, 3, 8, 8)).astype(np.float32)
        return {"images": images}, {"pixel_values": torch.from_numpy(images)}, ...
    tokens = draw.integers(2, 23, (4, 7))
    mask = np.arange(7) < np.array([7, 4, 1, 5])[:, None]
    if config.model_type == "opt":
        mask[3] = mask[3, ::-1]  # padding on the left: its real tokens still count from 0
        return {"tokens": tokens, "mask": mask}, words(tokens, mask), mask
    types = draw.integers(0, 2, tokens.shape)
    batch = {"tokens": tokens, "mask": mask, "types": types}
    whole = "Classification" in type(model).__name__  # one output a sequence
    return batch, words(tokens, mask) | {"token_type_ids": torch.from_numpy(types)}, ... if whole else mask


def words(tokens, mask):
    return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def output(model, given):
    with torch.no_grad():
        got = model.float()(**given)
    for key in ("logits", "prediction_logits", "last_hidden_state"):
        if key in got:
            return got[key].numpy()


def read(folder):
    """Bytes, dtype and shape of each tensor in a folder."""
    with open(folder / "model.safetensors", "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header, data = json.loads(file.read(size)), file.read()
    header.pop("__metadata__")
    return {
        name: (data[slice(*entry["data_offsets"])], entry["dtype"], entry["shape"]) for name, entry in header.items()
    }
