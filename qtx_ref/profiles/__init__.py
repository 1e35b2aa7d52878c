"""Profiles by name: what an engine's numbers mean, one JSON file each, every field with its source.

A file is a profile's tree of records, with {"value", "source"} at each leaf: the source says where the rule stands or
was seen, or "assumed" and why. "format" and "format_version" say what file it is; one of version 1, flat and without
them, is read as what it says in these records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from json import loads
from pathlib import Path
from typing import Any

from ..spec import Profile, SpecError, from_dict, to_dict
from .first import upgrade

__all__ = ["FORMAT", "NAMES", "VERSION", "parse", "profile", "sources", "to_tree", "upgrade"]

FOLDER = Path(__file__).parent
OWN = "qtx"
NAMES = (OWN, *sorted(file.stem for file in FOLDER.glob("*.json") if file.stem != OWN))
FORMAT, VERSION = "qtx-profile", 2
FIRST = "requantization"  # a key that only profiles of version 1 have at the top
PLAIN = ("name", "version", "engine", "path")  # fields without a source
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
        raise SpecError(f"profile is {name!r}: known profiles are {', '.join(NAMES)}; or give a .json file")
    return loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def parse(tree: Any) -> Profile:
    """The profile of a file's JSON, with sources or without, of either version of the format. Raises SpecError for
    another format, a later version, and naming the first key that is missing, unknown or of another value than it can
    have."""
    if not isinstance(tree, dict):
        raise SpecError("a profile is an object with keys, as the files of qtx_ref/profiles are")
    if "format" not in tree and FIRST in tree:
        return from_dict(Profile, upgrade(strip(tree)))
    values = dict(tree)
    form, version = values.pop("format", None), values.pop("format_version", None)
    if form != FORMAT:
        raise SpecError(f'profile format is {form!r}: give "format": "{FORMAT}", "format_version": {VERSION}')
    if version != VERSION:
        remedy = "use a later qtx" if isinstance(version, int) and version > VERSION else f"give {VERSION}"
        raise SpecError(f"profile format_version is {version!r}, and this qtx reads {VERSION}: {remedy}")
    return from_dict(Profile, strip(values))


def to_tree(profile: Profile, sources: Mapping[str, str]) -> Tree:
    """The JSON of a profile's file, which `parse` reads. sources: where each field's value was seen, by its path,
    `requantize.rounding`, or by that of a record above it. Raises KeyError where one has none."""

    def add(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: add(part, f"{path}.{key}" if path else key) for key, part in value.items()}
        if path in PLAIN:
            return value
        above = path
        while above not in sources and "." in above:
            above = above.rpartition(".")[0]
        return {"value": value, "source": sources[above]}

    return {"format": FORMAT, "format_version": VERSION, **add(to_dict(profile), "")}


def profile(name: str) -> Profile:
    """The profile of that name. Raises SpecError for an unknown one, naming those there are."""
    return parse(_read(name))


def sources(name: str) -> dict[str, str]:
    """Where each field of a profile comes from, or "assumed" and why: by its path, `requantize.rounding`."""
    return dict(walk(_read(name)))
