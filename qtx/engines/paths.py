"""Every path of every outside engine, by name, each run in a worker process.

An engine is a module: `PACKAGES`, what it imports, by name the extra that brings it; `PATHS`; and `run(path, values)`,
which only a worker calls. Those of other packages are entry points of the group `qtx.engines`.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import pathlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

import numpy as np

from qtx_ref.profiles import NAMES
from qtx_ref.spec import SpecError

from .backend import MissingExtra
from .process import EngineCrash, EngineRefusal, Worker, make_environment

__all__ = [
    "EngineCrash",
    "EngineRefusal",
    "OPERATIONS",
    "Path",
    "check_granularity",
    "emulate",
    "engine_names",
    "find_narrow",
    "find_path",
    "list_paths",
    "load_engine",
    "missing",
    "multiplies_bytes",
    "name_profile",
    "paths_of",
    "run",
]

GROUP = "qtx.engines"  # of entry points
BUILT_IN = {
    "onnx-reference": "qtx.engines.onnx_reference",
    "onnxruntime": "qtx.engines.onnx_runtime",
    "torch": "qtx.engines.torch_paths",
    "torchao": "qtx.engines.torchao_paths",
    "litert": "qtx.engines.litert",
    "ml_dtypes": "qtx.engines.ml_dtypes_paths",
}
OPERATIONS = {  # what each takes, and what it gives; what is in brackets may be left out
    "scale": ("low high", "scale zero_point"),
    "quantize": ("x scale zero_point dtype [axis]", "code"),
    "dequantize": ("code scale zero_point [axis dtype]", "y"),
    "fake_quantize": ("x scale zero_point code_min code_max [axis]", "y"),
    "matmul": ("x x_zero w w_zero", "accumulator"),
    "linear": ("x x_scale x_zero w w_scale w_zero bias y_scale y_zero", "y"),
    "cast": ("x format", "code"),
    "mx": ("x format", "scale code"),
}
SWITCHES = {  # CPUs that torch's kernels imitate by switches of their own
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
SWITCHED = ("torch", "torchao")  # engines that have these switches
WITHOUT_BYTES = "-avx2"  # ends the names of profiles of x86 CPUs without VNNI
LIMIT = 600.0  # seconds that one call may take


@dataclass(frozen=True)
class Path:
    """One operation on one path through an engine."""

    name: str  # onnxruntime-all, litert-xnnpack, torch-quantize_per_tensor; several operations may share it
    engine: str
    op: str  # of OPERATIONS
    profile: str  # name of the profile that states it
    codes: tuple[str, ...]  # dtypes of codes, or names of float formats, that it takes
    # Of a tensor's elements, the last size mod `lanes` go another way, which the profile `tail` states.
    lanes: int = 1
    tail: str = ""


class Engine(Protocol):
    """The module of an engine."""

    PACKAGES: Mapping[str, str]
    PATHS: tuple[Path, ...]

    def run(self, path: Path, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What the path makes of the values. Any exception is the engine's refusal."""


@functools.cache
def find_plugins() -> dict[str, str]:
    """The module of each engine of another package. Looked for once: every call of a path asks."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def check_granularity(path: Path, values: Mapping[str, Any]) -> None:
    """Raises ValueError where a path whose name ends in -channel has one scale (of weights, in a linear), or another
    has several: engines have rules of their own for each."""
    channels = path.name.endswith("-channel")
    several = np.size(values["w_scale"]) > 1 if path.op == "linear" else "axis" in values
    if channels != several:
        other = path.name.removesuffix("-channel") if channels else f"{path.name}-channel"
        raise ValueError(f"{path.name} takes {'several scales' if channels else 'one scale'}; see {other}")


def engine_names() -> dict[str, str]:
    """The module of each engine by name: those of qtx, then those of other packages."""
    return BUILT_IN | {name: module for name, module in find_plugins().items() if name not in BUILT_IN}


def load_engine(name: str) -> Engine:
    """The module of an engine, installed or not. Raises SpecError for a name that no engine has, MissingExtra for one
    of another package that cannot be imported."""
    names = engine_names()
    if name not in names:
        raise SpecError(f"engine is {name!r}: known engines are {', '.join(names)}")
    try:
        return cast(Engine, importlib.import_module(names[name]))
    except Exception as error:
        if name in BUILT_IN:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MissingExtra(f"engine {name}: its module {names[name]} cannot be imported: {reason}") from None


def paths_of(name: str) -> tuple[Path, ...]:
    """The paths of an engine, installed or not; none of one that cannot be imported."""
    try:
        return load_engine(name).PATHS
    except MissingExtra:
        return ()


def missing(name: str) -> str | None:
    """The line that says what to install for an engine; None where all of it is."""
    try:
        packages = load_engine(name).PACKAGES
    except MissingExtra as error:
        return str(error)
    for package, extra in packages.items():
        if importlib.util.find_spec(package) is None:
            what = f'"qtx[{extra}]", or ".[{extra}]" in a checkout' if name in BUILT_IN else extra
            return f"engine {name} needs {package}, which is not installed: pip install {what}"
    return None


def list_paths() -> list[Path]:
    """All paths of the engines that are installed."""
    return [path for name in engine_names() if missing(name) is None for path in load_engine(name).PATHS]


def find_path(name: str, op: str) -> Path:
    """The path of that name and operation. Raises SpecError where there is none, MissingExtra where its engine is not
    installed."""
    known = [path for engine in engine_names() for path in paths_of(engine)]
    paths = [path for path in known if path.name == name]
    if not paths:
        raise SpecError(f"path is {name!r}: known paths are {', '.join(dict.fromkeys(path.name for path in known))}")
    for path in paths:
        if path.op == op:
            if line := missing(path.engine):
                raise MissingExtra(line)
            return path
    raise SpecError(f"operation of {name} is {op!r}: it has {', '.join(path.op for path in paths)}")


def multiplies_bytes(cpu: str | None = None) -> bool:
    """Whether a CPU sums products of bytes in int32 at once, as x86 does with VNNI, instead of pairs in int16. Of those
    that are imitated none does: qemu has no AVX-512, nor AVX-VNNI."""
    if cpu is not None:
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        return "vnni" in pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:  # another system: as CPUs of these years
        return True


def find_narrow(path: Path) -> str | None:
    """The profile that states a path on x86 CPUs without VNNI, where it is another than its own."""
    name = f"{path.profile}{WITHOUT_BYTES}"
    return name if path.op in ("matmul", "linear") and name in NAMES else None


def name_profile(path: Path, cpu: str | None = None) -> str:
    """The profile that states a path on a CPU."""
    narrow = find_narrow(path)
    return path.profile if narrow is None or multiplies_bytes(cpu) else narrow


# --- workers ----------------------------------------------------------------------------------------------------------

workers: dict[tuple[str, str | None], Worker] = {}


def emulate(cpu: str) -> tuple[str, ...]:
    """The beginning of a command that runs on one of qemu-user's CPUs. Raises MissingExtra without qemu-user, SpecError
    for a CPU that it does not have."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        others = ", ".join(SWITCHES)
        raise MissingExtra(
            f"CPU {cpu} needs qemu-x86_64, of qemu-user, which is not installed; torch's {others} needs none"
        )
    listed = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True).stdout  # its status is 1
    if cpu.split(",")[0] not in listed.split():
        raise SpecError(
            f"CPU {cpu} is none that qemu-x86_64 has, nor of {', '.join(SWITCHES)}: see qemu-x86_64 -cpu help"
        )
    return emulator, "-cpu", cpu


def make_worker(engine: str, cpu: str | None) -> Worker:
    """A worker of an engine, on an imitated CPU where one is named. Raises SpecError where the engine has no switch for
    it, MissingExtra without qemu-user."""
    command = [sys.executable, "-m", "qtx.engines.worker", engine]
    if cpu in SWITCHES and engine not in SWITCHED:
        raise SpecError(f"CPU {cpu} is a switch of {', '.join(SWITCHED)}: name one of qemu-user's, such as Haswell")
    if cpu is not None and cpu not in SWITCHES:
        command = [*emulate(cpu), *command]
    return Worker(command, make_environment(**SWITCHES.get(cpu or "", {})))


@atexit.register
def end_workers() -> None:
    """Ends every worker; the next call of a path starts one anew."""
    for worker in workers.values():
        worker.close()
    workers.clear()


def run(path: Path | str, op: str, arrays: Mapping[str, Any], cpu: str | None = None) -> dict[str, np.ndarray]:
    """What the path makes of arrays, and of JSON values beside them (names: OPERATIONS), in the engine's worker.

    x of float16 is given as such, x of bfloat16 as float32 with `x_dtype` "bfloat16"; codes of 4 bits and less come in
    bytes. `cpu`: None is this machine's own, of SWITCHES those that engines imitate, any other one of qemu-user's.
    Raises SpecError, MissingExtra, EngineRefusal for what the engine refuses, EngineCrash with its signal or the
    seconds.
    """
    found = find_path(path.name if isinstance(path, Path) else path, op)
    worker = workers.get((found.engine, cpu))
    if worker is None:
        worker = workers[found.engine, cpu] = make_worker(found.engine, cpu)
    _, result = worker.call({"path": found.name, "op": op}, arrays, LIMIT)
    return result
