"""`test_docstrings` of the rooms of the reference beside the vocabulary, the quantizers and the integers."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import qtx_ref
from parity_tests.tests.house.test_docstrings import ROOMS, find_faults

MODULES = [
    module.name
    for module in pkgutil.walk_packages(qtx_ref.__path__, "qtx_ref.")
    if module.name.split(".")[1] not in ROOMS
]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_say_what_they_are(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "__all__")
    assert find_faults(module) == []
