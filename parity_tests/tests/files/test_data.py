"""The data: what is bundled, what may be relied on in every batch, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtx.data import (
    SPLITS,
    DataError,
    Section,
    TextData,
    load,
    unigram_perplexity,
)
from qtx.data.corpus import BOOKS, read_books, split_chapters, tokenize
from qtx.data.images import ImageData
from qtx.data.rows import read_text
from qtx.data.splits import digest, name_splits
from qtx.data.text import Specials
from qtx.data.tokenizing import BUNDLED, train_tokenizer
from qtx.engines.backend import MissingExtra
from qtx_ref.spec import Family, Head, ModelSpec

PAD, UNK, CLS, SEP, MASK = range(5)
OPT = ModelSpec(Family.OPT, 1, 8, 1, 8, Head.CAUSAL, vocab=2048, length=32)
BERT = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=32, types=2)
VIT = ModelSpec(Family.VIT, 1, 8, 1, 8, Head.CLASSIFY, classes=10, image_size=8, patch_size=2, channels=1)


def made(sizes: list[list[int]]) -> TextData:
    """Sections of the given sizes per split; every token has an id of its own, so a batch shows where it is from."""
    upto = itertools.accumulate((n for split in sizes for n in split), initial=5)
    sections = [
        Section(f"{split} {i}", digest(f"{split} {i}".encode()), split, np.arange(low, low + n, dtype=np.int32))
        for (split, i, n), low in zip(
            ((split, i, n) for split, row in zip(SPLITS, sizes, strict=True) for i, n in enumerate(row)),
            upto,
            strict=False,
        )
    ]
    return TextData("made", sections, "", 5 + sum(map(sum, sizes)), Specials(PAD, CLS, SEP, MASK, (0, 1, 2, 3, 4)))


def sized(spec: ModelSpec, data: TextData, length: int) -> ModelSpec:
    return dataclasses.replace(spec, length=length, vocab=data.vocab)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def home(data: TextData, split: str, token: int) -> int:
    """The index of the split's section that holds `token`."""
    rows = [s for s in data.sections if s.split == split]
    (got,) = [i for i, s in enumerate(rows) if token in s.tokens]
    return got


# --- bundled -------------------------------------------------------------------------------------------------------


def test_bundled_chapters():
    counts = {name: len(split_chapters(read_text(BUNDLED / "text" / f"{name}.txt"))) for name in BOOKS}
    assert counts == {"alice": 12, "thursday": 15, "persuasion": 24, "sense": 50}
    data = load(None, OPT)
    assert len(data.sections) == 101
    assert data.sections[0].title == "Alice's Adventures in Wonderland: CHAPTER I. Down the Rabbit-Hole"
    assert [data.token_count(split) for split in SPLITS] == [327583, 61272, 47417]


def test_bundled_chapters_are_the_text():
    passages = read_books()
    assert [(p.title, p.split, digest(p.text.encode())) for p in passages] == [
        (s.title, s.split, s.sha256) for s in load("books", OPT).sections
    ]
    assert all("gutenberg" not in p.text.lower() for p in passages)


def test_bundled_splits_are_runs_of_chapters_of_every_book():
    sections = load("books", OPT).sections
    for book in BOOKS.values():
        splits = [s.split for s in sections if s.title.startswith(f"{book}: ")]
        assert [split for split, _ in itertools.groupby(splits)] == list(SPLITS)
        assert splits == name_splits(len(splits))


def test_bundled_ids_are_the_tokenized_text():
    pytest.importorskip("tokenizers", reason="tokenizing the bundled text needs the extra qtx[text]")
    stored = load("books", OPT)
    fresh = tokenize("books", read_books(), stored.tokenizer_json)
    assert (fresh.vocab, fresh.specials) == (stored.vocab, stored.specials)
    assert fresh.describe() == stored.describe()
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(fresh.sections, stored.sections, strict=True))
    held = np.concatenate([s.tokens for s in stored.sections if s.split != "train"])
    assert (held == UNK).mean() < 1e-4


def test_bundled_tokenizer_saw_the_train_split_alone():
    pytest.importorskip("tokenizers", reason="training a tokenizer needs the extra qtx[text]")
    texts = [p.text for p in read_books() if p.split == "train"]
    again = train_tokenizer(texts, 2048)
    assert json.loads(again)["model"]["vocab"] == json.loads(load(None, OPT).tokenizer_json)["model"]["vocab"]


def test_bundled_text_needs_no_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load(None, BERT).vocab == 2048
    with pytest.raises(MissingExtra, match=r"qtx\[text\]"):
        load("books", BERT, vocab=500)


def test_bundled_files_are_small_and_have_a_source():
    files = [file for file in BUNDLED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 3e6
    source = (BUNDLED / "SOURCE.md").read_text()
    assert all(file.name in source for file in files if file.name != "SOURCE.md")


def test_digits():
    data = load(None, VIT)
    images = np.concatenate([b["images"] for split in SPLITS for b in data.split_batches(split, VIT, 256, 0)])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == np.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert data.classes == 10 and data.dropped == 0
    hashes = [set(data.hashes(split)) for split in SPLITS]
    assert [len(h) for h in hashes] == [1437, 180, 180]
    assert not hashes[0] & hashes[1] and not hashes[0] & hashes[2] and not hashes[1] & hashes[2]
    assert load("digits", VIT).describe() == data.describe()
    assert load("digits", VIT, seed=1).fingerprint("train") != data.fingerprint("train")


# --- batches -------------------------------------------------------------------------------------------------------

SIZES = st.tuples(*[st.lists(st.integers(0, 40), min_size=1, max_size=6)] * 3).map(list)


@given(SIZES, st.integers(3, 20), st.integers(0, 3), st.sampled_from([OPT, BERT]))
def test_windows_stay_in_their_section(sizes, length, step, spec):
    for row in sizes:
        row.append(50)  # a split can always fill one batch
    data = made(sizes)
    spec = sized(spec, data, length)
    batches = [("train", next(data.train_batches(spec, 2, 7, step)))]
    batches += [(split, batch) for split in SPLITS for batch in data.split_batches(split, spec, 2, 7)]
    for split, batch in batches:
        assert batch["tokens"].dtype == batch["targets"].dtype == np.int64 and batch["mask"].dtype == bool
        assert batch["tokens"].shape[1] == length
        tokens, mask, targets = batch["tokens"], batch["mask"], batch["targets"]
        assert (tokens[~mask] == PAD).all() and (targets[~mask] == -1).all()
        assert (targets >= 0).any(1).all()
        for row, real, target in zip(tokens, mask, targets, strict=True):
            assert real[0] and not (np.diff(real.astype(int)) > 0).any()  # padding stands at the end
            if spec.causal:
                inside = row[real]
                assert (np.diff(inside) == 1).all()
                known = target >= 0
                assert np.array_equal(target[known], row[known] + 1)
                assert known[real][:-1].all()
                last = target[known][-1]
            else:
                assert row[0] == CLS and row[real][-1] == SEP and (batch["types"] == 0).all()
                restored = np.where(target >= 0, target, row)[real][1:-1]
                assert (np.diff(restored) == 1).all()
                inside, last = restored, restored[-1]
            assert home(data, split, inside[0]) == home(data, split, last)


def test_train_windows_are_equally_likely():
    # windows of 5 and a target ahead: ids 5 to 13 have four of them, one id none, the last three ids a padded one
    data = made([[9, 1, 0, 3], [60], [60]])
    batches = list(itertools.islice(data.train_batches(sized(OPT, data, 5), 2, 0), 2000))
    first = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    starts, counts = np.unique(first, return_counts=True)
    assert starts.tolist() == [5, 6, 7, 8, 15]
    assert (abs(counts - 800) < 5 * math.sqrt(4000 * 0.2 * 0.8)).all()  # 5 standard deviations
    full = np.concatenate([(batch["targets"] >= 0).all(1) for batch in batches])
    assert np.array_equal(full, first < 15)


@given(SIZES, st.integers(3, 20), st.integers(1, 9), st.sampled_from([OPT, BERT]))
def test_split_batches_cover_the_split_once(sizes, length, size, spec):
    sizes[2].append(20 * 9 + 1)
    data = made(sizes)
    spec = sized(spec, data, length)
    seen = []
    for batch in data.split_batches("evaluation", spec, size, 0):
        tokens, targets = batch["tokens"], batch["targets"]
        seen.append(targets[targets >= 0] if spec.causal else np.where(targets >= 0, targets, tokens)[batch["mask"]])
    ids = np.concatenate(seen)
    expected = [s.tokens[1:] if spec.causal else s.tokens for s in data.sections if s.split == "evaluation"]
    assert np.array_equal(ids[ids > MASK], np.concatenate(expected))


@pytest.mark.parametrize("spec", [OPT, BERT, VIT], ids=["opt", "bert", "vit"])
def test_batch_depends_on_seed_and_step_alone(spec):
    data = load(None, spec)
    run = list(itertools.islice(data.train_batches(spec, 4, 3), 6))
    for step in (0, 3, 5):
        assert same(run[step], next(data.train_batches(spec, 4, 3, start=step)))
    assert not same(run[0], run[1])
    assert not same(run[0], next(data.train_batches(spec, 4, 4)))
    small, large = (list(data.split_batches("evaluation", spec, size, 3, limit=12 // size)) for size in (2, 6))
    for key in run[0]:  # the windows and their masks do not depend on the batch size
        assert np.array_equal(np.concatenate([b[key] for b in small]), np.concatenate([b[key] for b in large]))


@pytest.mark.parametrize("spec", [OPT, BERT, VIT], ids=["opt", "bert", "vit"])
def test_rows_of_a_batch_are_slices_of_it(spec):
    data = load(None, spec)
    whole = next(data.train_batches(spec, 6, 3, start=2))
    for part in (slice(0, 2), slice(2, 6), slice(5, 6)):
        own = next(data.train_batches(spec, 6, 3, start=2, rows=part))
        assert same(own, {key: value[part] for key, value in whole.items()})


def test_digits_pass_visits_every_image_once():
    data = load(None, VIT)
    labels = [next(data.train_batches(VIT, 479, 0, step))["labels"] for step in range(3)]  # 3 x 479 = 1437
    expected = data.labels[data._rows["train"]]
    assert np.array_equal(np.bincount(np.concatenate(labels)), np.bincount(expected))
    across = next(data.train_batches(VIT, 1000, 0, 1))  # rows 1000 to 1999: the end of one pass and the next's start
    assert len(across["labels"]) == 1000


def test_masking_rates():
    data = load(None, BERT)
    spec = dataclasses.replace(BERT, length=128)
    batches = list(itertools.islice(data.train_batches(spec, 64, 0), 20))
    tokens, targets, mask = (np.concatenate([b[key] for b in batches]) for key in ("tokens", "targets", "mask"))
    chosen = targets >= 0
    ordinary = mask & (np.where(chosen, targets, tokens) > MASK)
    assert not (chosen & ~ordinary).any()  # [CLS], [SEP] and padding are never masked
    hidden, kept = (tokens == MASK)[chosen], (tokens == targets)[chosen]
    replaced = ~hidden & ~kept
    assert (tokens[chosen][replaced] > MASK).all()

    def near(got: np.ndarray, rate: float) -> bool:
        return abs(got.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / got.size)  # 5 standard deviations

    assert near(chosen[ordinary], 0.15)
    assert near(hidden, 0.8) and near(replaced, 0.1) and near(kept, 0.1)


def test_random_words_are_spread_over_the_vocabulary():
    data = made([[1000], [50], [50]])
    rows = np.zeros(400, int)
    batch = data._cut("train", spec := sized(BERT, data, 102), rows, rows, np.full(400, 1000))
    draws = np.random.default_rng(0).random((3, 400, 102))
    draws[0], draws[1] = 0.0, 0.85  # choose all, replace all
    tokens = data._mask(batch, draws)["tokens"][:, 1:-1]
    assert tokens.min() == MASK + 1 and tokens.max() == spec.vocab - 1


def test_batches_cost_little():
    data = load(None, BERT)
    batches = data.train_batches(dataclasses.replace(BERT, length=128), 16, 0)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[10] < 2e-3


def test_unigram_perplexity_by_hand():
    # train targets 6, 6, 6, 7 (the first token is never one), plus one each of 8 ids: p(6) = 4/12, p(7) = 2/12
    sections = [
        Section(split, digest(split.encode()), split, np.array(tokens, np.int32))
        for split, tokens in zip(SPLITS, ([5, 6, 6, 6, 7], [5, 5], [5, 6, 7]), strict=True)
    ]
    data = TextData("made", sections, "", 8, Specials(PAD, CLS, SEP, MASK, (0, 1, 2, 3, 4)))
    got = unigram_perplexity(data, dataclasses.replace(OPT, vocab=8, length=2), seed=0, batch_size=1)
    assert got == pytest.approx(math.sqrt(12 / 4 * 12 / 2), rel=1e-12)


def test_unigram_perplexity_of_the_bundled_text():
    data = load(None, OPT)
    perplexity = unigram_perplexity(data, OPT, seed=0)
    assert perplexity == unigram_perplexity(data, OPT, seed=1, batch_size=5)
    assert perplexity == pytest.approx(480.2, abs=0.1)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_same_section_in_two_splits_is_refused():
    tokens = np.arange(5, 9, dtype=np.int32)
    twins = [Section("a", digest(b"a"), "train", tokens), Section("b", digest(b"a"), "evaluation", tokens)]
    with pytest.raises(DataError, match="'b' of the evaluation split is also in train"):
        TextData("made", twins, "", 9, Specials(PAD, CLS, SEP, MASK, (0, 1, 2, 3, 4)))


def test_equal_images_are_left_out():
    images = np.arange(20, dtype=np.uint8).repeat(64).reshape(20, 8, 8) % 10
    data = ImageData("made", images, np.arange(20) % 10)
    assert data.dropped == 10
    assert sum(len(data.hashes(split)) for split in SPLITS) == 10


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        ("books", VIT, "not images"),
        ("digits", OPT, "use 'books'"),
        (None, dataclasses.replace(BERT, head=Head.CLASSIFY, classes=2), "4 classes and the model 2"),
        (None, dataclasses.replace(VIT, image_size=16), "use vit-tiny"),
        (None, dataclasses.replace(VIT, classes=4), "10 classes and the model 4"),
        ("no/such/place", OPT, "no/such/place cannot be read"),
        (None, dataclasses.replace(OPT, length=100_000), "too short"),
    ],
)
def test_load_refuses(source, spec, message):
    with pytest.raises(DataError, match=message) as caught:
        load(source, spec)
    assert "\n" not in str(caught.value)


def test_load_refuses_options_that_cannot_apply():
    with pytest.raises(DataError, match="images have no words"):
        load(None, VIT, vocab=100)
    with pytest.raises(DataError, match="exclude each other"):
        load(None, OPT, vocab=100, tokenizer=BUNDLED / "tokenizer.json")


def test_batches_refuse():
    data = load(None, OPT)
    with pytest.raises(DataError, match="set its vocab to 2048"):
        data.train_batches(dataclasses.replace(OPT, vocab=100), 4, 0)
    with pytest.raises(DataError, match="choose one of train"):
        data.split_batches("test", OPT, 4, 0)
    with pytest.raises(DataError, match="do not fill one batch of 100000"):
        data.train_batches(OPT, 100_000, 0)
    with pytest.raises(DataError, match="batch size is 0"):
        data.split_batches("evaluation", OPT, 0, 0)
    with pytest.raises(DataError, match="at least 3"):
        data.train_batches(dataclasses.replace(BERT, length=2), 4, 0)
