"""The table of parity cases. Installed with the package and free of pytest.

`truth/` holds the reference to outside truth and needs no torch; `mirror/` holds torch to the reference.
"""

from __future__ import annotations

from importlib import import_module

from parity_tests.proof.case import Case
from qtx.engines.backend import backend as find_backend
from qtx_ref.spec import SpecError

MODULES = {
    "ref": ("truth.gradients", "truth.forward", "truth.quant", "truth.fakequant", "truth.integer", "truth.values"),
    "torch": (
        "mirror.ops",
        "mirror.attention",
        "mirror.models",
        "mirror.quant",
        "mirror.fakequant",
        "mirror.integer",
        "mirror.values",
        "mirror.steps",
        "mirror.accumulation",
        "mirror.gradients",
    ),
}
DTYPES = {"ref": ("float32",), "torch": ("float32", "bfloat16")}


def list_cases(backend: str, dtype: str = "float32") -> list[Case]:
    """The cases of a backend, those of `dtype` where they depend on one.

    Raises:
        SpecError: an unknown backend, or a dtype that it has no cases for.
        MissingExtra: the backend is torch and torch is not installed.
    """
    find_backend(backend)
    if dtype not in DTYPES[backend]:
        raise SpecError(f"dtype is {dtype!r}: parity of {backend} has cases for {' and '.join(DTYPES[backend])}")
    modules = [import_module(f"parity_tests.{name}") for name in MODULES[backend]]
    return [case for module in modules for case in module.list_cases() if dtype in case.dtypes]
