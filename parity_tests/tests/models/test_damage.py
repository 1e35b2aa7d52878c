"""The damage of quantization and the part of it that belongs to some tokens; `qtx ptq --spare`."""

import json
import math

import numpy as np
import pytest

from parity_tests.subjects import small_models
from parity_tests.tests.shell import call, good
from qtx.data import load
from qtx.data.spec import DataSpec
from qtx.engines.machine import Machine
from qtx.jobs.opening import open_checkpoint, open_data
from qtx.measure.damage import check_spared, compare_damage, find_spared, measure_damage
from qtx.measure.marks import make_kinds
from qtx.measure.paired import Measured, compare
from qtx.measure.scores import Answers
from qtx.recipes.named import recipe
from qtx_ref.backend import Model
from qtx_ref.presets import preset
from qtx_ref.spec import SpecError


def measured(*loss):
    """A pass over sequences of one, two, ... targets with these mean losses."""
    count = np.arange(1, len(loss) + 1)
    return Measured(Answers(np.array(loss) * count, count, np.zeros_like(count)), 1.0)


def first(batch):
    return np.arange(batch["tokens"].shape[1]) == np.zeros((len(batch["tokens"]), 1))


# --- differences ------------------------------------------------------------------------------------------------------


def test_a_difference_is_of_means_over_targets():
    nats, (low, high) = compare("loss", measured(2.0, 5.0), measured(1.0, 2.0), 0)
    assert nats == pytest.approx((1 * 1 + 2 * 3) / 3, rel=1e-15)
    assert (low, high) == pytest.approx((1.0, 3.0), rel=1e-15)  # two sequences: one of them alone, or the other


def test_the_part_is_what_sparing_gains():
    damage = compare_damage(measured(1.0, 1.0), measured(3.0, 3.0), measured(1.5, 1.5), 0)
    assert (damage.whole.nats, damage.part.nats) == (2.0, 1.5) and not damage.destroyed


@pytest.mark.parametrize(("after", "destroyed"), [(1 + 0.99 * math.log(10), False), (1 + 1.01 * math.log(10), True)])
def test_ten_times_the_perplexity_is_destroyed(after, destroyed):
    damage = compare_damage(measured(1.0), measured(after), measured(1.0), 0)
    assert damage.destroyed is destroyed
    assert damage.whole.nats == pytest.approx(after - 1, rel=1e-12)


def test_a_loss_that_is_no_number_is_destroyed():
    damage = compare_damage(measured(1.0, 1.0), measured(math.nan, 2.0), measured(1.0, 1.0), 0)
    assert damage.destroyed and damage.whole is None


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_the_first_token_is_the_first_real_one():
    spec = small_models.build("opt_plain").spec
    batch = {"tokens": np.zeros((3, 4), int), "mask": np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)}
    got = find_spared(spec, batch, ("first",))
    assert got.tolist() == [[True, False, False, False], [False, False, True, False], [False] * 4]
    vit = small_models.build("vit_plain")
    assert find_spared(vit.spec, vit.batch, ("first",)).sum(axis=0).tolist() == [3] + [0] * (vit.spec.length - 1)


def test_delimiters_are_those_of_the_tokenizer():
    spec = preset("bert-tiny")
    data = load(DataSpec(), spec)
    batch = next(iter(data.split_batches("evaluation", spec, 4, 0, limit=1)))
    kinds = make_kinds(spec, data)
    specials = data.specials
    assert (find_spared(spec, batch, ("first",)) == (batch["tokens"] == specials.cls)).all()
    assert (find_spared(spec, batch, ("[SEP]",), kinds) == (batch["tokens"] == specials.sep)).all()
    both = find_spared(spec, batch, ("first", "[SEP]", "punctuation"), kinds)
    words = {kinds.word(token) for token in batch["tokens"][both]}
    assert {"[CLS]", "[SEP]", ","} <= words and not any(map(str.isalpha, words))


def test_unknown_kinds_are_refused():
    opt, vit = small_models.build("opt_plain").spec, small_models.build("vit_plain").spec
    for spec, names in ((opt, ("last",)), (opt, ("first", "first")), (vit, ("[SEP]",))):
        with pytest.raises(SpecError, match="spared tokens are"):
            check_spared(spec, names)


@pytest.mark.parametrize("change", [{"spared": np.ones((2, 2), bool)}, {"spared": np.ones((3, 8))}])
def test_a_mask_that_is_none_is_refused(change):
    small = small_models.build("opt_plain")
    with pytest.raises(SpecError, match="spared"):
        Model(small.spec, small.params).forward({**small.batch, **change})


# --- a planted sink ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_a_planted_outlier_is_the_first_tokens(backend):
    """One channel of the first position is about 30 times what others hold: a range per tensor is made for it, ranges
    per token are not. Sparing that token takes the damage away, and sparing another does not."""
    small = small_models.build("opt_plain")
    params = {name: value.copy() for name, value in small.params.items()}
    params["embed.token.weight"] *= 4  # the head's too: a loss that feels what is lost
    params["embed.position.weight"][small.spec.position_offset, 0] = 240.0
    plain = Model(small.spec, params)
    batches = [small_models.make_batch(small.spec, size) for size in (3, 5, 6)]
    for batch in batches:  # what the float model says is right, so that whatever moves it costs
        batch["targets"] = np.where(batch["mask"], plain.forward(batch).argmax(axis=-1), -1)

    def measure(name, find):
        chosen = recipe(name, small.spec)
        arguments = Machine(backend), small.spec, params, chosen, lambda count: batches[:1], lambda: iter(batches)
        return measure_damage(*arguments, find)

    per_tensor, per_token = measure("w8a6", first), measure("w8a6-token", first)
    assert abs(per_tensor.part.nats / per_tensor.whole.nats - 1) < 0.25  # what is left is that of ordinary tokens
    assert per_tensor.whole.nats > 10 * abs(per_token.whole.nats)
    last = measure("w8a6", lambda batch: np.roll(first(batch), -1, axis=1))  # gains no more than its own error
    assert abs(last.part.nats) < 0.25 * per_tensor.part.nats


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    out = tmp_path_factory.mktemp("opt")
    shape = ("--set", "model.layers=1", "--set", "model.width=16", "--set", "model.heads=2", "--set", "model.hidden=16")
    begin = ("--set", "model.length=16", "--set", "data.begin=window", "--batch", "4", "--steps", "2")
    good("train", "--model", "opt-tiny", *shape, *begin, "--out", out)
    return out / "model.safetensors"


SMALL = ("--sequences", "6", "--calibration", "1", "--recipes", "w8a8,w8a8-token")


def test_windows_begin_as_the_checkpoint_s_own(opt):
    """The beginning token that a model is trained with stands before every window that it is measured on, whichever
    the text."""
    stored = open_checkpoint(opt)
    for source in (None, "books"):
        data = open_data(opt, stored.spec, stored.meta, source, None)
        for split in ("calibration", "evaluation"):
            for batch in data.split_batches(split, stored.spec, 4, 0, limit=2):
                assert (batch["tokens"][:, 0] == data.specials.around(causal=True)[0]).all()
                assert (find_spared(stored.spec, batch, ("first",)) == first(batch)).all()


def test_the_command(opt, tmp_path):
    out = tmp_path / "ptq"
    shown = good("ptq", opt, *SMALL, "--spare", "first", "--out", out).stdout
    assert "of it first's, nats" in shown
    content = json.loads((out / "ptq.json").read_text())
    assert content["of"]["spec"]["spare"] == ["first"]
    plain = content["rows"]["float"]["loss"]
    for name in ("w8a8", "w8a8-token"):
        row = content["rows"][name]
        whole, part = row["damage"]["whole"], row["damage"]["part"]
        assert whole["nats"] == pytest.approx(row["simulated"]["loss"] - plain, abs=1e-12)  # float64 means
        assert part["nats"] == pytest.approx(row["simulated"]["loss"] - row["spared"]["loss"], abs=1e-12)
        assert whole["low"] <= whole["nats"] <= whole["high"] and part["low"] <= part["nats"] <= part["high"]
    assert "spare" in call("ptq", opt, *SMALL, "--out", out, "--resume").stderr  # another comparison
    good("ptq", opt, *SMALL, "--spare", "first", "--out", out, "--resume")


def test_without_it_a_comparison_is_what_it_was(opt, tmp_path):
    out = tmp_path / "ptq"
    assert "damage" not in good("ptq", opt, *SMALL, "--spare", ",", "--out", out).stdout  # a list of nothing
    content = json.loads((out / "ptq.json").read_text())
    assert "spare" not in content["of"]["spec"]
    assert not {"spared", "damage"} & content["rows"]["w8a8"].keys()


def test_what_does_not_go_together_is_refused(opt, tmp_path):
    for more, words in (
        (("--spare", "last"), "choose of first"),
        (("--spare", "first", "--sensitivity", "w8a8"), "--spare first"),
    ):
        result = call("ptq", opt, "--sequences", "6", "--out", tmp_path / "a", *more)
        assert result.exit_code == 1 and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()
