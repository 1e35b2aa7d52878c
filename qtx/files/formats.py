"""What kinds of files qtx writes, how each is known by its first bytes, and what may be replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..data.reading import check_regular

CHECKPOINT, SHARES, ARTIFACT, VECTORS = "qtx-checkpoint", "qtx-shares", "qtx-artifact", "qtx-vectors"
GOLDEN = "qtx-golden"  # what engines gave
STUDY, COMPARISON, COST, ANALYSIS, RESULT = "qtx-study", "qtx-comparison", "qtx-cost", "qtx-analysis", "qtx-result"
PROFILE = "qtx-profile"
VERSIONS = {CHECKPOINT: 1, SHARES: 1, ARTIFACT: 2, VECTORS: 1, GOLDEN: 1}  # written now; those below are read too
# in a file's first bytes: of JSON, or of a safetensors file's header
FORMAT = re.compile(rb'(?s)(?:.{8}\{"__metadata__": ?\{"qtx": ?"\{|\{)\s*\\?"format\\?": \\?"(qtx-[a-z]+)\\?"')
REPORT, REPORT_MARK = "report", b'<testsuites name="qtx parity"'  # JUnit XML
PICTURE, PICTURE_MARK = "picture", b"tEXtSoftware\0qtx"  # and a PNG's
RUN, RUN_MARK = "run", b"# A run of qtx"  # TOML
EARLIER = {  # and of results from before they had a format
    b'{\n "of": {\n  "spec": {\n   "recipes": [': COMPARISON,
    b'{\n "spec": {\n  "model": "': STUDY,
}
KEYS = {  # of a header, beside format, version and sha256
    CHECKPOINT: ("spec", "recipe", "meta"),
    ARTIFACT: ("spec", "recipe", "profile", "nonlinear", "meta"),
    VECTORS: ("model", "order"),
}
MARKED_BYTES = 512
JsonObject = dict[str, Any]  # whose values are JSON's
USES = {
    CHECKPOINT: "a checkpoint: make integers of it with qtx quantize CHECKPOINT --out MODEL.qtx",
    SHARES: "the rest of a state that processes share: name its folder",
    ARTIFACT: "an artifact: qtx evaluate, show, diff, vectors, generate and parity take it, named MODEL.qtx",
    VECTORS: "golden vectors: hold their model to them with qtx vectors MODEL.qtx --check FILE",
    PROFILE: "a profile: qtx quantize and evaluate take it as --profile FILE",
}


class FileError(ValueError):
    """A file that cannot be read as what it should be, or that would be overwritten. The message names it and why."""


CheckpointError = FileError  # its name up to version 0.1, under which it is still caught


def kind_of(head: bytes) -> str:
    """The kind of a file by its first bytes: its format, picture or report; empty for what qtx does not write."""
    if (match := FORMAT.match(head)) is not None:
        return match[1].decode()
    for kind, first, mark in (
        (PICTURE, b"\x89PNG", PICTURE_MARK),
        (REPORT, b"<?xml", REPORT_MARK),
        (RUN, b"", RUN_MARK),
    ):
        if head.startswith(first or mark) and mark in head:
            return kind
    return next((kind for mark, kind in EARLIER.items() if head.startswith(mark)), "")


def read_kind(path: Path) -> str | None:
    """The kind of a file; None where it is empty, and so nobody's."""
    with open(path, "rb") as file:
        head = file.read(MARKED_BYTES)
    return kind_of(head) if head else None


def check_file(path: Path, missing: str = "no such file") -> None:
    """Raises FileError where `path` is missing, with these words, or no regular file: a folder, a device, a pipe."""
    try:
        check_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{path}: {missing}") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror})") from None


def check_replaceable(path: Path, kind: str | None = None) -> None:
    """Raises FileError where a link, a device, a pipe, or something else than a file of that kind has that name; kind:
    None for any that qtx writes. An empty file is nobody's."""
    if path.is_symlink():
        raise FileError(f"{path} is a link: name the file itself, or choose another")
    try:
        check_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise FileError(f"{path} cannot be replaced ({error.strerror}): choose another name") from None
    if (known := read_kind(path)) is not None and (not known or kind not in (None, known)):
        what = USES.get(known, f"a {known}" if known else "not qtx's")
        raise FileError(f"{path} exists and is {what}: choose another name")
