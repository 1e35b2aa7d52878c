"""Files that a user names, read within bounds: regular files alone, of a size that is known before memory is taken.

A device, a pipe or a file of /proc has no end, or none that can be known. Every reader of a user's file begins here.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

TEXT_BYTES = 2**31  # of a file of text, which is held whole
JSON_BYTES = 2**27  # of a configuration, a recipe or a tokenizer
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def check_regular(path: Path) -> None:
    """Raises OSError where `path`, or what it links to, is missing or no regular file; `strerror` says in words what it
    is. Nothing is opened."""
    refuse_special(os.stat(path), path)


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for its bytes. Raises OSError as `check_regular`; never waits for a pipe's other end."""
    check_regular(path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        refuse_special(os.fstat(file.fileno()), path)  # it may have been replaced since
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int = JSON_BYTES) -> bytes:
    """The bytes of a regular file of at most `most`.

    Raises OSError: missing, another kind of file, larger, or not as long as the system says (as in /proc, or while
    another program writes it).
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {most} are read", str(path))
        content = file.read(size + 1)
    if len(content) != size:
        raise OSError(
            errno.EIO, "it is not as long as the system says: it is being written, or no file of a disk", str(path)
        )
    return content


def refuse_special(status: os.stat_result, path: Path) -> None:
    """Raises OSError for anything but a regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in KINDS if test(status.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
