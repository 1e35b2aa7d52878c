"""Tokenizing into shards beside the tokenizers library alone, the second start, and what a batch costs beside a step.

The bundled texts become lines of JSONL, again and again, numbered so that no two are alike. The library has the texts
in memory and gives its encodings; qtx reads the file, drops duplicates, tokenizes, and writes the shards.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from itertools import count
from pathlib import Path

from qtx.data import DataSpec, Source, load
from qtx.data.documents import Documents
from qtx.data.shards import BATCH, Part, Reader, count_cores, open_part, plan
from qtx.data.spec import Begin, Order, Packing
from qtx.data.text import TextData
from qtx.data.tokenizing import open_tokenizer, read_bundled_tokenizer
from qtx_ref.models.initial import init_params
from qtx_ref.spec import Family, Head, ModelSpec

from .harness import Call, Differ, Row, Skip, compare, peak
from .steps import make_trainer, random_batch, shape

HELD_OUT = 0.1
AROUND = (2, 3)  # [CLS] and [SEP]


def write_documents(path: Path, size: int) -> None:
    """A JSONL file of about `size` bytes."""
    texts = sorted((Path(str(files("qtx.data"))) / "bundled" / "text").glob("*.txt"))
    paragraphs = [part for text in texts for part in text.read_text(encoding="utf-8").split("\n\n") if len(part) > 200]
    with path.open("w", encoding="utf-8") as file:
        for number in count():
            file.write(json.dumps({"text": f"{number} {paragraphs[number % len(paragraphs)]}"}) + "\n")
            if file.tell() >= size:
                return


def shard(path: Path, cache: Path) -> Part:
    os.environ["QTX_CACHE"] = str(cache)
    tokenizer, _, vocab = open_tokenizer(read_bundled_tokenizer())
    documents = Documents(str(path), (path,))
    return open_part(documents, read_bundled_tokenizer(), tokenizer, vocab, AROUND, HELD_OUT, 1.0)


def build_shards(path: str, cache: str, again: bool) -> Call:
    """Opening a file: anew, or as its cache has it."""

    def call() -> Part:
        if not again:
            shutil.rmtree(cache, ignore_errors=True)
        return shard(Path(path), Path(cache))

    return call


def build_library(path: str, name: str) -> Call:
    """The same texts by a function of the tokenizers library; how many tokens, those around each text too."""
    tokenizer, _, _ = open_tokenizer(read_bundled_tokenizer())
    kept = Reader(Documents(path, (Path(path),)), HELD_OUT).read()
    most = BATCH * max(2, count_cores())
    batches = [[document.text for document in batch] for _, batch, _ in plan(kept, set(), most)]
    encode = getattr(tokenizer, name)

    def call() -> int:
        found = (encode(batch, add_special_tokens=False) for batch in batches)
        return sum(len(each.ids) + len(AROUND) for batch in found for each in batch)

    return call


def compare_counts(part: Part, tokens: int) -> str:
    ours = sum(each.count for each in part.tokens.values())
    if ours != tokens:
        raise Differ(f"{ours} tokens, and the library has {tokens}")
    return f"{tokens} tokens in both"


def make_batches(cache: Path, path: Path, order: Order, batch: int, length: int) -> Iterator[dict]:
    """Masked windows of the file's documents, joined."""
    os.environ["QTX_CACHE"] = str(cache)
    model = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=length, types=2)
    settings = DataSpec(sources=(Source(str(path)),), order=order, packing=Packing.STREAM, begin=Begin.DOCUMENT)
    data = load(settings, model, tokenizer=read_bundled_tokenizer())
    assert isinstance(data, TextData)
    return data.train_batches(model, batch, 0)


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    size, rounds = (1, 2) if quick else (20, 5)
    with tempfile.TemporaryDirectory(prefix="qtx-bench-") as name:
        work = Path(name)
        path = work / "documents.jsonl"
        write_documents(path, size * 10**6)
        first, again = (build_shards(str(path), str(work / part), part == "again") for part in ("first", "again"))
        title, least = f"{size} MB", peak(build_shards, str(path), str(work / "weighed"), False)
        for function in ("encode_batch", "encode_batch_fast"):
            call = build_library(str(path), function)
            yield compare(
                f"{title}, read, tokenized, written", first, function, call,
                rounds=rounds, check=lambda call=call: compare_counts(first(), call()),
                mib=least, against_mib=peak(build_library, str(path), function),
            )  # fmt: skip
        yield compare(
            f"{title}, the second start", again, "the first", first,
            rounds=rounds, check=lambda: compare_counts(again(), build_library(str(path), "encode_batch_fast")()),
            mib=peak(build_shards, str(path), str(work / "again"), True), against_mib=least,
        )  # fmt: skip
        if size > 16:  # a smaller file is read as text, without shards
            yield from batch_rows(work, path)


def batch_rows(work: Path, path: Path) -> Iterator[Row]:
    """Making a batch beside a training step of bert-base with one."""
    spec = shape("bert-base", 0.0)
    trainer, data = make_trainer(spec, init_params(spec, 0)), random_batch(spec, 4, 128)
    for order in Order:
        batches = make_batches(work / "again", path, order, 4, 128)
        yield compare(
            f"a batch of 4 x 128, {order}", lambda batches=batches: next(batches),
            "a training step of bert-base", lambda: trainer.step(data),
            rounds=2, check=lambda batches=batches: compare_shape(next(batches), (4, 128)),
        )  # fmt: skip


def compare_shape(batch: dict, wanted: tuple[int, int]) -> str:
    if batch["tokens"].shape != wanted:
        raise Differ(f"tokens have shape {batch['tokens'].shape}")
    return "shapes equal"
