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
    begun, checked, seen = threading.Event(), threading.Event(), []

    def wait(graph: Any, given: list) -> Any:
        begun.set()
        checked.wait(60)
        return graph

    compiled = torch.compile(lambda x: x + is_traced(), backend=wait)
    thread = threading.Thread(target=lambda: seen.append(compiled(torch.ones(1)).item()))
    thread.start()
    try:
        assert begun.wait(60)
        with pytest.raises(ValueError, match="cannot quantize NaN"):
            affine.quantize(torch.tensor([torch.nan]), torch.ones(()), torch.zeros((), dtype=torch.int32), QuantSpec())
    finally:
        checked.set()
        thread.join()
    assert seen == [2] and not is_traced()
