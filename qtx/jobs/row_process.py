"""One row of a study in a process of its own: `python -m qtx.jobs.row_process`, which `side_by_side` starts.

It takes its task, a line of JSON, on stdin, and writes the row's result, a line of JSON, on stdout. SIGTERM, or the end
of stdin, which whoever started it holds open as long as it lives, means what SIGTERM means to every command.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from ..signals import Interrupted, exit_status, handle, interrupt
from .rows import read_kept
from .run import MENDABLE
from .study import Study


def main() -> None:
    """Trains and evaluates the row, and exits: with 1 where that failed, as every command where it was stopped."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_stdin, daemon=True).start()
    try:
        with handle(interrupt):
            out = Path(task["out"])
            study = Study(read_kept(task["spec"], str(out)), out, resume=task["resume"], only=task["row"])
            result = study.complete(task["row"])
    except (Interrupted, KeyboardInterrupt) as stop:
        sys.exit(exit_status(stop))
    except MENDABLE as error:
        sys.exit(f"Error: {error}")
    print(json.dumps(result))


def end_with_stdin() -> None:
    """Waits for stdin to end, and then stops this process as SIGTERM does."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
