"""The house rules: the two backends have the same signatures, and imports run one way."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qtx_ref

ROOT = Path(qtx_ref.__file__).parent.parent
REF = ["qtx_ref", *(module.name for module in pkgutil.walk_packages(qtx_ref.__path__, "qtx_ref."))]
PURE = (
    "affine", "fixed_point", "integer", "integer_ops", "formats", "quantizers", "observers", "stats", "random", "ops",
    "optim",
)  # fmt: skip
ONLY_REF = {"random": {"stream"}}  # weights, masking and batch order are drawn in NumPy whichever the backend
FUSED = ("ops", "integer")  # torch may have more of these: several of the reference's in one, or a device's own way


def public(module: object) -> dict[str, object]:
    """Functions and classes that a module defines under a public name; not torch's autograd nodes."""
    found = inspect.getmembers(module, lambda x: inspect.isfunction(x) or inspect.isclass(x))
    own = {name: x for name, x in found if x.__module__ == module.__name__ and not name.startswith("_")}
    return {name: x for name, x in own.items() if not hasattr(x, "backward")}


def shape(function: object) -> list[tuple]:
    """Parameters by name, kind and default; the types differ between backends."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def methods(kind: type) -> dict[str, list[tuple]]:
    found = inspect.getmembers(kind, inspect.isfunction)
    return {name: shape(f) for name, f in found if not name.startswith("_") or name == "__init__"}


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_have_the_same_signatures(name: str) -> None:
    pytest.importorskip("torch", reason="the torch backend needs the extra torch")
    ref, ours = (public(importlib.import_module(f"{package}.{name}")) for package in ("qtx_ref", "qtx_torch"))
    assert set(ref) - set(ours) == ONLY_REF.get(name, set())
    assert name in FUSED or set(ours) <= set(ref)
    for key in set(ref) & set(ours):
        same = methods if inspect.isclass(ref[key]) else shape
        assert same(ref[key]) == same(ours[key]), key


@pytest.mark.parametrize("name", ["Model", "IntegerModel", "Trainer"])
def test_backends_have_the_same_interface(name: str) -> None:
    pytest.importorskip("torch", reason="the torch backend needs the extra torch")
    ref, ours = (methods(getattr(importlib.import_module(f"{p}.backend"), name)) for p in ("qtx_ref", "qtx_torch"))
    assert {key: ours.get(key) for key in ref} == ref


def test_backends_have_the_same_functions() -> None:
    pytest.importorskip("torch", reason="the torch backend needs the extra torch")
    ref, ours = (importlib.import_module(f"{package}.backend") for package in ("qtx_ref", "qtx_torch"))
    for name in ("check_generation", "check_machine", "threads"):
        assert shape(getattr(ref, name)) == shape(getattr(ours, name)), name
    ref, ours = (importlib.import_module(f"{package}.timing") for package in ("qtx_ref", "qtx_torch"))
    for name in ("products", "quantizers"):
        assert shape(getattr(ref, name)) == shape(getattr(ours, name)), name


def run_fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_reference_never_loads_torch() -> None:
    modules = [*REF, "qtx", "parity_tests.runner"]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += (
        "from parity_tests.table import table\ntable('ref')\nprint([n for n in sys.modules if n.startswith('torch')])"
    )
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
    found = run_fresh(code + "print([n for n in sys.modules if n.partition('.')[0] in ('parity_tests', 'torch')])")
    assert found == "[]"


def imports(path: Path) -> set[str]:
    """Every module that a file imports, relative imports made absolute."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for entry in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(entry, ast.Import):
            found |= {alias.name for alias in entry.names}
        elif isinstance(entry, ast.ImportFrom):
            base = ".".join(package[: len(package) - entry.level + 1]) if entry.level else ""
            module = ".".join(filter(None, (base, entry.module)))
            found |= {module} if entry.module else {f"{module}.{alias.name}" for alias in entry.names}
            found |= {f"{module}.{alias.name}" for alias in entry.names} if module == "qtx_ref" else set()
    return found


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
