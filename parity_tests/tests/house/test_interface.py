"""The house rules: the two backends have the same signatures, and imports run one way."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import qtx_ref
import qtx_torch

ROOT = Path(qtx_ref.__file__).parent.parent
REF = ["qtx_ref", *(module.name for module in pkgutil.walk_packages(qtx_ref.__path__, "qtx_ref."))]
DIFFERS = re.compile(r"Differs from the reference: ([\w, .]+): ([^.]+)\.")  # names; why
ALONE = re.compile(r"Not in the reference: ([^.]+)\.")  # why


def modules(package: str) -> set[str]:
    """Every module of a package by its path within it, at whatever depth; without importing one."""
    paths = (path.relative_to(ROOT / package).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.parts).removesuffix(".__init__") for path in paths} - {"__init__"}


PAIRS = sorted(modules("qtx_ref") & modules("qtx_torch"))


def heading(module: object) -> str:
    """A module's docstring on one line."""
    return " ".join((module.__doc__ or "").split())


def declared(module: object) -> set[str]:
    """The names that a module of torch says differ on purpose: functions, classes, `Class.method`s and parameters."""
    return {name for names, _ in DIFFERS.findall(heading(module)) for name in names.split(", ")}


def public(module: object) -> dict[str, object]:
    """Functions and classes that a module defines under a public name; not torch's autograd nodes."""
    got = inspect.getmembers(module, lambda x: inspect.isfunction(x) or inspect.isclass(x))
    own = {name: x for name, x in got if x.__module__ == module.__name__ and not name.startswith("_")}
    return {name: x for name, x in own.items() if not hasattr(x, "apply") or not hasattr(x, "backward")}


def shape(function: object, apart: set[str]) -> list[tuple]:
    """Parameters by name, kind and default, but those of `apart`; the types differ between backends."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, plain(p.default)) for p in parameters if p.name not in apart]


def plain(default: object) -> object:
    """A default as a number, where it is an array or a tensor of one."""
    return default.item() if hasattr(default, "item") else default


def members(own: dict[str, object]) -> dict[str, object]:
    """The functions of a module, its classes, and by `Class.method` what the classes themselves define."""
    got = dict(own)
    for name, kind in own.items():
        for key, x in vars(kind).items() if inspect.isclass(kind) else ():
            x = x.__func__ if isinstance(x, (staticmethod, classmethod)) else x
            if inspect.isfunction(x) and (key == "__init__" or not key.startswith("_")):
                got[f"{name}.{key}"] = x
    return got


def differences(ref: object, ours: object, apart: set[str]) -> set[str]:
    """The names that only one of two modules has, and those whose signatures differ; nothing within a class of
    `apart`."""
    first, second = (members(public(module)) for module in (ref, ours))
    got = set(first) ^ set(second)
    for name in set(first) & set(second):
        if not inspect.isclass(first[name]) and shape(first[name], apart) != shape(second[name], apart):
            got.add(name)
    return {name for name in got if name.partition(".")[0] not in apart or "." not in name}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_modules_has_the_same_names_and_signatures(name: str) -> None:
    """Or torch's says in its docstring which of them differ, and why; and none that does not."""
    ref, ours = (importlib.import_module(f"{package}.{name}") for package in ("qtx_ref", "qtx_torch"))
    apart = declared(ours)
    assert differences(ref, ours, apart) <= apart
    for one in apart:
        assert differences(ref, ours, apart - {one}) - (apart - {one}), f"{one} does not differ"


def test_a_difference_is_noticed() -> None:
    """Planted: another name, another default, a method more, a parameter fewer."""
    ref, ours = ModuleType("ref"), ModuleType("ours")
    exec("def f(x, y=1): ...\nclass C:\n    def go(self, a): ...\ndef g(): ...", vars(ref))
    exec("def f(x, y=2): ...\nclass C:\n    def go(self): ...\n    def more(self): ...\ndef h(): ...", vars(ours))
    for module in (ref, ours):
        for x in list(vars(module).values()):
            if inspect.isfunction(x) or inspect.isclass(x):
                x.__module__ = module.__name__
    assert differences(ref, ours, set()) == {"f", "g", "h", "C.go", "C.more"}
    assert differences(ref, ours, {"a", "C.more", "y"}) == {"g", "h", "C.more"}
    assert differences(ref, ours, {"C"}) == {"f", "g", "h"}


def test_what_only_torch_has_says_why() -> None:
    for name in modules("qtx_torch") - modules("qtx_ref"):
        assert ALONE.search(heading(importlib.import_module(f"qtx_torch.{name}"))), name


def run_fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_reference_never_loads_torch() -> None:
    modules = [*REF, "qtx", "parity_tests.runner"]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "from parity_tests.table import list_cases\nlist_cases('ref')\n"
    code += "print([n for n in sys.modules if n.startswith('torch')])"
    assert run_fresh(code) == "[]"


def test_the_compiler_is_loaded_by_what_compiles_alone() -> None:
    """It takes a second, as long as torch itself."""
    code = "import sys, qtx.cli, qtx_torch.backend; print([n for n in sys.modules if n in ('torch._dynamo', 'triton')])"
    assert run_fresh(code) == "[]"


def test_the_reference_is_held_to_truth_without_torch() -> None:
    code = """
import sys
class Missing:
    def find_spec(self, name, *where):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from parity_tests.runner import run
print(run("ref", only="quant").ok)
"""
    assert run_fresh(code) == "True"


def test_qtx_does_not_import_the_proof() -> None:
    names = sorted(f"qtx.{p.stem}" for p in (ROOT / "qtx").glob("*.py") if p.stem != "__init__")
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    got = run_fresh(code + "print([n for n in sys.modules if n.partition('.')[0] in ('parity_tests', 'torch')])")
    assert got == "[]"


def imports(path: Path, wide: bool = False) -> set[str]:
    """Every module that a file imports, relative imports made absolute; wide: and every name taken from one."""
    package = path.relative_to(ROOT).parent.parts
    got = set()
    for entry in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(entry, ast.Import):
            got |= {alias.name for alias in entry.names}
        elif isinstance(entry, ast.ImportFrom):
            base = ".".join(package[: len(package) - entry.level + 1]) if entry.level else ""
            module = ".".join(filter(None, (base, entry.module)))
            got |= {module} if entry.module else {f"{module}.{alias.name}" for alias in entry.names}
            got |= {f"{module}.{alias.name}" for alias in entry.names} if wide or module == "qtx_ref" else set()
    return got


def test_torch_knows_the_reference_by_its_spec_alone() -> None:
    for path in (ROOT / "qtx_torch").rglob("*.py"):
        known = {name for name in imports(path) if name.partition(".")[0] in ("qtx_ref", "qtx", "parity_tests")}
        assert known <= {"qtx_ref.spec"}, f"{path.name} imports {known}"


def test_the_reference_knows_numpy_and_scipy_alone() -> None:
    for path in (ROOT / "qtx_ref").rglob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert tops <= {"qtx_ref", "numpy", "scipy"} | sys.stdlib_module_names, f"{path.name} imports {tops}"


def test_the_vocabulary_is_standard_library_alone() -> None:
    files = sorted((ROOT / "qtx_ref" / "spec").glob("*.py"))
    assert len(files) > 1
    for path in files:
        known = {name for name in imports(path) if name.partition(".")[0] not in sys.stdlib_module_names}
        assert all(name.startswith("qtx_ref.spec.") for name in known), f"{path.name} imports {known}"


@pytest.mark.parametrize("package", ["qtx_ref", "qtx_torch"])
def test_no_circle_of_files(package: str) -> None:
    """Of a backend's imports, those for types alone among them."""
    paths = {path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__"): ROOT / path.with_suffix(".py") for path in paths}
    left = {name: imports(path, wide=True) & set(names) - {name, package} for name, path in names.items()}
    while left:
        free = {name for name, known in left.items() if not known & set(left)}
        assert free, f"in a circle, or behind one: {sorted(left)}"
        left = {name: known for name, known in left.items() if name not in free}


def list_results() -> dict[str, list[str]]:
    """What each autograd Function of the backend gives back, as source, by its class."""
    found = {}
    for path in sorted(Path(qtx_torch.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and "torch.autograd.Function" in map(ast.unparse, node.bases):
                (forward,) = (
                    part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "forward"
                )
                values = [part.value for part in ast.walk(forward) if isinstance(part, ast.Return)]
                found[node.name] = [ast.unparse(value) for value in values if value is not None]
    return found


def test_every_function_gives_a_result_of_its_own() -> None:
    """Compiled by torch 2.11, one that was changed in place has no gradient, and torch says nothing; see `ops.own`."""
    found = list_results()
    assert {"ClippedSoftmax", "StraightThrough", "Linear"} <= set(found)
    assert not {
        name: values for name, values in found.items() if not all(re.match(r"(ops\.)?own\(", v) for v in values)
    }
