"""The cache's files: written whole or not at all, checked when they are read, one process at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..disk import WriteError, fcntl, try_lock, write_whole
from .cache import cache_folder
from .documents import Documents, stamp
from .reading import read_regular
from .splits import DataError, digest


class Cache:
    """The folder where tokenized texts are kept, as it is written and read here."""

    def __init__(self) -> None:
        self.folder = cache_folder()

    def write(self, path: Path, content: bytes) -> None:
        """Writes one of its files, whole or not at all. Raises DataError where it cannot be written."""
        try:
            write_whole(path, content)
        except WriteError as error:
            raise DataError(f"{error}: QTX_CACHE says where tokenized texts are kept") from None

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """Writes an object and, as its `check`, its sha256. Raises DataError as `write`."""
        check = digest(json.dumps(content).encode())
        self.write(path, json.dumps({**content, "check": check}).encode())

    def read_json(self, path: Path) -> dict[str, Any]:
        """An object that was written here; {} where there is none, or it is not as it was written."""
        try:
            content = json.loads(read_regular(path))
            check = content.pop("check")
        except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
            return {}
        return content if check == digest(json.dumps(content).encode()) else {}

    def fingerprint(self, documents: Documents) -> str:
        """The sha256 of a source's content: as it was found last time, where no file has another size, time or place
        on the disk since, else by reading all."""
        if not documents.files:
            return documents.fingerprint()
        path = self.folder / "sources" / f"{digest(os.path.abspath(documents.source).encode())}.json"
        try:
            before = stamp(documents.files)
            known = self.read_json(path)
            if known.get("stamp") == before:
                return known["sha256"]
            got = documents.fingerprint()
            still = stamp(documents.files) == before
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror}): give files that can be") from None
        if still:
            with suppress(DataError):  # a cache that can only be read
                self.write_json(path, {"stamp": before, "sha256": got})
        return got

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process at a time. Another waits, and says so. Raises DataError where the folder cannot be written."""
        path = self.folder / "locks" / f"{name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DataError(
                f"{self.folder} cannot be written ({error.strerror}): set QTX_CACHE to a folder that can, where "
                "tokenized texts are kept"
            ) from None
        try:
            if not try_lock(file):
                sys.stderr.write("another process tokenizes the same text: waiting for it\n")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)
