"""The table of parity cases. Installed with the package and free of pytest.

`truth_*` hold the reference to outside truth and need no torch; `torch_*` hold torch to the reference.
"""

from __future__ import annotations

from importlib import import_module

from parity_tests.case import Case
from qtx.backend import backend as find_backend
from qtx_ref.spec import SpecError

MODULES = {
    "ref": ("truth_gradients", "truth_forward", "truth_quant", "truth_fakequant", "truth_integer", "truth_values"),
    "torch": (
        "torch_ops",
        "torch_attention",
        "torch_models",
        "torch_quant",
        "torch_fakequant",
        "torch_integer",
        "torch_values",
        "torch_steps",
    ),
}
DTYPES = {"ref": ("float32",), "torch": ("float32", "bfloat16")}


def table(backend: str, dtype: str = "float32") -> list[Case]:
    """The cases of a backend, those of `dtype` where they depend on one.

    Raises:
        SpecError: an unknown backend, or a dtype that it has no cases for.
        MissingExtra: the backend is torch and torch is not installed.
    """
    find_backend(backend)
    if dtype not in DTYPES[backend]:
        raise SpecError(f"dtype is {dtype!r}: parity of {backend} has cases for {' and '.join(DTYPES[backend])}")
    modules = [import_module(f"parity_tests.{name}") for name in MODULES[backend]]
    return [case for module in modules for case in module.cases() if dtype in case.dtypes]
