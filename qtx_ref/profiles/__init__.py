"""Profiles by name: what an engine's numbers mean, one JSON file each, every field with its source."""

from __future__ import annotations

import json
from pathlib import Path

from ..spec import Profile, SpecError, from_dict

__all__ = ["NAMES", "profile", "sources"]

FOLDER = Path(__file__).parent
NAMES = ("qtx", "float32", "gemmlowp", "tflite", "onnx")


def _read(name: str) -> dict:
    if name not in NAMES:
        raise SpecError(f"profile is {name!r}: known profiles are {', '.join(NAMES)}")
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def profile(name: str) -> Profile:
    """The profile of that name. Raises SpecError for an unknown one, naming those there are."""
    return from_dict(
        Profile, {key: field["value"] if isinstance(field, dict) else field for key, field in _read(name).items()}
    )


def sources(name: str) -> dict[str, str]:
    """Where each field of a profile comes from, or "assumed" and why."""
    return {key: field["source"] for key, field in _read(name).items() if isinstance(field, dict)}
