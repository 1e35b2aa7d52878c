"""Profiles by name: what an engine's numbers mean, one JSON file each, every field with its source.

A file is a profile's tree of records, with {"value", "source"} at each leaf: the source says where the rule stands or
was seen, or "assumed" and why. A file of version 1 of the format, flat, is read as what it says in these records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..spec import Profile, SpecError, from_dict
from .first import upgrade

__all__ = ["NAMES", "parse", "profile", "sources", "upgrade"]

FOLDER = Path(__file__).parent
NAMES = ("qtx", "float32", "gemmlowp", "tflite", "onnx")
FIRST = "rounding"  # a key that only profiles of version 1 have at the top
Tree = dict[str, Any]


def is_leaf(value: Any) -> bool:
    """Whether it is a value with its source."""
    return isinstance(value, dict) and set(value) == {"value", "source"}


def strip(tree: Any) -> Any:
    """The values alone."""
    if is_leaf(tree):
        return tree["value"]
    return {key: strip(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each leaf's path, `requantize.rounding`, and source."""
    if is_leaf(tree):
        yield path, tree["source"]
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from walk(value, f"{path}.{key}" if path else key)


def _read(name: str) -> Tree:
    if name not in NAMES:
        raise SpecError(f"profile is {name!r}: known profiles are {', '.join(NAMES)}")
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def parse(tree: Tree) -> Profile:
    """The profile of a file's JSON, with sources or without, of either version of the format. Raises SpecError naming
    the first key that is missing, unknown or of another value than it can have."""
    values = strip(tree)
    if isinstance(values, dict) and FIRST in values:
        values = upgrade(values)
    return from_dict(Profile, values)


def profile(name: str) -> Profile:
    """The profile of that name. Raises SpecError for an unknown one, naming those there are."""
    return parse(_read(name))


def sources(name: str) -> dict[str, str]:
    """Where each field of a profile comes from, or "assumed" and why: by its path, `requantize.rounding`."""
    return dict(walk(_read(name)))
