"""When a run's checkpoints are written, how often that is tried, and which are kept."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path

from ..disk import WriteError, link_whole
from ..files.checkpoint import Checkpoint, save_checkpoint
from ..runs.spec import SavingSpec

LAST_SECONDS = 60  # for so long the last checkpoint is tried where the disk is full
RETRY_SECONDS = 2


class Saving:
    """The checkpoint of a run at `path`, and beside it the numbered ones of `SavingSpec`."""

    def __init__(self, path: Path, spec: SavingSpec) -> None:
        self.path, self.spec = path, spec
        self.saved = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step although nothing ends."""
        return self.is_numbered(step) or time.monotonic() - self.saved > self.spec.seconds

    def is_numbered(self, step: int) -> bool:
        """Whether it is the turn of this step by `every`."""
        return self.spec.every is not None and step % self.spec.every == 0

    def save(self, checkpoint: Checkpoint, step: int, *, last: bool) -> None:
        """Saves the run as it stands after a step. Where that cannot be written, training goes on without; the `last`
        one is tried for a minute, and then raises WriteError."""
        until = time.monotonic() + LAST_SECONDS
        warned = False
        while True:
            try:
                self.write(checkpoint, step)
            except WriteError as error:
                if last and time.monotonic() >= until:
                    raise
                if not warned:
                    then = f"trying for {LAST_SECONDS} s" if last else f"training goes on, step {step} is not saved"
                    sys.stderr.write(f"\n{error}; {then}\n")
                    warned = True
            else:
                break
            if not last:
                break
            time.sleep(RETRY_SECONDS)
        self.saved = time.monotonic()

    def write(self, checkpoint: Checkpoint, step: int) -> None:
        """Writes the state, and a numbered checkpoint where one is due, which is the same file by two names.

        The numbered one comes first: after a kill between the two, it is written again when its step is reached.
        Raises WriteError.
        """
        if not self.spec.keep or not self.is_numbered(step) or checkpoint.meta["done"]:
            save_checkpoint(self.path, checkpoint)
            return
        numbered = self.name(step)
        save_checkpoint(numbered, checkpoint)
        if not link_whole(self.path, numbered):
            save_checkpoint(self.path, checkpoint)
        self.remove_oldest(step)

    def name(self, step: int) -> Path:
        """The numbered checkpoint of a step."""
        return self.path.with_name(f"{self.path.stem}-{step:06}{self.path.suffix}")

    def remove_oldest(self, step: int) -> None:
        """Removes the numbered checkpoints up to this step but the last ones, as many as are kept."""
        pattern = re.compile(rf"{re.escape(self.path.stem)}-([0-9]{{6,}}){re.escape(self.path.suffix)}")
        found = {path: match for path in self.path.parent.iterdir() if (match := pattern.fullmatch(path.name))}
        steps = sorted(number for match in found.values() if (number := int(match[1])) <= step)
        for number in steps[: -self.spec.keep]:
            with contextlib.suppress(OSError):
                self.name(number).unlink()
