"""A file of JSON objects, one a line, each with the step that it is of: added to as a run goes on, cut back where it is
gone on with. Whenever the process is killed, all lines but the last are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..disk import WriteError
from .container import FileError


def cut_lines(path: Path, step: int) -> None:
    """Cuts a file off at its first line of a step after `step`, or that is not whole; there need be no file.

    Raises FileError, and nothing changes, where the first line is another's than `Lines` writes, or it cannot be cut.
    """
    try:
        with open(path, "r+b") as file:
            end = 0
            for line in file:
                at = read_step(line)
                if at is None and not end and line.endswith(b"\n"):
                    raise FileError(f"{path} is no log that qtx wrote: move it away, or choose another --out")
                if at is None or at > step:
                    break
                end += len(line)
            file.truncate(end)
            os.fsync(file.fileno())
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError(f"{path} cannot be written ({error.strerror or error}): choose another --out") from None


def read_step(line: bytes) -> int | None:
    """The step of a line; None where it is not whole, or no such line."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole, as JSON objects; none where there is no file. Raises FileError for one that cannot be
    read."""
    try:
        with open(path, "rb") as file:
            yield from (json.loads(line) for line in file if read_step(line) is not None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error})") from None


class Lines:
    """Adds lines to a file, which is there from the first one on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = b""  # what could not be written yet

    def add(self, record: Mapping[str, object]) -> None:
        """Adds a line. Raises WriteError where the disk does not take it: it is then tried again with the next."""
        self.waiting += json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
        except OSError as error:
            raise WriteError(f"{self.path} cannot be written ({error.strerror or error})") from None

    def sync(self) -> None:
        """Puts on the disk what was written."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:  # of which `add` has told
            return
        try:
            os.fsync(file)
        finally:
            os.close(file)
