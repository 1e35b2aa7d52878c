"""Documents in shards: what is read, tokenized once, kept through kills and damage, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from parity_tests.tests.files.document_folders import OPT, TOKENIZER, folder_of, opened, texts_of, write_lines
from qtx.data import DataError, DataSpec, Source, load
from qtx.data import documents as reading
from qtx.data import shards as writing
from qtx.data.documents import choose_split
from qtx.data.shards import Seen, make_encoder, map_shard
from qtx.data.spec import Begin
from qtx.data.splits import digest, refuse_overlap
from qtx.data.store import Cache
from qtx.engines.backend import MissingExtra
from qtx_ref.spec import SpecError

tokenizers = pytest.importorskip("tokenizers", reason="tokenizing needs the extra qtx[text]")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse_tokenizing(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(writing, "build", refuse)


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_the_second_start_tokenizes_and_hashes_nothing(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "lines", texts_of(60))
    first = opened(source)
    refuse_tokenizing(monkeypatch)
    for module in (reading, writing):
        monkeypatch.setattr(module, "hash_file", lambda path: pytest.fail("hashed again"))
    assert opened(source).describe() == first.describe()


def test_the_same_text_elsewhere_is_not_tokenized_again_and_another_is(tmp_path, monkeypatch):
    opened(folder_of(tmp_path / "one", texts_of(60)))
    other = folder_of(tmp_path / "two", texts_of(61))
    same = folder_of(tmp_path / "three", texts_of(60))
    refuse_tokenizing(monkeypatch)
    opened(same)
    for more in ({"begin": Begin.DOCUMENT}, {"held_out": 0.2}):
        with pytest.raises(AssertionError, match="tokenized again"):
            opened(same, **more)
    with pytest.raises(AssertionError, match="tokenized again"):
        opened(other)
    write_lines(Path(same) / "a.jsonl", texts_of(62))  # a file that was changed
    with pytest.raises(AssertionError, match="tokenized again"):
        opened(same)


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(writing, "SHARD", 1000)
    monkeypatch.setattr(writing, "BATCH", 100)


def count_encoded(monkeypatch) -> list[int]:
    """A list that grows by the number of texts in each batch that is tokenized."""
    counts: list[int] = []

    def make(*given):
        encode = make_encoder(*given)

        def run(texts):
            counts.append(len(texts) if texts != [""] else 0)
            return encode(texts)

        return run

    monkeypatch.setattr(writing, "make_encoder", make)
    return counts


HARMED_INDEX = {
    "index cut off": lambda text: text[:-20],
    "index of nothing": lambda text: '{"whole": true, "shards": []}',
    "index without counts": lambda text: text.replace('"documents"', '"other"'),
    "index of one shard less": lambda text: text[: text.rindex(", {")] + "]}",
    "index of another number": lambda text: text.replace('"dropped": 0', '"dropped": 1'),
}


@pytest.mark.parametrize("harm", ["a byte", "cut off", "gone", "no index", *HARMED_INDEX])
def test_a_damaged_shard_is_made_again(tmp_path, monkeypatch, cache, small_shards, harm, capsys):
    source = folder_of(tmp_path / "lines", texts_of(60))
    before = opened(source)
    (folder,) = (cache / "shards").iterdir()
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 4
    content = files[2].read_bytes()
    if harm == "a byte":
        files[2].write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "cut off":
        files[2].write_bytes(content[:-5])
    elif harm == "gone":
        files[2].unlink()
    elif harm == "no index":
        (folder / "index.json").unlink()
    else:
        index = folder / "index.json"
        harmed = HARMED_INDEX[harm](index.read_text())
        assert harmed != index.read_text()
        index.write_text(harmed)
    counts = count_encoded(monkeypatch)
    after = opened(source)
    assert after.describe() == before.describe() and files[2].read_bytes() == content
    assert 0 < sum(counts) <= (60 if "index" in harm else 60 // 4)  # of one shard alone
    assert ("damaged" in capsys.readouterr().err) == (harm in ("a byte", "cut off"))
    refuse_tokenizing(monkeypatch)
    opened(source)


def test_hashes_of_documents_that_are_lost_are_found_again_and_nothing_is_tokenized(tmp_path, monkeypatch, cache):
    source = folder_of(tmp_path / "lines", texts_of(60))
    opened(source)
    files = sorted((cache / "documents").iterdir())
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(before[0][:-8])
    files[1].write_bytes(b"")
    files[2].unlink()
    counts = count_encoded(monkeypatch)
    opened(source)
    assert [file.read_bytes() for file in files] == before and sum(counts) == 0


def test_a_damaged_tokenizer_is_trained_again(tmp_path, cache):
    settings = DataSpec(sources=(Source(folder_of(tmp_path / "lines", texts_of(60))),), vocab=200)
    before = load(settings, OPT).tokenizer_json
    (file,) = (cache / "tokenizers").iterdir()
    whole = file.read_bytes()
    for harmed in (b"", whole[:-50], whole.replace(b"document", b"documemt")):
        assert harmed != whole
        file.write_bytes(harmed)
        assert load(settings, OPT).tokenizer_json == before and file.read_bytes() == whole


def test_what_was_done_when_tokenizing_ended_early_is_kept(tmp_path, monkeypatch, cache, small_shards):
    source = folder_of(tmp_path / "lines", texts_of(60))
    real, calls = Cache.write, []

    def stop(self, path, content):
        calls.append(path.name)
        if path.name == "shard-00003.safetensors":
            raise KeyboardInterrupt
        real(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            opened(source)
    counts = count_encoded(monkeypatch)
    data = opened(source)
    assert 20 < sum(counts) < 50
    other = opened(folder_of(tmp_path / "again", texts_of(60)), held_out=0.1)
    assert data.fingerprint("train") == other.fingerprint("train")


RUN = """
import sys
from qtx.data import DataSpec, Source, load
from qtx.data import shards
from qtx.data.tokenizing import BUNDLED
from qtx_ref.spec import Family, Head, ModelSpec
shards.SHARD, shards.BATCH = 20000, 1000
spec = ModelSpec(Family.OPT, 1, 8, 1, 8, Head.CAUSAL, vocab=2048, length=16)
data = load(DataSpec(sources=(Source(sys.argv[1]),)), spec, tokenizer=BUNDLED / "tokenizer.json")
print(data.fingerprint("train"), data.token_count("train"))
"""


def start(source: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(reading.__file__).parents[2])}
    command = [sys.executable, "-c", RUN, source]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_leaves_nothing_that_is_taken_for_whole_and_two_processes_share_the_work(tmp_path, cache):
    pytest.importorskip("fcntl", reason="Windows has no flock")
    source = folder_of(tmp_path / "lines", texts_of(6000))
    killed = start(source)
    until = time.monotonic() + 60
    while not list(cache.glob("shards/*/shard-00001.safetensors")):
        assert time.monotonic() < until and killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (index,) = cache.glob("shards/*/index.json")
    assert json.loads(index.read_text())["whole"] is False
    both = [start(source), start(source)]
    results = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0] and results[0][0] == results[1][0]
    assert json.loads(index.read_text())["whole"] is True
    assert not list(cache.glob("shards/*/.*qtx-part"))


def test_a_full_disk_is_one_line_and_what_was_done_stays(tmp_path, monkeypatch, cache, small_shards):
    source = folder_of(tmp_path / "lines", texts_of(60))
    real = os.fsync

    def full(file):
        if list(cache.glob("shards/*/shard-00002.safetensors")):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr("qtx.disk.os.fsync", full)
        with pytest.raises(DataError, match="No space left on device.*QTX_CACHE says where") as caught:
            opened(source)
    assert "\n" not in str(caught.value)
    counts = count_encoded(monkeypatch)
    opened(source)
    assert 0 < sum(counts) < 50


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, cache):
    source = folder_of(tmp_path / "lines", texts_of(60))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTX_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match=r"file/below cannot be written .*: set QTX_CACHE to a folder that can"):
        opened(source)
    monkeypatch.setenv("QTX_CACHE", str(cache))
    own = DataSpec(sources=(Source(source),), vocab=200)
    first, trained = opened(source), load(own, OPT)

    def refuse(self, *given):
        raise DataError("read only")

    for name in ("write", "lock"):  # one that can only be read is enough
        monkeypatch.setattr(Cache, name, refuse)
    os.utime(next(cache.glob("shards/*/*.safetensors")))
    assert opened(source).describe() == first.describe() and load(own, OPT).describe() == trained.describe()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("QTX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().folder == tmp_path / "qtx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "qtx"


def test_duplicates_are_known_however_many_came_before():
    seen, numbers = Seen(), np.random.default_rng(0).integers(2**64, size=150_000, dtype=np.uint64).tolist()
    for number in numbers:
        seen.add(number)
    assert all(number in seen for number in numbers[::97])
    assert not any(number + 1 in seen for number in numbers[::97])


def test_ids_take_as_few_bytes_as_they_need(tmp_path, cache):
    opened(folder_of(tmp_path / "lines", texts_of(60)))
    (file,) = cache.glob("shards/*/*.safetensors")
    assert map_shard(file)["train.tokens"].dtype == np.uint16
    library = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    assert make_encoder(library, None, 70_000)(["a"])[0].dtype == np.uint32


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_overlap_is_found_by_document_where_the_cache_is_and_by_split_where_it_is_not(tmp_path, cache, monkeypatch):
    texts = texts_of(200)
    trained = opened(folder_of(tmp_path / "one", texts))
    meta = {"data": json.loads(json.dumps(trained.describe()))}
    refuse_overlap(meta, trained, "evaluation")
    refuse_overlap(meta, opened(folder_of(tmp_path / "two", texts_of(100, 500))), "evaluation")
    write_lines(tmp_path / "three" / "a.jsonl", [texts[0], *texts_of(30, 900)], split="evaluation")
    write_lines(tmp_path / "three" / "b.jsonl", texts_of(30, 1000), split="train")
    write_lines(tmp_path / "three" / "c.jsonl", texts_of(30, 1100), split="calibration")
    assert choose_split(int(digest(texts[0].encode())[:16], 16), 0.1) == "train"
    mixed = opened(str(tmp_path / "three"))
    with pytest.raises(SpecError, match=rf"1 section.s. of the evaluation .* {digest(texts[0].encode())[:12]}"):
        refuse_overlap(meta, mixed, "evaluation")
    with pytest.raises(SpecError, match="are this model's earlier train data"):
        refuse_overlap({"trained_on": meta["data"]["hashes"]["train"]}, mixed, "evaluation")
    (cache / "documents" / f"{trained.hashes('calibration')[0]}.npy").write_bytes(b"")  # damaged, and another split's
    with pytest.raises(SpecError, match="are this model's train data"):
        refuse_overlap(meta, mixed, "evaluation")
    monkeypatch.setenv("QTX_CACHE", str(tmp_path / "elsewhere"))
    refuse_overlap(meta, mixed, "evaluation")  # the documents are not known here
    swapped = {"data": {"hashes": {"train": meta["data"]["hashes"]["evaluation"]}}}
    with pytest.raises(SpecError, match="are this model's train data"):
        refuse_overlap(swapped, trained, "evaluation")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n[1]\n', r"a.jsonl line 2 is no object"),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}\n', r"a.jsonl line 2 has no text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": 3}\n', r"a.jsonl line 2 has no text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n', r"a.jsonl line 2 is no JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', r"a.jsonl line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "one", "question": "two"}\n', r"line 1 has a question: pairs of texts"),
        ("a.jsonl", b'{"text": "one", "split": "test"}\n', r"line 1 has the split 'test'"),
        ("a.jsonl", b"", r"is too short: its train split has 0 tokens"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', r"is too short: its train split has 0 tokens"),
        ("a.parquet", b"PAR1", r"a.parquet cannot be read .*give a whole Parquet file"),
    ],
)
def test_bad_documents_are_named(tmp_path, name, content, message, capsys):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        opened(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)
    if b"null" in content:
        assert "left out are 2 documents without text" in capsys.readouterr().err


def test_bad_columns_and_texts_are_named(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra qtx[data]")
    table = pytest.importorskip("pyarrow").table
    parquet.write_table(table({"content": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has no column text, and has content, id: rename one"):
        opened(str(tmp_path / "a.parquet"))
    parquet.write_table(table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column text holds int64: give strings"):
        opened(str(tmp_path / "a.parquet"))
    arrow = pytest.importorskip("pyarrow")
    ends = arrow.py_buffer(np.array([0, 2, 4], np.int32).tobytes())
    latin = arrow.Array.from_buffers(arrow.string(), 2, [None, ends, arrow.py_buffer(b"ok\xff\xfe")])
    parquet.write_table(table({"text": latin}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet holds a text after row 0 that is not UTF-8"):
        opened(str(tmp_path / "a.parquet"))
    monkeypatch.setattr(reading, "LARGE", 10)
    monkeypatch.setattr(reading, "LINE", 100)
    bad = {"a.txt": b"caf\xe9 " * 10, "b.txt": "one two three".encode("utf-16"), "c.txt": b"a\0b" * 10}
    for name, words in zip(bad, ("not UTF-8", "is UTF-16", "holds NUL bytes"), strict=True):
        (tmp_path / name).write_bytes(bad[name])
        with pytest.raises(DataError, match=words):
            opened(str(tmp_path / name))
    write_lines(tmp_path / "d.jsonl", ["x" * 200])
    with pytest.raises(DataError, match="d.jsonl line 1 has more than 100 bytes"):
        opened(str(tmp_path / "d.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        opened(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        opened(str(tmp_path / "nothing.parquet"))


def test_a_tokenizer_that_does_not_know_a_word_is_one_line(tmp_path):
    lib = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word1": 0, "word2": 1}))
    lib.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    lib.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "known").mkdir()
    rows = [json.dumps({"text": " ".join(f"word{1 + (i >> j) % 2}" for j in range(9))}) for i in range(200)]
    (tmp_path / "known" / "a.jsonl").write_text("\n".join(rows))
    load(DataSpec(sources=(Source(str(tmp_path / "known")),)), OPT, tokenizer=tmp_path / "tokenizer.json")
    (tmp_path / "b.txt").write_text("\n".join(texts_of(90)))
    for source in (folder_of(tmp_path / "lines", texts_of(60)), str(tmp_path / "b.txt")):
        with pytest.raises(DataError, match=r"does not take the text \(.*UNK.*\): give one with a token") as caught:
            load(DataSpec(sources=(Source(source),)), OPT, tokenizer=tmp_path / "tokenizer.json")
        assert "\n" not in str(caught.value)


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"a Parquet file needs pyarrow.*qtx\[data\]"):
        opened(str(tmp_path / "a.parquet"))
