"""What reading an artifact checks: a damaged file, a constant or a header that is not its model's; and nothing that was
lowered is refused."""

from dataclasses import replace

import numpy as np
import pytest

from parity_tests.tests.shell import REF, call
from qtx.files.artifact import load_artifact, save_artifact
from qtx.files.artifact_check import check_constants, check_size, widen_to_one
from qtx.files.container import ARTIFACT, CheckpointError, read_sealed, write_sealed
from qtx.recipes.named import recipe, resolve
from qtx.recipes.sites import shorten_inputs
from qtx_ref.backend import Model
from qtx_ref.integer.lowering import lower
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention, preset
from qtx_ref.profiles import profile
from qtx_ref.spec import (
    QTX,
    Granularity,
    Nonlinear,
    QuantSpec,
    Rule,
)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "header", "text", "checkpoint"])
def test_a_damaged_file_is_one_clear_error(damage, artifact, checkpoint, tmp_path):
    content = artifact.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    new = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "flipped": bytes(flipped),
        "header": content.replace(b"half_even", b"half_away", 1),
        "text": b"not a model at all",
        "checkpoint": checkpoint.read_bytes(),
    }[damage]
    file = tmp_path / "model.qtx"
    file.write_bytes(new)
    for command in ("evaluate", "show", "vectors"):
        more = ("--out", tmp_path / "v.safetensors") if command == "vectors" else ()
        result = call(command, file, *more)
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {file}") and result.output.count("\n") == 1
    assert file.read_bytes() == new


QUERY = "layer.1.attn.query"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("layer.1.ffn.hidden.weight", lambda x: None, "is missing"),
        (f"{QUERY}.multiplier", lambda x: None, "is missing"),
        ("layer.3.attn.probs.gamma", lambda x: None, "is missing"),
        ("output.scale", lambda x: None, "is missing"),
        ("extra", lambda x: np.zeros(3), "is unknown"),
        (f"{QUERY}.sink", lambda x: np.zeros(3), "is unknown"),
        (f"{QUERY}.bias", lambda x: x.astype(np.float32), "is float32; this model's is int32"),
        (f"{QUERY}.weight", lambda x: x.T[None], "has shape"),
        (f"{QUERY}.weight", lambda x: x.reshape(-1), "has shape"),
        (f"{QUERY}.bias", lambda x: x[:1], "has shape"),
        (f"{QUERY}.scale", lambda x: np.full(3, x), "has shape"),
        ("embed.sum.multiplier", lambda x: x[:1], "has shape"),
        ("layer.1.ffn.activation.table", lambda x: x[:9], "has shape"),
        (f"{QUERY}.scale", lambda x: x * np.float32(np.nan), "holds NaN"),
        (f"{QUERY}.weight.scale", lambda x: -x, "is not positive"),
        (f"{QUERY}.multiplier", lambda x: -x, "is negative"),
        (f"{QUERY}.zero_point", lambda x: x + 256, "no code from 0 to 255"),
    ],
)
def test_a_constant_that_is_not_the_models_is_named(name, change, said, artifact, tmp_path):
    broken = load_artifact(artifact)
    broken.constants[name] = change(broken.constants.get(name))
    broken.constants = {key: value for key, value in broken.constants.items() if value is not None}
    save_artifact(tmp_path / "m.qtx", broken)
    with pytest.raises(CheckpointError, match=f"constant {name} .*{said}|constant {name} {said}"):
        load_artifact(tmp_path / "m.qtx")


def lower_short(kind):
    """A short model of one layer, its recipe, and its constants."""
    spec = replace(preset("bert-tiny"), layers=1, vocab=40)
    chosen, (short, batch) = recipe(kind, spec), shorten_inputs(spec)
    quants, params = resolve(chosen, short), init_params(short, 0)
    return short, chosen, dict(lower(short, params, quants, Model(short, params).calibrate([batch], quants)))


def move_one(x):
    """Of the channels, the sixth."""
    y = x.copy()
    y.reshape(-1)[5] += 1
    return y


@pytest.mark.parametrize(
    ("kind", "site", "key", "change", "said"),
    [
        ("w8a8-peg2", "embed.norm", "zero_point", move_one, "is not that of 2 groups"),
        ("w8a8-peg2p", "layer.0.ffn.activation", "scale", move_one, "is not that of 2 groups"),
        ("w8a8-out2", "embed.norm", "zero_point", lambda x: x * 0, "is not that of 2 wide channels"),
        ("w8a8-out2", "embed.norm", "zero_point", lambda x: x * 0 + 2**15, "is not that of 2 wide channels"),
        ("w8a8-peg2", "layer.0.attn.query", "channel_multiplier", lambda x: x.reshape(-1)[0], "has shape"),
        ("w8a8-peg2", "embed.norm", "channel_multiplier", lambda x: x * 0 + 2**30, "is 1073741824: give 0 to 16777216"),
        ("w8a8-peg2", "layer.0.attn.query", "channel_shift", lambda x: x * 0 + 63, "is 63: give 0 to 62"),
    ],
)
def test_groups_that_are_not_the_recipes_are_named(kind, site, key, change, said):
    short, chosen, constants = lower_short(kind)
    check_constants(short, chosen, QTX, Nonlinear.TABLE, constants)
    constants[f"{site}.{key}"] = np.asarray(change(constants[f"{site}.{key}"]), constants[f"{site}.{key}"].dtype)
    with pytest.raises(ValueError, match=f"constant {site}.*{said}"):
        check_constants(short, chosen, QTX, Nonlinear.TABLE, constants)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("meta",), [], "meta must be an object"),
        (("meta", "hashes"), {"recipe": 5}, "meta.hashes.recipe must be a text"),
        (("meta", "data", "hashes", "train"), "x", "must be a list of texts"),
        (("meta", "calibration"), [5], "meta.calibration must be a list of texts"),
        (("meta", "data", "source"), ["digits"], "meta.data.source must be a text"),
        (("spec", "layers"), 10**7, "its model has 10000000"),
        (("spec", "heads"), 3, "it must divide the width"),
        (("nonlinear",), None, "known values are"),
    ],
)
def test_a_header_of_other_types_is_refused(path, value, said, artifact, tmp_path):
    header, tensors = read_sealed(artifact, ARTIFACT)
    place = header
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_sealed(tmp_path / "m.qtx", header, tensors)
    result = call("evaluate", tmp_path / "m.qtx", *REF)
    assert result.exit_code == 1 and said in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize("kind", ["chanw", "token-w8a8-r16", "w2a2", "w3a16", "w16a16", "lsq-w4a8"])
@pytest.mark.parametrize("model", ["bert", "opt", "vit"])
def test_whatever_lowers_passes(model, kind):
    spec = replace(preset(f"{model}-tiny"), layers=1, vocab=0 if model == "vit" else 40)
    spec = replace(spec, attention=attention("sink+mlp" if model == "opt" else "clipped_row+linear"))
    chosen = recipe("w8a8" if kind == "chanw" else kind, spec)
    if kind == "chanw":
        channels = QuantSpec(symmetric=True, granularity=Granularity.CHANNEL)
        chosen = replace(chosen, rules=(*chosen.rules, Rule(("*.attn.*.weight", "*.ffn.*.weight"), channels, "a test")))
    short, batch = shorten_inputs(spec)
    params = {name: 8 * value for name, value in init_params(short, 0).items()}  # no scale too fine for a polynomial
    quants = resolve(chosen, short)
    got = Model(short, params).calibrate([batch], quants)
    ranges = {site: widen_to_one(one, quants[site]) for site, one in got.items()}
    for name in ("qtx", "onnx"):
        for nonlinear in Nonlinear:
            constants = lower(short, params, quants, ranges, profile(name), nonlinear)
            check_size(short, constants)
            check_constants(short, chosen, profile(name), nonlinear, constants)


def test_another_of_our_files_is_named(artifact, checkpoint, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(artifact.read_bytes())
    assert "it is an artifact" in call("evaluate", tmp_path / "m.safetensors", *REF).output
    (tmp_path / "m.qtx").write_bytes(checkpoint.read_bytes())
    assert "it is a checkpoint: make integers of it" in call("show", tmp_path / "m.qtx").output


def test_one_scale_for_all_groups_is_named():
    """Shapes let it pass, as they do for a single channel."""
    short, chosen, constants = lower_short("w8a8-peg2")
    for name in ("embed.norm.scale", "embed.norm.zero_point"):
        constants[name] = constants[name].reshape(-1)[0]
    with pytest.raises(ValueError, match="constant embed.norm.zero_point, or its scale, is not that of 2 groups"):
        check_constants(short, chosen, QTX, Nonlinear.TABLE, constants)
