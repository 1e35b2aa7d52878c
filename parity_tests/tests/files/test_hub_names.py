"""What an import asks of tensors and configurations: each name known, each value one that the models here have."""

import json

import numpy as np
import pytest

from parity_tests.tests.hub_folder import (
    NORM,
    WORD,
    config,
    make_folder,
    refused,
    tensors,
)
from qtx.hub import import_model


@pytest.fixture
def folder(tmp_path, request):
    """The folder of a small model; another than BERT by indirect parameters."""
    return make_folder(tmp_path / "model", getattr(request, "param", "bert"))


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_missing_and_unknown_are_listed(folder):
    def change(got):
        for i in range(5):
            got[f"bert.adapter.{i}"] = np.zeros(2, np.float32)
        del got[NORM], got[WORD]

    tensors(folder, change)
    refused(
        folder,
        f"2 tensors ({WORD}, {NORM}) missing and",
        "5 tensors (bert.adapter.0",
        "...) unknown",
        "a bert of 2 layers",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(folder, value):
    tensors(folder, lambda got: got[NORM].__setitem__(3, value))
    refused(folder, f"tensor {NORM} holds NaN or infinity")


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "bool", "uint8"])
def test_parameters_that_are_no_floats(folder, dtype):
    tensors(folder, lambda got: got.update({NORM: got[NORM].astype(dtype)}))
    refused(folder, f"tensor {NORM} is", "expected one of F32, F16, BF16, F64")


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_read(folder, dtype):
    before = import_model(folder).params["layer.1.ffn.norm.weight"]
    tensors(folder, lambda got: got.update({NORM: (got[NORM] / 3).astype(dtype)}))
    got = import_model(folder).params["layer.1.ffn.norm.weight"]
    assert got.dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_array_equal(got, (before / 3).astype(dtype))


def test_shapes(folder):
    tensors(folder, lambda got: got.update({WORD: got[WORD].T.copy()}))
    refused(folder, f"tensor {WORD} has shape (16, 23); config.json makes it (23, 16)")


def test_a_copy_that_is_none(folder):
    decoder = "cls.predictions.decoder.weight"
    tensors(folder, lambda got: got.update({decoder: got[WORD].copy()}))
    assert import_model(folder).meta["hub"]["tied"] == {decoder: "embed.token.weight"}
    tensors(folder, lambda got: got[decoder].__setitem__((2, 5), 1))
    refused(folder, f"tensor {decoder} differs from {WORD}")


@pytest.mark.parametrize("folder", ["opt"], indirect=True)
def test_the_copies_of_opt(folder):
    config(folder, tie_word_embeddings=False)
    refused(folder, "1 tensor (lm_head.weight) missing")
    word = "model.decoder.embed_tokens.weight"
    tensors(folder, lambda got: got.update({"lm_head.weight": got[word] + 1}))
    refused(folder, f"tensor lm_head.weight differs from {word}")


def test_names_of_old(folder):
    before = import_model(folder).params

    def change(got):
        for name in list(got):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            got[old.removeprefix("bert.")] = got.pop(name)
        got["cls.predictions.decoder.bias"] = got.pop("cls.predictions.bias")
        got["embeddings.position_ids"] = np.arange(7)[None]

    tensors(folder, change)
    got = import_model(folder)
    for name, value in before.items():
        np.testing.assert_array_equal(got.params[name], value)
    assert [*got.extra] == ["hub.embeddings.position_ids"]
    assert got.meta["hub"]["names"]["embed.norm.weight"] == "embeddings.LayerNorm.gamma"
    tensors(folder, lambda got: got.update({"embeddings.LayerNorm.weight": got["embeddings.LayerNorm.gamma"]}))
    refused(folder, "embeddings.LayerNorm.gamma", "embeddings.LayerNorm.weight", "one parameter")


@pytest.mark.parametrize("folder", ["vit"], indirect=True)
def test_names_of_transformers_5(folder):
    before = import_model(folder).params
    new = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "encoder.layer.": "layers.",
    }

    def change(got):
        for name in list(got):
            renamed = name
            for theirs, word in new.items():
                renamed = renamed.replace(theirs, word)
            got[renamed] = got.pop(name)

    tensors(folder, change)
    got = import_model(folder)
    assert "vit.layers.1.attention.o_proj.bias" in got.meta["hub"]["dtypes"]
    for name, value in before.items():
        np.testing.assert_array_equal(got.params[name], value)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta': supported are bert, opt, vit"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
        ({"architectures": [{}]}, "architectures is [{}]"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': with head mlm it must be gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key': only 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True: only False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and there are 42 tensors"),
        ({"num_hidden_layers": 3}, "16 tensors (bert.encoder.layer.2.attention.output.LayerNorm.weight"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2': it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 10**12, "num_attention_heads": 1}, "config.json makes it (23, 1000000000000)"),
        ({"hidden_size": 16.0}, "hidden_size is 16.0"),
        ({"hidden_size": ...}, "hidden_size is None"),
        ({"num_attention_heads": 3}, "heads is 3: it must divide the width 16"),
        ({"layer_norm_eps": 0}, "norm_eps"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps is 1000"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"hidden_dropout_prob": 1.5}, "dropout is 1.5"),
    ],
)
def test_configurations_of_bert(folder, values, message):
    config(folder, **values)
    refused(folder, message)


@pytest.mark.parametrize(
    ("folder", "values", "message"),
    [
        ("opt", {"enable_bias": False}, "enable_bias is False: only True"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("opt", {"activation_function": "silu"}, "activation_function is 'silu'"),
        ("opt", {"do_layer_norm_before": 1}, "do_layer_norm_before is 1: it must be true or false"),
        ("opt", {"word_embed_proj_dim": "narrow"}, "word_embed_proj_dim is 'narrow'"),
        ("vit", {"qkv_bias": False}, "qkv_bias is False: only True"),
        ("vit", {"image_size": [4, 8]}, "image_size is [4, 8]"),
        ("vit", {"patch_size": 3}, "patch_size"),
        ("classify", {"id2label": {"0": "one"}}, "one label, which transformers takes for regression"),
        ("classify", {"id2label": ["a", "b"]}, "id2label is"),
    ],
    indirect=["folder"],
)
def test_configurations_of_others(folder, values, message):
    config(folder, **values)
    refused(folder, "config.json", message)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "[1]", "null", "\xff"])
def test_a_configuration_that_is_none(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json", "is not JSON" if text not in ("[1]", "null") else "not an object")


@pytest.mark.parametrize("folder", ["vit"], indirect=True)
def test_how_images_are_normalised(folder):
    path = folder / "preprocessor_config.json"
    assert "images" not in import_model(folder).meta

    def read(**values):
        path.write_text(json.dumps({"size": 4} | values))
        images = import_model(folder).meta["images"]
        assert (images["resize"], images["resample"], images["crop"]) == ([4, 4], 2, None)
        return images["mean"], images["std"]

    assert read(image_mean=[0.1, 0.2], image_std=0.5) == ([0.1, 0.2], [0.5, 0.5])
    assert read(do_normalize=False, image_mean=[9, 9]) == ([0.0, 0.0], [1.0, 1.0])
    for values, message in [
        ({"image_mean": [0.1, 0.2, 0.3]}, "image_mean is [0.1, 0.2, 0.3]: give 2 numbers"),
        ({"image_std": [0, 1]}, "image_std is [0, 1]"),
        ({"image_mean": "grey"}, "image_mean is 'grey'"),
        ({"image_mean": 10**400}, "image_mean is 1000"),
        ({"rescale_factor": -1}, "rescale_factor is -1"),
        ({"do_rescale": 1}, "do_rescale is 1: it must be true or false"),
        ({"do_pad": True}, "do_pad is True: it is not supported"),
        ({"do_flip": "twice"}, "do_flip is 'twice': it is not supported"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"size": {"height": 8, "width": 8}}, "size is {'height': 8, 'width': 8}, which makes other pictures"),
        ({"size": None}, "size is None, which makes other pictures than the model's 4 x 4"),  # transformers' 224
        ({"size": {"longest_edge": 4}}, "size is {'longest_edge': 4}: only height and width, or shortest_edge"),
        ({"size": {"shortest_edge": 4}}, "size is {'shortest_edge': 4}, which makes other pictures"),
        ({"size": [4, 10**9]}, "size is [4, 1000000000]: give whole numbers of pixels"),
        ({"do_center_crop": True}, "there is no crop_size"),
        ({"do_center_crop": True, "crop_size": 3}, "crop_size is 3, which makes other pictures"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor'"),
    ]:
        path.write_text(json.dumps({"size": 4} | values))
        refused(folder, "preprocessor_config.json", message)
