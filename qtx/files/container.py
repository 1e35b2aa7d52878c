"""qtx's files: safetensors with JSON in their metadata, read with one clear error for whatever is wrong.

Three formats: a checkpoint, an artifact, golden vectors. The last two carry a sha256 over all that they hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qtx_ref.spec.base import is_number

from .writing import missing_folders, open_beside, remove_empty, write_whole

VERSION = 1
CHECKPOINT, ARTIFACT, VECTORS = "qtx-checkpoint", "qtx-artifact", "qtx-vectors"
USES = {
    CHECKPOINT: "a checkpoint: make integers of it with qtx quantize CHECKPOINT --out MODEL.qtx",
    ARTIFACT: "an artifact: qtx evaluate, show, diff, vectors, generate and parity take it, named MODEL.qtx",
    VECTORS: "golden vectors: hold their model to them with qtx vectors MODEL.qtx --check FILE",
}


class CheckpointError(ValueError):
    """A file that cannot be read as what it should be, or that would be overwritten. The message names it and why."""


# --- writing ----------------------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Raises CheckpointError where a file of that name could not be written, before any work is done for it. Leaves
    nothing behind."""
    made = missing_folders(path.parent)
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_beside(path):
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror}): choose another place") from None
    finally:
        remove_empty(made)


def write_beside(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment either the old or the new one is whole. Raises WriteError where it cannot be
    written."""
    write_whole(path, content)


def write_tensors(path: Path, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """A file of tensors with its header."""
    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    write_beside(path, save(whole, {"qtx": json.dumps(header)}))


def write_sealed(path: Path, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """The same with the sha256 that `read_sealed` compares."""
    write_tensors(path, {**header, "sha256": digest(header, tensors)}, tensors)


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path, form: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """The header of a file of format `form`, and the file open for its tensors.

    Raises CheckpointError: missing, empty, truncated, not of safetensors, of another format or version, a damaged header.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            yield read_header(path, form, file.metadata()), file
    except CheckpointError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None


def read_header(path: Path, form: str, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The JSON of a file's metadata. Raises CheckpointError; of another of our formats, with what to do with it."""
    try:
        header = json.loads((metadata or {})["qtx"])
    except (KeyError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: a safetensors file without qtx's metadata; was it made by qtx?") from None
    found = header.get("format") if isinstance(header, dict) else None
    if found != form and isinstance(found, str) and found in USES:
        raise CheckpointError(f"{path}: it is {USES[found]}")
    if found != form or header.get("version") != VERSION:
        raise CheckpointError(f"{path}: format is not {form} version {VERSION}; use the qtx that wrote it")
    check_meta(path, header.get("meta", {}))
    return header


def read_sealed(path: Path, form: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and tensors that `write_sealed` wrote. Raises CheckpointError, also where anything has changed."""
    with opened(path, form) as (header, file):
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        same = header.pop("sha256", None) == digest(header, tensors)
    if not same:
        raise CheckpointError(f"{path}: its content is not what was written (sha256 differs); make it again")
    return header, tensors


def digest(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
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


def check_meta(path: Path, meta: Any) -> None:
    """Raises CheckpointError where a part of `meta` that a command reads has another type than qtx writes."""

    def expect(name: str, value: Any, kind: str) -> None:
        if not KINDS[kind](value):
            raise CheckpointError(f"{path}: metadata is damaged: {name} must be {kind}")

    expect("meta", meta, "an object")
    data = meta.get("data", {})
    expect("meta.data", data, "an object")
    for where, found in (("meta", meta), ("meta.data", data)):
        expect(f"{where}.hashes", hashes := found.get("hashes", {}), "an object")
        for name, value in hashes.items():
            expect(f"{where}.hashes.{name}", value, "a text" if where == "meta" else "a list of texts")
    if meta.get("images") is not None:
        expect("meta.images", meta["images"], "an object of mean and std, numbers by channel")
    expect("meta.files", files := meta.get("files", {}), "an object")
    for name, value in files.items():
        expect(f"meta.files.{name}", value, "a text")
    for name in ("calibration", "trained_on"):
        expect(f"meta.{name}", meta.get(name, []), "a list of texts")
    for where, name, found in (("meta", "tokenizer", meta), ("meta.data", "source", data),
                               ("meta.data", "tokenizer_sha256", data)):  # fmt: skip
        if found.get(name) is not None:
            expect(f"{where}.{name}", found[name], "a text")
    for name, kind in (("length", "a whole number"), ("names", "a list of texts")):
        if data.get(name) is not None:
            expect(f"meta.data.{name}", data[name], kind)


PREPARED = ("resize", "resample", "crop")  # of `meta.images`, checked when pictures are read
KINDS = {
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
