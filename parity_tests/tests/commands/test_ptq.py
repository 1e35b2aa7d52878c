"""`qtx ptq`: scores by sequence, the bootstrap, shared ranges, errors by site, and the command as a user types it."""

import json
import math

import numpy as np
import pytest
from scipy import special, stats

from parity_tests.subjects import small_models
from parity_tests.tests.shell import call, good
from qtx.engines.machine import Machine
from qtx.measure.paired import Measured, compare, measure
from qtx.measure.scores import Answers, answer_batch
from qtx.measure.site_errors import measure_relative_error, measure_site_errors
from qtx.prepare.prepare import Prepared, prepare
from qtx.prepare.shared_ranges import Calibrated
from qtx.progress import Progress
from qtx.recipes import remedies
from qtx.recipes.named import recipe, resolve
from qtx_ref.backend import Model
from qtx_ref.spec import ModelSpec, QuantSpec, Range, SpecError


def bad(*arguments):
    result = call(*arguments)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.stderr


# --- scores and their bootstrap ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert_plain", "bert_classify", "vit_plain"])
def test_answers_are_those_of_scipy(name):
    small = small_models.build(name)
    model = Model(small.spec, small.params)
    got = answer_batch(model, small.batch)
    logs = special.log_softmax(model.forward(small.batch).astype(np.float64), axis=-1)
    targets = small.batch["targets"] if "targets" in small.batch else small.batch["labels"]
    for i, wanted in enumerate(targets):
        some = np.atleast_1d(wanted) >= 0
        rows = np.atleast_2d(logs[i])[some]
        picked = rows[np.arange(some.sum()), np.atleast_1d(wanted)[some]]
        assert got.loss[i] == pytest.approx(-picked.sum(), rel=1e-12)  # float64 sums in another order
        assert got.count[i] == some.sum()
        assert got.right[i] == (rows.argmax(axis=-1) == np.atleast_1d(wanted)[some]).sum()


def measured(right, loss=None, count=None):
    right = np.asarray(right)
    count = np.ones_like(right) if count is None else count
    return Measured(Answers(np.asarray(right * 0.5 if loss is None else loss), count, right), 1.0)


def test_the_difference_is_worked_by_hand():
    plain, worse = measured([1, 1, 1, 0]), measured([1, 0, 0, 0])
    assert compare("accuracy", worse, plain, 0)[0] == -50
    counts = np.array([1, 3])
    plain, worse = (measured([0, 0], loss, counts) for loss in (np.array([1.0, 3.0]), np.array([2.0, 6.0])))
    assert compare("perplexity", worse, plain, 0)[0] == pytest.approx(100 * (math.e - 1), rel=1e-12)


def test_the_bootstrap_is_paired():
    right = np.arange(200) % 3 > 0
    same = measured(right.astype(int))
    assert compare("accuracy", same, same, 0) == (0.0, (0.0, 0.0))  # drawn apart, it would be wide


def test_the_interval_is_that_of_scipy():
    rng = np.random.default_rng(0)
    plain, worse = (rng.random(400) < rate for rate in (0.9, 0.8))
    _, got = compare("accuracy", measured(worse.astype(int)), measured(plain.astype(int)), 0)
    wanted = stats.bootstrap(
        (worse, plain), lambda a, b, axis: 100 * (a.mean(axis=axis) - b.mean(axis=axis)), paired=True,
        n_resamples=20_000, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    # an end is a 2.5 % quantile of 2000 draws: its deviation is about 2.7 / sqrt(2000) = 0.06 deviations of the
    # difference
    deviation = 100 * np.std(worse.astype(float) - plain) / 20
    assert np.abs(np.subtract(got, wanted)).max() < 4 * 0.06 * deviation
    assert got[1] - got[0] > 2 * deviation


class Fixed:
    """A model that gives every token the same logits."""

    def forward(self, batch):
        return np.zeros((*batch["targets"].shape, 3), np.float32)


def test_sequences_without_a_target_are_left_out():
    got = measure(Fixed(), [{"targets": np.array([[-1, -1], [2, -1], [0, 1]])}])
    assert got.answers.count.tolist() == [1, 2]
    assert got.loss == pytest.approx(math.log(3), rel=1e-6)  # float32 logits
    for batches in ([], [{"targets": np.full((2, 2), -1)}]):
        with pytest.raises(SpecError, match="no target"):
            measure(Fixed(), batches)


def test_a_row_that_diverged_has_no_interval():
    plain, lost = (measured([0, 0], np.array([1.0, loss])) for loss in (1.0, math.nan))
    assert all(math.isnan(value) for value in compare("perplexity", lost, plain, 0)[1])
    far = measured([0, 0], np.array([2000.0, 1.0]))
    assert compare("perplexity", far, plain, 0)[0] > 1e100


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert_plain", "opt_plain", "vit_gate_linear"])
def test_every_standard_recipe_fits(name):
    spec: ModelSpec = small_models.build(name).spec
    names = remedies.list_standard(spec)
    assert len(set(names)) == len(names)
    for one in names:
        chosen = recipe(one, spec)
        assert chosen.name == one
        assert resolve(chosen, spec)


def test_remedies_change_what_they_name():
    spec = small_models.build("bert_plain").spec
    plain = resolve(recipe("w8a8", spec), spec)

    def differing(name):
        got = resolve(recipe(name, spec), spec)
        return {site for site in plain.keys() | got.keys() if plain.get(site) != got.get(site)}

    ffn = {f"layer.{i}.{rest}" for i in (0, 1) for rest in ("attn.norm", "ffn.output", "ffn.residual")}
    assert differing("w8a8-ffn16") == ffn
    assert differing("w8a8-ffnfloat") == ffn
    assert differing("w8a8-float[layer.1.ffn.output]") == {"layer.1.ffn.output"}
    assert all(site.endswith(".weight") for site in differing("w8a8-channel"))
    assert not any(site.endswith((".weight", ".scores", ".probs")) for site in differing("w8a8-peg4p"))
    narrow = (".query", ".key", ".value", ".hidden")  # products of activations, and what tables read
    assert differing("w8a8-out3") == {site for site in differing("w8a8-peg4p") if not site.endswith(narrow)}
    opt = small_models.build("opt_plain").spec
    assert resolve(recipe("w8a8-ffn16", opt), opt)["layer.0.ffn.norm"].bits == 16  # pre-norm: the FFN's input


def test_the_last_remedy_decides():
    spec, site = small_models.build("bert_plain").spec, "layer.0.ffn.output"
    assert resolve(recipe("w8a8-peg4p-ffn16", spec), spec)[site].bits == 16
    assert resolve(recipe("w8a8-ffn16-peg4p", spec), spec)[site].groups == 4
    assert site not in resolve(recipe("w8a8-peg4p-ffnfloat", spec), spec)
    assert resolve(recipe("w8a8-peg4p-ffn16", spec), spec)[f"{site}.weight"].bits == 8


def test_unknown_remedies_are_refused():
    spec = small_models.build("bert_plain").spec
    for name in ("w8a8-nothing", "w8a8-peg", "w8a8-float[layer.9.*]", "w8a8-p101", "w8a8-smooth1.5"):
        with pytest.raises(SpecError):
            recipe(name, spec)
    for name, message in (  # on sites that the recipe leaves in float, the remedy would do harm, or nothing
        ("linear-w8a8-peg4", "leaves in float"),
        ("linear-w8a8-ffn16", "leaves in float"),
        ("w8a8-out16", "give 1 to 15 channels"),
        ("linear-w8a8-ffnfloat", "changes none"),
        ("w8a8-float[head.decoder]", "changes none"),
    ):
        with pytest.raises(SpecError, match=message):
            recipe(name, spec)
    with pytest.raises(SpecError, match="groups 5"):
        resolve(recipe("w8a8-peg5", spec), spec)


# --- ranges and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend_name", ["ref", "torch"])
def test_shared_ranges_are_those_of_each_recipe_alone(backend_name):
    small = small_models.build("bert_classify")
    batches = [small.batch, small_models.make_batch(small.spec, 2)]
    machine = Machine(backend_name)
    shared, alone = Calibrated(machine.model(small.spec, small.params), lambda: batches), 0
    others = ("token-w8a8", "lsq-w4a6", "train-w8a8", "fp8-e4m3", "fp8-e5m2", "w8a8-peg4p-mse", "w4a4-channel-mse",
              "w8a8-float[*.scores+*.probs]")  # fmt: skip
    for name in (*remedies.list_standard(small.spec), *others):
        chosen = recipe(name, small.spec)
        quants = resolve(chosen, small.spec)
        got = shared.of(chosen, quants)
        if got is None:
            assert chosen.transforms
            continue
        wanted = machine.model(small.spec, small.params).calibrate(batches, quants)
        assert got.keys() == wanted.keys()
        for site, range_ in wanted.items():
            for part, have in zip(range_, got[site], strict=True):
                assert np.array_equal(part, have), (name, site)
        alone += 1
    assert alone > 20


def test_errors_are_worked_by_hand():
    # scale 1, codes -1 to 1: [0.25, 1, 3] becomes [0, 1, 1]
    ends = Range(np.float32(-1), np.float32(1), np.float32(1), np.int32(0))
    spec = QuantSpec(2, symmetric=True)
    x = np.float32([0.25, 1, 3])
    assert measure_relative_error(x, None, spec, ends) == (0.0625 + 4) / (0.0625 + 1 + 9)
    assert measure_relative_error(x, np.array([True, True, False]), spec, ends) == 0.0625 / 1.0625
    assert measure_relative_error(np.zeros(3, np.float32), None, spec, ends) == 0


def test_errors_by_site_name_the_coarsest():
    small = small_models.build("bert_classify")
    model = Model(small.spec, small.params)
    quants = {site: QuantSpec(8) for site in ("layer.0.ffn.output", "embed.sum")} | {"layer.1.ffn.hidden": QuantSpec(2)}
    quants["head.classifier.weight"] = QuantSpec(3, symmetric=True)
    got = measure_site_errors(
        model, small.batch, quants, Prepared(small.params, model.calibrate([small.batch], quants), {})
    )
    assert set(got) == set(quants)
    assert list(got.values()) == sorted(got.values(), reverse=True)
    assert next(iter(got)) in ("layer.1.ffn.hidden", "head.classifier.weight")
    x, where = model.record(small.batch, ["layer.1.ffn.hidden"])["layer.1.ffn.hidden"]
    kept = x[np.broadcast_to(where, x.shape)]
    step = (max(kept.max(), 0) - min(kept.min(), 0)) / 3
    error = np.abs(kept - kept.clip(min=kept.min()))  # nothing is clipped in the middle: at most half a step anywhere
    assert got["layer.1.ffn.hidden"] <= (kept.size * (step / 2) ** 2 + error.sum()) / np.square(kept).sum()


def test_the_error_of_a_rewritten_weight_counts_from_before():
    small, name = small_models.build("bert_plain"), "layer.0.ffn.output.weight"
    chosen = recipe("w4a16-channel-gptq", small.spec)
    quants = {name: resolve(chosen, small.spec)[name]}
    got = prepare(Machine("ref"), small.spec, small.params, lambda count: [small.batch], chosen)
    error = measure_site_errors(Model(small.spec, small.params), small.batch, quants, got)[name]
    was, now = small.params[name].astype(np.float64), got.params[name]
    assert error == pytest.approx(np.square(now - was).sum() / np.square(was).sum(), rel=1e-12) and error > 1e-4


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    out = tmp_path_factory.mktemp("vit")
    good("train", "--backend", "ref", "--model", "vit-tiny", "--batch", "16", "--steps", "20", "--out", out)
    return out / "model.safetensors"


SMALL = ("--backend", "ref", "--sequences", "40", "--calibration", "2")


def test_the_command(vit, tmp_path):
    out = tmp_path / "ptq"
    names = "w8a8,w4a4,w8a8-peg4p,linear-w8a8-hadamard,w4a16-channel-gptq"
    shown = good("ptq", vit, *SMALL, "--recipes", names, "--keep", "w8a8,linear-w8a8-hadamard", "--out", out).stdout
    rows = json.loads((out / "ptq.json").read_text())["rows"]
    assert list(rows) == ["float", *names.split(",")]
    assert all(f"| {name} " in shown for name in rows)
    assert [row["runs_as"] for row in rows.values()] == ["float", *["integers"] * 3, "simulation", "integers"]
    assert rows["w8a8"]["bytes"] < rows["linear-w8a8-hadamard"]["bytes"] / 3
    assert "linear" in rows["linear-w8a8-hadamard"]["why"] or "float" in rows["linear-w8a8-hadamard"]["why"]
    for row in rows.values():
        assert row["low"] <= row["difference"] <= row["high"]
    plain = json.loads(good("evaluate", vit, "--backend", "ref", "--batches", 3, "--json", "-").stdout)
    assert plain["targets"] == 48  # of which the comparison takes 40
    for name in ("w8a8", "linear-w8a8-hadamard"):  # the model that is kept is the row's
        kept = out / f"{name}.safetensors"
        again = tmp_path / f"{name}.json"
        good("ptq", vit, *SMALL, "--recipes", name, "--out", tmp_path / name, "--json", again)
        assert json.loads(again.read_text())["rows"][name]["simulated"]["loss"] == rows[name]["simulated"]["loss"]
        assert good("evaluate", kept, "--backend", "ref", "--batches", 1)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-peg4p", "w8a8-out8"])
def test_a_row_is_what_quantize_and_evaluate_give(vit, tmp_path, name):
    out = tmp_path / "ptq"
    size = ("--backend", "ref", "--sequences", "180", "--calibration", "16", "--recipes", name)
    row = json.loads(good("ptq", vit, *size, "--out", out, "--json", "-").stdout)["rows"][name]
    fake = json.loads(good("evaluate", vit, "--backend", "ref", "--recipe", name, "--json", "-").stdout)
    assert row["simulated"]["loss"] == pytest.approx(fake["loss"], rel=1e-12)  # summed in another order
    good("quantize", vit, "--backend", "ref", "--recipe", name, "--out", tmp_path / "m.qtx")
    whole = json.loads(good("evaluate", tmp_path / "m.qtx", "--backend", "ref", "--json", "-").stdout)
    assert row["loss"] == pytest.approx(whole["loss"], rel=1e-12)
    assert row["value"] == pytest.approx(whole["accuracy"], rel=1e-12)


def test_resume_goes_on_and_refuses_another(vit, tmp_path, monkeypatch):
    out = tmp_path / "ptq"
    arguments = ("ptq", vit, *SMALL, "--recipes", "w8a8,w4a4,w6a6", "--out", out)
    advance = Progress.advance

    def stop(self, count=1, note=""):
        advance(self, count, note)
        if note == "w4a4":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", stop)
        stopped = call(*arguments)
    assert stopped.exit_code == 130 and "--resume goes on" in stopped.stderr
    rows = json.loads((out / "ptq.json").read_text())["rows"]
    assert list(rows) == ["float", "w8a8", "w4a4"]
    assert "--resume" in bad(*arguments)
    good(*arguments, "--resume")
    after = json.loads((out / "ptq.json").read_text())["rows"]
    assert list(after) == ["float", "w8a8", "w4a4", "w6a6"]
    assert after["w4a4"] == rows["w4a4"]  # not measured again
    assert "sequences" in bad(
        "ptq", vit, *SMALL[:3], "50", *SMALL[4:], "--recipes", "w8a8,w4a4,w6a6", "--out", out, "--resume"
    )
    (out / "ptq.json").write_text("{}")
    assert "not qtx's" in bad(*arguments, "--resume")


def test_sensitivity_ranks_sites(vit, tmp_path):
    out = tmp_path / "ptq"
    got = json.loads(good("ptq", vit, *SMALL, "--sensitivity", "w4a4", "--out", out, "--json", "-").stdout)
    ranked = got["sensitivity"]["w4a4"]
    spec = json.loads((out / "ptq.json").read_text())["of"]["spec"]
    assert spec["recipes"] == ["w4a4"]
    assert [(-e["difference"], e["loss"]) for e in ranked] == sorted(
        [(-e["difference"], e["loss"]) for e in ranked], reverse=True
    )
    assert {"embed.image", "layer.3.ffn.residual", "layer.0.attn.query.weight", "head.classifier"} <= {
        entry["site"] for entry in ranked
    }


def test_sensitivity_of_transformed_and_simulated_recipes(vit, tmp_path):
    """Transforms alone change nothing but noise; what the ranges depend on beside the model is no obstacle."""
    smaller = ("--backend", "ref", "--sequences", "4", "--calibration", "1")
    for name in ("linear-w8a8-hadamard", "paper-vit"):
        command = ("ptq", vit, *smaller, "--sensitivity", name, "--out", tmp_path / name, "--json", "-")
        got = json.loads(good(*command).stdout)
        assert all(abs(entry["loss"] - got["rows"]["float"]["loss"]) < 0.1 for entry in got["sensitivity"][name])
    out = ("--out", tmp_path / "a")
    assert "gptq" in bad("ptq", vit, *SMALL, "--sensitivity", "w4a16-channel-gptq", *out)
    assert "not known" in bad("ptq", vit, *SMALL, "--sensitivity", "w8a8,w4a4", *out)
    assert "--keep" in bad("ptq", vit, *SMALL, "--sensitivity", "w8a8", "--keep", "w8a8", *out)
    assert not (tmp_path / "a").exists()


def mine(path, **changes):
    """A recipe's file: w8a8 of the model with some keys changed."""
    known = json.loads(good("recipes", "w8a8", "--model", "vit-tiny", "--json", "-").stdout)["recipe"]
    path.write_text(json.dumps(known | changes))
    return path


def test_a_row_that_fails_stops_no_other(vit, tmp_path):
    rotation = {
        "sites": ["layer.*.ffn.output"],
        "kind": "hadamard",
        "source": "a test",
        "strength": None,
        "block": 2**20,
    }
    wrong, out = mine(tmp_path / "wrong.json", transforms=[rotation]), tmp_path / "ptq"
    arguments = ("ptq", vit, *SMALL, "--recipes", f"{wrong},w8a8", "--keep", wrong, "--out", out)
    shown = good(*arguments).stdout
    assert f"{wrong} failed: transform block 1048576 at layer.0.ffn.output" in shown
    rows = json.loads((out / "ptq.json").read_text())["rows"]
    assert rows[str(wrong)]["runs_as"] == "failed" and rows[str(wrong)]["value"] is None
    assert rows["w8a8"]["runs_as"] == "integers"
    assert "wrong.json.safetensors" not in shown  # was not written
    good(*arguments, "--resume")


def test_a_recipe_of_a_file(vit, tmp_path):
    """Its model is kept in the folder, wherever the file lies; another file of that name is another comparison."""
    path, out = mine(tmp_path / "mine.json"), tmp_path / "ptq"
    arguments = ("ptq", vit, *SMALL, "--recipes", path, "--keep", path, "--out", out)
    good(*arguments)
    assert (out / "mine.json.safetensors").exists() and len(list(tmp_path.iterdir())) == 2
    good(*arguments, "--resume")
    mine(path, masked_scores=True)
    assert "mine.json was" in bad(*arguments, "--resume")
    (tmp_path / "b").mkdir()
    both = f"{path},{mine(tmp_path / 'b' / 'mine.json')}"
    assert "rename one" in bad("ptq", vit, *SMALL, "--recipes", both, "--keep", both, "--out", tmp_path / "c")


def test_what_cannot_be_compared_is_refused(vit, tmp_path):
    assert "nothing" in bad("ptq", vit, *SMALL, "--recipes", "w8a8-nothing", "--out", tmp_path / "a")
    assert "--keep w4a4" in bad("ptq", vit, *SMALL, "--recipes", "w8a8", "--keep", "w4a4", "--out", tmp_path / "a")
    assert "each once" in bad("ptq", vit, *SMALL, "--recipes", "w8a8,w8a8", "--out", tmp_path / "a")
    own = tmp_path / "a" / "ptq.json"
    assert "a file that the command writes" in bad("ptq", vit, *SMALL, "--out", tmp_path / "a", "--json", own)
    rotated = tmp_path / "rotated.safetensors"
    good("quantize", vit, "--backend", "ref", "--recipe", "linear-w8a8-hadamard", "--out", rotated)
    assert "made for the transforms" in bad("ptq", rotated, *SMALL, "--recipes", "w8a8", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
