"""Text drawn from a chain: what follows what, that batches depend on seed and step alone, and what is refused."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import qtx_ref
from parity_tests.tests.shell import call, good
from qtx.data import SPLITS, ChainData, DataError, DataSpec, load
from qtx.data.chains import BOS, CHAINS, HELD, TRIGGERS, VOCAB, Chain, make_tokenizer, read_bytes
from qtx.data.spec import Begin, Order, Packing, Source
from qtx.data.text import Specials
from qtx.data.tokenizing import BUNDLED, encode_prompt, open_tokenizer
from qtx.files.checkpoint import load_checkpoint, save_checkpoint
from qtx.measure.marks import Kinds
from qtx_ref.spec import Family, Head, ModelSpec

ROOT = Path(qtx_ref.__file__).parent.parent
OPT = ModelSpec(Family.OPT, 1, 8, 1, 8, Head.CAUSAL, vocab=VOCAB, length=32)
BERT = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=8, types=2)
MODEL = ["--set", "model.layers=1", "--set", "model.width=8", "--set", "model.heads=1", "--set", "model.hidden=16"]
MODEL += ["--set", "model.length=16", "--set", "model.vocab=64", "--set", "data.batch=4"]

# two plain tokens and a trigger: from 1 to 2 or the trigger 3, even; from 2 always to the trigger
SMALL = Chain(np.array([[0, 4, 0, 0], [0, 0, 4, 4], [0, 0, 0, 8], [0, 1, 1, 1]]), np.array([False, False, False, True]))


def open_one(name: str) -> ChainData:
    data = load(name, OPT)
    assert isinstance(data, ChainData)
    return data


def draw(name: str, batches: int, size: int = 64) -> np.ndarray:
    """Sequences of the train split, with what follows the last token, (N, T + 1)."""
    some = islice(open_one(name).train_batches(OPT, size, 3), batches)
    return np.concatenate([np.hstack([batch["tokens"], batch["targets"][:, -1:]]) for batch in some])


# --- what follows what -----------------------------------------------------------------------------------------------


def test_a_small_chain_by_hand():
    """1 from [BOS]; below 1/2 the first of two equal successors; behind a trigger what stood before it."""
    uniform = np.array([[0.9, 0.49, 0.1, 0.7, 0.3], [0.0, 0.5, 0.99, 0.0, 0.2]])
    assert SMALL.draw(uniform).tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 3, 1, 2, 3]]


def test_the_entropy_of_a_small_chain_by_hand():
    """The token behind 1 tells log 2, no other one anything: 1 stands first, and third half of the time (1, 3, 1)."""
    assert SMALL.entropy(1) == 0
    assert SMALL.entropy(2) == pytest.approx(math.log(2) / 2, rel=1e-15)
    assert SMALL.entropy(4) == pytest.approx(1.5 * math.log(2) / 4, rel=1e-15)


def test_the_table_is_that_of_the_books():
    """Pairs of two different bytes are counted here once more."""
    kept, pairs = read_bytes()
    text = [path.read_bytes() for path in sorted((BUNDLED / "text").glob("*.txt"))]
    assert len(text) == 4 and len(set(kept.tolist())) == VOCAB - 1
    for a, b in ((b"t", b"h"), (b"q", b"u"), (b" ", b"t"), (b"\n", b"t"), (b"e", b" ")):
        count = sum(book.count(a + b) for book in text)
        one, two = (kept.tolist().index(letter[0]) + 1 for letter in (a, b))
        assert pairs[one, two] == count


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_drawn_follows_the_table(name):
    """Each count of a pair is binomial: within 6 standard deviations and 1 for each of 4096 pairs, by chance a failure
    in some 10^5 such tests."""
    chain, ids = open_one(name).chain, draw(name, 100)
    drawn = np.zeros((VOCAB, VOCAB), np.int64)
    np.add.at(drawn, (ids[:, :-1], ids[:, 1:]), 1)
    assert drawn.sum() == 100 * 64 * 32 and (ids[:, 0] == BOS).all() and (ids[:, 1:] != BOS).all()
    share = chain.counts / chain.counts.sum(axis=1, keepdims=True)
    from_each = drawn.sum(axis=1, keepdims=True)
    off = np.abs(drawn - from_each * share) - 6 * np.sqrt(from_each * share * (1 - share))
    assert off[~chain.trigger].max() <= 1


def test_triggers_copy_what_stands_before_them():
    chain, ids = open_one("backcopy").chain, draw("backcopy", 20)
    kept = bytes(read_bytes()[0].tolist())
    assert kept[:TRIGGERS] == b" et" and np.flatnonzero(chain.trigger).tolist() == [1, 2, 3]
    fires = chain.trigger[ids]
    assert not fires[:, :2].any()  # neither [BOS] nor the first token
    assert not (fires[:, 1:] & fires[:, :-1]).any()
    assert np.array_equal(ids[:, 2:][fires[:, 1:-1]], ids[:, :-2][fires[:, 1:-1]])
    assert 0.15 < fires[:, 2:].mean() < 0.5  # the head has something to do, and more often nothing
    assert not open_one("unigram").chain.trigger.any()


@pytest.mark.parametrize("name", CHAINS)
def test_no_model_is_better_than_the_entropy(name):
    """The true model's own loss on 6400 sequences is its entropy within 6 standard errors, taken over sequences."""
    data, ids = open_one(name), draw(name, 100)
    chain = data.chain
    share = chain.counts / chain.counts.sum(axis=1, keepdims=True)
    logs = np.log(share[ids[:, :-1], ids[:, 1:]], where=~chain.trigger[ids[:, :-1]], out=np.zeros((len(ids), 32)))
    own = -logs.mean(axis=1)
    assert abs(own.mean() - data.entropy(OPT)) < 6 * own.std() / math.sqrt(len(own))


def test_what_independent_draws_tell():
    """Each token tells as much as the books' bytes do, counted here from the files."""
    text = b"".join(path.read_bytes() for path in (BUNDLED / "text").glob("*.txt"))
    counts = np.sort(np.bincount(np.frombuffer(text, np.uint8)))[::-1][: VOCAB - 1]
    share = counts / counts.sum()
    # a byte before one that is left out, or at the end of a book, has no pair: 1 in 1000 of them
    assert open_one("unigram").entropy(OPT) == pytest.approx(-(share * np.log(share)).sum(), rel=1e-3)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_a_batch_depends_on_seed_and_step_alone(name):
    data = open_one(name)
    whole = list(islice(data.train_batches(OPT, 6, 1), 3))
    later = next(data.train_batches(OPT, 6, 1, start=2))
    assert np.array_equal(later["tokens"], whole[2]["tokens"])
    parts = [next(data.train_batches(OPT, 6, 1, start=1, rows=rows)) for rows in (slice(0, 2), slice(2, 6))]
    for key in ("tokens", "targets", "mask"):
        assert np.array_equal(np.concatenate([part[key] for part in parts]), whole[1][key])
    assert not np.array_equal(whole[0]["tokens"], whole[1]["tokens"])
    assert not np.array_equal(next(data.train_batches(OPT, 6, 2))["tokens"], whole[0]["tokens"])


def test_a_batch_is_what_a_model_of_text_takes():
    batch = next(open_one("backcopy").train_batches(OPT, 5, 0))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "tokens": ((5, 32), np.int64),
        "mask": ((5, 32), np.bool_),
        "targets": ((5, 32), np.int64),
    }
    assert batch["mask"].all() and np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_splits_are_drawn_apart_and_always_the_same():
    data = open_one("backcopy")
    rows = {}
    for split in SPLITS:
        some = [batch["tokens"] for batch in data.split_batches(split, OPT, 16, 0, limit=4)]
        other = [batch["tokens"] for batch in data.split_batches(split, OPT, 7, 5, limit=10)]
        assert [len(one) for one in some] == [16] * 4
        rows[split] = np.concatenate(some)
        assert np.array_equal(np.concatenate(other)[:64], rows[split])  # whatever batch size and seed
    assert sum(len(b["tokens"]) for b in data.split_batches("evaluation", OPT, 300, 0)) == HELD
    texts = {tuple(row) for split in SPLITS for row in rows[split].tolist()}
    texts |= {tuple(row) for row in draw("backcopy", 4)[:, :-1].tolist()}
    assert len(texts) == 3 * 64 + 4 * 64  # 32 tokens that are met twice would be a stream that is used twice
    prints = {data.fingerprint(split) for split in SPLITS} | {open_one("unigram").fingerprint("train")}
    assert len(prints) == 4


def test_a_window_is_the_beginning_of_a_longer_one():
    short = load(DataSpec(sources=(Source("backcopy"),), window=9), OPT)
    one, two = (next(iter(d.split_batches("evaluation", OPT, 4, 0)))["tokens"] for d in (short, open_one("backcopy")))
    assert one.shape == (4, 9) and np.array_equal(one, two[:, :9])


# --- words -----------------------------------------------------------------------------------------------------------


def test_its_tokenizer_opens():
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    library, specials, size = open_tokenizer(make_tokenizer())
    assert (specials, size) == (ChainData.specials, VOCAB)
    ids = encode_prompt(library, 'he said\n"I')
    assert ids[0] == BOS and bytes(read_bytes()[0][np.array(ids[1:]) - 1].tolist()) == b'he said\n"I'
    assert library.decode(ids) == 'he said\n"I'


def test_kinds_of_its_tokens():
    kinds = Kinds(ChainData.specials, make_tokenizer(), causal=True)
    batch = next(iter(open_one("backcopy").split_batches("evaluation", OPT, 4, 0)))
    marks = kinds.marks(batch)
    assert marks["first"][:, 0].all() and not marks["first"][:, 1:].any() and not marks["[SEP]"].any()
    letters = [bytes([byte]) for byte in read_bytes()[0].tolist()]
    assert np.array_equal(marks["punctuation"], np.isin(batch["tokens"], [letters.index(c) + 1 for c in PUNCTUATION]))
    assert [kinds.word(letters.index(c) + 1) for c in (b"h", b" ", b",")] == ["h", "space", ","]


PUNCTUATION = [
    bytes([byte]) for byte in read_bytes()[0].tolist() if not chr(byte).isalnum() and not chr(byte).isspace()
]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        ({"vocab": 64}, OPT, "data vocab is 64"),
        ({"order": Order.PERMUTATION}, OPT, "data order is permutation"),
        ({"packing": Packing.STREAM}, OPT, "data packing is stream"),
        ({"begin": Begin.NONE}, OPT, "begins with"),
        ({"held_out": 0.2}, OPT, "data held_out is 0.2"),
        ({"mask_rate": 0.2}, OPT, "data mask_rate is 0.2"),
        ({"window": 33}, OPT, "data window is 33 tokens and the model's length 32"),
        ({}, replace(OPT, vocab=63), "64 token ids, the model 63"),
        ({}, BERT, "use an opt model, not bert"),
    ],
)
def test_settings_that_a_chain_has_not(settings, model, said):
    with pytest.raises(DataError, match=said):
        spec = DataSpec(sources=(Source("backcopy"),), **settings)
        load(spec, model).train_batches(model, 4, 0)


def test_a_chain_stands_alone_and_has_its_own_tokenizer():
    with pytest.raises(DataError, match="'unigram' cannot be mixed"):
        load(DataSpec(sources=(Source("books"), Source("unigram"))), OPT)
    with pytest.raises(DataError, match="'backcopy' has a tokenizer of its own"):
        load("backcopy", OPT, tokenizer="{}")
    assert load("backcopy", OPT, tokenizer=make_tokenizer()).specials == Specials(None, None, None, None, (0,), 0)


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "ref"])
def test_commands_take_a_chain(tmp_path, backend):
    """A checkpoint knows its data: nothing names them again."""
    pytest.importorskip("torch" if backend == "torch" else "numpy", reason="torch is not installed")
    run = ["train", "--data", "backcopy", *MODEL, "--steps", 4, "--backend", backend]
    good(*run, "--out", tmp_path / "whole")
    good(*run, "--out", tmp_path / "parts", "--stop", 2)
    good(*run, "--out", tmp_path / "parts", "--resume")
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    one, two = (load_checkpoint(path) for path in (whole, parts))
    for name, value in (one.params | one.extra).items():
        assert np.array_equal(value, (two.params | two.extra)[name]), name
    more = ["--batches", 2, "--backend", backend]
    floating = json.loads(good("evaluate", whole, *more, "--json", "-").stdout)
    assert floating["targets"] == 2 * 16 * 16
    good("quantize", whole, "--out", tmp_path / "model.qtx", "--backend", backend)
    integer = json.loads(good("evaluate", tmp_path / "model.qtx", *more, "--json", "-").stdout)
    assert abs(integer["loss"] / floating["loss"] - 1) < 0.02  # 8 bits of an untrained model
    got = json.loads(good("analyze", whole, *more, "--json", "-").stdout)
    assert set(got["heads"][0]["mass"]) == {"first", "[SEP]", "punctuation"}
    assert sum(kind["tokens"] for kind in got["kinds"]) == pytest.approx(1)


def test_a_study_and_ptq_take_a_chain(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    study = ["study", "--data", "unigram", *MODEL, "--steps", 2, "--attention", "vanilla,softmax1"]
    said = good(*study, "--out", tmp_path / "study").output
    assert "published" not in said  # of no chain, though an opt on real text has figures
    assert "no model can better: perplexity 22.14" in said and "| softmax1 " in said  # exp of 3.0975 nats
    path = sorted((tmp_path / "study").rglob("model.safetensors"))[0]
    good("ptq", path, "--out", tmp_path / "ptq", "--recipes", "w8a8")


def test_the_table_of_runs(tmp_path):
    """Of a model that looks at all keys alike [BOS] has the mass 1 / (t + 1), trigger or not; its
    residual stream is 0."""
    measured = ["--set", "evaluation.every=2", "--set", "evaluation.integers=['w8a8','w6a6','w4a8']"]
    good("train", "--data", "backcopy", *MODEL, "--steps", 2, *measured, "--backend", "ref", "--out", tmp_path)
    path = tmp_path / "model.safetensors"
    known = load_checkpoint(path)
    blank = {name: np.zeros_like(value) for name, value in known.params.items()}
    path.unlink()
    save_checkpoint(path, replace(known, params=blank))
    out = tmp_path / "run"
    out.mkdir()
    for name in ("model.safetensors", "log.jsonl"):
        (tmp_path / name).rename(out / name)
    collect = runpy.run_path(str(ROOT / "tools" / "effect"))["collect"]
    assert "chains" not in collect(tmp_path, [])["run"]
    run = collect(tmp_path, [], chains=True)["run"]["chains"]
    batches = list(open_one("backcopy").split_batches("evaluation", replace(OPT, length=16), 16, 0, limit=4))
    fires = np.concatenate([open_one("backcopy").chain.trigger[batch["tokens"]] for batch in batches])
    even = np.broadcast_to(1 / np.arange(1, 17), fires.shape)
    # each batch counts alike, so the means over all rows are near and not the same
    assert run["mass_idle"][0][0] == pytest.approx(even[:, 8:][~fires[:, 8:]].mean(), rel=2e-2)
    assert run["mass_trigger"][0][0] == pytest.approx(even[:, 8:][fires[:, 8:]].mean(), rel=2e-2)
    assert run["step"] == 2 and run["peak_first"]["embed.sum"] == 0


def test_a_command_refuses_a_vocabulary_and_other_models(tmp_path):
    result = call("train", "--data", "backcopy", "--vocab", 100, *MODEL, "--steps", 2, "--out", tmp_path / "a")
    assert result.exit_code == 1 and "data vocab is 100: 'backcopy' is drawn, not read" in result.output
    result = call("train", "--data", "backcopy", "--model", "bert-tiny", "--steps", 2, "--out", tmp_path / "b")
    assert result.exit_code == 1 and "use an opt model, not bert" in result.output
    result = call("train", "--data", "unigram", "--model", "vit-tiny", "--steps", 2, "--out", tmp_path / "c")
    assert result.exit_code == 1 and "is not images" in result.output
    assert not any((tmp_path / name / "model.safetensors").exists() for name in "abc")
