"""An integer model as a file: written, run, shown, compared, damaged."""

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from qtx.artifact import load_artifact, save_artifact, size
from qtx.files import CheckpointError
from qtx.report.plots import curves
from qtx.training import History
from qtx_ref.backend import IntegerModel
from qtx_ref.spec import SpecError

from .runner import check_integers
from .test_cli import TRAIN, call, good

REF = ("--backend", "ref")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vit whose clipped, gated attention uses most of what an integer model can do."""
    out = tmp_path_factory.mktemp("checkpoint")
    good(*TRAIN, "--out", out, "--attention", "clipped+gated")
    return out / "model.safetensors"


@pytest.fixture(scope="module")
def artifact(checkpoint):
    file = checkpoint.with_name("model.qtx")
    good("quantize", checkpoint, *REF, "--out", file)
    return file


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
    half, whole = (size(f, load_artifact(f)) for f in (file, artifact))
    assert 2 * half.codes == whole.codes  # every last axis is even
    found = load_artifact(file)
    assert found.constants["layer.0.attn.query.weight"].min() >= -8
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
    assert "profile.requantization" in result.output
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


def test_parity_of_an_artifact(artifact):
    pytest.importorskip("torch", reason="the extra torch is not installed")
    found = json.loads(good("parity", artifact, "--json", "-").stdout)
    assert found["ok"] and found["first"] == ""
    assert {"embed.image", "layer.3.attn.probs", "output value"} <= {row["name"] for row in found["rows"]}


def test_parity_names_the_first_site_that_differs(artifact):
    made = load_artifact(artifact)
    batch = {"images": np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32)}
    model = IntegerModel(made.spec, made.constants, made.quants, made.profile)
    assert check_integers(model, model, batch).ok
    name = "layer.2.ffn.activation.table"
    faulty = made.constants | {name: made.constants[name] + np.uint8(1)}
    report = check_integers(model, IntegerModel(made.spec, faulty, made.quants, made.profile), batch)
    assert not report.ok and report.first == "layer.2.ffn.activation"


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "header", "text", "checkpoint"])
def test_a_damaged_file_is_one_clear_error(damage, artifact, checkpoint, tmp_path):
    content = artifact.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    new = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "flipped": bytes(flipped),
        "header": content.replace(b'half_even', b'half_away', 1),
        "text": b"not a model at all",
        "checkpoint": checkpoint.read_bytes(),
    }[damage]  # fmt: skip
    file = tmp_path / "model.qtx"
    file.write_bytes(new)
    for command in ("evaluate", "show", "vectors"):
        more = ("--out", tmp_path / "v.safetensors") if command == "vectors" else ()
        result = call(command, file, *more)
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {file}") and result.output.count("\n") == 1
    assert file.read_bytes() == new


def test_a_missing_constant_is_named(artifact, tmp_path):
    broken = load_artifact(artifact)
    del broken.constants["layer.1.ffn.hidden.weight"]
    save_artifact(tmp_path / "m.qtx", broken)
    with pytest.raises(CheckpointError, match=r"layer\.1\.ffn\.hidden\.weight"):
        load_artifact(tmp_path / "m.qtx")


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
    found = json.loads(good(*command).stdout)
    assert len(found["tokens"]) == found["prompt_tokens"] + 5
    sampled = [json.loads(good(*command, "--temperature", 1, "--seed", s).stdout)["tokens"] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_training_is_watched_in_integers(tmp_path):
    command = (*TRAIN, "--out", tmp_path, "--watch-integer", 4, "--json", "-")
    found = json.loads(good(*command).stdout)
    assert found["integer_step"] == [0, 4, 8]
    for integer, floating in zip(found["integer_perplexity"], found["float_perplexity"], strict=True):
        assert integer != floating
        assert abs(integer / floating - 1) < 0.05
    unwatched = json.loads(good(*TRAIN, "--out", tmp_path / "b", "--json", "-").stdout)
    assert unwatched["loss"] == found["loss"]  # watching changes nothing


def test_the_watch_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    watched = History([3.0, 2.0], [1, 2], [5.0, 6.0], [1, 2], [20.0, 8.0], [19.0, 7.5], [3.0, 3.1])
    curves(tmp_path / "a.png", {"plain": History([3.0], [1], [5.0])})
    curves(tmp_path / "b.png", {"watched": watched})
    assert (tmp_path / "b.png").stat().st_size > (tmp_path / "a.png").stat().st_size


def test_a_watch_that_could_not_run_is_refused_before_training(tmp_path):
    result = call(*TRAIN, "--attention", "clipped:gamma=-70", "--watch-integer", 4, "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert "gamma" in result.output and "cannot run in integers" in result.output
    assert isinstance(result.exception, SystemExit) and not isinstance(result.exception, SpecError)
