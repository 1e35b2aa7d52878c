"""Profiles as files, integers under another profile, and versions of formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects import integer_models, rules
from parity_tests.subjects.integer_models import record_run, same
from parity_tests.tests.shell import REF, call, good
from qtx.files.artifact import Artifact, list_differences, load_artifact, save_artifact
from qtx.files.container import ARTIFACT, VECTORS, FileError, digest, read_sealed, write_sealed, write_tensors
from qtx.files.formats import VERSIONS
from qtx.files.profiles import read_profile, write_profile
from qtx_ref.backend import IntegerModel
from qtx_ref.integer.converting import convert
from qtx_ref.profiles import NAMES, parse, profile, sources, to_tree
from qtx_ref.spec import (
    QTX,
    Bias,
    Fixed,
    MatmulRule,
    Nonlinear,
    Order,
    Products,
    Profile,
    QuantSpec,
    Recipe,
    Rounding,
    SpecError,
    ZeroPoint,
    to_dict,
)
from qtx_torch.backend import IntegerModel as TorchModel

WRITTEN = next(folder for above in Path(__file__).parents if (folder := above / "fixtures" / "v0.1").is_dir())
OWN = {"scale": "a", "quantize": "b", "fake_quantize": "c", "dequantize": "d", "matmul": "e", "bias": "f"}
OWN |= {"requantize": "g", "requantize.rounding": "h", "add": "i", "cast": "j", "unseen": "k"}
STEPS = replace(QTX, name="steps", bias=Bias.FLOAT_AFTER, requantize=replace(rules.RINT, order=Order.STEPS))
BEFORE = replace(
    QTX, name="before", bias=Bias.FLOAT_BEFORE, requantize=replace(rules.RINT, zero_point=ZeroPoint.BEFORE)
)
FUSED = replace(QTX, name="fused", bias=Bias.FLOAT_BEFORE_FUSED, requantize=rules.RINT)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_is_written_and_read_back(name: str, tmp_path: Path) -> None:
    known, file = profile(name), tmp_path / "p.json"
    write_profile(file, known, sources(name))
    assert read_profile(str(file)) == known == read_profile(name) == parse(to_dict(known) | MARK)
    assert json.loads(file.read_text()).keys() == to_dict(known).keys() | {"format", "format_version"}
    write_profile(file, known, OWN)  # over one of ours
    tree = json.loads(file.read_text())
    assert tree["requantize"]["rounding"]["source"] == "h" and tree["scale"]["floor"]["source"] == "a"


MARK = {"format": "qtx-profile", "format_version": 2}


def test_every_profile_of_the_package_has_a_source_for_every_field() -> None:
    assert NAMES[0] == "qtx" and list(NAMES[1:]) == sorted(NAMES[1:])
    for name in NAMES:
        known = profile(name)
        assert known.name == name and known.engine and known.path
        assert all(sources(name).values())
        assert to_tree(known, sources(name)).keys() == to_dict(known).keys() | MARK.keys()  # each has one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: tree.update(format_version=3), "format_version is 3, and this qtx reads 2: use a later qtx"),
        (lambda tree: tree.update(format_version="2"), "format_version is '2', and this qtx reads 2: give 2"),
        (lambda tree: tree.pop("format"), "profile format is None: give"),
        (lambda tree: tree.update(format="qtx-result"), "profile format is 'qtx-result'"),
        (lambda tree: tree["requantize"].update(rounding="nearest"), "Profile.requantize.rounding is 'nearest'"),
        (lambda tree: tree["requantize"].pop("left"), "missing key in Profile.requantize is 'left'"),
        (lambda tree: tree["matmul"].update(width=32), "unknown key in Profile.matmul is 'width'"),
        (lambda tree: tree.update(bias="float_after"), "a requantization in integers takes a bias of int32"),
        (lambda tree: tree.update(unseen=["conv"]), "profile unseen is 'conv'"),
        (lambda tree: tree.update(matmul=[]), "Profile.matmul is .*: expected an object"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(change, said: str, tmp_path: Path) -> None:
    tree = MARK | to_dict(QTX)
    change(tree)
    (tmp_path / "p.json").write_text(json.dumps(tree))
    with pytest.raises(FileError, match=f"profile file .*p.json: .*{said}"):
        read_profile(str(tmp_path / "p.json"))


def test_other_contents_are_refused(tmp_path: Path) -> None:
    for text, said in (("[1]", "an object"), ("{", "is not JSON"), ('{"requantization": [1]}', "missing key")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(FileError, match=said):
            read_profile(str(tmp_path / "p.json"))
    with pytest.raises(FileError, match="no such file"):
        read_profile(str(tmp_path / "none.json"))
    with pytest.raises(SpecError, match="known profiles are qtx, .*; or give a .json file"):
        read_profile("tensorrt")
    first = json.loads((WRITTEN / "profile.json").read_text())
    for key in ("requantization", "arithmetic", "scale_dtype"):
        for value in (1, None, ["float32"], "float8"):
            with pytest.raises(SpecError, match=f"Profile.{key} is"):
                parse(first | {key: value})


def test_a_profile_of_version_1_is_what_its_records_say() -> None:
    first = json.loads((WRITTEN / "profile.json").read_text())
    assert parse(first).requantize == rules.TWO
    kinds = {"fixed_one": rules.ONE, "fixed_one_narrow": rules.NARROW, "high_half_up": rules.TRUNCATED}
    kinds |= {"float32": rules.RINT, "float_half_away": rules.AWAY}
    for kind, rule in kinds.items():
        assert parse(first | {"requantization": kind}).requantize == rule


# --- versions of formats ----------------------------------------------------------------------------------------------


@pytest.fixture()
def written(tmp_path: Path) -> Path:
    """An artifact as it is written now."""
    save_artifact(tmp_path / "m.qtx", load_artifact(WRITTEN / "opt.qtx"))
    return tmp_path / "m.qtx"


def test_an_artifact_of_version_1_is_read_and_not_rewritten(written: Path) -> None:
    before = (WRITTEN / "opt.qtx").read_bytes()
    was, now = load_artifact(WRITTEN / "opt.qtx"), load_artifact(written)
    assert list_differences(was, now) == [] and was.profile.requantize == rules.ONE
    assert (WRITTEN / "opt.qtx").read_bytes() == before
    assert read_sealed(written, ARTIFACT)[0]["version"] == VERSIONS[ARTIFACT] == 2
    assert read_sealed(WRITTEN / "opt.qtx", ARTIFACT)[0]["version"] == 1


@pytest.mark.parametrize("version", [3, 0, -1, True, "2", None])
def test_a_version_that_is_none_of_ours_is_refused(version: object, written: Path) -> None:
    header, tensors = read_sealed(written, ARTIFACT)
    write_sealed(written, header | {"version": version}, tensors)
    said = "qtx-artifact version 3, and this qtx reads up to 2: use a later qtx" if version == 3 else "format is not"
    with pytest.raises(FileError, match=said):
        load_artifact(written)


def test_a_key_of_the_metadata_that_nobody_reads_is_refused(written: Path) -> None:
    header, tensors = read_sealed(written, ARTIFACT)
    write_sealed(written, header | {"saturate": True}, tensors)
    with pytest.raises(FileError, match="a key 'saturate' that no qtx-artifact has"):
        load_artifact(written)


def test_the_seal_is_compared_before_a_profile_is_upgraded(tmp_path: Path) -> None:
    header, tensors = read_sealed(WRITTEN / "opt.qtx", ARTIFACT)
    sealed = digest(header, tensors)
    header["profile"] = header["profile"] | {"requantization": "float32"}
    write_tensors(tmp_path / "m.qtx", header | {"sha256": sealed}, tensors)
    with pytest.raises(FileError, match="sha256 differs"):
        load_artifact(tmp_path / "m.qtx")


@pytest.mark.parametrize("version", [1, 2])
def test_each_version_has_its_own_profile(version: int, written: Path) -> None:
    """Flat in version 1 alone, records in version 2 alone."""
    header, tensors = read_sealed(written, ARTIFACT)
    flat = read_sealed(WRITTEN / "opt.qtx", ARTIFACT)[0]["profile"]
    write_sealed(
        written, header | {"version": version, "profile": flat if version == 2 else header["profile"]}, tensors
    )
    with pytest.raises(FileError, match="key in Profile"):
        load_artifact(written)
    for profile_of in (None, 1, []):
        write_sealed(written, header | {"version": version, "profile": profile_of}, tensors)
        with pytest.raises(FileError, match="rofile"):
            load_artifact(written)


def test_vectors_have_a_version_of_their_own() -> None:
    header, _ = read_sealed(WRITTEN / "opt.vectors.safetensors", VECTORS)
    assert header["version"] == VERSIONS[VECTORS] == 1  # nothing of them has changed


# --- under another profile --------------------------------------------------------------------------------------------


def unequal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    return [n for n in {**a, **b} if n not in a or n not in b or not np.array_equal(a[n], b[n])]


@pytest.mark.parametrize("recipe", ["w8a8", "channels", "w8a16"])
@pytest.mark.parametrize("name", ["bert_sink_and_mlp", "opt_post_norm_projected", "vit_clipped_row"])
def test_codes_and_scales_are_kept_and_the_rest_is_as_if_lowered_under_it(name: str, recipe: str) -> None:
    low = integer_models.small(name, recipe)
    for other in ("qtx", "float32", "tflite"):  # which make scales and weights as qtx does, but for tflite
        got = convert(low.spec, low.constants, low.quants, profile(other), Nonlinear.TABLE)
        want = integer_models.small(name, recipe, other).constants
        if other != "tflite":
            assert unequal(got, want) == [] and list(got) == list(want)
        back = convert(low.spec, got, low.quants, low.profile, Nonlinear.TABLE)
        assert unequal(back, dict(low.constants)) == [] and list(back) == list(low.constants)
        codes = [key for key in got if key.endswith((".weight", ".scale", ".zero_point", ".table"))]
        assert [key for key in codes if not np.array_equal(got[key], low.constants[key])] == []


@pytest.mark.parametrize("rules_of", [STEPS, BEFORE, FUSED], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["bert_gate_mlp", "opt_gate_linear", "vit_clipped_row"])
def test_floats_in_steps_and_float_biases_run_alike_in_both_backends(name: str, rules_of: Profile) -> None:
    for recipe in ("w8a8", "channels", "rows"):
        low = integer_models.small(name, recipe)
        made = replace(
            low,
            profile=rules_of,
            constants=convert(low.spec, low.constants, low.quants, rules_of, Nonlinear.TABLE),
        )
        query = made.constants["layer.0.attn.query.bias"]
        assert query.dtype == np.float32  # of real numbers
        assert made.constants["layer.0.attn.norm.bias"].dtype == np.int32  # a norm's is no engine's
        want = record_run(made.model(IntegerModel), made.batch)
        assert all(verdict.ok for verdict in same(record_run(made.model(TorchModel), made.batch), want))
        code = dict(want.sites)["layer.1.ffn.residual"].astype(int)
        beside = dict(record_run(low.model(IntegerModel), low.batch).sites)["layer.1.ffn.residual"].astype(int)
        assert np.abs(code - beside).max() <= 24 and (code == beside).mean() > 0.5  # the same model all the same
        back = convert(low.spec, made.constants, low.quants, low.profile, Nonlinear.TABLE)
        far = [n for n in unequal(back, dict(low.constants)) if np.abs(back[n] - low.constants[n]).max() > 64]
        assert far == []  # a bias of 2^30 steps has no more than 24 bits in float32


@pytest.mark.parametrize("products", [rules.PAIRS16, replace(rules.PAIRS16, products=Products.RUNS16, run=2)])
@pytest.mark.parametrize("name", ["bert_gate_mlp", "opt_gate_linear", "vit_clipped_row"])
def test_a_model_under_pairs_saturates_alike_in_both_backends(name: str, products: MatmulRule) -> None:
    """Weights of 8 bits, each at an end of its codes, and inputs of 8: pairs reach 255 * 127 * 2. Of 7 bits none do."""
    low = integer_models.small(name)
    ends = dict(low.constants)
    for key, value in low.constants.items():
        if key.endswith(("query.weight", "ffn.hidden.weight")):
            ends[key] = np.where(value < 0, -128, 127).astype(np.int8)
    runs = {}
    for kind in (low.profile.matmul, products):
        made = replace(low, profile=replace(low.profile, matmul=kind), constants=ends)
        runs[kind] = record_run(made.model(IntegerModel), made.batch)
        assert all(verdict.ok for verdict in same(record_run(made.model(TorchModel), made.batch), runs[kind]))
        strict = record_run(made.model(IntegerModel, strict=True), made.batch)
        assert all(verdict.ok for verdict in same(strict, runs[kind]))
    accumulators = [dict(run.sites)["layer.0.attn.query.accumulator"] for run in runs.values()]
    assert (accumulators[0] != accumulators[1]).any()  # and what they do is seen
    bytes_of = dict(runs[products].sites)
    scores = "layer.0.attn.scores.accumulator"  # uint8 by uint8: exact, of the codes that then are
    q, k = (bytes_of[f"layer.0.attn.{part}"].astype(int) for part in ("query", "key"))
    q, k = (x - low.constants[f"layer.0.attn.{part}.zero_point"] for x, part in ((q, "query"), (k, "key")))
    heads = low.spec.heads
    q, k = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in (q, k))
    np.testing.assert_array_equal(bytes_of[scores], q @ k.swapaxes(-1, -2))


def test_a_profile_that_cannot_have_the_codes_is_refused() -> None:
    low = integer_models.small("opt_plain", "w8a16")
    with pytest.raises(SpecError, match="16 bits need 64-bit accumulators"):
        convert(low.spec, low.constants, low.quants, profile("gemmlowp"), Nonlinear.TABLE)


def test_commands_take_a_profile_of_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = WRITTEN / "vit.qtx"
    rule = replace(rules.ONE, rounding=Rounding.FLOOR)
    write_profile(Path("floor.json"), replace(QTX, name="floor", requantize=rule), OWN)
    own = json.loads(good("evaluate", source, *REF, "--json", "-").stdout)
    assert own["numerics"] == "integer, w8a8, profile float32"
    floor = json.loads(good("evaluate", source, *REF, "--profile", "floor.json", "--json", "-").stdout)
    assert floor["numerics"] == "integer, w8a8, profile floor" and floor["loss"] != own["loss"]
    said = good("quantize", source, "--profile", "floor.json", "--out", "floor.qtx").output
    assert "codes and scales of" in said and "profile floor" in said
    made = load_artifact(Path("floor.qtx"))
    assert made.profile.requantize == rule and made.meta == load_artifact(source).meta
    again = json.loads(good("evaluate", "floor.qtx", *REF, "--json", "-").stdout)
    assert again == floor
    for arguments, message in (
        (("quantize", source, "--out", "x.qtx", "--recipe", "w4a8"), "leave them out"),
        (("quantize", source, "--out", "x.safetensors"), "integers already"),
        (("quantize", source, "--out", "x.qtx", "--profile", "none.json"), "no such file"),
        (("evaluate", "floor.qtx", *REF, "--profile", "nnapi"), "known profiles are"),
        (("evaluate", WRITTEN / "half.safetensors", *REF, "--profile", "onnx"), "runs in float"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1 and message in result.output
        assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("rules_of", [STEPS, BEFORE, FUSED], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["opt", "bert-int4", "vit"])
def test_an_artifact_with_floats_is_written_and_read_back(name: str, rules_of: Profile, tmp_path: Path) -> None:
    made = load_artifact(WRITTEN / f"{name}.qtx").under(rules_of)
    save_artifact(tmp_path / "m.qtx", made)
    assert list_differences(load_artifact(tmp_path / "m.qtx"), made) == []
    header, tensors = read_sealed(tmp_path / "m.qtx", ARTIFACT)
    key = next(key for key in tensors if key.endswith("query.multiplier"))
    assert (tensors[key].shape[:1] == (3,)) == rules_of.requantize.order.in_steps
    write_sealed(tmp_path / "m.qtx", header, tensors | {key: np.ones((2, 2), np.float32)})
    with pytest.raises(FileError, match=f"{key} has shape"):
        load_artifact(tmp_path / "m.qtx")


def test_fake_quantization_takes_a_profile_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's ranges, and an artifact's codes, in floats under other rules: both backends tell them apart."""
    monkeypatch.chdir(tmp_path)
    down = replace(QTX.quantize, rounding=Rounding.FLOOR)
    floor = replace(QTX, name="floor", quantize=down, fake_quantize=replace(QTX.fake_quantize, quantize=down))
    write_profile(Path("floor.json"), floor, OWN)
    fake = ("--numerics", "fake")
    for source, kind in (
        (WRITTEN / "half.safetensors", ("--recipe", "w8a8", "--data", WRITTEN / "words.txt")),
        (WRITTEN / "vit.qtx", fake),
    ):
        losses = []
        for backend in ("ref", "torch"):
            run = ("evaluate", source, *kind, "--backend", backend, "--batches", "1", "--json", "-")
            own, other = (json.loads(good(*run, *more).stdout) for more in ((), ("--profile", "floor.json")))
            assert other["numerics"].endswith("profile floor") and other["loss"] != own["loss"]
            losses.append(other["loss"])
        assert abs(losses[0] - losses[1]) < 0.1 * abs(other["loss"] - own["loss"])


def test_quants_and_recipes_are_those_of_the_artifact() -> None:
    artifact = load_artifact(WRITTEN / "opt.qtx")
    other = artifact.under(profile("onnx"))
    assert isinstance(other, Artifact) and isinstance(other.recipe, Recipe) and other.recipe == artifact.recipe
    assert all(isinstance(quant, QuantSpec) for quant in other.quants.values())
    assert not isinstance(other.profile.requantize, Fixed) and artifact.profile.name == "qtx"
