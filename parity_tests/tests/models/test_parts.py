"""Graphs that a compiled part keeps: read again by what means the same, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from qtx_torch.compiler import find_compiler
from qtx_torch.integer import parts
from qtx_torch.integer.parts import Part, can_keep, keep_guards, make_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler says them of torch
VALUE = torch.arange(24).reshape(2, 3, 4)


class Counted:
    """What `torch.compile` gave, and how often it made a graph to be kept."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.made = 0

    def aot_compile(self, given: tuple) -> Any:
        self.made += 1
        return self.compiled.aot_compile(given)


def make(meaning: str = "a factor", gain: int = 3) -> tuple[Part, Counted]:
    """A part that gives value * factor + gain, and a count of the graphs that it makes."""

    def scale(data: dict, constants: dict, prepared: dict) -> torch.Tensor:
        return data["value"] * constants["factor"] + gain

    part = Part(scale, meaning, 0, torch.device("cpu"), "inductor")
    counted = Counted(part.compiled)
    part.compiled = counted
    return part, counted


def call(part: Part, value: torch.Tensor = VALUE, factor: int = 2) -> list:
    return part({"value": value, "mask": None}, {"factor": torch.tensor(factor)}, {}).tolist()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's graphs are kept; inductor's own stay where they are."""
    if reason := find_compiler("cpu") or ("" if can_keep() else "this torch keeps no graphs"):
        pytest.skip(reason)
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: str(tmp_path))
    return tmp_path / "qtx"


def list_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_a_second_part_reads_what_the_first_kept(folder: Path) -> None:
    """For batches of other sizes and other constants too: a graph holds neither."""
    first, made = make()
    assert call(first) == (VALUE * 2 + 3).tolist()
    small = VALUE[:, :2].contiguous()
    assert call(first, small) == (small * 2 + 3).tolist()
    second, again = make()
    assert call(second) == (VALUE * 2 + 3).tolist()
    wider = torch.arange(5 * 7 * 4).reshape(5, 7, 4)
    assert call(second, wider, 9) == (wider * 9 + 3).tolist()
    assert (made.made, again.made, len(list_files(folder))) == (1, 0, 1)


def test_a_second_thread_waits_for_the_first_to_trace(folder: Path) -> None:
    """While one thread traces, torch refuses what another calls compiled: a server's first two calls."""
    part, made = make()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda value: call(part, value), (VALUE, VALUE + 1)))
    assert results == [(VALUE * 2 + 3).tolist(), (VALUE * 2 + 5).tolist()]
    assert made.made == 1


def test_other_data_have_a_graph_of_their_own(folder: Path) -> None:
    """A batch of one, another dtype, another layout: the last call's graph stands first."""
    kinds = VALUE, VALUE[:1], VALUE.int(), VALUE.mT.contiguous().mT
    first, made = make()
    for value in (*kinds, *kinds):
        assert call(first, value) == (value * 2 + 3).tolist()
    second, again = make()
    for value in reversed(kinds):
        assert call(second, value) == (value * 2 + 3).tolist()
    assert (made.made, again.made, len(list_files(folder))) == (4, 0, 4)


def test_a_graph_is_not_called_under_other_settings(folder: Path) -> None:
    """A graph has its number of threads in it."""
    first, made = make()
    call(first)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert call(first) == (VALUE * 2 + 3).tolist()
        assert made.made == 2
    finally:
        torch.set_num_threads(threads)
    assert call(first) == (VALUE * 2 + 3).tolist()
    assert (made.made, len({path.parent for path in list_files(folder)})) == (2, 2)


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lie(path: Path) -> None:
    """Whole by its name, and no graph."""
    path.unlink()
    path.with_name("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855").touch()


DAMAGE = {
    "changed": change,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "another": lie,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_what_is_damaged_is_made_again(folder: Path, damage: Callable[[Path], object]) -> None:
    call(make()[0])
    (path,) = list_files(folder)
    damage(path)
    second, again = make()
    assert call(second) == (VALUE * 2 + 3).tolist()
    assert again.made == 1


WORLDS = {
    "torch": (torch, "__version__", "2.0"),
    "its source": (torch.version, "git_version", "0"),
    "python": (parts.sys, "version", "3.0"),
    "processor": (torch.cpu, "get_capabilities", lambda: {"avx2": False}),
    "instructions": (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
    "threads": (torch, "get_num_threads", lambda: 99),
    "sources": (parts, "hash_sources", lambda: "0"),
    "precision": (parts, "plain_float32", lambda device: None),
    "products": (parts, "multiplies_bytes", lambda device: None),
}


@pytest.mark.parametrize("change", WORLDS.values(), ids=list(WORLDS))
def test_another_world_keeps_graphs_elsewhere(change: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_folder("a part")
    assert make_folder("a part") == here
    assert make_folder("another part") != here
    monkeypatch.setattr(*change)
    assert make_folder("a part") != here


def test_inductors_settings_are_part_of_the_world() -> None:
    here = make_folder("a part")
    with torch._inductor.config.patch("cpp.simdlen", 1):
        assert make_folder("a part") != here


def test_another_meaning_is_not_read(folder: Path) -> None:
    call(make("three", 3)[0])
    other, made = make("four", 4)
    assert call(other) == (VALUE * 2 + 4).tolist()
    assert made.made == 1


def test_numbers_in_which_models_differ_are_no_variables(folder: Path) -> None:
    """A float and the size of a constant: torch makes variables of what another model had otherwise."""
    counts = []

    def note(graph: Any, given: list) -> Any:
        counts.append(len(given))
        return graph

    for gain, size in ((0.5, 8), (0.25, 8), (0.25, 5)):
        module = torch.nn.Module()
        module.gain = gain

        def scale(data: dict, constants: dict, prepared: dict, module: torch.nn.Module = module) -> torch.Tensor:
            return data["value"] * constants["factor"][:4] * torch.full((), module.gain)

        part, factor = Part(scale, "a gain", 0, torch.device("cpu"), note), torch.arange(size)
        got = part({"value": VALUE, "mask": None}, {"factor": factor}, {})
        assert torch.equal(got, VALUE * factor[:4] * gain)
    assert counts == [4, 4, 4]  # the data, its two sizes that may be others, the factor


def test_a_graph_that_torch_begins_anew_is_kept(folder: Path) -> None:
    """torch asks for that once, of a float64 constant among others; `torch.compile` itself goes on."""
    part, made = make()
    asked: list[tuple] = []

    class Anew:
        def aot_compile(self, given: tuple) -> Any:
            asked.append(given)
            if len(asked) == 1:
                raise torch._dynamo.exc.RestartAnalysis
            return made.aot_compile(given)

    part.compiled = Anew()
    assert call(part) == (VALUE * 2 + 3).tolist()
    assert (part.keeps, made.made, len(list_files(folder))) == (True, 1, 1)


def test_what_cannot_be_kept_runs_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk; a torch that knows no such thing."""

    def fail(*given: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Part, "save", fail)
    part, _ = make()
    assert call(part) == call(part) == (VALUE * 2 + 3).tolist()
    assert list_files(folder) == []
    monkeypatch.delattr(torch.compiler, "load_compiled_function")
    part, made = make()
    part.compiled = made.compiled
    assert call(part) == (VALUE * 2 + 3).tolist()
    assert (part.keeps, part.graphs) == (False, [])


def test_guards_are_kept_where_the_data_are_not_found() -> None:
    class Entry:
        def __init__(self, name: str, kind: str) -> None:
            self.name, self.guard_type = name, kind

    known = [Entry("data['value']", "TENSOR_MATCH"), Entry("constants['a']", "TENSOR_MATCH"), Entry("", "SHAPE_ENV")]
    assert keep_guards(known) == [True, False, True]
    assert keep_guards([Entry("x", "TENSOR_MATCH"), Entry("", "GRAD_MODE")]) == [True, True]
