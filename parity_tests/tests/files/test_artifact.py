"""An integer model as a file: written, run, shown, compared."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity_tests.runner import check_integers
from parity_tests.tests.shell import REF, TRAIN, call, good
from qtx.files.artifact import Artifact, list_differences, load_artifact, measure_size, save_artifact
from qtx.files.checkpoint import load_checkpoint, save_checkpoint
from qtx.files.container import VECTORS, read_sealed, write_sealed
from qtx.jobs.opening import describe_head
from qtx.recipes.named import recipe
from qtx_ref.backend import IntegerModel
from qtx_ref.presets import preset
from qtx_ref.spec import (
    QTX,
    Head,
    Nonlinear,
    QuantSpec,
    Rule,
)


def evaluated(*arguments):
    return json.loads(good("evaluate", *arguments, "--json", "-").stdout)


def test_strict_integers_give_the_same_digits(artifact):
    free = evaluated(artifact, *REF)
    strict = evaluated(artifact, *REF, "--strict")
    assert free["numerics"] == "integer, w8a8, profile qtx"
    assert {**strict, "numerics": free["numerics"]} == free
    assert free["targets"] == 180


def test_fake_quantization_of_the_same_codes_is_near(artifact):
    integer, fake = evaluated(artifact, *REF), evaluated(artifact, *REF, "--numerics", "fake")
    assert fake["loss"] != integer["loss"]
    assert abs(fake["loss"] - integer["loss"]) < 0.01 * fake["loss"]  # the bound of the task metric


def test_it_runs_without_torch(artifact):
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from qtx.cli import main\n"
        f"main(['evaluate', {str(artifact)!r}, '--backend', 'ref', '--batches', '1', '--json', '-'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["numerics"].startswith("integer")


def test_what_is_stored_comes_back(artifact, tmp_path):
    first = load_artifact(artifact)
    save_artifact(tmp_path / "again.qtx", first)
    second = load_artifact(tmp_path / "again.qtx")
    assert artifact.read_bytes() == (tmp_path / "again.qtx").read_bytes()
    assert first.constants.keys() == second.constants.keys()
    assert first.meta["hashes"].keys() == {"checkpoint", "recipe", "calibration"}


def test_four_bit_weights_take_half_the_bytes(checkpoint, artifact, tmp_path):
    file = tmp_path / "w4.qtx"
    good("quantize", checkpoint, *REF, "--recipe", "w4a8", "--out", file)
    half, whole = (measure_size(f, load_artifact(f)) for f in (file, artifact))
    assert 2 * half.codes == whole.codes  # every last axis is even
    got = load_artifact(file)
    assert got.constants["layer.0.attn.query.weight"].min() >= -8
    assert evaluated(file, *REF)["targets"] == 180


def test_show(artifact):
    shown = json.loads(good("show", artifact, "--json", "-").stdout)
    rows = {row["site"]: row for row in shown["sites"]}
    assert rows["layer.0.attn.query.weight"]["codes"] == "-128..127"
    assert sum(row["bytes"] for row in shown["sites"]) == shown["bytes"]["tensors"]
    assert "layer.3.attn.probs" in good("show", artifact).output


def test_diff(checkpoint, artifact, tmp_path):
    assert good("diff", artifact, artifact).output.strip() == "0 difference(s)"
    other = tmp_path / "other.qtx"
    good("quantize", checkpoint, *REF, "--profile", "float32", "--out", other)
    result = call("diff", artifact, other)
    assert result.exit_code == 1
    assert "profile.requantize.dtype" in result.output
    assert "layer.0.attn.query.shift" in result.output


def test_vectors(artifact, tmp_path):
    file = tmp_path / "vectors.safetensors"
    good("vectors", artifact, *REF, "--out", file, "--count", 2)
    tensors = load_file(file)
    assert tensors["input.images"].shape[0] == 2
    assert {"code.embed.image", "code.layer.3.attn.scores.accumulator", "code.head.classifier", "output.value"} <= set(
        tensors
    )
    assert all(value.dtype.kind in "iu" for name, value in tensors.items() if name.startswith("code."))
    assert "0 differ" in good("vectors", artifact, *REF, "--check", file).output
    assert "0 differ" in good("vectors", artifact, *REF, "--strict", "--check", file).output


def test_a_checkpoint_is_no_artifact(checkpoint, tmp_path):
    """Nor is its folder: one line, and nothing written. Vectors of one ended in a traceback."""
    out = tmp_path / "out.safetensors"
    folder = checkpoint.parent
    for model in (folder, checkpoint):
        result = call("vectors", model, *REF, "--out", out)
        assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
        assert f"{model} is a checkpoint, and vectors are of integers: make a MODEL.qtx with qtx qu" in result.output
    for words in (("show", folder), ("export", folder, "--format", "onnx", "--out", tmp_path / "x.onnx")):
        result = call(*words)
        assert result.exit_code == 1
        assert f"{folder} is a folder, and no artifact; make one with qtx quantize {folder} --out" in result.output
    assert not list(tmp_path.iterdir())


def test_vectors_find_the_first_site_that_differs(artifact, tmp_path):
    file, other = tmp_path / "vectors.safetensors", tmp_path / "model.qtx"
    changed = load_artifact(artifact)
    changed.constants["layer.2.ffn.activation.table"] += 1
    save_artifact(other, changed)
    good("vectors", artifact, *REF, "--out", file)
    result = call("vectors", other, *REF, "--check", file)
    assert result.exit_code == 1
    assert "not the vectors of" in result.output  # of another file
    good("vectors", other, *REF, "--out", tmp_path / "v.safetensors")
    codes, faulty = load_file(file), load_file(tmp_path / "v.safetensors")
    wrong = [name for name in codes if not np.array_equal(codes[name], faulty[name])]
    assert "code.layer.2.ffn.activation" in wrong
    assert not any(name.startswith(("code.layer.0", "code.layer.1", "code.layer.2.attn")) for name in wrong)


def resealed(file, name, value):
    """Vectors with one tensor changed (None: taken out), sealed anew."""
    header, tensors = read_sealed(file, VECTORS)
    tensors[name] = value
    tensors = {key: kept for key, kept in tensors.items() if kept is not None}
    order = [key for key in dict.fromkeys([*header["order"], name]) if key in tensors]
    write_sealed(file, header | {"order": order}, tensors)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("input.images", lambda x: None, "input images is missing"),
        ("input.images", lambda x: x[:, :, :5], "none that this model takes"),
        ("input.images", lambda x: x * np.nan, "none that this model takes"),
        ("input.bogus", lambda x: np.zeros(2), "input bogus is unknown"),
        ("code.layer.1.attn.query", lambda x: x.astype(np.int64), "1 differ, first code.layer.1.attn.query"),
        ("code.layer.1.attn.query", lambda x: None, "1 differ, first code.layer.1.attn.query"),
    ],
)
def test_vectors_that_do_not_fit(name, change, said, artifact, tmp_path):
    file = tmp_path / "vectors.safetensors"
    good("vectors", artifact, *REF, "--out", file, "--count", 1)
    resealed(file, name, change(load_file(file).get(name)))
    result = call("vectors", artifact, *REF, "--check", file)
    assert result.exit_code == 1 and said in result.output and result.output.count("\n") == 1


def test_changed_vectors_are_refused_and_the_first_is_in_forward_order(artifact, tmp_path):
    file = tmp_path / "vectors.safetensors"
    good("vectors", artifact, *REF, "--out", file)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    (tmp_path / "v.safetensors").write_bytes(content)
    assert "sha256 differs" in call("vectors", artifact, *REF, "--check", tmp_path / "v.safetensors").output
    header, tensors = read_sealed(file, VECTORS)
    for name in ("code.embed.patch", "code.embed.cls", "code.layer.0.attn.value"):  # by name, cls comes first
        tensors[name] = tensors[name] ^ 1
    write_sealed(file, header, tensors)
    assert "3 differ, first code.embed.patch" in call("vectors", artifact, *REF, "--check", file).output


def test_parity_of_an_artifact(artifact):
    got = json.loads(good("parity", artifact, "--json", "-").stdout)
    assert got["ok"] and got["first"] == ""
    assert {"embed.image", "layer.3.attn.probs", "output value"} <= {row["name"] for row in got["rows"]}


def test_parity_of_an_artifact_has_no_dtype(artifact):
    assert "an integer model has no float dtype" in call("parity", artifact, "--dtype", "float64").output


def test_parity_names_the_first_site_that_differs(artifact):
    made = load_artifact(artifact)
    batch = {"images": np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)}
    model = IntegerModel(made.spec, made.constants, made.quants, made.profile)
    assert check_integers(model, model, batch).ok
    name = "layer.2.ffn.activation.table"
    faulty = made.constants | {name: made.constants[name] + np.uint8(1)}
    report = check_integers(model, IntegerModel(made.spec, faulty, made.quants, made.profile), batch)
    assert not report.ok and report.first == "layer.2.ffn.activation"


def test_a_model_without_a_head_is_not_evaluated(checkpoint, tmp_path):
    got = load_checkpoint(checkpoint)
    got.spec = replace(got.spec, head=Head.NONE)
    got.params = {name: value for name, value in got.params.items() if not name.startswith("head.")}
    got.extra = {}
    save_checkpoint(tmp_path / "m.safetensors", got)
    good("quantize", tmp_path / "m.safetensors", *REF, "--out", tmp_path / "m.qtx")
    for name in ("m.safetensors", "m.qtx"):
        result = call("evaluate", tmp_path / name, *REF)
        assert result.exit_code == 1 and "has no head" in result.output


def test_differences_are_exact(artifact):
    one, other = load_artifact(artifact), load_artifact(artifact)
    name = "layer.0.attn.norm.eps"
    one.constants[name], other.constants[name] = np.array([2**62 + 1, -(2**63)]), np.array([2**62, 2**63 - 1])
    other.meta = one.meta | {"tokenizer": "x" * 100}
    got = {d.where: d.what for d in list_differences(one, other)}
    assert got == {name: "2 of 2 differ, by 18446744073709551615 at most", "meta.tokenizer": "only in the second"}


def test_json_is_no_other_file_of_the_command(artifact, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (
        ("vectors", artifact, *REF, "--out", "a.json", "--json", "a.json"),
        ("quantize", checkpoint, *REF, "--out", "m.qtx", "--json", "./m.qtx"),
        (*TRAIN, "--out", "run", "--json", "run/model.safetensors"),
    ):
        result = call(*command)
        assert result.exit_code == 1 and "--json" in result.output and "choose another" in result.output
    assert not list(tmp_path.iterdir())


def test_own_ranges_are_kept(tmp_path):
    good(*TRAIN, "--train-quant", "lsq-w8a8", "--out", tmp_path)
    own = good("quantize", tmp_path, *REF, "--out", tmp_path / "own.qtx").output
    assert "recipe lsq-w8a8, the checkpoint's own ranges" in own
    ranges = load_checkpoint(tmp_path).ranges
    got = load_artifact(tmp_path / "own.qtx").ranges()
    assert ranges.keys() == got.keys()
    for site, one in ranges.items():
        assert one.scale == got[site].scale and one.zero_point == got[site].zero_point
    other = good("quantize", tmp_path, *REF, "--recipe", "w8a8", "--out", tmp_path / "new.qtx").output
    assert "recipe w8a8, ranges of 16 calibration batches" in other


@pytest.mark.parametrize(
    ("base", "rules", "said"),
    [
        ("w8a8", (), "which recipe mine leaves in float, multiplies the int8 codes of embed.token.weight; its int32"),
        ("w16a16", (), "int16 codes of embed.token.weight; its int64"),
        (
            "w8a8",
            (Rule(("*.weight",), QuantSpec(), "a test"),),
            "which recipe mine leaves in float, multiplies the uint8",
        ),
        ("w8a8", (Rule(("head.decoder",), QuantSpec(), "a test"),), "whose weights recipe mine leaves in float"),
        ("w8a8", (Rule(("head.decoder.weight",), QuantSpec(), "a test"),), "whose result recipe mine leaves in float"),
        ("w8a8", (Rule(("head.decoder*",), QuantSpec(), "a test"),), ""),
    ],
)
def test_the_note_on_a_head_in_float(base, rules, said):
    spec = preset("opt-tiny")
    chosen = recipe(base, spec)
    head = Rule(("head.decoder.weight",), None, "a test")
    rules = (rules[0], head) if rules and rules[0].sites == ("*.weight",) else rules
    made = Artifact(spec, replace(chosen, name="mine", rules=(*chosen.rules, *rules)), QTX, Nonlinear.TABLE, {})
    assert said in describe_head(made) if said else describe_head(made) == ""
    assert ("accumulators" in describe_head(made)) == ("head.decoder" not in made.quants)


@pytest.mark.parametrize(
    ("recipe", "site"), [("train-w8a8", r"layer.0.attn.query.input|embed"), ("fp8-e4m3", "float format")]
)
def test_what_cannot_run_in_integers_is_refused_by_site(recipe, site, checkpoint, tmp_path):
    result = call("quantize", checkpoint, *REF, "--recipe", recipe, "--out", tmp_path / "m.qtx")
    assert result.exit_code == 1
    assert "cannot run in integers" in result.output
    assert not (tmp_path / "m.qtx").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evaluate", "MODEL", "--recipe", "w8a8"), "has its own"),
        (("evaluate", "MODEL", "--numerics", "fake", "--strict"), "--strict belongs to --numerics integer"),
        (("evaluate", "MODEL", "--dtype", "float64"), "no float dtype"),
        (("evaluate", "CHECKPOINT", "--numerics", "integer"), "belong to a MODEL.qtx"),
        (("quantize", "CHECKPOINT", "--profile", "onnx", "--out", "x.safetensors"), "ending in .qtx"),
        (("quantize", "CHECKPOINT", "--profile", "nnapi", "--out", "x.qtx"), "known profiles"),
        (("vectors", "MODEL"), "give --out FILE"),
        (("vectors", "MODEL", "--check", "v.safetensors", "--count", "2"), "belong to --out"),
        (("vectors", "MODEL", "--out", "v.QTX"), "vectors are no model"),
        (("quantize", "CHECKPOINT", "--out", "m.QTX"), "give a name ending in .qtx"),
        (("quantize", "CHECKPOINT", "--out", "a/b/m"), "give a name ending in .qtx"),
        (("generate", "MODEL", "--prompt", "a"), "only a causal model"),
    ],
)
def test_options_that_do_not_belong_are_refused(arguments, said, artifact, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"MODEL": artifact, "CHECKPOINT": checkpoint}
    result = call(*(names.get(a, a) for a in arguments), *REF)
    assert result.exit_code == 1
    assert said in result.output
    assert not list(tmp_path.iterdir())


def test_strict_refuses_a_float_profile(checkpoint, tmp_path):
    file = tmp_path / "m.qtx"
    good("quantize", checkpoint, *REF, "--profile", "onnx", "--out", file)
    assert evaluated(file, *REF)["targets"] == 180
    result = call("evaluate", file, *REF, "--strict")
    assert result.exit_code == 1
    assert "profile onnx requantizes by float32" in result.output


def test_generate_from_codes(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    good("train", *REF, "--model", "opt-tiny", "--batch", "2", "--steps", "2", "--out", tmp_path)
    file = tmp_path / "m.qtx"
    good("quantize", tmp_path / "model.safetensors", *REF, "--out", file)
    command = ["generate", file, *REF, "--prompt", "It was the best", "--tokens", 5, "--json", "-"]
    got = json.loads(good(*command).stdout)
    assert len(got["tokens"]) == got["prompt_tokens"] + 5
    sampled = [json.loads(good(*command, "--temperature", 1, "--seed", s).stdout)["tokens"] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_bias_beyond_int32_is_read_back(checkpoint, tmp_path):
    """Behind values that are almost nothing a bias takes 64 bits."""
    got = load_checkpoint(checkpoint)
    for name, value in got.params.items():
        if ".attn.value." in name:
            value *= 1e-4
        if name.endswith("attn.output.bias"):
            value += 1
    save_checkpoint(tmp_path / "c.safetensors", got)
    good("quantize", tmp_path / "c.safetensors", *REF, "--out", tmp_path / "m.qtx")
    assert load_artifact(tmp_path / "m.qtx").constants["layer.0.attn.output.bias"].dtype == np.int64
    assert evaluated(tmp_path / "m.qtx", *REF)["targets"] == 180
