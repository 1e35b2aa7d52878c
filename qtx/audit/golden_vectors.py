"""What engines gave for a few vectors of every family, kept as files, which stand for an engine that is absent.

A file holds one engine: its version, the CPU's features that its kernels choose by, and for each batch the arrays that
went in and came out. They are read where the engine is not installed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path as File
from typing import Any

import numpy as np

from qtx_ref.profiles import profile as load_profile
from qtx_ref.spec import Profile

from ..engines.paths import EngineCrash, EngineRefusal, Path, load_engine, name_profile, run
from ..files.container import FileError, read_sealed, write_sealed
from ..files.formats import GOLDEN, VERSIONS
from .known import Known
from .tallies import Tally, check_path, prepare
from .vectors import DRAWN, Batch, draw, take_codes

__all__ = ["Golden", "read_golden", "replay", "write_golden"]

SIZE = 40  # vectors of a batch
LEFT_OUT = ("powers of two", "empty")  # families: one is long, one has nothing
FEATURES = ("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "neon", "asimddp")
FOLDER = "golden"
DISTRIBUTIONS = {"ai_edge_litert": "ai-edge-litert"}  # names of packages, where not those of their modules


@dataclass(frozen=True)
class Record:
    """One call, and what came of it."""

    path: str
    op: str
    batch: Batch
    results: dict[str, np.ndarray]


@dataclass(frozen=True)
class Golden:
    """The records of one engine."""

    engine: str
    provenance: str  # versions and CPU, in a line
    records: list[Record]


def name_cpu() -> str:
    """The machine's architecture, and those of its features that kernels are chosen by."""
    try:
        lines = File("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = {word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split()}
    return " ".join([platform.machine(), *(name for name in FEATURES if name in flags)])


def name_versions(engine: str) -> str:
    """The packages of an engine with their versions."""
    packages = [DISTRIBUTIONS.get(name, name) for name in load_engine(engine).PACKAGES]
    return ", ".join(f"{name} {version(name)}" for name in packages)


# --- writing ----------------------------------------------------------------------------------------------------------


def draw_few(path: Path, seed: int) -> Iterator[Batch]:
    """One batch of each family, of one dtype after another."""
    codes = take_codes(path.op, path.codes)
    for number, family in enumerate(DRAWN[path.op]):
        if family not in LEFT_OUT:
            yield draw(path.op, family, codes[number % len(codes)], number, SIZE, seed)


def write_golden(folder: File, engine: str, profiles: Callable[[str], Profile], seed: int = 0) -> File:
    """Runs an engine and writes what it gave; the file. What it refuses is left out. Raises MissingExtra, FileError."""
    index: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    for path in load_engine(engine).PATHS:
        for batch in draw_few(path, seed) if path.op in DRAWN else ():
            try:
                results = run(path, path.op, prepare(batch, path, profiles(path.profile)))
            except (EngineRefusal, EngineCrash):
                continue
            arrays = {name: value for name, value in batch.values.items() if isinstance(value, np.ndarray)}
            plain = {name: value for name, value in batch.values.items() if name not in arrays}
            where = str(len(index))
            tensors |= {f"{where}.in.{name}": value for name, value in arrays.items()}
            tensors |= {f"{where}.out.{name}": value for name, value in results.items()}
            index.append(
                {"path": path.name, "op": path.op, "family": batch.family, "dtype": batch.dtype, "values": plain}
            )
    file = folder / f"{engine}.safetensors"
    header = {"format": GOLDEN, "version": VERSIONS[GOLDEN], "engine": engine}
    made = {"versions": name_versions(engine), "cpu": name_cpu(), "seed": seed}
    write_sealed(file, {**header, "made": made, "index": index}, tensors)
    return file


# --- reading ----------------------------------------------------------------------------------------------------------


def read_golden(engine: str, folder: File | None = None) -> Golden | None:
    """The records of an engine, of the package or of a folder; None where there are none. Raises FileError."""
    place = folder or File(str(resources.files("qtx.audit").joinpath(FOLDER)))
    file = place / f"{engine}.safetensors"
    if not file.exists():
        return None
    header, tensors = read_sealed(file, GOLDEN)
    try:
        parts: list[dict[str, dict[str, np.ndarray]]] = [{"in": {}, "out": {}} for _ in header["index"]]
        for key, value in tensors.items():
            where, side, name = key.split(".")
            parts[int(where)][side][name] = value
        records = [
            Record(
                entry["path"],
                entry["op"],
                Batch(entry["family"], entry["dtype"], {**entry["values"], **part["in"]}),
                part["out"],
            )
            for entry, part in zip(header["index"], parts, strict=True)
        ]
        return Golden(engine, f"{header['made']['versions']} on {header['made']['cpu']}", records)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise FileError(f"{file}: its index is damaged ({type(error).__name__}: {error})") from None


def replay(golden: Golden, path: Path, known: Sequence[Known] = (), profile: Profile | None = None) -> list[Tally]:
    """A path's rows, its results those that were kept, beside the profile of the CPU that gave them."""
    records = [record for record in golden.records if (record.path, record.op) == (path.name, path.op)]
    kept = iter(records)

    def give(path: Path, op: str, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return next(kept).results

    narrow = "x86" in golden.provenance and "vnni" not in golden.provenance
    stated = profile or load_profile(name_profile(path, "avx2") if narrow else path.profile)
    return check_path(path, [record.batch for record in records], give, known, stated)
