"""qtx's files, read with one clear error for whatever is wrong: safetensors with JSON in their metadata, and JSON.

Tensors: a checkpoint, an artifact, golden vectors. JSON: the results of study, ptq, cost and analyze. Each carries a
sha256 over all that it holds, its seal, and a mark by which qtx knows what it may replace.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qtx_ref.spec.base import is_number

from ..data.reading import read_regular
from ..disk import open_beside, write_whole
from .formats import (
    ANALYSIS,
    ARTIFACT,
    CHECKPOINT,
    COMPARISON,
    COST,
    KEYS,
    MARKED_BYTES,
    RESULT,
    STUDY,
    USES,
    VECTORS,
    VERSIONS,
    CheckpointError,
    FileError,
    JsonObject,
    check_file,
    check_replaceable,
    kind_of,
)
from .writing import missing_folders, remove_empty

__all__ = [  # what other rooms take of this module and of `formats`
    "ANALYSIS",
    "ARTIFACT",
    "CHECKPOINT",
    "COMPARISON",
    "COST",
    "RESULT",
    "STUDY",
    "VECTORS",
    "VERSIONS",
    "CheckpointError",
    "FileError",
    "check_seal",
    "check_writable",
    "digest",
    "open_sealed",
    "read_json",
    "read_sealed",
    "read_sealed_json",
    "sha_of",
    "tell_unsealed",
    "to_json",
    "write_beside",
    "write_picture",
    "write_sealed",
    "write_sealed_json",
]

DIGITS = 40  # of a whole number
RESULT_BYTES = 2**28  # more is no result or recipe of ours


# --- writing ----------------------------------------------------------------------------------------------------------


def check_writable(path: Path, kind: str | None = None) -> None:
    """Raises FileError where a file of that name could not be written, before any work is done for it. Leaves
    nothing behind. kind: as of `check_replaceable`."""
    if path.is_dir():
        raise FileError(f"{path} cannot be written (it is a folder): choose another place")
    check_replaceable(path, kind)
    made = missing_folders(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_beside(path):
            pass
    except OSError as error:
        raise FileError(f"{path} cannot be written ({error.strerror}): choose another place") from None
    finally:
        remove_empty(made)


def write_beside(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment either the old or the new one is whole. Raises FileError where the old one
    is not of its kind, WriteError where it cannot be written."""
    check_replaceable(path, kind_of(content[:MARKED_BYTES]))
    write_whole(path, content)


def write_tensors(path: Path, header: Mapping[str, object], tensors: Mapping[str, np.ndarray]) -> None:
    """A file of tensors with its header."""
    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    write_beside(path, save(whole, {"qtx": json.dumps(header)}))


def write_sealed(path: Path, header: Mapping[str, object], tensors: Mapping[str, np.ndarray]) -> None:
    """The same with the sha256 that `check_seal` compares."""
    plain = json.loads(json.dumps(header))
    write_tensors(path, {**plain, "sha256": digest(plain, tensors)}, tensors)


def write_sealed_json(path: Path, form: str, content: Mapping[str, object]) -> None:
    """JSON values as a file of format `form`, which `read_sealed_json` reads back."""
    plain = json.loads(json.dumps({"format": form, **content}, allow_nan=False))
    write_beside(path, to_json({**plain, "sha256": digest(plain, {})}).encode())


def write_picture(path: Path, figure: Any) -> None:
    """A matplotlib figure as a PNG that is known as ours."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": "qtx"})
    write_beside(path, content.getvalue())


def to_json(content: object) -> str:
    """Text of JSON values, as every file of ours has them. Raises ValueError for a number that is not finite."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def open_sealed(path: Path, form: str) -> Iterator[tuple[JsonObject, safe_open]]:
    """The header of a file of format `form`, and the file open for its tensors.

    Raises FileError: missing, empty, truncated, not of safetensors, of another format or version, a damaged header.
    """
    check_file(path)
    try:
        with safe_open(path, framework="np") as file:
            yield read_header(path, form, file.metadata()), file
    except FileError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: damaged or not a safetensors file ({error})") from None


def read_header(path: Path, form: str, metadata: Mapping[str, str] | None) -> JsonObject:
    """The JSON of a file's metadata. Raises FileError; of another of our formats, with what to do with it."""
    try:
        header = json.loads((metadata or {})["qtx"], parse_int=parse_whole)
    except (KeyError, ValueError, RecursionError):
        raise FileError(f"{path}: a safetensors file without qtx's metadata; was it made by qtx?") from None
    given = header.get("format") if isinstance(header, dict) else None
    if given != form and isinstance(given, str) and given in USES:
        raise FileError(f"{path}: it is {USES[given]}")
    version = header.get("version") if given == form else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FileError(f"{path}: format is not {form} version {VERSIONS[form]}; use the qtx that wrote it")
    if version > VERSIONS[form]:
        raise FileError(f"{path}: {form} version {version}, and this qtx reads up to {VERSIONS[form]}: use a later qtx")
    for key in header:
        if form in KEYS and key not in (*KEYS[form], "format", "version", "sha256"):
            raise FileError(f"{path}: its metadata has a key {key!r} that no {form} has: use the qtx that wrote it")
    check_meta(path, header.get("meta", {}))
    return header


def read_sealed(path: Path, form: str) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Header and tensors that `write_sealed` wrote. Raises FileError, also where anything has changed."""
    with open_sealed(path, form) as (header, file):
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if "sha256" not in header:
            raise FileError(f"{path}: its sha256 is missing; make it again")
        check_seal(path, header, file.metadata()["qtx"], tensors)
    return header, tensors


def check_seal(path: Path, header: JsonObject, text: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Takes the sha256 out of a header, whose text in the file is `text`. Raises FileError where it is not that of
    header and tensors."""
    seal = header.pop("sha256")
    # the text too: it can change and mean the same (1e-05 and 1E-05)
    if seal != digest(header, tensors) or text != json.dumps({**header, "sha256": seal}):
        raise FileError(f"{path}: its content is not what was written (sha256 differs); make it again")


def tell_unsealed(path: Path) -> None:
    """Says on stderr that a file has no seal, and so what cannot be known of it."""
    sys.stderr.write(f"note: {path} is from before files had a sha256: whether it has changed since cannot be told\n")


def read_sealed_json(path: Path, form: str, check: Callable[[JsonObject], None]) -> JsonObject:
    """The content that `write_sealed_json` wrote. Raises FileError: missing, no JSON, of another format, changed, or
    what `check` refuses. An object with neither format nor sha256, as results were, gets a note."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise FileError(f"{path} holds no object: it is none of qtx's results")
    if not content.keys() & {"format", "sha256"}:
        check(content)
        tell_unsealed(path)
        return content
    seal = content.pop("sha256", None)
    if content.get("format") != form:
        raise FileError(f"{path}: format is not {form}; use the qtx that wrote it")
    if seal != digest(content, {}):
        raise FileError(f"{path}: its content is not what qtx wrote (sha256 differs); remove it and measure again")
    del content["format"]
    check(content)
    return content


def read_json(path: Path) -> Any:
    """A file's JSON value. Raises FileError: missing, no regular file, too large, or no JSON, NaN and infinity
    included."""
    check_file(path)
    try:
        text = read_regular(path, RESULT_BYTES).decode()
        return json.loads(text, parse_int=parse_whole, parse_float=parse_real, parse_constant=parse_real)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FileError(f"{path} is not JSON ({error})") from None


def parse_whole(text: str) -> int:
    """A whole number that arithmetic can take. Raises ValueError for more digits than any file of ours has."""
    if len(text) > DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def parse_real(text: str) -> float:
    """A finite number. Raises ValueError for NaN, infinity and what rounds to it."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:DIGITS]} is no finite number")
    return value


def digest(header: Mapping[str, object], tensors: Mapping[str, np.ndarray]) -> str:
    """One sha256 over the header and every tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        total.update(f"{name} {value.dtype} {tensors[name].shape} ".encode())
        total.update(value.data)
    return total.hexdigest()


def sha_of(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_meta(path: Path, given: object) -> None:
    """Raises FileError where a part of a header's `meta` that a command reads has another type than qtx writes."""

    def expect(name: str, value: object, kind: str) -> None:
        if not KINDS[kind](value):
            raise FileError(f"{path}: metadata is damaged: {name} must be {kind}")

    expect("meta", given, "an object")
    meta = cast(JsonObject, given)
    expect("meta.data", meta.get("data", {}), "an object")
    data: JsonObject = meta.get("data", {})
    for where, part in (("meta", meta), ("meta.data", data)):
        expect(f"{where}.hashes", hashes := part.get("hashes", {}), "an object")
        for name, value in hashes.items():
            expect(f"{where}.hashes.{name}", value, "a text" if where == "meta" else "a list of texts")
    if meta.get("images") is not None:
        expect("meta.images", meta["images"], "an object of mean and std, numbers by channel")
    expect("meta.files", files := meta.get("files", {}), "an object")
    for name, value in files.items():
        expect(f"meta.files.{name}", value, "a text")
    for name in ("calibration", "trained_on"):
        expect(f"meta.{name}", meta.get(name, []), "a list of texts")
    if meta.get("tokenizer") is not None:
        expect("meta.tokenizer", meta["tokenizer"], "a text")
    for name, kind in DATA_KINDS.items():
        if data.get(name) is not None:
            expect(f"meta.data.{name}", data[name], kind)


DATA_KINDS = {
    "source": "a text",
    "settings": "an object",
    "tokenizer_sha256": "a text",
    "length": "a whole number",
    "names": "a list of texts",
}
PREPARED = ("resize", "resample", "crop")  # of `meta.images`, checked when pictures are read
KINDS: dict[str, Callable[[object], bool]] = {
    "an object": lambda value: isinstance(value, dict),
    "a whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a text": lambda value: isinstance(value, str),
    "an object of mean and std, numbers by channel": lambda value: (
        isinstance(value, dict)
        and {"mean", "std"} <= value.keys() <= {"mean", "std", *PREPARED}
        and all(isinstance(value[key], list) and all(map(is_number, value[key])) for key in ("mean", "std"))
    ),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
}
