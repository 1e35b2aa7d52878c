"""Rows of a study side by side: a process each, so many at once. What ends one ends no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ..engines.backend import backend
from ..engines.machine import Machine
from ..signals import Interrupted, postpone

OUTPUT = "output.txt"  # beside a row's checkpoint: what its processes wrote on stderr
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
POLL = 0.1  # seconds
TAIL = 5  # lines of the output of a row that failed
Task = dict[str, Any]
Result = dict[str, Any]


def share_threads(machine: Machine, jobs: int) -> int:
    """Threads of each of so many processes: this one's divided among them, or as many as the environment says."""
    threads = backend(machine.backend).threads()
    return threads if any(os.environ.get(name) for name in THREADS) else max(1, threads // jobs)


@dataclass
class RowProcess:
    """A row's process, the file that takes its result, and its output from where this process began it."""

    process: subprocess.Popen[str]
    answer: IO[str]
    output: Path
    begun: int  # bytes of the output before

    @classmethod
    def start(cls, task: Task, output: Path, environment: Mapping[str, str]) -> RowProcess:
        """Starts the process and gives it its task."""
        output.parent.mkdir(parents=True, exist_ok=True)
        answer = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # closed with the process
        with open(output, "ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "qtx.jobs.row_process"],
                stdin=subprocess.PIPE,
                stdout=answer,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C of a terminal comes here alone, and is passed on once
            )
            begun = errors.tell()
        given = cast(IO[str], process.stdin)  # a pipe, as asked for; it stays open: its end would be the row's
        try:
            given.write(json.dumps(task) + "\n")
            given.flush()
        except BrokenPipeError:  # it ended before it had read its task
            pass
        return cls(process, answer, output, begun)

    def finish(self) -> Result | str:
        """The row's result, or how its process ended without one; when that has ended."""
        code = self.process.wait()
        cast(IO[str], self.process.stdin).close()
        with self.answer as answer:
            answer.seek(0)
            lines = answer.read().splitlines()
        if code == 0 and lines:
            return cast(Result, json.loads(lines[-1]))
        how = f"crashed (signal {-code})" if code < 0 else f"ended with status {code}"
        with open(self.output, "rb") as file:
            file.seek(self.begun)
            said = file.read().decode(errors="replace").split("\n")
        return "\n  ".join([f"{how}; the last lines of {self.output}:", *[one for one in said if one.strip()][-TAIL:]])


def run_side_by_side(
    tasks: Mapping[str, Task], jobs: int, threads: int, out: Path, keep: Callable[[str, Result], None]
) -> dict[str, str]:
    """Runs every row's task, at most `jobs` at once, each with `threads` threads, and calls `keep` with each result as
    it comes. Returns the rows that have none: how each ended.

    Raises Interrupted where a signal came: every process has then saved its run and stopped.
    """
    here = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONPATH": paths}
    if not any(os.environ.get(name) for name in THREADS):
        environment |= dict.fromkeys(THREADS, str(threads))
    waiting, running, failed = list(tasks), dict[str, RowProcess](), dict[str, str]()
    done, told = 0, False
    what = f"{threads} thread{'s' * (threads > 1)} each; their own lines are in {out}/ROW/{OUTPUT}"
    print(f"{len(tasks)} rows, {min(jobs, len(tasks))} at once, {what}", file=sys.stderr)
    with postpone() as stop:
        try:
            while running or (waiting and stop.number is None):
                while waiting and len(running) < jobs and stop.number is None:
                    name = waiting.pop(0)
                    running[name] = RowProcess.start(tasks[name], out / name / OUTPUT, environment)
                if stop.number is not None and not told:
                    told = True
                    end(running)
                for name in [name for name, row in running.items() if row.process.poll() is not None]:
                    result = running.pop(name).finish()
                    if isinstance(result, dict):
                        keep(name, result)
                        done += 1
                        print(f"{name}: done, {done} of {len(tasks)}", file=sys.stderr)
                    elif stop.number is None:
                        failed[name] = result
                        print(f"{name}: failed", file=sys.stderr)
                time.sleep(POLL)
        finally:
            end(running)  # a second signal, or a result that could not be kept
            for row in running.values():
                row.finish()
    if stop.number is not None:
        raise Interrupted(f"stopped with {done} of {len(tasks)} rows done, the others saved in {out}", stop.number)
    return failed


def end(running: Mapping[str, RowProcess]) -> None:
    """Tells processes to save and stop."""
    for row in running.values():
        row.process.terminate()
