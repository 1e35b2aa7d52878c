"""How a benchmark is taken: parity first, then two calls in turns, the median of the rounds' ratios, and memory.

A file of benchmarks has `rows(device, quick) -> Iterable[Row | Skip]`, or several such functions, each a line of
`groups.py`; quick is two rounds of the smallest sizes:

    def build(way: str, length: int) -> Call:                        # arguments that JSON can carry
        ...
        return lambda: attend(q, k, v)

    def rows(device: str, quick: bool) -> Iterator[Row]:
        ours, theirs = build("tiles", 4096), build("matrix", 4096)
        yield compare("tiles, 4096", ours, "matrix", theirs, rounds=3 if quick else 9, device=device,
                      check=lambda: near(ours(), theirs(), 1e-5), bound=0.5,
                      mib=peak(build, "tiles", 4096, device=device),
                      against_mib=peak(build, "matrix", 4096, device=device))

Times are milliseconds: on one thread of a CPU the process's own seconds, to which others on the machine add little;
with several threads, or on a GPU, by the clock. Memory is MiB.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]
Check = Callable[[], str]

ROOT = Path(__file__).parent.parent
LEAST = 0.005  # seconds that one reading of the clock takes at least: a shorter call is repeated
SHORT = 0.2  # seconds; a shorter call is made once more before its reading, so that it follows its own kind
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("numpy", "scipy", "torch", "triton", "transformers", "torchao", "onnxruntime", "brevitas", "optimum-quanto")
LIBRARIES = ("transformers", "torchao", "onnxruntime", "brevitas", "optimum", "onnx", "onnxscript")


@dataclass(frozen=True)
class Row:
    """One thing timed against another. `ratio` is the median of the rounds' ratios, `low` and `high` the least and the
    largest; `bound` is the ratio that is asked for at most, None where nothing is; memory is None where the system does
    not say."""

    name: str
    against: str
    ratio: float
    low: float
    high: float
    ms: float
    against_ms: float
    mib: float | None = None
    against_mib: float | None = None
    bound: float | None = None
    notes: str = ""


@dataclass(frozen=True)
class Skip:
    """A row that could not be: what is not installed, or not on this machine."""

    name: str
    why: str


class Differ(Exception):
    """Two that should agree do not: nothing is timed."""


# --- parity -----------------------------------------------------------------------------------------------------------


def as_array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    return np.asarray(value)


def equal(ours: Any, theirs: Any, what: str = "codes") -> str:
    """Says that all are equal. Raises Differ."""
    a, b = as_array(ours), as_array(theirs)
    if a.shape != b.shape:
        raise Differ(f"{what} have shapes {a.shape} and {b.shape}")
    if not np.array_equal(a, b):
        raise Differ(f"{what} differ in {int((a != b).sum())} of {a.size}")
    return f"{what} equal"


def near(ours: Any, theirs: Any, limit: float, what: str = "") -> str:
    """Says by how much two differ at most, on their device if they have one. Raises Differ at more than `limit`, or
    where one is not finite."""
    a, b = (x.detach() if isinstance(x, torch.Tensor) else torch.from_numpy(np.asarray(x)) for x in (ours, theirs))
    if a.shape != b.shape:
        raise Differ(f"{what or 'results'} have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    gap = float((a.double() - b.to(a.device).double()).abs().max())
    if not gap <= limit:
        raise Differ(f"{what or 'results'} differ by {gap:.3g}, more than {limit}")
    return f"{what} within {gap:.0e}".strip()


# --- time -------------------------------------------------------------------------------------------------------------


def make_clock(device: str) -> Callable[[], float]:
    """Seconds; on a GPU when all that was begun is done."""
    if device.startswith("cuda"):

        def read() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return read
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def time_calls(calls: Mapping[str, Call], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each call in each round, in turns, every second round backwards, after two of each that warm up."""
    clock = make_clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    once = {}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        once[name] = max(clock() - begin, 1e-7)
    for turn in range(rounds):
        for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
            if once[name] < SHORT:
                call()
            number = max(1, round(LEAST / once[name]))
            begin = clock()
            for _ in range(number):
                call()
            seconds[name].append((clock() - begin) / number)
    return seconds


def make_row(name: str, against: str, times: Mapping[str, list[float]], **given: Any) -> Row:
    """The row of two whose times are known."""
    ratios = [a / b for a, b in zip(times[name], times[against], strict=True)]
    ms, other = (1000 * statistics.median(times[each]) for each in (name, against))
    return Row(name, against, statistics.median(ratios), min(ratios), max(ratios), ms, other, **given)


def compare(
    name: str,
    call: Call,
    against: str,
    other: Call,
    *,
    rounds: int,
    check: Check,
    device: str = "cpu",
    bound: float | None = None,
    mib: float | None = None,
    against_mib: float | None = None,
    notes: str = "",
) -> Row:
    """Both in turns. `check` is called first: it says what agrees, as `equal` and `near` do, or raises Differ."""
    agreed = check()
    notes = "; ".join(filter(None, (agreed, notes)))
    times = time_calls({name: call, against: other}, rounds, device)
    return make_row(name, against, times, mib=mib, against_mib=against_mib, bound=bound, notes=notes)


def compare_each(
    title: str,
    calls: Mapping[str, Call],
    against: str,
    *,
    rounds: int,
    checks: Mapping[str, Check],
    device: str = "cpu",
    bounds: Mapping[str, float] | None = None,
    memory: Mapping[str, float | None] | None = None,
) -> list[Row]:
    """Each of several against one of them, all in turns: a row each, `title` before its name. All but that one have a
    check; all checks come first."""
    bounds, memory = bounds or {}, memory or {}
    notes = {name: checks[name]() for name in calls if name != against}
    times = time_calls(calls, rounds, device)
    rows = []
    for name in notes:
        weight = {"mib": memory.get(name), "against_mib": memory.get(against)}
        row = make_row(name, against, times, **weight, bound=bounds.get(name), notes=notes[name])
        rows.append(replace(row, name=", ".join(filter(None, (title, name)))))
    return rows


# --- memory -----------------------------------------------------------------------------------------------------------


def read_status(key: str) -> float | None:
    """MiB of this process: VmRSS, what it holds, or VmHWM, the most that it held; None where the system is not
    Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def settle() -> None:
    """Gives back what is only freed, and starts VmHWM anew."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        pass


def measure_here(build: Callable[..., Call], given: tuple[Any, ...], held: bool, compiled: bool) -> float | None:
    torch.ones(64, 64) @ torch.ones(64, 64)
    if compiled:  # what compiling itself loads is no model's
        torch.compile(lambda x: x + 1)(torch.ones(64))
    settle()
    before = read_status("VmRSS")
    call = build(*given)
    call()
    settle()
    if not held:
        before = read_status("VmRSS")
    call()
    most = read_status("VmHWM")
    return None if most is None or before is None else most - before


def build_measured(
    build: Callable[..., Call], *given: Any, device: str, held: bool = True
) -> tuple[Call, float | None]:
    """What `build(*given)` gives, and `peak` of it; on a GPU it is built once for both."""
    if not device.startswith("cuda"):
        return build(*given), peak(build, *given, device=device, held=held)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    call = build(*given)
    call()
    if not held:
        before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return call, (torch.cuda.max_memory_allocated(device) - before) / 2**20


@cache
def peak(
    build: Callable[..., Call], *given: Any, device: str = "cpu", held: bool = True, compiled: bool = False
) -> float | None:
    """The most MiB that a process has during the second call of what `build(*given)` gives, less what it has before it
    is built; with `held` False, less what it has before that call: weights and inputs do not count.

    On the CPU in a process of its own, with as many threads as here: `build` is a function of a module and `given` is
    what JSON carries. `compiled`: what torch.compile loads for itself does not count."""
    if device.startswith("cuda"):
        return build_measured(build, *given, device=device, held=held)[1]
    if not hasattr(os, "fork"):
        return None
    module = sys.modules[build.__module__]
    name = module.__spec__.name if module.__spec__ else build.__module__  # of __main__ too
    loaded = [each for each in sys.modules if each.partition(".")[0] in LIBRARIES]
    task = {"module": name, "build": build.__qualname__, "given": given, "held": held, "compiled": compiled}
    task["loaded"] = loaded
    scale = start_scale(torch.get_num_threads())
    scale.stdin.write(json.dumps(task) + "\n")
    scale.stdin.flush()
    answer = json.loads(scale.stdout.readline())
    if "error" in answer:
        raise RuntimeError(f"{build.__qualname__}{given} in a process of its own: {answer['error']}")
    return answer["mib"]


@cache
def start_scale(threads: int) -> subprocess.Popen:
    """The process that forks those that are measured: it has imported what they need, and computed nothing."""
    command = [sys.executable, "-m", "benchmarks.harness"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    scale = subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)
    atexit.register(scale.kill)
    return scale


def serve_scale() -> None:
    """Answers each line of stdin, a task, with a line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        task = json.loads(line)
        module = importlib.import_module(task["module"])
        for name in task["loaded"]:  # code counts in nobody's memory
            with suppress(Exception):
                importlib.import_module(name)
        if child := os.fork():
            if status := os.waitpid(child, 0)[1]:
                print(json.dumps({"error": f"ended with status {status}"}), file=answers, flush=True)
            continue
        try:
            mib = measure_here(getattr(module, task["build"]), tuple(task["given"]), task["held"], task["compiled"])
            answer = {"mib": mib}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
        os._exit(0)


# --- the machine ------------------------------------------------------------------------------------------------------


def read_processor() -> tuple[str, list[str]]:
    """The CPU's name and which of FLAGS it has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    lines = dict(tuple(map(str.strip, line.split(":", 1))) for line in text.splitlines() if ":" in line)
    has = set(lines.get("flags", "").split())
    return lines.get("model name", platform.machine()), [flag for flag in FLAGS if flag in has]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(device: str = "cpu") -> dict[str, Any]:
    """What the figures depend on: machine, versions, threads."""
    name, flags = read_processor()
    cuda = device.startswith("cuda")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": name,
        "flags": flags,
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "packages": {package: version for package in PACKAGES if (version := version_of(package)) is not None},
    }


def write_json(path: Path, value: Any) -> None:
    """The file, at no moment half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    serve_scale()
