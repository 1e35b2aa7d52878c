"""Labelled texts and pictures: what a batch holds, how rows are divided, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from qtx.data import SPLITS, DataError, load
from qtx.data.corpus import BOOKS
from qtx.data.images import load_folder
from qtx.data.labelled import LabelledText, read_book_rows
from qtx.data.splits import digest, iterate_passes
from qtx.data.tokenizing import read_bundled_tokenizer
from qtx_ref.spec import Family, Head, ModelSpec

tokenizers = pytest.importorskip("tokenizers", reason="the extra text is not installed")

PAD, UNK, CLS, SEP, MASK = range(5)
BERT = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.CLASSIFY, vocab=2048, length=32, types=2, classes=4)
VIT = ModelSpec(Family.VIT, 1, 8, 1, 8, Head.CLASSIFY, classes=4, image_size=4, patch_size=2, channels=3)
WORDS = ("the", "man", "who", "was", "so", "very", "good", "and", "had", "been", "to", "see", "her", "town", "with")


def sentence(number: int, size: int) -> str:
    """`size` words of one token each, different for each number."""
    return " ".join(WORDS[(number * (place + 1) + place) % len(WORDS)] for place in range(size - 1)) + f" {number}"


def write_csv(path, rows, header=("text", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def divided(tmp_path):
    """60 rows of 3 to 22 words that say their split."""
    split = ["train"] * 40 + ["calibration"] * 8 + ["evaluation"] * 12
    rows = [(sentence(i, 3 + i % 20), ("bad", "good")[i % 2], split[i]) for i in range(60)]
    return write_csv(tmp_path / "set.csv", rows, ("text", "label", "split")), rows


def opened(path, spec=BERT, **given) -> LabelledText:
    return load(str(path), spec, tokenizer=read_bundled_tokenizer(), **given)


def test_a_batch_is_what_the_tokenizer_gives(divided):
    """Held to the library's own [CLS] text [SEP], truncation and padding."""
    path, rows = divided
    theirs = tokenizers.Tokenizer.from_str(read_bundled_tokenizer())
    theirs.post_processor = tokenizers.processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    theirs.enable_truncation(12)
    theirs.enable_padding(pad_id=PAD, pad_token="[PAD]", pad_to_multiple_of=4)  # 12 is the limit, and no multiple of 8
    data = opened(path, length=12)
    (batch,) = data.split_batches("evaluation", BERT, 16, 0)
    place = {digest(text.encode())[:16]: (text, label) for text, label, split in rows if split == "evaluation"}
    drawn = [place[got] for got in data.hashes("evaluation")]  # the order that the batches keep
    assert len(set(drawn)) == len(place) and drawn != list(place.values())
    wanted = theirs.encode_batch([text for text, _ in drawn])
    assert batch["tokens"].tolist() == [got.ids for got in wanted]
    assert batch["mask"].tolist() == [[bool(x) for x in got.attention_mask] for got in wanted]
    assert not batch["types"].any() and batch["types"].shape == batch["tokens"].shape
    assert [data.names[label] for label in batch["labels"]] == [label for _, label in drawn]


def test_a_batch_is_as_long_as_its_longest_text(divided):
    path, _ = divided
    data = opened(path)
    for batch in data.split_batches("evaluation", BERT, 3, 0):
        longest = batch["mask"].sum(1).max()
        assert batch["tokens"].shape[1] == -(-longest // 8) * 8  # the next multiple of 8
    short = replace(BERT, length=13)
    (batch,) = data.split_batches("evaluation", short, 16, 0)
    assert batch["tokens"].shape == (12, 13)  # the model's limit, though no multiple of 8
    assert (batch["tokens"][batch["mask"].sum(1) == 13, -1] == SEP).all()


def test_batches_are_the_same_again_and_cover_a_pass(divided):
    path, _ = divided
    data = opened(path)
    first = list(islice(data.train_batches(BERT, 8, seed=3), 12))
    for step, (one, two) in enumerate(zip(first[7:], data.train_batches(BERT, 8, seed=3, start=7), strict=False)):
        assert all(np.array_equal(one[key], two[key]) for key in one), step
        own = next(data.train_batches(BERT, 8, seed=3, start=7 + step, rows=slice(2, 4)))
        assert all(np.array_equal(one[key][2:4], own[key]) for key in one), step
    rows = np.arange(100, 140)
    sizes = np.random.default_rng(0).integers(1, 50, 140)
    batches = np.array(list(islice(iterate_passes(rows, 8, 0, 0, sizes), 10)))
    assert sorted(batches[:5].ravel()) == sorted(batches[5:].ravel()) == rows.tolist()
    spread = np.ptp(sizes[batches], axis=1).mean()
    mixed = np.ptp(sizes[np.array(list(islice(iterate_passes(rows, 8, 0, 0), 10)))], axis=1).mean()
    assert spread < mixed / 2  # five batches sorted together: each holds a fifth of the sizes, mixed ones most of them
    assert not np.array_equal(batches[:5], batches[5:])


def test_undivided_rows_are_divided_and_duplicates_dropped(tmp_path):
    rows = [(sentence(i, 6), i % 3) for i in range(50)] + [(sentence(i, 6), i % 3) for i in range(5)]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in rows) + "\n\n", encoding="utf-8")
    data = opened(path)
    assert data.dropped == 5
    assert [len(data.hashes(split)) for split in SPLITS] == [40, 5, 5]
    assert data.names == ("0", "1", "2")
    known = [digest(text.encode())[:16] for text, _ in rows[:50]]
    places = [known.index(got) for split in SPLITS for got in data.hashes(split)]
    assert sorted(places) == list(range(50)) and places != sorted(places)  # drawn, since files are sorted by label
    assert opened(path, seed=1).hashes("evaluation") != data.hashes("evaluation") == opened(path).hashes("evaluation")


def test_labels_are_part_of_a_split_s_identity(tmp_path):
    rows = [(sentence(i, 6), i % 2) for i in range(20)]
    one = opened(write_csv(tmp_path / "one.csv", rows))
    two = opened(write_csv(tmp_path / "two.csv", [(text, 1 - label) for text, label in rows]))
    assert one.hashes("train") == two.hashes("train") and one.fingerprint("train") != two.fingerprint("train")


def test_whole_numbers_are_classes_in_their_order(tmp_path):
    rows = [(sentence(i, 6), (10, 9, -1)[i % 3]) for i in range(30)]
    assert opened(write_csv(tmp_path / "set.csv", rows)).names == ("-1", "9", "10")


def test_another_file_keeps_the_model_s_classes(tmp_path):
    path = write_csv(tmp_path / "set.csv", [(sentence(i, 6), "good") for i in range(30)])
    data = opened(path, names=["bad", "good"])
    assert data.classes == 2
    (batch,) = data.split_batches("evaluation", BERT, 16, 0)
    assert (batch["labels"] == 1).all()
    with pytest.raises(DataError, match="has the label 'good'; the model knows no, yes"):
        opened(path, names=["no", "yes"])


def row(text="a text", label="x", split=None):
    return {"text": text, "label": label} | ({} if split is None else {"split": split})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row(text=" ")], "line 2 has no text"),
        ([row(), row(text=3)], "line 2 has no text"),
        ([row(), row(label=None)], "line 2 has the label None"),
        ([row(), row(label=True)], "line 2 has the label True"),
        ([row(), row(label=1.5)], "line 2 has the label 1.5"),
        ([row(), row(split="test")], "line 2 has the split 'test': choose one of train"),
        ([row(), row("b", split="train")], "line 2 has a split and other rows have none"),
        ([row(), row("b"), row("c")], "has the label x alone"),
        ([row(), row()], "has 1 different text"),
        ([row(), row("b"), row(label="y")], "line 3 has the text of .* line 1, with labels 'y' and 'x': remove one"),
        ([row() | {"text_pair": "b"}], "line 1 has a text_pair: pairs of texts are not read"),
        ([row(label="1" * 5000), row("b", "2")], "line 1 has a label of 5000 characters: give at most 200"),
        (
            [row(split="train"), row(split="evaluation")],
            "line 2 of the evaluation split has the text of .* line 1 of train",
        ),
        ([[]], "line 1 is no object"),
        ([row("\ud800")], "half a surrogate pair"),
        ([], "is empty"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, rows, message):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        opened(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentence,label\na,b\n", "has no column text"),
        ("text,label\na\n", "row 1 has not as many cells"),
        ("text,label\na,b,c\n", "row 1 has not as many cells"),
        ('text,label\n"a,b\n', "is no CSV"),
        ("text,label\n", "has no rows"),
        ("text,label,label\na,b,c\n", "has 2 columns label"),
    ],
)
def test_files_that_are_no_csv_are_named(tmp_path, text, message):
    path = tmp_path / "set.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        opened(path)


def test_the_sentiment_tool_says_in_a_line_what_is_not_there(tmp_path):
    tool = Path(__file__).parents[3] / "tools/build_sentiment.py"
    done = subprocess.run(
        [sys.executable, str(tool), "nowhere", "nowhere", str(tmp_path / "set.csv")], capture_output=True, text=True
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "nowhere/movie_reviews" in done.stderr and "give the folders" in done.stderr


def test_a_text_may_be_long(tmp_path):
    """Longer than the 131,072 characters at which Python's csv stops by default."""
    rows = [("good " * 30_000 + str(i), "ab"[i % 2]) for i in range(3)]
    assert sum(len(opened(write_csv(tmp_path / "set.csv", rows)).hashes(split)) for split in SPLITS) == 3


def test_what_does_not_fit_is_refused(divided, tmp_path):
    path, rows = divided
    with pytest.raises(DataError, match="the text has 2048 token ids, the model 100"):
        opened(path, replace(BERT, vocab=100))
    with pytest.raises(DataError, match="length is 2"):
        opened(path, length=2)
    with pytest.raises(DataError, match="is not labelled text"):
        opened("notes.txt")
    with pytest.raises(DataError, match="needs the model's tokenizer"):
        load(str(path), BERT)
    only = write_csv(tmp_path / "only.csv", [r for r in rows if r[2] == "train"], ("text", "label", "split"))
    data = opened(only)
    with pytest.raises(DataError, match="has no evaluation rows"):
        data.split_batches("evaluation", BERT, 4, 0)
    with pytest.raises(DataError, match="41"):
        data.train_batches(BERT, 41, 0)


def test_the_books_are_told_apart_by_their_paragraphs():
    rows = read_book_rows()
    data = load("books", BERT, tokenizer=read_bundled_tokenizer())
    assert data.names == tuple(sorted(BOOKS.values()))
    assert {(row.label, row.split) for row in rows} == {(book, split) for book in BOOKS.values() for split in SPLITS}
    assert min(len(row.text) for row in rows) >= 200
    assert sum(len(data.hashes(split)) for split in SPLITS) == len(rows)


def test_a_headless_bert_sees_the_text_as_it_is():
    for spec in (replace(BERT, head=Head.NONE, classes=0), replace(BERT, head=Head.MLM, classes=0)):
        data = load("books", spec)
        batch = next(data.split_batches("evaluation", spec, 4, 0, limit=1))
        section = next(s for s in data.sections if s.split == "evaluation")
        natural = batch["tokens"][0, 1:-1].tolist() == section.tokens[: spec.length - 2].tolist()
        assert natural is ("targets" not in batch) is (spec.head is Head.NONE)


def test_a_headless_bert_takes_labelled_text(divided):
    data = opened(divided[0], replace(BERT, head=Head.NONE, classes=0))
    assert isinstance(data, LabelledText)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """12 pictures in two folders, each of one colour (r, g, b) = (20 i, 255 - 20 i, 7 for cats and 9 for dogs)."""
    image = pytest.importorskip("PIL.Image", reason="the extra images is not installed")
    for i in range(12):
        kind = ("cat", "dog")[i % 2]
        (tmp_path / kind).mkdir(exist_ok=True)
        colour = (20 * i, 255 - 20 * i, 7 + 2 * (i % 2))
        image.new("RGB", (5 + i, 9), colour).save(tmp_path / kind / f"{i:02}.{('png', 'bmp')[i % 2]}")
    return tmp_path


def test_pictures_are_resized_and_scaled(pictures):
    scaling = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 2.0]}
    data = load_folder(pictures, VIT, scaling=scaling)
    assert data.names == ("cat", "dog") and data.classes == 2
    assert [len(data.hashes(split)) for split in SPLITS] == [10, 1, 1]
    seen = set()
    for split in SPLITS:
        for batch in data.split_batches(split, VIT, 4, 0):
            for pixels, label in zip(batch["images"], batch["labels"], strict=True):
                assert pixels.shape == (3, 4, 4) and pixels.dtype == np.float32
                assert np.ptp(pixels, axis=(1, 2)).max() == 0  # one colour stays one colour
                r, g, b = np.rint((pixels[:, 0, 0] * scaling["std"] + scaling["mean"]) * 255).astype(int)
                assert (g, b) == (255 - r, 7 + 2 * label)
                seen.add(int(r))
    assert seen == {20 * i for i in range(12)}
    grey = load_folder(pictures, replace(VIT, channels=1))
    batch = next(grey.split_batches("train", replace(VIT, channels=1), 4, 0))
    assert batch["images"].shape == (4, 1, 4, 4) and -1 <= batch["images"].min() <= batch["images"].max() <= 1


def test_equal_pictures_are_too_few(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="the extra images is not installed")
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        image.new("RGB", (8, 8)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    with pytest.raises(DataError, match="has 1 different image"):
        load(str(tmp_path), VIT)


def test_pictures_that_cannot_be_used_are_named(pictures):
    data = load(str(pictures), VIT)
    assert data.describe()["names"] == ["cat", "dog"]
    with pytest.raises(DataError, match="has the class 'dog'"):
        load(str(pictures), VIT, names=["cat", "bird"])
    with pytest.raises(DataError, match="pixel mean"):
        load(str(pictures), VIT, scaling={"mean": [0.5, 0.5], "std": [1.0]})
    broken = pictures / "dog" / "broken.png"
    broken.write_bytes((pictures / "cat" / "00.png").read_bytes()[:40])
    with pytest.raises(DataError, match="broken.png cannot be read as a picture"):
        load(str(pictures), VIT)
    broken.unlink()
    image = pytest.importorskip("PIL.Image")
    deep = image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    deep.save(pictures / "dog" / "deep.png")
    with pytest.raises(DataError, match="deep.png cannot be read as a picture .*mode I"):  # else it were all white
        load(str(pictures), VIT)
    with pytest.raises(DataError, match="give a folder per class"):
        load(str(pictures / "cat"), VIT)
