"""What runs uncompiled is told from what is traced, in whatever thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from qtx_ref.spec import QuantSpec  # noqa: E402
from qtx_torch.quant import affine  # noqa: E402
from qtx_torch.tracing import is_traced  # noqa: E402


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's tracer says them of torch
def test_checks_stand_while_another_thread_compiles() -> None:
    said: list[str] = []

    def quantize() -> None:
        with pytest.raises(ValueError, match="cannot quantize NaN") as caught:
            affine.quantize(torch.tensor([torch.nan]), torch.ones(()), torch.zeros((), dtype=torch.int32), QuantSpec())
        said.append(str(caught.value))

    def compile_slowly(graph: Any, given: list) -> Any:
        thread = threading.Thread(target=quantize)
        thread.start()
        thread.join()
        return graph

    compiled = torch.compile(lambda x: x + is_traced(), backend=compile_slowly)
    assert compiled(torch.ones(1)).item() == 2 and not is_traced()
    assert said
