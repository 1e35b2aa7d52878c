"""A user's own text: how files are read and divided, the tokenizer they get, and what is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtx.data import SPLITS, DataError, load
from qtx.data.corpus import split_blocks, split_chapters
from qtx.data.splits import name_splits
from qtx.data.text import Specials
from qtx.data.tokenizing import BUNDLED, train_tokenizer
from qtx_ref.spec import Family, Head, ModelSpec

PAD, UNK, CLS, SEP, MASK = range(5)
OPT = ModelSpec(Family.OPT, 1, 8, 1, 8, Head.CAUSAL, vocab=2048, length=32)
BERT = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=32, types=2)
VIT = ModelSpec(Family.VIT, 1, 8, 1, 8, Head.CLASSIFY, classes=10, image_size=8, patch_size=2, channels=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \r\n\r\n", "is empty"),
        (b"one\0two", "NUL bytes"),
        (b"caf\xe9", r"not UTF-8 \(byte 3\)"),
        (b"one line only", "too short"),
    ],
)
def test_bad_files(tmp_path, content, message):
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    for source in (file, tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            load(str(source), OPT)
        assert "mine.txt" in str(caught.value) or str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_folder_without_text(tmp_path):
    with pytest.raises(DataError, match=r"holds no \*.txt"):
        load(str(tmp_path), OPT)


def prose(paragraphs: int, seed: int = 0) -> str:
    words = ["the", "a", "cat", "dog", "saw", "ran", "from", "to", "river", "house", "old", "grey", "and", "then", "it"]
    rng = np.random.default_rng(seed)
    return "\n\n".join(f"Paragraph {seed} {i}: " + " ".join(rng.choice(words, 60)) + "." for i in range(paragraphs))


@given(st.integers(3, 500))
def test_splits_are_runs(count):
    names = name_splits(count)
    assert [name for name, _ in itertools.groupby(names)] == list(SPLITS) and len(names) == count
    assert names.count("evaluation") == names.count("calibration") == max(1, round(count / 10))


@given(st.lists(st.text("ab \n", min_size=1, max_size=30), min_size=1, max_size=200))
def test_blocks_lose_nothing(lines):
    text = "\n".join(lines)
    parts = split_blocks(text)
    assert "".join("".join(part for _, part in parts).split()) == "".join(text.split())
    assert len(parts) <= 51


def test_headings():
    text = "\n\n".join(
        ["A preface.", "CHAPTER I. Start", "One.\nchapter 2\nno", "Chapter 2", "Two.", "  Letter XL: to B", "End."]
    )
    assert split_chapters(text) == [
        ("CHAPTER I. Start", "A preface.\n\nCHAPTER I. Start\n\nOne.\nchapter 2\nno"),
        ("Chapter 2", "Chapter 2\n\nTwo."),
        ("Letter XL: to B", "  Letter XL: to B\n\nEnd."),
    ]
    assert split_chapters("I read\n\nchapter I had missed.") == []


class TestOwnText:
    """Reads text from disk with a tokenizer."""

    @pytest.fixture(autouse=True)
    def _needs_tokenizers(self):
        pytest.importorskip("tokenizers", reason="a user's own text needs the extra qtx[text]")

    def test_file_in_blocks(self, tmp_path):
        file = tmp_path / "mine.txt"
        file.write_text(prose(200).replace("\n", "\r\n"), newline="")
        data = load(str(file), OPT, vocab=150)
        assert data.vocab <= 150 and data.source == str(file) and data.dropped == 0
        assert 40 <= len(data.sections) <= 51
        assert data.fingerprint("train") == load(str(file), OPT).fingerprint("train")
        assert {k: v.shape for k, v in next(data.train_batches(OPT, 4, 0)).items()}["tokens"] == (4, 32)
        assert load(str(file), BERT).specials == Specials(PAD, CLS, SEP, MASK, (0, 1, 2, 3, 4))

    def test_tokenizer_is_the_same_each_time(self):
        assert len({train_tokenizer([prose(40)], 120) for _ in range(4)}) == 1

    def test_tokenizer_does_not_see_held_out_text(self, tmp_path):
        for i in range(4):
            (tmp_path / f"{i}.txt").write_text(prose(10, i) + (" zyx" * 50 if i == 3 else ""))
        data = load(str(tmp_path), OPT)
        held = next(s for s in data.sections if s.split == "evaluation")
        assert UNK in held.tokens and not any("z" in word for word in json.loads(data.tokenizer_json)["model"]["vocab"])

    def test_file_in_chapters(self, tmp_path):
        file = tmp_path / "mine.txt"
        file.write_text("\n\n".join(f"Chapter {i}\n\n{prose(3, i)}" for i in range(12)))
        assert [s.title for s in load(str(file), OPT).sections] == [f"Chapter {i}" for i in range(12)]

    def test_folder_in_files_without_duplicates(self, tmp_path):
        (tmp_path / "deep").mkdir()
        for i in range(4):
            (tmp_path / "deep" / f"{i}.txt").write_text(prose(10, i))
        (tmp_path / "z.txt").write_text(prose(10, 0))
        (tmp_path / "not.md").write_bytes(b"\0")
        data = load(str(tmp_path), BERT)
        assert [(s.title, s.split) for s in data.sections] == [
            ("deep/0.txt", "train"),
            ("deep/1.txt", "train"),
            ("deep/2.txt", "calibration"),
            ("deep/3.txt", "evaluation"),
        ]
        assert data.dropped == 1

    def test_two_files_are_one_text(self, tmp_path):
        for i in range(2):
            (tmp_path / f"{i}.txt").write_text(prose(60, i))
        assert len(load(str(tmp_path), OPT).sections) > 40

    def test_given_tokenizer(self, tmp_path):
        (tmp_path / "mine.txt").write_text(prose(100))
        data = load(str(tmp_path / "mine.txt"), OPT, tokenizer=BUNDLED / "tokenizer.json")
        books = load("books", OPT)
        assert data.vocab == 2048
        assert data.describe()["tokenizer_sha256"] == books.describe()["tokenizer_sha256"]

    def test_given_tokenizer_does_not_truncate(self, tmp_path):
        import tokenizers

        lib = tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
        lib.enable_truncation(8)
        lib.enable_padding(length=4096)
        lib.save(str(tmp_path / "short.json"))
        (tmp_path / "mine.txt").write_text(prose(100))
        one, two = (
            load(str(tmp_path / "mine.txt"), OPT, tokenizer=file)
            for file in (tmp_path / "short.json", BUNDLED / "tokenizer.json")
        )
        assert [len(s.tokens) for s in one.sections] == [len(s.tokens) for s in two.sections]

    def test_bad_tokenizers(self, tmp_path):
        (tmp_path / "mine.txt").write_text(prose(100))
        (tmp_path / "bad.json").write_text("{}")
        for name, message in (("bad.json", "cannot be read"), ("none.json", "none.json cannot be read")):
            with pytest.raises(DataError, match=message):
                load(str(tmp_path / "mine.txt"), OPT, tokenizer=tmp_path / name)
        with pytest.raises(DataError, match="vocab 6 is too small"):
            load(str(tmp_path / "mine.txt"), OPT, vocab=6)

    def test_tokenizer_without_masks(self, tmp_path):
        import tokenizers

        lib = tokenizers.Tokenizer(tokenizers.models.WordLevel({"the": 0, "a": 3, "?": 4}, unk_token="?"))
        lib.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        lib.save(str(tmp_path / "plain.json"))
        (tmp_path / "mine.txt").write_text(prose(100))
        data = load(str(tmp_path / "mine.txt"), OPT, tokenizer=tmp_path / "plain.json")
        assert data.vocab == 5 and data.specials.ids == (1, 2)  # ids that no token has
        next(data.train_batches(OPT, 2, 0))
        with pytest.raises(DataError, match=r"no \[PAD\] token"):
            data.train_batches(BERT, 2, 0)

    def test_data_description_is_json(self, tmp_path):
        (tmp_path / "mine.txt").write_text(prose(100))
        for data in (load(str(tmp_path / "mine.txt"), OPT), load(None, OPT), load(None, VIT)):
            assert json.loads(json.dumps(data.describe())) == data.describe()
