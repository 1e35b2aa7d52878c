"""SIGINT and SIGTERM, which mean the same: a command ends, with status 130 or 143, and cuts no step of training in
two."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = 0.1  # seconds


class Terminated(KeyboardInterrupt):
    """SIGTERM came, which is to a command what Ctrl-C is."""


class Interrupted(Exception):
    """Signal `number` came, and everything up to the step under way is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@dataclass
class Stop:
    """Which of the two signals came first; None: none yet."""

    number: int | None = None


def exit_status(stop: KeyboardInterrupt | Interrupted) -> int:
    """The status that shells give a process ended by the signal: 130 for SIGINT, 143 for SIGTERM."""
    if isinstance(stop, Interrupted):
        return 128 + stop.number
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises Terminated for SIGTERM, KeyboardInterrupt for SIGINT. While a command imports a module the signal comes
    again, until that has ended: compiled modules that call Python abort the process where it raises, as Triton's do."""
    if is_importing(frame):
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def is_importing(frame: FrameType | None) -> bool:
    """Whether what runs was called by an import, and not by a function of qtx since."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        if frame.f_globals.get("__name__", "").startswith("qtx") and frame.f_code.co_name != "<module>":
            return False
        frame = frame.f_back
    return False


def leave(number: int, frame: FrameType | None) -> None:
    """Ends the process at once, where nothing has begun: an exception would come out of whatever is being imported."""
    os.write(2, b"\nstopped\n")
    os._exit(128 + number)


@contextmanager
def handle(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Both signals call `handler`. A SIGINT that is ignored, as a shell asks of what it starts with `&`, stays
    ignored; in another thread than the main one nothing changes."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, where signals arrive
        pass
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def give_way(seconds: float) -> None:
    """Waits so long for a signal that ends the process without a word: where one of several processes fails, torchrun
    sends SIGTERM to the others."""
    with handle(lambda number, frame: os._exit(128 + number)):
        time.sleep(seconds)


@contextmanager
def postpone() -> Iterator[Stop]:
    """The first signal becomes the value's `number`, and nothing is interrupted; a second one interrupts at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.number is not None:
            interrupt(number, frame)
        else:
            stop.number = number
            sys.stderr.write("\nstopping after this step\n")

    with handle(note):
        yield stop
