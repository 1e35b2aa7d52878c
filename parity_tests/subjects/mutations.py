"""Changes to files, drawn at random: bytes of any file, JSON values, rows of tables, headers and tensors of
safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save

from qtx.files.container import digest

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, -1e308,
    float("nan"), float("inf"), "", "x", "NaN", "float", "w8a8", "../..", "\x00", "\ud800", "é" * 9, "a" * 10_000, [],
    [[]], [0], ["a"], [None], {}, {"a": 1}, {"": {}}, [1.5, "b", None],
)  # fmt: skip
DEEP = 100_000
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint64", "bool")
NUMBERS = (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 1e30, -5e36, 3e38, 1e-45)


def change_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes flipped, set, removed, repeated or put in, or the end cut off."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if not data:
            return bytes(rng.integers(0, 256, 20, dtype=np.uint8))
        at = int(rng.integers(len(data))) if rng.random() < 0.5 else int(rng.integers(min(len(data), 4000)))
        size = int(rng.integers(1, 40))
        match rng.integers(7):
            case 0 | 1:
                data[at] ^= 1 << int(rng.integers(8))
            case 2:
                data[at] = int(rng.integers(256))
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size]
            case 5:
                data[at:at] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
            case 6:
                del data[at:]
    return bytes(data)


def flip_bit(content: bytes, rng: np.random.Generator) -> bytes:
    """One bit, of the whole file or, half the time, of its first 4,000 bytes."""
    data = bytearray(content)
    at = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 4000)))
    data[at] ^= 1 << int(rng.integers(8))
    return bytes(data)


# --- JSON -------------------------------------------------------------------------------------------------------------


def find_place(value: Any, rng: np.random.Generator) -> tuple:
    """The path of a part of a JSON value, drawn from the top down, so that long lists do not take all."""
    path: list = []
    while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.8):
        path.append(pick(list(value) if isinstance(value, dict) else range(len(value)), rng))
        value = value[path[-1]]
    return tuple(path)


def change_json(value: Any, rng: np.random.Generator) -> Any:
    """A value with a few of its parts replaced, removed, added or exchanged."""
    value = deepcopy(value)
    for _ in range(rng.integers(1, 3)):
        path = find_place(value, rng)
        if not path:
            if rng.random() < 0.9:
                continue
            return pick(VALUES, rng)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        match rng.integers(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[pick(("", "x", "sha256", "format", f"{key}x"), rng)] = pick(VALUES, rng)
            case 2:
                number = holder[key]
                if isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) < 1e300:
                    holder[key] = pick((-number, number + 1, number * 2, number / 3, float(number), int(number)), rng)
            case 3:
                part = value
                for step in find_place(value, rng):
                    part = part[step]
                holder[key] = deepcopy(part)
            case _:
                holder[key] = pick(VALUES, rng)
    return value


def pick(values: Any, rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def json_text(value: Any, rng: np.random.Generator) -> bytes:
    """Text of a JSON value, sometimes nested as deep as no reader goes."""
    text = json.dumps(value)
    if rng.random() < 0.03:
        opening, closing = pick((("[", "]"), ('{"a":', "}")), rng)
        deep = opening * DEEP + "1" + closing * DEEP
        text = pick((deep, re.sub(r": *[^,{}\[\]\"]+([,}])", lambda m: f": {deep}{m[1]}", text, count=1)), rng)
    return text.encode()


def change_json_file(path: Path, rng: np.random.Generator) -> None:
    """Bytes or values; a file with a seal is sealed again, or loses it, or keeps the old one."""
    if rng.random() < 0.25:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return
    value = change_json(json.loads(path.read_bytes()), rng)
    if isinstance(value, dict) and "sha256" in value:
        reseal(value, {}, rng, forms=True)
    path.write_bytes(json_text(value, rng))


def reseal(
    header: dict[str, Any], tensors: dict[str, np.ndarray], rng: np.random.Generator, *, forms: bool = False
) -> None:
    """Half the time a right sha256, else none (and with `forms` no format) or the one that is there."""
    match rng.integers(4):
        case 0 | 1:
            del header["sha256"]
            header["sha256"] = digest(header, tensors)
        case 2:
            del header["sha256"]
            if forms:
                header.pop("format", None)


# --- tables -----------------------------------------------------------------------------------------------------------


def change_rows(path: Path, rng: np.random.Generator) -> None:
    """A file of lines: bytes, or cells of a few lines."""
    if rng.random() < 0.4:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return
    lines = path.read_text().splitlines()
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(lines)))
        if path.suffix == ".jsonl":
            if lines[at] == "{" or len(lines[at]) > DEEP:  # drawn before
                continue
            lines[at] = json_text(change_json(json.loads(lines[at]), rng), rng).decode() if rng.random() < 0.8 else "{"
            continue
        cells = lines[at].split(",")
        cells[int(rng.integers(len(cells)))] = pick(
            ("", "9" * 5000, '"', "\x00", "-1", "1e5", " a\tb", "ja\ud7ff", "train"), rng
        )
        lines[at] = ",".join(cells if rng.random() < 0.8 else cells[:-1] if rng.random() < 0.5 else [*cells, "more"])
    path.write_text("\n".join(lines) + "\n" * int(rng.integers(2)), errors="replace")


# --- safetensors ------------------------------------------------------------------------------------------------------


def change_tensors(path: Path, rng: np.random.Generator) -> None:
    """Bytes, or a valid file of other tensors, or with another header."""
    if rng.random() < 0.35:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return
    with safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    tensors = load_file(path)
    header = json.loads(metadata["qtx"]) if "qtx" in metadata else None
    if header is not None and rng.random() < 0.6:
        header = change_json(header, rng)
    else:
        change_one(tensors, rng)
    if isinstance(header, dict) and "sha256" in header:
        reseal(header, tensors, rng)
    if header is not None:
        metadata = {"qtx": json_text(header, rng).decode()}
    path.write_bytes(save(tensors, metadata))


def change_one(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """One tensor: gone, doubled, of another name, dtype or shape, or with other numbers."""
    name = pick(sorted(tensors), rng)
    value = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: value.astype(pick(DTYPES, rng)),
        lambda: value[..., None],
        lambda: value.reshape(-1)[: int(rng.integers(0, 3))].copy(),
        lambda: np.zeros((0, *value.shape), value.dtype),
        lambda: np.full_like(
            value, pick(NUMBERS, rng) if value.dtype.kind == "f" else int(rng.integers(-5, 300)) & 127
        ),
    ]
    with np.errstate(all="ignore"):
        match rng.integers(5):
            case 0:
                del tensors[name]
            case 1:
                tensors[pick(("", "x", f"{name}.x", "range.x.low", "optim.step", "hub.a"), rng)] = value
            case 2 if value.size:
                spot = tuple(int(rng.integers(extent)) for extent in value.shape)
                tensors[name] = value.copy()
                tensors[name][spot] = pick(NUMBERS, rng) if value.dtype.kind == "f" else pick((0, 1, 127), rng)
            case _:
                tensors[name] = pick(changes, rng)()
