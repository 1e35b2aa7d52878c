"""Which rows of a conformance run a finding explains: data, so that a CI run fails on what is new alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path as File

from qtx_ref.profiles import NAMES

from ..files.container import FileError, read_json
from .findings import FINDINGS

__all__ = ["Known", "read_known"]

KEYS = {"path", "op", "family", "dtype", "profile", "cpu"}
NARROW = "without VNNI"  # of x86, on which products of bytes are pairs in int16


@dataclass(frozen=True)
class Known:
    """Patterns of path, operation, family and dtype of codes, and what explains the rows that they fit.

    With a profile, only results that are as this other profile has them; without, all results, and crashes.
    """

    finding: str
    path: str = "*"
    op: str = "*"
    family: str = "*"
    dtype: str = "*"
    profile: str | None = None
    cpu: str | None = None  # NARROW: on such a CPU alone

    def explains(self, path: str, op: str, family: str, dtype: str = "") -> bool:
        """Whether it is about this."""
        pairs = ((path, self.path), (op, self.op), (family, self.family), (dtype, self.dtype))
        return all(fnmatchcase(given, pattern) for given, pattern in pairs)


def read_known(file: File | None = None) -> list[Known]:
    """Known findings by identifier, and what each explains: those of the package, or of a file. Raises FileError."""
    if file is None:
        content = json.loads(resources.files("qtx.audit").joinpath("known.json").read_text(encoding="utf-8"))
    else:
        content = read_json(file)
    where = file or "known.json"
    if not isinstance(content, dict):
        raise FileError(f"{where} holds no object: give a list of what it explains by identifier of a finding")
    known = []
    for finding, rows in content.items():
        if file is None and finding not in FINDINGS:
            raise FileError(f"{where} names {finding}, which is no finding")
        for row in rows if isinstance(rows, list) else [rows]:
            if not isinstance(row, dict) or not row.keys() <= KEYS or not all(isinstance(v, str) for v in row.values()):
                raise FileError(f"{where}, {finding}: {row!r} is no object of {', '.join(sorted(KEYS))}, each a text")
            if row.get("cpu", NARROW) != NARROW:
                raise FileError(f"{where}, {finding}: cpu is {row['cpu']!r}: it can be {NARROW!r}")
            if row.get("profile", NAMES[0]) not in NAMES:
                raise FileError(f"{where}, {finding}: profile is {row['profile']!r}: known are {', '.join(NAMES)}")
            known.append(Known(finding, **row))
    return known
