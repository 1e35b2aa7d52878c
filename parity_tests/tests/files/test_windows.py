"""Windows: which there are, in what order they come, what stands around them, and mixtures of sources."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import pytest

from qtx.data import SPLITS, DataError, DataSpec, Section, TextData, load
from qtx.data.spec import Begin, Order, Packing, Source
from qtx.data.splits import digest
from qtx.data.text import Specials, make_part
from qtx.data.windows import BLOCK, Mixture, Reach, Tokens, Windows, order_epochs, permute
from qtx_ref.random import stream
from qtx_ref.spec import Family, Head, ModelSpec, SpecError

PAD, UNK, CLS, SEP, MASK = range(5)
OPT = ModelSpec(Family.OPT, 1, 8, 1, 8, Head.CAUSAL, vocab=2048, length=8)
BERT = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=8, types=2)
PLAIN = replace(BERT, head=Head.NONE)
VIT = ModelSpec(Family.VIT, 1, 8, 1, 8, Head.CLASSIFY, classes=10, image_size=8, patch_size=2, channels=1)
SPECIALS = Specials(PAD, CLS, SEP, MASK, (0, 1, 2, 3, 4))


def sections(sizes: list[int], low: int = 5, name: str = "") -> list[Section]:
    """Sections in every split whose tokens are 5, 6, 7, ... so that each shows where it is from."""
    made, at = [], low
    for split in SPLITS:
        for i, size in enumerate(sizes):
            title = f"{name} {split} {i}"
            tokens = np.arange(at, at + size, dtype=np.int32)
            made.append(Section(title, digest(title.encode()), split, tokens))
            at += size if split == "train" else 0
    return made


def made(sizes: list[int], **settings) -> TextData:
    return TextData("made", sections(sizes), "", 2048, SPECIALS, settings=DataSpec(**settings))


# --- the permutation -------------------------------------------------------------------------------------------------


def keys_of(epoch: int) -> np.ndarray:
    return stream(0, "keys", epoch).integers(2**64, size=8, dtype=np.uint64)


@pytest.mark.parametrize("count", [*range(1, 40), 64, 65, 1000, 4097])
def test_a_permutation_has_every_place_once(count):
    got = permute(np.arange(count), count, keys_of(count))
    assert np.array_equal(np.sort(got), np.arange(count))


def test_permutations_are_spread_over_all():
    """Each of 8 windows is first equally often: 4000 draws, chi square of 7 degrees below its 1 - 1e-6 quantile, 40."""
    first = Counter(int(permute(np.array([0]), 8, keys_of(epoch))[0]) for epoch in range(4000))
    assert sum((first[i] - 500) ** 2 / 500 for i in range(8)) < 40
    pairs = np.array([permute(np.arange(1000), 1000, keys_of(epoch)) for epoch in range(20)])
    neighbours = (np.diff(pairs, axis=1) == 1).mean()
    assert neighbours < 5 / 1000  # of a random order 1 in 1000


def test_any_size_costs_the_same():
    got = permute(np.arange(10**15, 10**15 + 32), 10**15 + 33, keys_of(0))
    assert len(set(got.tolist())) == 32 and got.min() >= 0 and got.max() < 10**15 + 33


def test_epochs_differ_and_any_place_is_known_at_once():
    whole = order_epochs(np.arange(300), 100, 1, 0)
    epochs = whole.reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(order_epochs(np.arange(95, 205), 100, 1, 0), whole[95:205])
    assert not np.array_equal(order_epochs(np.arange(100), 100, 1, 1), epochs[0])  # another source


# --- which windows there are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [*Packing])
@pytest.mark.parametrize("reach", [Reach(4, 4), Reach(5, 4), Reach(3, 3), Reach(2, 1)])
@pytest.mark.parametrize("sizes", [[7], [1, 0, 9, 4, 2], [0, 0, 12], [5, 5]])
def test_windows_are_those_that_a_loop_finds(packing, reach, sizes):
    cut = len(sizes) // 2
    arrays, ends, low = [], [], 0
    for part in (sizes[:cut], sizes[cut:]):  # in two shards
        arrays.append(np.arange(low, low + sum(part)))
        ends.append(np.cumsum(part, dtype=np.int64))
        low += sum(part)
    tokens = Tokens(arrays, ends)
    windows = Windows(tokens, reach, packing)
    ahead = reach.read - reach.step
    upto = np.cumsum(sizes) if packing is Packing.SECTION else [sum(sizes)]
    begins = [0, *upto[:-1]]
    adjoining = [(f, e) for b, e in zip(begins, upto, strict=True) for f in range(b, e - ahead, reach.step)]
    anywhere = [
        (f, e)
        for b, e in zip(begins, upto, strict=True)
        if e - b > ahead
        for f in range(b, b + max(e - b - reach.read + 1, 1))
    ]
    assert (windows.count, windows.choices) == (len(adjoining), len(anywhere))
    assert list(zip(*windows.adjoining(np.arange(windows.count)), strict=True)) == adjoining
    assert list(zip(*windows.random(np.arange(windows.choices)), strict=True)) == anywhere
    assert np.array_equal(tokens.take(np.arange(sum(sizes)).reshape(1, -1)), [np.arange(sum(sizes))])


@pytest.mark.parametrize("packing", [*Packing])
@pytest.mark.parametrize("begin", [None, *Begin])
@pytest.mark.parametrize("spec", [OPT, PLAIN], ids=["opt", "bert"])
def test_an_epoch_has_every_token_once(packing, begin, spec):
    """Every token that can be predicted is the target of one window (OPT), or stands in one (BERT)."""
    data = made([30, 3, 17, 1, 40], order=Order.PERMUTATION, packing=packing, begin=begin)
    (windows,) = data._cut_windows("train", spec)
    epoch = list(islice(data.train_batches(spec, 1, 0), windows.count))
    seen = np.concatenate(
        [(b["targets"] if spec.causal else np.where(b["mask"], b["tokens"], -1)).ravel() for b in epoch]
    )
    first = {Packing.SECTION: [5, 35, 38, 55, 56], Packing.STREAM: [5]}[packing]
    missing = first if spec.causal and begin is not Begin.WINDOW else []  # what nothing stands before
    assert sorted(seen[seen > MASK].tolist()) == sorted({*range(5, 96)} - {*missing})
    again = next(data.train_batches(spec, 1, 0, start=windows.count))
    both = np.array([epoch[0]["tokens"], again["tokens"]])
    assert not np.array_equal(*both)  # another order: 1 in `count` that the first window is the same


def test_what_stands_around_a_window_by_hand():
    def first(spec: ModelSpec, **settings) -> list[int]:
        data = made([20, 20], packing=Packing.STREAM, **settings)
        return next(data.split_batches("train", spec, 1, 0, limit=1))["tokens"][0].tolist()

    assert first(OPT) == [5, 6, 7, 8, 9, 10, 11, 12]
    assert first(OPT, begin=Begin.WINDOW) == [CLS, 5, 6, 7, 8, 9, 10, 11]
    assert first(PLAIN) == first(PLAIN, begin=Begin.WINDOW) == [CLS, 5, 6, 7, 8, 9, 10, SEP]
    assert first(PLAIN, begin=Begin.NONE) == [5, 6, 7, 8, 9, 10, 11, 12]
    data = made([20, 20], packing=Packing.STREAM, begin=Begin.WINDOW)
    batch = next(data.split_batches("train", OPT, 1, 0, limit=1))
    assert batch["targets"][0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]


def test_documents_begin_and_end_with_their_tokens():
    plain = load("books", BERT)
    data = load(DataSpec(begin=Begin.DOCUMENT, packing=Packing.STREAM), BERT)
    assert data.fingerprint("train") == plain.fingerprint("train")
    assert data.token_count("train") == plain.token_count("train") + 2 * len(plain.hashes("train"))
    assert data.sections[0].tokens[[0, -1]].tolist() == [CLS, SEP]
    assert load(DataSpec(begin=Begin.DOCUMENT), OPT).sections[0].tokens[0] == CLS  # the bundled tokenizer has no other
    (batch,) = data.split_batches("train", BERT, 1, 0, limit=1)
    assert batch["targets"][0, 0] == -1  # never predicted


def test_windows_shorter_than_the_model_and_other_rates():
    spec = replace(BERT, length=128)
    data = load(DataSpec(window=32, mask_rate=0.4), spec)
    batch = next(data.train_batches(spec, 64, 0))
    assert batch["tokens"].shape == (64, 32)
    rate = (batch["targets"] >= 0).sum() / (64 * 30)
    assert abs(rate - 0.4) < 5 * math.sqrt(0.24 / 1920)  # 5 standard deviations
    assert next(data.split_batches("evaluation", spec, 4, 0))["tokens"].shape == (4, 32)
    with pytest.raises(DataError, match="window is 256 tokens and the model's length 128"):
        load(DataSpec(window=256), spec)


@pytest.mark.parametrize("order", [*Order])
@pytest.mark.parametrize("spec", [OPT, BERT], ids=["opt", "bert"])
def test_a_batch_is_the_same_wherever_a_run_begins_and_whichever_rows_are_made(order, spec):
    parts = [make_part(sections([90, 30], 5, "a"), 0, 3.0), make_part(sections([50], 900, "b"), 0, 1.0)]
    settings = DataSpec(order=order, packing=Packing.STREAM)
    for own in (parts[:1], parts):
        data = TextData("made", [], "", 2048, SPECIALS, settings=settings, parts=own)
        run = list(islice(data.train_batches(spec, 6, 3), 40))
        for step in (0, 7, 39):
            whole = next(data.train_batches(spec, 6, 3, start=step))
            part = next(data.train_batches(spec, 6, 3, start=step, rows=slice(2, 5)))
            for key, value in run[step].items():
                assert np.array_equal(whole[key], value) and np.array_equal(part[key], value[2:5]), key


def test_batches_are_those_of_earlier_versions():
    """The first 16 digits of a sha256 over batches that version 0.2.0 gave."""
    known = {"opt": "58fe8c7f2bed06cf", "bert": "a7868be14a768af9", "vit": "9fe7396eb965663f"}
    for name, spec in (("opt", replace(OPT, length=32)), ("bert", replace(BERT, length=32)), ("vit", VIT)):
        data, got = load(None, spec), hashlib.sha256()
        run = islice(data.train_batches(spec, 5, 3, start=7), 4)
        for batch in chain(run, data.split_batches("evaluation", spec, 16, 2, limit=3)):
            for key in sorted(batch):
                got.update(key.encode() + str(batch[key].dtype).encode() + np.ascontiguousarray(batch[key]).tobytes())
        assert got.hexdigest()[:16] == known[name]


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_each_source_has_its_share_of_every_block_and_its_windows_in_turn():
    mixture = Mixture([3.0, 1.0], 0)
    source, before = mixture.draw(np.arange(2 * BLOCK))
    assert np.bincount(source[:BLOCK]).tolist() == np.bincount(source[BLOCK:]).tolist() == [BLOCK * 3 // 4, BLOCK // 4]
    for one in (0, 1):
        assert np.array_equal(before[source == one], np.arange((source == one).sum()))
    small = np.bincount(source[:400])[1]
    assert abs(small - 100) < 5 * math.sqrt(75)  # drawn, not in turns: 5 standard deviations
    assert np.array_equal(
        Mixture([3.0, 1.0], 0).draw(np.arange(BLOCK - 5, BLOCK + 5))[0], source[BLOCK - 5 : BLOCK + 5]
    )
    assert not np.array_equal(Mixture([3.0, 1.0], 1).draw(np.arange(BLOCK))[0], source[:BLOCK])


def test_a_mixture_of_texts():
    parts = [make_part(sections([160], 5, "a"), 0, 1.0), make_part(sections([80], 900, "b"), 2, 3.0)]
    data = TextData("a, b", [], "", 2048, SPECIALS, settings=DataSpec(order=Order.PERMUTATION), parts=parts)
    assert data.dropped == 2 and data.token_count("train") == 240
    assert data.fingerprint("train") not in (parts[0].fingerprints["train"], parts[1].fingerprints["train"])
    first = [int(b["tokens"][0, 0]) for b in islice(data.train_batches(OPT, 1, 0), 400)]
    second = [token for token in first if token >= 900]
    assert abs(len(second) - 300) < 5 * math.sqrt(75)
    windows = 80 // 8
    for low in range(0, len(second) - windows, windows):  # each of its windows once per epoch of its own
        assert len({*second[low : low + windows]}) == windows
    held = [int(b["tokens"][0, 0]) >= 900 for b in data.split_batches("evaluation", OPT, 1, 0)]
    assert len(held) == 30 and sum(held) == 10
    assert sum(held[:15]) == 5  # evenly among the first ones too


def test_weights_count_by_their_ratio():
    expected = Mixture([1.0, 3.0], 0).draw(np.arange(500))[0]
    for weights in ([5e-324, 15e-324], [5e307, 1.5e308], [0.25, 0.75]):
        assert np.array_equal(Mixture(weights, 0).draw(np.arange(500))[0], expected)


def test_mixtures_that_cannot_be_are_refused():
    with pytest.raises(SpecError, match="stands there twice"):
        DataSpec(sources=(Source("a"), Source("a")))
    with pytest.raises(SpecError, match="weight of a is 0"):
        Source("a", 0.0)
    tiny = [make_part(sections([160], 5, "a"), 0, 1e9), make_part(sections([80], 900, "b"), 0, 1.0)]
    data = TextData("a, b", [], "", 2048, SPECIALS, settings=DataSpec(), parts=tiny)
    with pytest.raises(DataError, match="weight 1"):
        data.train_batches(OPT, 1, 0)


def test_settings_come_back_from_a_checkpoint():
    spec = DataSpec(
        (Source("a"), Source("b", 2.0)), window=16, order=Order.PERMUTATION, begin=Begin.NONE, held_out=0.05
    )
    about = {"source": "a, b", **spec.describe()}
    assert DataSpec.of(about) == spec
    assert DataSpec.of(about, "c") == replace(spec, sources=(Source("c"),))
    assert DataSpec.of({"source": "books"}) == DataSpec((Source("books"),)) and DataSpec().describe() == {}
    with pytest.raises(SpecError, match="sources and weights must be lists of one length"):
        DataSpec.of({**about, "weights": [1.0]})
