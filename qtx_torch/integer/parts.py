"""A part of a model compiled: a graph for each kind of batch, kept on disk.

Not in the reference: it says what comes out, not how a machine gets there fast.

Inductor keeps the code that it compiled (TORCHINDUCTOR_CACHE_DIR). What led there, the trace, is not kept by it, and
takes longer than all the rest of a second start. So on a CPU a part keeps its graphs whole beside that code, in `qtx`,
by `torch.compile(...).aot_compile` (experimental; torch documents it since 2.13): conditions, wrapper, generated code.

A graph holds no constant, only their shapes. It is found again by all else that it was made of: what its part means,
the files of this package, torch, its settings and inductor's, the processor, the threads (`describe_world`). A file's
name is its content's hash: a damaged one is not read. Whatever fails, a torch that cannot keep graphs included, the
part is compiled as if nothing were kept. Files are trusted as inductor's are: who may write there may run code.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qtx_ref.spec

from ..quant.compiled import ask_division
from .batched import hold_settings, multiplies_bytes
from .products import plain_float32

KINDS = 64  # graphs of a part: batch or length of one, masked, either side of each size that decides how to multiply
# torch notes, on disk too, which numbers differed between models, floats and sizes of constants, and would make
# variables of them
ALONE = {"automatic_dynamic_shapes": False}
DATA = re.compile(r"\bdata\b")  # the argument of a part that differs from call to call
TRACING = threading.RLock()  # of the process: while one thread traces, what another calls compiled raises

Data = Mapping[str, Tensor | None]


def keep_guards(entries: list) -> list[bool]:
    """Which conditions of a graph each call looks at: those on the data, and torch's settings. Constants are alike by
    construction, and there are a hundred of them. Where the data are not found by their names, all are kept."""
    data = [bool(DATA.search(entry.name)) for entry in entries]
    if not any(entry.guard_type == "TENSOR_MATCH" for entry, kept in zip(entries, data, strict=True) if kept):
        return [True] * len(entries)
    return [
        kept or entry.guard_type in ("SHAPE_ENV", "GLOBAL_STATE") for entry, kept in zip(entries, data, strict=True)
    ]


class Part:
    """A function of data, constants and prepared products, compiled. A call gives what the function would, in any
    thread."""

    def __init__(self, function: Callable, meaning: str, number: int, device: torch.device, backend: str) -> None:
        """meaning: all that the graphs depend on and the arguments' data do not show: shapes and dtypes of constants,
        what the function closes over. number: tells parts apart, each of which has code of its own, of which torch
        keeps count. backend: who compiles, as `torch.compile` names it."""
        hold_settings()
        function.__code__ = function.__code__.replace(co_name=f"{function.__name__}_{number}")
        options: dict[str, Any] = {"guard_filter_fn": keep_guards}
        if backend == "inductor":
            options |= {"size_asserts": False, "assert_indirect_indexing": False}
            options |= ask_division() if device.type == "cuda" else {}
        self.function, self.meaning = function, meaning
        self.compiled = torch.compile(function, fullgraph=True, backend=backend, options=options)
        self.keeps = device.type == "cpu" and backend == "inductor" and can_keep()
        self.graphs: list[Any] = []  # the one that was called last before the others
        self.read: set[Path] = set()

    def __call__(self, data: Data, constants: Mapping, prepared: Mapping) -> Any:
        with TRACING:
            graph = self.choose(data, constants, prepared)
            if graph is None:
                with torch._dynamo.config.patch(recompile_limit=KINDS, **ALONE):
                    return self.compiled(mark(data), constants, prepared)
        return graph(data, constants, prepared)

    def choose(self, *given: Any) -> Any:
        """A graph for these arguments, which is put first; None where this torch cannot keep them."""
        for i, graph in enumerate(self.graphs):
            if graph.guard_check(*given):
                if i:
                    self.graphs.insert(0, self.graphs.pop(i))
                return graph
        graph = self.find(*given) if self.keeps else None
        if graph is not None:
            self.graphs.insert(0, graph)
        return graph

    def find(self, *given: Any) -> Any:
        """A kept graph for these arguments, or one that is made and kept. None where this torch cannot."""
        try:
            folder = make_folder(self.meaning)
            for graph in self.load(folder):
                if graph.guard_check(*given):
                    return graph
                self.graphs.append(graph)
            data, constants, prepared = given
            for_data = (mark(data), constants, prepared), {}
            with torch._dynamo.config.patch(ALONE):
                try:
                    graph = self.compiled.aot_compile(for_data)
                except torch._dynamo.exc.RestartAnalysis:  # of a float64 constant; `torch.compile` too begins anew
                    graph = self.compiled.aot_compile(for_data)
            if not graph.guard_check(*given):
                raise RuntimeError("a graph does not take what it was made of")
            graph.disable_guard_check()
        except Exception:  # of any kind, for torch calls this experimental; what is the part's own fault shows again
            self.keeps = False
            return None
        with suppress(Exception):  # a full disk; what cannot be written
            self.save(graph, folder)
        return graph

    def load(self, folder: Path) -> Iterator[Any]:
        """The kept graphs that were not read so far; those that can be."""
        for path in sorted(folder.iterdir()):
            if path in self.read or path.suffix:
                continue
            self.read.add(path)
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != path.name:
                    continue
                names, closure = self.function.__globals__, self.list_closure()
                graph = torch.compiler.load_compiled_function(
                    io.BytesIO(content), f_globals=names, external_data=closure
                )
                graph.disable_guard_check()
            except Exception:  # whatever inductor says, of its own files among them
                continue
            yield graph

    def save(self, graph: Any, folder: Path) -> None:
        """Writes a graph beside its place, and renames it."""
        with tempfile.TemporaryDirectory(dir=folder, suffix=".new") as fresh:
            path = Path(fresh) / "graph"
            graph.save_compiled_function(str(path), external_data=self.list_closure())
            place = folder / hashlib.sha256(path.read_bytes()).hexdigest()
            os.replace(path, place)
        self.read.add(place)

    def list_closure(self) -> dict[str, Any]:
        """What the function closes over, by name, which no file holds: a graph was traced from its meaning."""
        cells = zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True)
        values = {name: cell.cell_contents for name, cell in cells}
        return {name: value for name, value in values.items() if not isinstance(value, (bool, type(None)))}


AXES = {"tokens": (0, 1), "types": (0, 1), "mask": (0, 1), "images": (0,), "allowed": (0, 2, 3)}


def mark(data: Data) -> dict[str, Tensor | None]:
    """The data as the compiler is shown them: their sizes of batch and length may be others in the next call. Of codes
    and their units, those are the first two axes, the last left out."""
    fresh = {name: None if x is None else x.detach() for name, x in data.items()}  # marks are seen by guards
    for name, x in fresh.items():
        if x is not None:
            for axis in AXES.get(name, range(min(x.ndim - 1, 2))):
                torch._dynamo.maybe_mark_dynamic(x, axis)
    return fresh


def can_keep() -> bool:
    """Whether this torch has what keeps graphs, and is not told to keep nothing."""
    if not hasattr(torch.compiler, "load_compiled_function") or not hasattr(torch.cpu, "get_capabilities"):
        return False
    from torch._inductor import config  # here, for it takes a second to import

    return not getattr(config, "force_disable_caches", False)


def make_folder(meaning: str) -> Path:
    """Where graphs of a part that means this are kept, beside inductor's: made here, by this machine, as it is now."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    name = hashlib.sha256(f"{describe_world()}\n{meaning}".encode()).hexdigest()
    folder = Path(cache_dir()) / "qtx" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe_world() -> str:
    """All that a graph depends on beside its part: who traced and compiled it, for which processor, under which
    settings, those included that a graph holds as constants (`hold_settings`)."""
    from torch._inductor import config

    made = hash_sources(), sys.version, torch.__version__, torch.version.git_version
    machine = platform.platform(), sorted(torch.cpu.get_capabilities().items()), torch.backends.cpu.get_cpu_capability()
    settings = torch.get_num_threads(), plain_float32("cpu"), multiplies_bytes("cpu"), config.get_hash().hex()
    return repr((made, machine, settings))


@cache
def hash_sources() -> str:
    """Of this package and of the vocabulary: what a graph is traced from."""
    total = hashlib.sha256()
    for root in (Path(__file__).parents[1], Path(qtx_ref.spec.__file__).parent):
        for path in sorted(root.rglob("*.py")):
            total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return total.hexdigest()
