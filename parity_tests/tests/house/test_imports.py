"""Imports run one way: between rooms as `docs/architecture.md` draws them, and never in a circle of files."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qtx_ref

ROOT = Path(qtx_ref.__file__).parent.parent
HOUSES = ("qtx_ref", "qtx_torch", "qtx", "parity_tests")
BELOW = {  # the houses that a house may import, and of them the rooms, where not all
    "qtx_ref": {},
    "qtx_torch": {"qtx_ref": {"spec"}},
    "qtx": {"qtx_ref": None},
    "parity_tests": {"qtx_ref": None, "qtx_torch": None, "qtx": None},
}


def read_levels(page: str) -> dict[str, list[set[str]]]:
    """The rooms of each house from the highest level to the lowest: the words before two spaces on each line."""
    blocks = re.findall(r"^```rooms (\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return {house: [set(line.split("  ")[0].split()) for line in block.splitlines()] for house, block in blocks}


def find_modules(root: Path) -> dict[str, Path]:
    """Every module of the four houses by its dotted name."""
    modules = {}
    for house in HOUSES:
        for path in sorted((root / house).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def find_imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules that a file imports, wherever in it and whether or not for types alone."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            named = {f"{source}.{alias.name}" for alias in node.names}
            targets |= {one if one in modules else source for one in named}
    return {target for target in targets if target.partition(".")[0] in HOUSES}


def room_of(name: str) -> tuple[str, str]:
    """House and room of a module; the house itself has the room ''."""
    house, _, rest = name.partition(".")
    return house, rest.partition(".")[0]


def find_faults(name: str, path: Path) -> list[str]:
    """Each import of a file that the map has no arrow for."""
    house, room = room_of(name)
    if room and (house, room) not in HEIGHT:
        return [f"{name} is in no room of the map"]
    faults = []
    for target in sorted(find_imports(name, path, MODULES)):
        other, place = room_of(target)
        if other == house:
            allowed = not room or place in ("", room) or HEIGHT[other, place] < HEIGHT[house, room]
        else:
            rooms = BELOW[house].get(other, set())
            allowed = rooms is None or place in rooms
            # when it runs
            allowed |= name == "qtx.commands.parity" and other == "parity_tests"
        if not allowed:
            faults.append(f"{name} imports {target}")
    return faults


MODULES = find_modules(ROOT)
LEVELS = read_levels((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
HEIGHT = {(house, room): -i for house, lines in LEVELS.items() for i, rooms in enumerate(lines) for room in rooms}


def test_the_map_has_every_room() -> None:
    assert set(LEVELS) == set(HOUSES)
    for house, lines in LEVELS.items():
        rooms = [room for line in lines for room in line]
        assert len(rooms) == len(set(rooms)), house
        assert set(rooms) == {room_of(name)[1] for name in MODULES if name.partition(".")[0] == house} - {""}, house


@pytest.mark.parametrize("house", HOUSES)
def test_imports_between_rooms_run_down_the_map(house: str) -> None:
    own = {name: path for name, path in MODULES.items() if name.partition(".")[0] == house}
    assert [fault for name, path in own.items() for fault in find_faults(name, path)] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: find_imports(name, path, MODULES) - {name} for name, path in MODULES.items()}
    # a package's index is loaded before its files whatever they import
    graph = {name: {t for t in targets if not name.startswith(f"{t}.")} for name, targets in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qtx.data.images", "from ..jobs import training"),
        ("qtx_ref.ops", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .numerics import Float"),
        ("qtx_ref.tape", "def run():\n    from .quant.affine import quantize"),
        ("qtx_torch.ops", "from qtx_ref import ops"),
        ("qtx.jobs.study", "from parity_tests.runner import run"),
        ("qtx_ref.cellar", "import numpy"),
    ],
)
def test_a_wrong_arrow_is_seen(tmp_path: Path, name: str, text: str) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(text)
    assert len(find_faults(name, planted)) == 1
