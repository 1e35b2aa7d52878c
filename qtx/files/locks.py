"""Who may write where: a lock on a folder, held by the system for a process and gone with it, however it ends.

The lock is on a file of the folder, `.qtx-lock`, which names the process and is removed when it is done. One that a
killed process left locks nothing: the next command takes it over. On Windows, which has no flock, nothing is locked.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..disk import fcntl, has_name, try_lock
from .container import FileError
from .writing import clear_stale, missing_folders, remove_empty

LOCK = ".qtx-lock"
SCRATCH = "qtx-scratch-"  # begins the name of a temporary folder
_held: set[Path] = set()


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """The folder is this process's to write in; it is made, and removed again where nothing was written. What killed
    processes left of files that they were writing is removed. Held twice by one process, it is held until the first
    lets go.

    Raises FileError where another process holds it, naming that, or where it cannot be written.
    """
    place = folder.resolve()
    if fcntl is None or place in _held:
        yield
        return
    made = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = take(folder)
    except OSError as error:
        remove_empty(made)
        raise FileError(f"{folder} cannot be written ({error.strerror}): choose another --out") from None
    _held.add(place)
    try:
        clear_stale(folder)
        yield
    finally:
        _held.discard(place)
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(file)
        remove_empty(made)


def take(folder: Path) -> int:
    """The folder's lock file, open and locked. Raises FileError where another process holds it."""
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not try_lock(file):
            holder = os.read(file, 20).decode(errors="replace").strip()
            os.close(file)
            raise FileError(
                f"{folder} is in use by another qtx, process {holder or '?'}: wait for its end, or choose another --out"
            )
        if has_name(file, path):
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()}\n".encode())
            return file
        os.close(file)  # whoever held it has just removed it


@contextmanager
def make_scratch() -> Iterator[Path]:
    """A temporary folder for large files. Those of killed processes are removed first."""
    if fcntl is None:
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as name:
            yield Path(name)
        return
    for old in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(OSError):
            remove_scratch(old)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        file = os.open(folder, os.O_RDONLY)
        if try_lock(file) and has_name(file, folder):
            break
        os.close(file)  # another process took it for an old one before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(file)


def remove_scratch(folder: Path) -> None:
    """Removes a temporary folder of ours that no process holds. Raises OSError where it cannot."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(file).st_uid == os.getuid() and try_lock(file):
            shutil.rmtree(folder)
    finally:
        os.close(file)
