"""The files below a folder of data."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path

from .splits import DataError


def list_files(folder: Path, suffixes: Collection[str], say: bool = True) -> list[Path]:
    """Every file below `folder` with one of the endings (lower case, any case of theirs), sorted by path.

    Links to folders are followed, but never back to one that holds them. What is hidden, as notebooks hide copies in
    .ipynb_checkpoints, is passed over and, unless it was said before, said on stderr. Raises DataError for a folder
    that cannot be read.
    """
    hidden: list[Path] = []
    try:
        files = walk(folder, hidden, ())
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): give a folder that can be read") from None
    if hidden and say:
        count = f"{len(hidden)} hidden files or folders" if len(hidden) > 1 else "what is hidden"
        sys.stderr.write(
            f"{folder}: not read: {count}, {hidden[0].relative_to(folder)}{' first' * (len(hidden) > 1)}\n"
        )
    return sorted(file for file in files if file.suffix.lower() in suffixes)


def walk(folder: Path, hidden: list[Path], above: tuple[tuple[int, int], ...]) -> list[Path]:
    """Every file below `folder` that is not `hidden`, to which others are added; `above` are the device and inode of
    each folder that holds it."""
    status = os.stat(folder)
    place = (status.st_dev, status.st_ino)
    if place in above:
        return []
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            hidden.append(path)
        elif path.is_dir():
            files += walk(path, hidden, (*above, place))
        else:
            files.append(path)
    return files
