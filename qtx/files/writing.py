"""Writing a file so that at any moment, also when the process is killed, the machine stops or the disk is full, either
the old or the new one is whole."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .formats import read_kind

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# ends the name of a file that is being written: .model.safetensors.qtx-part
UNDER_WAY = ".qtx-part"
EARLIER = re.compile(r"\.(.+)\.([0-9]{1,7})")  # up to version 0.1: .model.safetensors.PID


class WriteError(OSError):
    """A file that could not be written; what was there before is there still. The message names it, why and a
    remedy."""


def try_lock(file: int) -> bool:
    """Locks an open file for this process, which loses the lock with its end, however it ends; whether it could be had.

    Where there are no such locks (Windows; a file system without) it can be had always.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def has_name(file: int, path: Path) -> bool:
    """Whether an open file is the one of that name: not where it was removed or renamed meanwhile."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def remove_stale(beside: Path) -> bool:
    """Removes what a killed process left of a file that it was writing; False where a process is writing it."""
    try:
        if fcntl is None:  # Windows removes no file that is open
            beside.unlink(missing_ok=True)
            return True
        file = os.open(beside, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        if not try_lock(file):
            return False
        beside.unlink(missing_ok=True)
        return True
    finally:
        os.close(file)


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


@contextmanager
def open_beside(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `path`, and its name: opened exclusively, locked while it is open, and gone afterwards unless
    it was renamed.

    Raises BlockingIOError where another process is writing `path`.
    """
    beside = path.with_name(f".{path.name}{UNDER_WAY}")
    while True:
        try:
            file = open(beside, "xb")  # noqa: SIM115  # closed below, after it was removed
        except FileExistsError:
            if not remove_stale(beside):
                raise BlockingIOError(errno.EAGAIN, "another process is writing it") from None
            continue
        if try_lock(file.fileno()) and has_name(file.fileno(), beside):
            break
        file.close()  # another process took it for stale before it was locked
    try:
        yield file, beside
    finally:
        if fcntl is None:  # Windows removes no file that is open
            file.close()
        if file.closed or has_name(file.fileno(), beside):
            beside.unlink(missing_ok=True)
        file.close()


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


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside `path`, puts it on the disk and renames it.

    Raises WriteError where it cannot be written, or another process is writing it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_beside(path) as (file, beside):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no file that is open
                file.close()
            os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({error.strerror or error}): make room, or choose another place"
        ) from None


def link_whole(path: Path, source: Path) -> bool:
    """Makes `path` a second name of a file that is whole, in place of what it was; whether the system can."""
    beside = path.with_name(f".{path.name}{UNDER_WAY}")
    try:
        os.link(source, beside)
    except OSError:
        return False
    try:
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise WriteError(f"{path} cannot be written ({error.strerror or error}): choose another place") from None
    return True


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the system can."""
    if os.name != "posix":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system that does so itself
            os.fsync(file)
    finally:
        os.close(file)
