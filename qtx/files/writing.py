"""Beside what other processes write: what killed ones left, folders made and removed again, room on the disk."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..disk import UNDER_WAY, WriteError, fcntl, open_beside, remove_stale, write_whole
from .formats import read_kind

__all__ = [  # what other rooms take of this module and of `disk`
    "UNDER_WAY",
    "WriteError",
    "check_space",
    "clear_stale",
    "missing_folders",
    "open_beside",
    "remove_empty",
    "write_whole",
]

EARLIER = re.compile(r"\.(.+)\.([0-9]{1,7})")  # up to version 0.1: .model.safetensors.PID


def clear_stale(folder: Path) -> None:
    """Removes what killed processes left of files that they were writing in a folder."""
    for beside in folder.glob(f".*{UNDER_WAY}"):
        with contextlib.suppress(OSError):
            remove_stale(beside)
    for beside in folder.glob(".*.[0-9]*"):
        with contextlib.suppress(OSError):
            if is_earlier_stale(beside):
                beside.unlink()


def is_earlier_stale(beside: Path) -> bool:
    """Whether a file is what a version before 0.2 left when it was killed while it wrote: named after a process that is
    gone, and empty or begun as qtx's files are. Raises OSError where that cannot be seen."""
    match = EARLIER.fullmatch(beside.name)
    if match is None or fcntl is None or beside.is_symlink() or not beside.is_file():
        return False
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return read_kind(beside) != ""
    return False


def missing_folders(folder: Path) -> list[Path]:
    """Those of a folder and what it lies in that do not exist, the innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes those of the folders that are empty, in their order."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_space(path: Path, size: int) -> None:
    """Raises WriteError where the disk of `path` has less than `size` bytes left for it."""
    folder = next(each for each in path.absolute().parents if each.exists())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise WriteError(
            f"{path} takes {size / 2**20:.1f} MiB, and its disk has {free / 2**20:.1f} MiB left: make room, or choose "
            "another place"
        )
