"""Documents of every format: what is read of files, folders and the hub, and in which split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.tests.files.document_folders import OPT, TOKENIZER, folder_of, opened, texts_of, write_lines
from qtx.data import SPLITS, DataError, DataSpec, Source, load
from qtx.data import documents as reading
from qtx.data import shards as writing
from qtx.data.documents import choose_split, cut, open_documents, read_file
from qtx.data.spec import Begin, Packing
from qtx.data.splits import digest
from qtx_ref.spec import Family, Head, ModelSpec

tokenizers = pytest.importorskip("tokenizers", reason="tokenizing needs the extra qtx[text]")


BERT = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=16, types=2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- what is read ----------------------------------------------------------------------------------------------------


def test_lines_become_documents_in_splits_by_their_hash(tmp_path):
    texts = texts_of(120)
    data = opened(folder_of(tmp_path / "one", [*texts, texts[3], "", texts[3]]))
    library = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    for split in SPLITS:
        own = [t for t in texts if choose_split(int(digest(t.encode())[:16], 16), 0.1) == split]
        ids = [i for t in own for i in library.encode(t, add_special_tokens=False).ids]
        assert data._parts[0].tokens[split].take(np.arange(data.token_count(split))).tolist() == ids
        assert len(own) >= 4
    assert data.dropped == 2
    sizes = {split: len(json.dumps(data.describe())) for split in SPLITS}
    assert max(sizes.values()) < 1000  # no hash of a document


def test_a_document_stays_in_its_split_when_others_come(tmp_path):
    texts = texts_of(100)

    def places(source: str) -> dict[str, str]:
        reader = writing.Reader(open_documents(source), 0.1)
        return {kept.text: SPLITS[kept.split] for kept in reader.read()}

    one = places(folder_of(tmp_path / "one", texts))
    two = places(folder_of(tmp_path / "two", texts_of(50, 1000) + texts[::-1]))
    assert all(two[text] == split for text, split in one.items())
    shares = np.bincount([SPLITS.index(choose_split(int(digest(str(i).encode())[:16], 16), 0.02)) for i in range(5000)])
    assert abs(shares[2] - 100) < 50 and abs(shares[1] - 100) < 50  # 5 standard deviations


def test_every_format_gives_the_same_documents(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra qtx[data]")
    table = pytest.importorskip("pyarrow").table
    texts = texts_of(60)
    expected = opened(folder_of(tmp_path / "lines", texts))
    parquet.write_table(table({"text": texts, "other": list(range(60))}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "mixed").mkdir()
    parquet.write_table(table({"text": texts[:20]}), tmp_path / "mixed" / "1.parquet")
    (tmp_path / "mixed" / "2.txt").write_text(texts[20] + "  \r\n")
    write_lines(tmp_path / "mixed" / "3.jsonl", texts[21:])
    for name in ("a.parquet", "mixed"):
        got = opened(str(tmp_path / name))
        assert [got.fingerprint(s) for s in SPLITS] == [expected.fingerprint(s) for s in SPLITS], name
        batches = [next(d.train_batches(OPT, 4, 0))["tokens"] for d in (got, expected)]
        assert np.array_equal(*batches)


def test_a_saved_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra qtx[data]")
    texts = texts_of(60)
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0] * 60})
    rows.save_to_disk(str(tmp_path / "set"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "sets"))
    expected = opened(folder_of(tmp_path / "lines", texts))
    assert opened(str(tmp_path / "set")).fingerprint("train") == expected.fingerprint("train")
    assert opened(str(tmp_path / "sets" / "train")).fingerprint("train") == expected.fingerprint("train")
    with pytest.raises(DataError, match=r"holds the data sets test, train: give one of them, such as .*sets/test"):
        opened(str(tmp_path / "sets"))
    rows.save_to_disk(str(tmp_path / "turned"), num_shards=2)
    straight = opened(str(tmp_path / "turned"))
    assert straight.fingerprint("train") == expected.fingerprint("train")
    state = json.loads((tmp_path / "turned" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "turned" / "state.json").write_text(json.dumps(state))  # the same files, and other rows first
    assert opened(str(tmp_path / "turned")).fingerprint("train") != expected.fingerprint("train")
    (tmp_path / "set" / "state.json").write_text("{")  # though the cache knows the text
    with pytest.raises(DataError, match="cannot be opened as a data set"):
        opened(str(tmp_path / "set"))
    rows.select(range(50)).save_to_disk(str(tmp_path / "set"))
    next((tmp_path / "set").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match="cannot be opened as a data set"):
        opened(str(tmp_path / "set"))


def test_a_data_set_of_the_hub_is_streamed(tmp_path, monkeypatch):
    """The library reads a folder of JSONL under any name that it is asked for; only the version is the hub's."""
    datasets = pytest.importorskip("datasets", reason="needs the extra qtx[data]")
    folder = folder_of(tmp_path / "lines", texts_of(60))
    real = datasets.load_dataset
    asked = set()

    def load_dataset(*names, **more):
        asked.add(names)
        return real("json", data_dir=folder, **more)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(reading, "hub_version", lambda name: "abc")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    got = opened("hub:someone/something:en")
    assert asked == {("someone/something", "en")}
    assert got.fingerprint("train") == opened(folder).fingerprint("train")
    assert got.describe()["source"] == "hub:someone/something:en"


def test_a_hub_that_is_not_there_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra qtx[data]")

    class Away:
        def dataset_info(self, name):
            raise OSError("no\nnetwork")

    monkeypatch.setattr(hub, "HfApi", Away)
    with pytest.raises(DataError, match="hub:a/b cannot be found .no network.: check its name and the network"):
        opened("hub:a/b")
    with pytest.raises(DataError, match="names no data set"):
        opened("hub:")


def test_a_large_text_is_cut_into_blocks_that_are_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 4000)
    monkeypatch.setattr(reading, "BLOCK", 500)
    monkeypatch.setattr(reading, "READ", 700)
    paragraphs = [f"Paragraph {i} caf\u00e9. " + "x y z. " * (i % 40) for i in range(200)]
    text = "\n\n".join(p.strip() for p in paragraphs)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    blocks = [d.text for d in read_file(tmp_path / "a.txt")]
    assert "\n\n".join(blocks) == text and len(blocks) > 30
    assert all(len(block) >= 500 - 2 for block in blocks[:-1]) and max(map(len, blocks)) <= 2000
    longer = [d.text for d in cut("", [text + "\n\nAnd more."])]
    assert longer[: len(blocks) - 1] == blocks[:-1]  # adding text leaves the earlier blocks
    assert [d.text for d in cut("", ["x" * 9000])] == ["x" * 2000] * 4 + ["x" * 1000]  # nothing to cut at
    assert [d.text for d in cut("", ["short"])] == ["short"]


def test_a_text_file_is_read_as_documents_beyond_a_size(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(texts_of(300)))
    assert open_documents(str(file)) is None and len(load(str(file), OPT, tokenizer=TOKENIZER).sections) > 40
    monkeypatch.setattr(reading, "LARGE", 1000)
    monkeypatch.setattr(reading, "LONGEST", 2000)
    monkeypatch.setattr(reading, "BLOCK", 200)
    data = opened(str(file))
    assert data.sections == [] and data.token_count("evaluation") > 100


def test_files_may_say_the_split_themselves(tmp_path):
    for split, first in (("train", 0), ("calibration", 100), ("evaluation", 200)):
        write_lines(tmp_path / "set" / f"{split}.jsonl", texts_of(10, first), split=split)
    data = opened(str(tmp_path / "set"))
    library = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    own = sum(len(library.encode(t, add_special_tokens=False).ids) for t in texts_of(10, 200))
    assert data.token_count("evaluation") == own
    write_lines(tmp_path / "set" / "more.jsonl", texts_of(1, 3), split="evaluation")
    with pytest.raises(
        DataError, match="train.jsonl line 4 of the train split has a text that stands in another one too"
    ):
        opened(str(tmp_path / "set"))
    write_lines(tmp_path / "set" / "more.jsonl", texts_of(1, 300))
    with pytest.raises(DataError, match="some documents have a split and others none"):
        opened(str(tmp_path / "set"))


def test_documents_carry_their_tokens_and_mix_with_sections(tmp_path):
    source = folder_of(tmp_path / "lines", texts_of(60))
    plain, data = opened(source, BERT), opened(source, BERT, begin=Begin.DOCUMENT, packing=Packing.STREAM)
    count = sum(len(part) for part in plain._parts[0].tokens["train"]._local)
    assert data.token_count("train") == plain.token_count("train") + 2 * count
    mixed = DataSpec(sources=(Source("books"), Source(source, 3.0)))
    both = load(mixed, BERT, tokenizer=TOKENIZER)
    assert both.token_count("train") == load("books", BERT).token_count("train") + plain.token_count("train")
    assert DataSpec.of(both.describe()) == replace(mixed, tokenizer=None)


def test_a_text_in_two_splits_of_a_mixture_is_refused(tmp_path):
    texts = texts_of(80)
    of_split = {choose_split(int(digest(text.encode())[:16], 16), 0.1): text for text in texts}
    one = folder_of(tmp_path / "one", texts)
    for first, split in zip((200, 300, 400), SPLITS, strict=True):
        own = [of_split[split], *texts_of(9, first)]  # in the same split of both: no harm
        write_lines(tmp_path / "two" / f"{split}.jsonl", own, split=split)
    held = next(t for t in texts if choose_split(int(digest(t.encode())[:16], 16), 0.1) == "evaluation")
    assert held != of_split["evaluation"]
    load(DataSpec(sources=(Source(one), Source(str(tmp_path / "two")))), OPT, tokenizer=TOKENIZER)
    write_lines(tmp_path / "two" / "more.jsonl", [held], split="train")
    mixed = DataSpec(sources=(Source(one), Source(str(tmp_path / "two"))))
    with pytest.raises(
        DataError, match=rf"two \(train\) are also in .*one \(evaluation\).*{digest(held.encode())[:16]}"
    ):
        load(mixed, OPT, tokenizer=TOKENIZER)
    for name in ("a", "b", "c", "d"):  # sections: the last file evaluates
        for source in ("three", "four"):
            (tmp_path / source).mkdir(exist_ok=True)
            (tmp_path / source / f"{name}.txt").write_text(f"{name} of {source} " * 20)
    (tmp_path / "four" / "a.txt").write_text("d of three " * 20)
    with pytest.raises(DataError, match=r"1 text\(s\) of .*four \(train\) are also in .*three \(evaluation\)"):
        sources = (Source(str(tmp_path / "three")), Source(str(tmp_path / "four")))
        load(DataSpec(sources=sources), OPT, tokenizer=TOKENIZER)


def test_files_that_are_not_read_are_said_once(tmp_path, capsys):
    for name, ending in (("lines", "jsonl"), ("texts", "txt")):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(40):
            content = json.dumps({"text": texts_of(1, i)[0]}) if ending == "jsonl" else texts_of(1, i)[0]
            (folder / f"{i}.{ending}").write_text(content)
        (folder / "rows.csv").write_text("text\nwords\n")
        (folder / ".hidden").write_text("words")
        capsys.readouterr()
        opened(str(folder))
        said = capsys.readouterr().err
        assert said.count("1 file(s) that are no .txt, .jsonl, .parquet, rows.csv first") == 1
        assert said.count("what is hidden, .hidden") == 1


def test_a_tokenizer_is_trained_once_on_a_bounded_sample(tmp_path, monkeypatch, capsys):
    source = folder_of(tmp_path / "lines", texts_of(300))
    monkeypatch.setattr("qtx.data.corpus.SAMPLE", 3000)
    data = load(DataSpec(sources=(Source(source),), vocab=200), OPT)
    assert "trained on 0.0 million characters of the train split" in capsys.readouterr().err
    monkeypatch.setattr("qtx.data.corpus.train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert load(DataSpec(sources=(Source(source),), vocab=200), OPT).tokenizer_json == data.tokenizer_json
    sample = writing.take_sample(open_documents(source), 0.1, 3000)
    assert 2000 < sum(map(len, sample)) < 3200 and len({text.split(":")[0] for text in sample}) == len(sample)
    assert int(sample[-1].split(":")[0].split()[1]) > 100  # spread over the whole, not its beginning
