"""Profiles as files: the JSON that `--profile FILE.json` takes, every field with its source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qtx_ref.profiles import parse, profile, to_tree
from qtx_ref.spec import Profile

from .container import FileError, read_json, to_json, write_beside


def read_profile(given: str) -> Profile:
    """The profile of a name, or of a .json file. Raises SpecError for an unknown name, FileError for a file that cannot
    be read or holds no profile that this qtx knows."""
    if not given.endswith(".json"):
        return profile(given)
    try:
        return parse(read_json(Path(given)))
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"profile file {given}: {error}") from None


def write_profile(path: Path, rules: Profile, sources: Mapping[str, str]) -> None:
    """Writes a profile's file. sources: as of `to_tree`. Raises FileError where `path` is a file of another kind,
    WriteError where it cannot be written."""
    write_beside(path, to_json(to_tree(rules, sources)).encode())
