"""A worker: a process that does tasks for this one, so that an engine that crashes or hangs there is a finding here.

A message is a line of JSON, then as many bytes of safetensors as it says. The parent sends a task; the worker answers
with lines `{"done": n}` and one `{"result": ...}` or `{"error": ...}`. It ends when its stdin does, which the parent
holds open as long as it lives. `Worker` is the parent's side, `serve` the worker's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load, save

__all__ = ["EngineCrash", "EngineRefusal", "Worker", "end_with_parent", "make_environment", "serve", "tell_end"]

PR_SET_PDEATHSIG = 1  # of Linux's prctl: which signal this process gets when its parent ends
Values = dict[str, Any]  # arrays, and JSON values beside them
Tell = Callable[[int], None]  # how much more is done


class EngineCrash(RuntimeError):
    """A worker ended or hung before it answered. `signal`: what ended it; `seconds`: how long it was waited for."""

    def __init__(self, message: str, signal: int | None = None, seconds: float | None = None) -> None:
        super().__init__(message)
        self.signal, self.seconds = signal, seconds


class EngineRefusal(RuntimeError):
    """A worker answered with an error of its engine's, in a line: the type of the exception, and what it says."""


# --- messages ---------------------------------------------------------------------------------------------------------


def write(pipe: IO[bytes], message: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Writes a message whose values are arrays or JSON values. An array that is not contiguous arrives as such."""
    arrays = {name: value for name, value in values.items() if isinstance(value, (np.ndarray, np.generic))}
    strided = [name for name, value in arrays.items() if not np.asarray(value).flags.c_contiguous]
    # ascontiguousarray would make a scalar a vector
    payload = save({name: np.array(value, order="C") for name, value in arrays.items()}) if arrays else b""
    plain = {name: value for name, value in values.items() if name not in arrays}
    header = {**message, "values": plain, "strided": strided, "bytes": len(payload)}
    pipe.write(json.dumps(header).encode() + b"\n" + payload)
    pipe.flush()


def read(pipe: IO[bytes]) -> tuple[dict[str, Any], Values] | None:
    """The next message and its values; None at the end. Lines that are none, words of an engine's, are skipped."""
    for line in pipe:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if not isinstance(message, dict):
            continue
        size = message.pop("bytes", 0)
        payload = pipe.read(size)
        if len(payload) < size:
            return None
        arrays = load(payload) if size else {}
        for name in message.pop("strided", ()):
            arrays[name] = np.repeat(arrays[name], 2, axis=-1)[..., ::2]
        return message, {**message.pop("values", {}), **arrays}
    return None


# --- the parent's side ------------------------------------------------------------------------------------------------


def make_environment(**variables: str) -> dict[str, str]:
    """This process's environment for a worker, which finds the same qtx, with `variables` in it."""
    here = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"PYTHONPATH": paths} | variables


class Worker:
    """A process of `command` with `environment`, started by the first call and again after one that ended it.

    Calls come from the thread that made the first: Linux ends the process with that thread.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command, self.environment = list(command), dict(environment)
        self.process: subprocess.Popen[bytes] | None = None
        self.errors: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> subprocess.Popen[bytes]:
        """The process, which is started where none runs."""
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.close()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=self.environment,
        )
        return self.process

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.errors):
                with contextlib.suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
        self.process = self.errors = None

    def call(
        self, task: Mapping[str, Any], values: Mapping[str, Any], limit: float | None = None, tell: Tell | None = None
    ) -> tuple[Any, Values]:
        """The result of a task and its values. `limit`: seconds that it may take; `tell`: is told of what is done.

        Raises EngineRefusal with the error that the worker answered, EngineCrash where it did not answer.
        """
        process = self.start()
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit or 0, end)
        answered = False
        try:
            if limit is not None:
                timer.start()
            assert process.stdin is not None and process.stdout is not None and self.errors is not None
            with contextlib.suppress(BrokenPipeError):  # it ended before it had read its task
                write(process.stdin, task, values)
            while (message := read(process.stdout)) is not None:
                head, arrays = message
                if "done" in head and tell is not None:
                    tell(head["done"])
                if "error" in head:
                    answered = True
                    raise EngineRefusal(head["error"])
                if "result" in head:
                    answered = True
                    return head["result"], arrays
            code = process.wait()
            if late.is_set():
                raise EngineCrash(f"did not end within {limit} s", seconds=limit)
            raise EngineCrash(tell_end(code, self.errors), signal=-code if code < 0 else None)
        finally:
            timer.cancel()
            if not answered:  # nor will it of what comes next
                self.close()


def tell_end(code: int, errors: IO[bytes]) -> str:
    """How a process ended that said nothing itself."""
    if code < 0:
        return f"crashed (signal {-code})"
    errors.seek(0)
    last = errors.read().decode(errors="replace").strip().splitlines()
    return f"ended with status {code}" + (f": {last[-1][:200]}" if last else "")


# --- the worker's side ------------------------------------------------------------------------------------------------


def end_with_parent() -> None:
    """From now on Linux ends this process at once with its parent, whatever it computes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(do: Callable[[dict[str, Any], Values, Tell], tuple[Any, Values]]) -> None:
    """Answers each task on stdin by `do(task, values, tell)`, its result and values, until stdin ends, which ends this
    process even while it computes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    end_with_parent()
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what an engine prints is no answer
        tasks: queue.Queue[tuple[dict[str, Any], Values]] = queue.Queue()

        def listen() -> None:
            with os.fdopen(os.dup(0), "rb") as given:  # Python's own stdin would be locked where the process ends
                while (message := read(given)) is not None:
                    tasks.put(message)
            os._exit(1)

        threading.Thread(target=listen, daemon=True).start()
        while True:
            task, values = tasks.get()
            try:
                result, arrays = do(task, values, lambda count: write(out, {"done": count}, {}))
            except Exception as error:  # any failure of an engine is a finding
                write(out, {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}, {})
            else:
                write(out, {"result": result}, arrays)
