"""Shards: the ids of documents, tokenized once by all cores, in files of a cache folder that are mapped, not read.

The folder of a text is named after its content, its tokenizer and all else that decides the ids. It holds
`index.json` and a safetensors file for every 32 MB of text or so, each with its three splits: `train.tokens` and
`train.ends`, the places in them where documents end. A split of a document follows from its hash, so that it stays
where it is when others are added. What was done when a process is killed is not done again; a shard that is not what
the index says is made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from ..progress import Progress
from .cache import hashes_path
from .documents import Documents, choose_split, hash_file
from .splits import SHORT, SPLITS, DataError, digest
from .store import Cache
from .text import Part
from .tokenizing import Tokenizer, encode_texts
from .windows import Tokens

VERSION = 1  # of the rules by which documents become shards: with another, a text is tokenized anew
SHARD = 2**25  # characters of text in a shard, about
BATCH = 2**19  # characters of text that are tokenized at once, about, for each core
WORKERS = 2  # batches at once: one is tokenized by all cores while another's ids are taken
SAMPLE = 2**24  # characters of train text, at most, that a tokenizer is trained on
INDEX = "index.json"
KINDS = {"U16": np.uint16, "U32": np.uint32, "I64": np.int64}  # safetensors' names
Encode = Callable[[list[str]], list[np.ndarray]]


class Kept(NamedTuple):
    """A document that is kept: its place in the splits, and its text."""

    split: int
    text: str


class Seen:
    """Which documents came before, by 64 bits of their hash; eight bytes for each, and as much again now and then."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._fresh: set[int] = set()

    def __contains__(self, number: int) -> bool:
        if number in self._fresh or not len(self._sorted):
            return number in self._fresh
        at = int(np.searchsorted(self._sorted, np.uint64(number)))
        return at < len(self._sorted) and int(self._sorted[at]) == number

    def add(self, number: int) -> None:
        """From now on it is not new."""
        self._fresh.add(number)
        if len(self._fresh) > max(2**16, len(self._sorted) // 8):
            fresh = np.fromiter(self._fresh, np.uint64, len(self._fresh))
            self._sorted = np.sort(np.concatenate([self._sorted, fresh]))
            self._fresh = set()


class Reader:
    """Documents of a source as they are kept: with their splits, each text once, those without text left out."""

    def __init__(self, documents: Documents, held_out: float) -> None:
        self._documents, self._held_out = documents, held_out
        self._seen = [Seen() for _ in SPLITS]
        self.hashes = [array("Q") for _ in SPLITS]  # 64 bits of each document's, in order
        self.dropped = self.empty = self.bytes = 0
        self._divided: bool | None = None

    def read(self) -> Iterator[Kept]:
        """Each document that is kept. Raises DataError as `Documents.read`, for a text in two splits, and for splits
        that some documents have and others do not."""
        for where, text, split in self._documents.read():
            if not text:
                self.empty += 1
                continue
            raw = text.encode()
            number = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")
            if self._divided is None:
                self._divided = bool(split)
            elif self._divided != bool(split):
                raise DataError(
                    f"{where}: some documents have a split and others none: give every one a split, or none"
                )
            place = SPLITS.index(split or choose_split(number, self._held_out))
            if split and any(number in self._seen[other] for other in range(len(SPLITS)) if other != place):
                raise DataError(f"{where} of the {split} split has a text that stands in another one too: remove one")
            if number in self._seen[place]:
                self.dropped += 1
                continue
            self._seen[place].add(number)
            self.hashes[place].append(number)
            self.bytes += len(raw)
            yield Kept(place, text)

    def fingerprint(self, place: int) -> str:
        """One sha256 over the hashes of a split's documents, in order."""
        big = np.frombuffer(self.hashes[place], np.uint64).astype(">u8")
        return hashlib.sha256(big.tobytes()).hexdigest()


def plan(kept: Iterator[Kept], done: set[int], most: int) -> Iterator[tuple[int, list[Kept], bool]]:
    """Batches of documents of about `most` characters, each with the number of its shard and whether it is its last; of
    shards that are `done` an empty one."""
    number = shard = size = 0
    batch: list[Kept] = []
    for document in kept:
        batch.append(document)
        size += len(document.text)
        if size >= most or shard + size >= SHARD:
            shard, last = shard + size, shard + size >= SHARD
            if last or number not in done:
                yield number, [] if number in done else batch, last
            batch, size = [], 0
            if last:
                number, shard = number + 1, 0
    if shard + size:
        yield number, [] if number in done else batch, True


def count_cores() -> int:
    """How many cores tokenize: those that this process may use, or as many as the library is told to take; 16 at most,
    beyond which batches would only take more memory."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("off", "false", "f", "no", "n", "0"):
        return 1
    told = os.environ.get("RAYON_NUM_THREADS", "")
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(told) if told.isdecimal() and int(told) else own, 16)


def make_encoder(tokenizer: Tokenizer, around: tuple[int, int | None] | None, vocab: int) -> Encode:
    """What makes ids of texts, in as few bytes as they take, with what stands before and behind each."""
    kind = np.uint16 if vocab <= 2**16 else np.uint32
    before, behind = ([] if one is None else [one] for one in around or (None, None))

    def run(texts: list[str]) -> list[np.ndarray]:
        every = (encoding.ids for encoding in encode_texts(tokenizer, texts))
        return [np.array([*before, *ids, *behind] if around else ids, kind) for ids in every]

    return run


def pack(documents: Sequence[tuple[int, np.ndarray]], kind: type) -> tuple[bytes, list[int], list[int]]:
    """A shard's bytes, its tokens and its documents by split."""
    tensors, tokens, counts = {}, [], []
    for place, split in enumerate(SPLITS):
        own = [ids for where, ids in documents if where == place]
        tensors[f"{split}.tokens"] = np.concatenate([np.empty(0, kind), *own])
        tensors[f"{split}.ends"] = np.cumsum([len(ids) for ids in own], dtype=np.int64)
        tokens.append(len(tensors[f"{split}.tokens"]))
        counts.append(len(own))
    return save(tensors), tokens, counts


def look(path: Path) -> list[int] | None:
    """What a file's status is where nothing was done to it; None where it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def find_whole(cache: Cache, folder: Path, index: dict[str, Any]) -> set[int]:
    """The numbers of the shards that are as the index says: untouched since they were last hashed, or of its sha256."""
    whole, fresh = set(), False
    for number, record in enumerate(index.get("shards", [])):
        path = folder / name_shard(number)
        now = look(path)
        if now is None:
            continue
        if now != record.get("seen"):
            if now[0] != record.get("bytes") or hash_file(path) != record.get("sha256"):
                sys.stderr.write(f"{path} is damaged: it is made again\n")
                continue
            record["seen"], fresh = now, True
        whole.add(number)
    if fresh:
        with suppress(DataError):  # a cache that can only be read
            cache.write_json(folder / INDEX, index)
    return whole


def name_shard(number: int) -> str:
    """The name of a shard's file."""
    return f"shard-{number:05}.safetensors"


def is_complete(index: dict[str, Any], whole: set[int]) -> bool:
    """Whether all shards are there, what is said at the end, and the hashes of the documents."""
    if not index.get("whole") or len(whole) < len(index["shards"]):
        return False
    kept = zip(index["fingerprints"].values(), index["hash_bytes"], strict=True)
    return all((now := look(hashes_path(value[:SHORT]))) and now[0] == size for value, size in kept)


def build(
    cache: Cache, folder: Path, documents: Documents, held_out: float, encode: Encode, index: dict[str, Any]
) -> dict[str, Any]:
    """Tokenizes what is not yet done, and returns the index. Raises DataError where the documents cannot be read or
    the shards not written; what was done is kept."""
    done = find_whole(cache, folder, index)
    records: list[dict[str, Any]] = index.get("shards", [])
    reader = Reader(documents, held_out)
    kind = encode([""])[0].dtype.type
    parts: list[tuple[int, np.ndarray]] = []
    pending: deque[tuple[int, list[int], bool, Future[list[np.ndarray]] | None]] = deque()

    def finish() -> None:
        number, places, last, future = pending.popleft()
        if future is not None:
            parts.extend(zip(places, future.result(), strict=True))
        if last and number not in done:
            content, tokens, counts = pack(parts, kind)
            path = folder / name_shard(number)
            cache.write(path, content)
            sha256 = hashlib.sha256(content).hexdigest()
            record = {
                "bytes": len(content),
                "sha256": sha256,
                "seen": look(path),
                "tokens": tokens,
                "documents": counts,
            }
            records[number : number + 1] = [record]
            cache.write_json(folder / INDEX, {"whole": False, "shards": records})
            parts.clear()

    total = -(-documents.count_bytes() // 2**20)
    workers = min(WORKERS, count_cores())
    with Progress("tokenize, MB", total) as bar, ThreadPoolExecutor(workers) as pool:
        try:
            for number, batch, last in plan(reader.read(), done, BATCH * max(2, count_cores())):
                texts = [document.text for document in batch]
                future = pool.submit(encode, texts) if texts else None
                pending.append((number, [document.split for document in batch], last, future))
                while len(pending) > workers:
                    finish()
                bar.advance(min(total, reader.bytes // 2**20) - bar.done)
            while pending:
                finish()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        bar.advance(total - bar.done)
    return seal(cache, folder, reader, records)


def seal(cache: Cache, folder: Path, reader: Reader, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the hashes of the documents, and the index of all shards."""
    counts = [len(hashes) for hashes in reader.hashes]
    prints = {split: reader.fingerprint(place) for place, split in enumerate(SPLITS)}
    sizes = []
    for place, split in enumerate(SPLITS):
        raw = io.BytesIO()
        np.save(raw, np.sort(np.frombuffer(reader.hashes[place], np.uint64)))
        cache.write(hashes_path(prints[split][:SHORT]), raw.getvalue())
        sizes.append(len(raw.getvalue()))
    about = {"fingerprints": prints, "documents": counts, "dropped": reader.dropped, "empty": reader.empty}
    index = {"whole": True, **about, "hash_bytes": sizes, "shards": records}
    cache.write_json(folder / INDEX, index)
    return index


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a shard, mapped."""
    raw = np.memmap(path, np.uint8, "r")
    low = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    tensors = {}
    for name, about in json.loads(raw[8:low].tobytes()).items():
        begin, end = about["data_offsets"]
        kind = np.dtype(KINDS[about["dtype"]])
        tensors[name] = np.frombuffer(raw, kind, (end - begin) // kind.itemsize, low + begin)
    return tensors


def open_part(
    documents: Documents,
    tokenizer_json: str,
    tokenizer: Tokenizer,
    vocab: int,
    around: tuple[int, int | None] | None,
    held_out: float,
    weight: float,
) -> Part:
    """A source as it is in the cache, put there first where it is not. Raises DataError."""
    cache = Cache()
    rules = [VERSION, cache.fingerprint(documents), digest(tokenizer_json.encode()), around, held_out, SHARD]
    key = digest(json.dumps(rules).encode())[:32]
    folder = cache.folder / "shards" / key
    index = cache.read_json(folder / INDEX)
    if not is_complete(index, find_whole(cache, folder, index)):
        with cache.lock(key):
            index = cache.read_json(folder / INDEX)  # another process may have made it meanwhile
            if not is_complete(index, find_whole(cache, folder, index)):
                index = build(cache, folder, documents, held_out, make_encoder(tokenizer, around, vocab), index)
    if index["empty"]:
        sys.stderr.write(f"{documents.source}: left out are {index['empty']} documents without text\n")
    shards = [map_shard(folder / name_shard(number)) for number in range(len(index["shards"]))]
    prints = index["fingerprints"]
    counts = dict(zip(SPLITS, index["documents"], strict=True))
    return Part(
        {
            split: Tokens([s[f"{split}.tokens"] for s in shards], [s[f"{split}.ends"] for s in shards])
            for split in SPLITS
        },
        {split: [prints[split][:SHORT]] if counts[split] else [] for split in SPLITS},
        prints,
        index["dropped"],
        weight,
    )


def take_sample(documents: Documents, held_out: float, most: int) -> list[str]:
    """Train documents of at most about `most` characters in all, spread over the source by their hashes where its size
    is known, else its first."""
    reader, texts, size = Reader(documents, held_out), [], 0
    share = most / max(documents.count_bytes(), most)
    for kept in reader.read():
        if SPLITS[kept.split] != "train":
            continue
        number = reader.hashes[kept.split][-1]
        if (number & 0xFFFFFFFF) / 2**32 < share:
            texts.append(kept.text)
            size += len(kept.text)
            if size >= most:
                break
    return texts
