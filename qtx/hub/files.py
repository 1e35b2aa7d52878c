"""The files of a Hugging Face model: a folder with config.json and safetensors, read with one clear error for whatever
is wrong, and no allocation beyond what the files hold. Nothing is ever unpickled.

A safetensors file is 8 bytes of header length, a JSON header (dtype, shape and offsets by tensor), then the tensors'
bytes, little-endian. The package safetensors checks that offsets are in order, whole and within the file; bfloat16,
which NumPy lacks, is read here: it is the upper half of a float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..data.reading import read_regular
from ..files.container import FileError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER, PREPROCESSOR = "tokenizer.json", "preprocessor_config.json"
TOKENIZER_CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
GENERATION = "generation_config.json"
# kept as they are, to be written again
BESIDE = (CONFIG, PREPROCESSOR, GENERATION, TOKENIZER_CONFIG, SPECIALS, ADDED, "vocab.txt", "vocab.json", "merges.txt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADER_BYTES = 100_000_000  # the package's own limit
MOST = 20_000  # tensors in a file: a thousand layers
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
INTEGERS = {"I64": "int64", "I32": "int32"}
DTYPES = FLOATS | INTEGERS
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `dtype` in the words of safetensors, `start` and `size` in bytes of `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


# --- JSON and the folder ----------------------------------------------------------------------------------------------


def read_file(path: Path) -> bytes:
    """The bytes of a file beside the tensors. Raises FileError where it is missing, no regular file or too large."""
    try:
        return read_regular(path)
    except FileNotFoundError:
        raise FileError(f"{path} is missing: give the whole folder of a model, as transformers saves it") from None
    except OSError as error:
        raise FileError(
            f"{path} cannot be read ({error.strerror}): take the file anew from where the model is from"
        ) from None


def read_json(path: Path) -> dict[str, object]:
    """A JSON object. Raises FileError where the file is missing, broken or something else."""
    try:
        value = json.loads(read_file(path).decode())
    except FileError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(f"{path} is not JSON ({error}): take the file anew from where the model is from") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} holds {type(value).__name__}, not an object of settings")
    return value


def read_beside(folder: Path) -> dict[str, str]:
    """The text of each file of `BESIDE` that the folder has, by name. Raises FileError for one that is damaged."""
    texts = {}
    for name in BESIDE:
        if (folder / name).exists():
            if name.endswith(".json"):
                read_json(folder / name)
            try:
                texts[name] = read_file(folder / name).decode()
            except UnicodeDecodeError:
                raise FileError(f"{folder / name} is not UTF-8: take the file anew") from None
    return texts


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's model.safetensors, or of the shards that its index names.

    Raises FileError: no such folder, nothing in it, pickles only, an index that is wrong, damaged files.
    """
    if not folder.is_dir():
        hint = (
            explain_pickle(folder.name)
            if folder.suffix in PICKLES
            else "give the folder of a model, not a file or a name"
        )
        raise FileError(f"{folder} is no folder: {hint}")
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return read_shards(folder / INDEX)
    if names := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise FileError(f"{folder} holds {names[0]} and no {WEIGHTS}: {explain_pickle(names[0])}")
    raise FileError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: give the folder of a model in safetensors")


def explain_pickle(name: str) -> str:
    """Why a file is not opened, and what to do instead."""
    return (
        f"{name} is a pickle, which can run code and is never opened here; where you trust it, load it with "
        "transformers' from_pretrained and write it anew with save_pretrained(FOLDER), which writes safetensors"
    )


def read_shards(index: Path) -> dict[str, Stored]:
    """The tensors of all shards; each must be in the shard that the index names, and in no other.

    Raises FileError for an index that is wrong.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise FileError(f"{index}: weight_map must be an object of file names by tensor")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise FileError(f"{index}: tensor {name} is said to be in {shard!r}; name a .safetensors file beside it")
    tensors: dict[str, Stored] = {}
    parts = sorted(set(where.values()))
    if absent := [shard for shard in parts if not (index.parent / shard).is_file()]:
        raise FileError(f"{index}: {join_count(absent, 'shard')} missing: take the whole folder of the model")
    for shard in parts:
        for name, stored in read_header(index.parent / shard).items():
            if where.get(name) != shard:
                raise FileError(f"{index}: {shard} holds tensor {name}, which the index does not say")
            tensors[name] = stored
    if lost := sorted(where.keys() - tensors.keys()):
        raise FileError(f"{index}: {join_count(lost, 'tensor')} of the index in no shard")
    return tensors


def join_count(names: list[str], what: str) -> str:
    """A count and the first few names, in words."""
    first = ", ".join(name if len(name) <= 80 else name[:77] + "..." for name in names[:3])
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({first}{', ...' if len(names) > 3 else ''})"


# --- tensors ----------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Stored]:
    """Dtype, shape and place of every tensor of a file; no tensor is read.

    Raises FileError: truncated, a header that lies, tensors named twice, more than `MOST` tensors.
    """
    total = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > total - 8:
            raise FileError(f"{path} is truncated or damaged: {total} bytes, its header alone would have {length}")
        if length > HEADER_BYTES:
            raise FileError(f"{path}: a header of {length} bytes is no model's; at most {HEADER_BYTES} are read")
        header = file.read(length)
    if (count := header.count(b"{") - 1) > MOST:  # every tensor has its own; counted before as many are made
        raise FileError(f"{path} names about {count} tensors: a model that can be imported has at most {MOST}")
    try:
        with safe_open(path, framework="np"):
            pass
        entries = json.loads(header, object_pairs_hook=refuse_repeated)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except (SafetensorError, OSError, TypeError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged or not a safetensors file ({error})") from None
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


def refuse_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON in which no key stands twice. Raises FileError naming one that does."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise FileError(f"the header names {twice!r} twice")
    return values


def read_tensor(name: str, stored: Stored) -> np.ndarray:
    """The values: float16 and bfloat16 as float32, which holds each of them exactly; others as they are.

    Raises FileError for a dtype that is none of `FLOATS` and `INTEGERS`, and for NaN and infinity.
    """
    if stored.dtype not in DTYPES:
        raise FileError(f"{stored.path}: tensor {name} is {stored.dtype}; known are {', '.join(FLOATS)}")
    kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4"}[stored.dtype]
    with open(stored.path, "rb") as file:
        file.seek(stored.start)
        raw = np.fromfile(file, kind, stored.size // np.dtype(kind).itemsize).reshape(stored.shape)
    if stored.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    value = raw.astype(np.float32) if stored.dtype == "F16" else raw
    if not np.isfinite(value).all():
        raise FileError(f"{stored.path}: tensor {name} holds NaN or infinity; take the file anew")
    return value


def fits(value: np.ndarray, dtype: str) -> bool:
    """Whether a dtype of safetensors holds these values exactly."""
    if dtype == "BF16":
        return value.dtype == np.float32 and not (value.view(np.uint32) & 0xFFFF).any()
    with np.errstate(over="ignore"):
        return np.array_equal(value.astype(DTYPES[dtype]), value)


def write_bytes(tensors: Mapping[str, tuple[np.ndarray, str]]) -> bytes:
    """A safetensors file of values that fit the dtypes given with them."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    parts, place = [], 0
    for name, (value, dtype) in sorted(tensors.items(), key=lambda item: (-BYTES[item[1][1]], item[0])):  # aligned
        if dtype == "BF16":
            data = (np.ascontiguousarray(value).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = value.astype(np.dtype(DTYPES[dtype]).newbyteorder("<")).tobytes()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [place, place + len(data)]}
        parts.append(data)
        place += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])
