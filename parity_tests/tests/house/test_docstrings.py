"""What a name of the reference says of itself: it is exported, documented, and an array has a shape and a dtype.

A function that takes or returns arrays names a shape, `(..., O)` or in words, and a dtype. What holds for all arrays of
a module is said once, in a paragraph of the module's docstring that begins with "Arrays:". A function that raises, or
calls a check, says so.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import qtx_ref

MODULES = [module.name for module in pkgutil.walk_packages(qtx_ref.__path__, "qtx_ref.") if not module.ispkg]
ARRAY = re.compile(r"\b(ndarray|Arrays|Constants|Params|Var|Code)\b")
# (B, T), (O,), (..., D / block): a tuple with a dimension of one letter or "..." in it
SHAPE = re.compile(r"\((?=[^()]*(?:\.\.\.|\b[A-Z][a-z]?\b))[^()]*,[^()]*\)|\b(shape[sd]?|broadcasts?|one number)\b")
DTYPE = re.compile(r"\b(u?int(8|16|32|64)|b?float(16|32|64)|integers?|whole numbers?|booleans?|dtypes?|Q\d+)\b")
SHARED = re.compile(r"^Arrays:.*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


def own_doc(x: object) -> str:
    """The docstring that a function or class was given by its author; not a base's, a dataclass's or an enum's."""
    text = vars(x).get("__doc__") if inspect.isclass(x) else x.__doc__
    generated = inspect.isclass(x) and (text or "").startswith((f"{x.__name__}(", "An enumeration."))
    return "" if generated else text or ""


def public(module: ModuleType) -> dict[str, object]:
    """Functions and classes that a module defines under a name without an underscore."""
    members = inspect.getmembers(
        module, lambda x: inspect.isfunction(x) or inspect.isclass(x) or hasattr(x, "__wrapped__")
    )
    return {name: x for name, x in members if x.__module__ == module.__name__ and not name.startswith("_")}


def can_raise(function: Callable) -> bool:
    """Whether a function has a `raise` of its own, or calls another named check or refuse; not within one it
    defines."""
    left = list(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Raise) and node.exc is not None:
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.partition("_")[0] in ("check", "refuse"):
                return True
        left += [] if isinstance(node, (ast.FunctionDef, ast.Lambda)) else ast.iter_child_nodes(node)
    return False


def takes_arrays(function: Callable) -> bool:
    """By its annotations."""
    annotations = inspect.unwrap(function).__annotations__.values()
    return any(ARRAY.search(one if isinstance(one, str) else str(one)) for one in annotations)


def find_faults(module: ModuleType) -> list[str]:
    """What a module's public names leave unsaid, a line each."""
    own, exported = public(module), list(getattr(module, "__all__", []))
    shared = SHARED.search(module.__doc__ or "")
    faults = [f"{name} is not in __all__" for name in own if name not in exported]
    faults += [f"{name} of __all__ is not there" for name in exported if not hasattr(module, name)]
    faults += ["__all__ is not sorted"] * (exported != sorted(exported))
    for name, x in own.items():
        doc = own_doc(x)
        if not doc:
            faults.append(f"{name} has no docstring")
        elif inspect.isclass(x):
            for key, member in vars(x).items():
                callable_ = inspect.isroutine(member) or isinstance(member, (property, staticmethod, classmethod))
                if callable_ and not key.startswith("_") and not inspect.getdoc(getattr(x, key)):
                    faults.append(f"{name}.{key} has no docstring")
        else:
            said = doc + (shared.group() if shared else "")
            if takes_arrays(x):
                faults += [f"{name} names no shape"] * (not SHAPE.search(said))
                faults += [f"{name} names no dtype"] * (not DTYPE.search(said))
            if can_raise(inspect.unwrap(x)) and not re.search(r"\b[Rr]aises?\b|Error\b", doc):
                faults.append(f"{name} does not say what it raises")
    return faults


@pytest.mark.parametrize("name", MODULES)
def test_public_names_say_what_they_are(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "__all__")
    assert find_faults(module) == []


def test_the_integers_page_computes_what_it_says() -> None:
    page = Path(qtx_ref.__file__).parent / "integer" / "README.md"
    ran = doctest.testfile(str(page), module_relative=False)
    assert ran.attempted > 5 and not ran.failed


PLANTED = '''
"""{words}"""
from enum import Enum
import numpy as np
__all__ = ["gone", "Kind", "bare", "shapeless", "silent", "typeless", "whole"]
class Kind(Enum):
    A = 1
    def go(self): ...
def alone(): "Not exported."
def bare(): ...
def shapeless(x: "np.ndarray"): "The sum of x, float32."
def typeless(x: "np.ndarray") -> "np.ndarray": "Rows of x (N, D), turned (Bondarenko et al. 2021, section 4)."
def silent(x: int):
    "Twice x."
    check_it(x)
def whole(x: "np.ndarray"):
    "x (N, D), float32, doubled. Raises ValueError for NaN."
    raise ValueError
'''


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("Nothing.", {"shapeless names no shape", "typeless names no dtype"}),
        ("Nothing.\n\nArrays: of int64.\n\nOf shapes no word.", {"shapeless names no shape"}),
        ("Nothing.\n\nArrays: the arguments\nbroadcast; int64.", set()),
    ],
)
def test_what_is_left_unsaid_is_noticed(tmp_path: Path, words: str, left: set[str]) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED.format(words=words).lstrip())
    spec = importlib.util.spec_from_file_location("planted", planted)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = {"alone is not in __all__", "gone of __all__ is not there", "__all__ is not sorted"}
    expected |= {"Kind has no docstring", "bare has no docstring", "silent does not say what it raises"}
    assert set(find_faults(module)) == expected | left
