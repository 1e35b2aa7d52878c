"""Files of rows and of text, read as what they are or refused in a line; and files that have no end."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from parity_tests.subjects.small_models import OPT
from parity_tests.tests.shell import call
from qtx.data import SPLITS, DataError, load
from qtx.data.reading import read_regular
from qtx.data.rows import TextRow, divide_rows, read_rows, read_text
from qtx.data.tokenizing import BUNDLED
from qtx.data.walking import list_files

WORDS = ("the", "man", "who", "was", "so", "very", "good", "and", "had", "been")


def make_text(number):
    """Ten words, others for each number."""
    return " ".join(WORDS[number // 10**place % 10] for place in range(10))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def lines(tmp_path):
    """400 texts, 5 of them twice."""
    return write_lines(tmp_path / "set.jsonl", [{"text": make_text(i), "id": i} for i in [*range(400), *range(5)]])


def load_words(path, **given):
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    return load(str(path), OPT, tokenizer=BUNDLED / "tokenizer.json", **given)


def decode(data):
    from qtx.data.tokenizing import open_tokenizer

    tokenizer, _, _ = open_tokenizer(data.tokenizer_json)
    return {split: " ".join(tokenizer.decode(s.tokens) for s in data.sections if s.split == split) for split in SPLITS}


def test_rows_train_a_language_model_as_texts_and_not_as_braces(lines, capsys):
    data = load_words(lines)
    assert "not read are the columns id" in capsys.readouterr().err
    words = decode(data)
    assert data.dropped == 5
    assert {word for text in words.values() for word in text.split()} == set(WORDS)  # no brace, no quote, no key
    assert " ".join(words[split] for split in SPLITS) == " ".join(make_text(i) for i in range(400))


@pytest.mark.parametrize("ending", [".csv", ".CSV"])
def test_a_csv_is_the_same_texts(lines, tmp_path, ending):
    path = tmp_path / f"set{ending}"
    path.write_text("text,label\n" + "".join(f"{make_text(i)},x\n" for i in range(400)))
    assert decode(load_words(path)) == decode(load_words(lines))


def test_rows_that_say_their_split_stay_in_it(tmp_path):
    splits = ["evaluation"] * 60 + ["train"] * 280 + ["calibration"] * 60
    path = write_lines(tmp_path / "set.jsonl", [{"text": make_text(i), "split": splits[i]} for i in range(400)])
    got = decode(load_words(path))
    for split in SPLITS:
        assert got[split] == " ".join(make_text(i) for i in range(400) if splits[i] == split)
    write_lines(path, [{"text": make_text(i % 399), "split": splits[i]} for i in range(400)])
    with pytest.raises(DataError, match="line 400 of the calibration split has the text of .* line 1 of evaluation"):
        load_words(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "text_pair": "b"}', "line 1 has a text_pair: pairs of texts are not read"),
        ('{"text": "a", "hypothesis": "b"}', "line 1 has a hypothesis: pairs"),
        ('{"text": "a", "text": "b"}', "line 1 has 2 values of text: keep one"),
        ('{"text": "a", "split": 3}', "line 1 has the split 3"),
        ('{"label": 1}', "line 1 has no text"),
        ('{"text": "a", "id": ' + "9" * 5000 + "}", "line 1 holds a number of thousands of digits"),
        ("[" * 100_000, "line 1 is no JSON"),
        ('{"text": "\\ud800"}', "line 1: text holds half a surrogate pair"),
        ("null", "line 1 is no object"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, line, message):
    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        load(str(path), OPT)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_column_of_pairs_is_refused_and_an_empty_one_is_not(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("text,label,text_pair\na,x,b\nc,y,d\n")
    with pytest.raises(DataError, match="row 1 has a text_pair"):
        read_rows(path)
    path.write_text("text,label,text_pair\na,x,\nc,y,\n")
    assert [(row.text, row.label) for row in read_rows(path)] == [("a", "x"), ("c", "y")]


def test_one_text_under_two_labels(capsys):
    rows = [TextRow(f"row {i}", make_text(i), "ab"[i % 2], "") for i in range(9)]
    with pytest.raises(DataError, match=r"row 9 has the text of row 0, with labels 'b' and 'a': remove one"):
        divide_rows("set", [*rows, TextRow("row 9", rows[0].text, "b", "")], 0)
    kept, dropped = divide_rows("set", [*rows, rows[0]], 0)
    assert (len(kept), dropped) == (9, 1)
    train = [row._replace(split="train") for row in [*rows, TextRow("row 9", rows[0].text, "b", "")]]
    assert divide_rows("set", train, 0) == (train, 0)  # a file that divides itself keeps all its rows
    said = capsys.readouterr().err
    assert (
        said == "set: 1 row with the text of an earlier one and another label, the first row 9 (labels 'b' and 'a'); "
        "all are kept\n"
    )


def test_labels_that_are_one_number_have_an_order():
    """01 and 1 are two labels: which is first must not depend on the rows."""
    from qtx.data.labelled import name_classes

    rows = [TextRow("", "", label, "") for label in ("1", "01", "-1", "+")]
    assert name_classes("set", rows[:3], None) == name_classes("set", rows[2::-1], None) == ("-1", "01", "1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "one"}]', "is not plain text by its ending: give .jsonl"),
        ("a.parquet", b"PAR1 PAR1", "cannot be read .*: give a whole Parquet file"),
        ("a.txt.gz", b"\x1f\x8b\x08", "unpack it first"),
        ("a.tsv", b"text\tlabel\n", "write it as .csv"),
        ("a.txt", "one\n".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        ("a.txt", "one\n".encode("utf-16-le"), "holds NUL bytes"),
        ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "is UTF-16"),
        ("a.csv", "caf\u00e9".encode("latin-1"), "is not UTF-8"),
        ("none.json", None, "cannot be read"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(str(tmp_path / name), OPT)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    for name, content in (("a.jsonl", '{"text": "one", "label": 1}'), ("a.csv", "text,label\none,1")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert [row[1:] for row in read_rows(tmp_path / name)] == [("one", "1", "")]


def test_hidden_texts_are_passed_over(tmp_path, capsys):
    for name in ("b.txt", "a/c.TXT", ".ipynb_checkpoints/b-checkpoint.txt", "a/.c.txt.swp", "a/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    assert [file.relative_to(tmp_path).as_posix() for file in list_files(tmp_path, (".txt",))] == ["a/c.TXT", "b.txt"]
    assert "not read: 2 hidden files or folders, .ipynb_checkpoints first" in capsys.readouterr().err


# --- files without an end ---------------------------------------------------------------------------------------------


@pytest.fixture
def bounded():
    """Whatever is read takes less than 4 MB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000, peak


def make_endless(folder, kind):
    path = folder / f"{kind}.jsonl"
    if kind == "device":
        os.symlink("/dev/zero", path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "process":
        os.symlink("/proc/self/maps", path)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(2**40)
    return path


ENDLESS = {
    "device": "it is a device, not a regular file",
    "pipe": "it is a pipe, not a regular file",
    "process": "it is not as long as the system says",
    "folder": "it is a folder, not a regular file",
    "sparse": "it has 1099511627776 bytes, and at most",
}


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("kind", ENDLESS)
def test_files_without_an_end_are_refused(tmp_path, kind):
    path = make_endless(tmp_path, kind)
    for read in (read_text, read_rows):
        with pytest.raises(DataError, match=ENDLESS[kind]):
            read(path)
    with pytest.raises(OSError, match=ENDLESS[kind]):
        read_regular(path)
    assert read_regular(Path(__file__)) == Path(__file__).read_bytes()


@pytest.mark.usefixtures("bounded")
def test_a_pipe_among_texts_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(DataError, match="b.txt cannot be read .it is a pipe"):
        load(str(tmp_path), OPT)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--data", "/dev/zero"),
        ("train", "--data", "/dev/zero", "--tokenizer", BUNDLED / "tokenizer.json"),
        ("train", "--data", "mine.txt", "--tokenizer", "/dev/zero"),
        ("study", "--data", "/dev/zero"),
        ("recipes", "/dev/zero.json"),
        ("recipes", "zero.json"),
        ("evaluate", "/dev/zero"),
        ("evaluate", "zero.json"),
        ("finetune", "zero.json", "--data", "/dev/zero", "--out", "out"),
        ("import", "/dev/zero", "--out", "m.safetensors"),
        ("import", "theirs", "--out", "m.safetensors"),
        ("parity", "--checkpoint", "/dev/zero"),
    ],
)
def test_commands_refuse_what_has_no_end(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("\n\n".join(make_text(i) for i in range(100)))
    os.symlink("/dev/zero", "zero.json")
    Path("theirs").mkdir()
    Path("theirs/model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    os.symlink("/dev/zero", "theirs/config.json")
    result = call(*arguments)
    assert result.exit_code not in (0, None) and isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output and len(result.output) < 600


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("largest", [2**31 - 1, 2**31, 2**32 - 1, 2**80, 5000])
def test_ids_far_beyond_the_tokens_take_no_memory(largest):
    from qtx.data.tokenizing import open_tokenizer, read_vocabulary

    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    model = {"type": "WordLevel", "vocab": {"the": 0, "man": largest}, "unk_token": "the"}
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    for read in (open_tokenizer, read_vocabulary):
        with pytest.raises(DataError, match=f"has 2 tokens and gives 'man' the id {largest}"):
            read(text)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"model": {"vocab": {"a": -1}}}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": [[]]}}',
        '{"added_tokens": [3]}',
        "[" * 100_000,
    ],
)
def test_vocabularies_that_are_none(text):
    from qtx.data.tokenizing import read_vocabulary

    with pytest.raises(DataError, match="the tokenizer"):
        read_vocabulary(text)
