"""Locks that end with the process, and writing a file so that at any moment, also when the process is killed, the
machine stops or the disk is full, either the old or the new one is whole."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# ends the name of a file that is being written: .model.safetensors.qtx-part
UNDER_WAY = ".qtx-part"


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


class WriteError(OSError):
    """A file that could not be written; what was there before is there still. The message names it, why and a
    remedy."""


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
