"""Checkpoints: whole or refused, with one line that names the file and the fault; an old file survives a refused
save."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qtx.files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qtx.files.container import CheckpointError, check_writable
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention, preset
from qtx_ref.spec import QuantSpec, Range, Recipe, Rule

SPEC = replace(preset("vit-tiny"), layers=1, attention=attention("clipped:alpha=4+mlp"))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    ranges = {
        "embed.patch": Range(*(np.full((1, 1, 1), v, np.float32) for v in (-1, 2, 3 / 255)), np.full((1, 1, 1), 85))
    }
    recipe = Recipe("mine", (Rule(("embed.patch",), QuantSpec(bits=8), "a test"),))
    extra = {"optim.step": np.array(3), "history.loss": np.array([2.5, 2.25])}
    save_checkpoint(path, Checkpoint(SPEC, init_params(SPEC, 0), extra, recipe, ranges, {"data": {"source": "digits"}}))
    return path


def rewrite(path, change):
    """The same file without its sha256, tensors and metadata changed by `change(tensors, header)`."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(json.loads(file.read(size))["__metadata__"]["qtx"])
    tensors = load_file(path)
    del header["sha256"]
    change(tensors, header)
    save_file(tensors, path, {"qtx": json.dumps(header)})


def test_what_is_written_is_read(path):
    got = load_checkpoint(path)
    assert got.spec == SPEC
    assert got.spec.attention.gamma == -4 / 17  # alpha over the configured length, 16 patches and CLS
    for name, value in init_params(SPEC, 0).items():
        np.testing.assert_array_equal(got.params[name], value)
    assert got.extra["history.loss"].tolist() == [2.5, 2.25]
    assert got.recipe.quant("embed.patch") == QuantSpec(bits=8)
    assert got.ranges["embed.patch"].zero_point.item() == 85
    assert load_checkpoint(path.parent).spec == SPEC  # a folder stands for its model.safetensors


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_checkpoint(path)


def damage_shape(tensors, header):
    tensors["head.classifier.weight"] = np.zeros((10, 63), np.float32)


def damage_nan(tensors, header):
    tensors["head.classifier.bias"][3] = np.nan


def damage_missing(tensors, header):
    del tensors["embed.cls.weight"]


def damage_unknown(tensors, header):
    tensors["embed.extra.weight"] = np.zeros(3, np.float32)


def damage_key(tensors, header):
    header["spec"]["colour"] = "blue"


def damage_gamma(tensors, header):
    header["spec"]["attention"]["gamma"] = 0.5


def damage_bits(tensors, header):
    header["recipe"]["rules"][0]["quant"]["bits"] = 17


def damage_version(tensors, header):
    header["version"] = 99


def damage_dtype(tensors, header):
    tensors["embed.cls.weight"] = tensors["embed.cls.weight"].astype(np.float16)


def damage_scale(tensors, header):
    tensors["range.embed.patch.scale"][...] = 0


def damage_zero_point(tensors, header):
    tensors["range.embed.patch.zero_point"][...] = 300


def damage_meta(tensors, header):
    header["meta"] = ["data"]


def damage_layers(tensors, header):
    header["spec"]["layers"] = 10**9


def damage_hashes(tensors, header):
    header["meta"]["data"]["hashes"] = {"train": [5]}


def damage_tokenizer(tensors, header):
    header["meta"]["tokenizer"] = {"model": "WordPiece"}


def damage_images(tensors, header):
    header["meta"]["images"] = {"mean": [0.5], "std": ["wide"]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_shape, r"head.classifier.weight has shape \(10, 63\); this model's is \(10, 64\)"),
        (damage_nan, "head.classifier.bias holds NaN"),
        (damage_missing, "embed.cls.weight is missing"),
        (damage_unknown, "unknown tensor embed.extra.weight"),
        (damage_key, "unknown key in ModelSpec is 'colour'"),
        (damage_gamma, "gamma is 0.5"),
        (damage_bits, "bits is 17"),
        (damage_version, "qtx-checkpoint version 99, and this qtx reads up to 1: use a later qtx"),
        (damage_dtype, "embed.cls.weight is float16"),
        (damage_scale, "scale of site embed.patch must be positive"),
        (damage_zero_point, "zero point of site embed.patch is no code"),
        (damage_meta, "metadata is damaged: meta must be an object"),
        (damage_layers, "its model has 1000000000 layers"),
        (damage_hashes, "meta.data.hashes.train must be a list of texts"),
        (damage_tokenizer, "meta.tokenizer must be a text"),
        (damage_images, "meta.images must be an object of mean and std"),
    ],
)
def test_damaged(path, damage, message):
    rewrite(path, damage)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[]", "5", "null", "[" * 100_000, '{"a":' + "9" * 5000 + "}", '{"format":["x"]}', "{"]
)
def test_metadata_that_is_none(tmp_path, text):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "m.safetensors", {"qtx": text})
    with pytest.raises(CheckpointError, match="without qtx's metadata|format is not qtx-checkpoint"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_a_place_is_tried_without_leaving_folders(tmp_path):
    check_writable(tmp_path / "a" / "b" / "c.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_writable(tmp_path / "file" / "b" / "c.safetensors")
    assert [got.name for got in tmp_path.iterdir()] == ["file"]


def test_foreign_files(tmp_path):
    foreign = tmp_path / "other.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, foreign)
    with pytest.raises(CheckpointError, match="without qtx's metadata"):
        load_checkpoint(foreign)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing.safetensors")


def test_a_refused_save_leaves_the_old_file(path):
    before = path.read_bytes()
    params = init_params(SPEC, 0)
    params["embed.cls.weight"][0] = np.inf
    with pytest.raises(CheckpointError, match="embed.cls.weight holds NaN or infinity; not saved"):
        save_checkpoint(path, Checkpoint(SPEC, params))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]  # nothing half-written stays beside it
