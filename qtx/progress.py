"""How far long work has come and when it will end: a bar on a terminal, now and then a line elsewhere; on stderr."""

from __future__ import annotations

import sys
import time


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """`with Progress("vanilla", steps) as bar: bar.advance(note="loss 4.3")`. Redrawn at most twice a second; nothing
    is drawn while the total is 0."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done, self.first = label, total, done, done
        self.terminal = sys.stderr.isatty()
        self.began = time.monotonic()
        self.drawn = self.began

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.draw("", end=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        """So much more is done; `note` says how it stands."""
        self.done += count
        now = time.monotonic()
        if now - self.drawn >= (0.5 if self.terminal else 15):
            self.drawn = now
            self.draw(note)

    def draw(self, note: str, end: bool = False) -> None:
        """Writes the line, whenever it was last written."""
        if not self.total:
            return
        elapsed = time.monotonic() - self.began
        fresh = self.done - self.first
        left = elapsed / fresh * (self.total - self.done) if fresh else 0
        when = f"{clock(elapsed)} taken" if end else f"{clock(left)} left"
        text = f"{self.label:<18} {self.done}/{self.total}  {when}  {note}".rstrip()
        if self.terminal:
            sys.stderr.write(f"\r\033[K{text}" + ("\n" if end else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
