"""Whether `torch.compile` has what it needs, and what it says where it fails.

Not in the reference: nothing is compiled there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch.utils._triton import has_triton

from qtx_ref.spec import SpecError

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # inductor's variable for the folder of its caches


@cache
def find_compiler(device: str) -> str:
    """Why nothing can be compiled for a kind of device; empty where it can."""
    try:
        from torch._inductor import cpp_builder  # here, for it takes a second to import
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        cache_dir()  # makes it, as importing inductor does in some versions
        if device == "cpu":
            cpp_builder.get_cpp_compiler()
        elif not has_triton():
            return "Triton is not installed"
    except OSError as error:
        return f"inductor's caches have no folder ({FOLDER}), {error}"
    except Exception as error:  # of inductor's own kind, which differs by version
        return f"{error}".splitlines()[0]
    return ""


@contextmanager
def tell_failure(instead: str) -> Iterator[None]:
    """Raises SpecError with the first line of what a compiler says that is there and fails: without Python's headers,
    or on a full disk. `instead`: what to do, in words."""
    try:
        yield
    except RuntimeError as error:
        exc = sys.modules.get("torch._dynamo.exc")  # not there where nothing was compiled; importing it may fail
        if exc is None or not isinstance(error, exc.BackendCompilerFailed):
            raise
        said = str(error).partition("\nOutput:\n")
        line = next(line for part in (said[2], said[0]) for line in part.splitlines() if line.strip())
        where = f", with its caches in {FOLDER}" if isinstance(error.inner_exception, OSError) else ""
        raise SpecError(f"the compiler fails, {line.strip()}{where}: {instead}, or mend it") from error
