"""What a compiler makes of a quantizer's divisions on a GPU: looked at in its intermediate form, without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from qtx_ref.spec import FloatFormat, FloatQuantSpec, Granularity, QuantSpec, SharedScale  # noqa: E402
from qtx_torch import step  # noqa: E402
from qtx_torch.compiler import find_compiler  # noqa: E402
from qtx_torch.integer.parts import Part  # noqa: E402
from qtx_torch.quant import formats, gradients, quantizer  # noqa: E402
from qtx_torch.quant.compiled import ask_division  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler says them of torch
TOKEN = {"granularity": Granularity.TOKEN, "dynamic": True}
SCALES = {
    "asymmetric": lambda x: quantizer.dynamic_scale(x, QuantSpec(**TOKEN), None, False)[0],
    "symmetric": lambda x: quantizer.dynamic_scale(x, QuantSpec(symmetric=True, **TOKEN), None, False)[0],
    "mirrored": lambda x: quantizer.dynamic_scale(x, QuantSpec(mirrored=True, **TOKEN), None, False)[0],
    "float8": lambda x: quantizer.dynamic_scale(x, FloatQuantSpec(FloatFormat.E4M3, **TOKEN), None, False)[0],
}


@pytest.fixture(autouse=True)
def compiler() -> None:
    if reason := find_compiler("cpu"):
        pytest.skip(reason)


def lower(function: Callable, *shape: int) -> str:
    """What inductor makes of a function of a tensor on a GPU, before it writes it for Triton."""
    from torch._inductor.decomposition import decompositions
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        x = torch.empty(shape, device="cuda")
        graph = make_fx(torch.func.functionalize(function), decomposition_table=decompositions)(x)
    lowered = GraphLowering(graph, shape_env=mode.shape_env)
    with V.set_graph_handler(lowered), V.set_fake_mode(mode):
        lowered.run(x)
        return "\n".join(buffer.data.inner_fn_str() for buffer in lowered.buffers)


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_is_a_quotient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no product with the reciprocal of 127, 255 or 448, which is rounded. Of rows of one: for longer ones the
    compiler would ask a GPU how many run at once."""
    assert repr(1 / 255) in lower(
        lambda x: x / torch.full_like(x, 255), 64, 1
    )  # what it does, unless it is kept from it
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    found = lower(SCALES[name], 64, 1)
    assert " / " in found
    assert not any(repr(1 / last) in found for last in (127, 255, 448))


def test_scales_of_gradients_and_blocks_are_quotients_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not lowered, for `isfinite` asks for the GPU: what they divide by goes through the same function."""
    x = torch.linspace(-3, 5, 64).reshape(2, 32)
    spec = QuantSpec(symmetric=True, **TOKEN)
    scale, shared = gradients.find_scale(x, spec), formats.mx_scale(x, FloatFormat.E4M3, SharedScale.RCEIL, 32)
    for module in (gradients, formats):
        monkeypatch.setattr(module, "hide", lambda constant, x: constant / 2)
    assert torch.equal(gradients.find_scale(x, spec), 2 * scale)
    assert torch.equal(formats.mx_scale(x, FloatFormat.E4M3, SharedScale.RCEIL, 32), 2 * shared)


def test_triton_s_quotients_are_ieee_s() -> None:
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonOverrides

    if torch.__version__ < "2.10":
        pytest.skip("this torch has no such option")

    class Number:
        def __init__(self, name: str) -> None:
            self.name, self.dtype = name, torch.float32

        def __str__(self) -> str:
            return self.name

    assert TritonOverrides.truediv(Number("x"), Number("y")) == "(x / y)"
    with config.patch(ask_division()):
        assert TritonOverrides.truediv(Number("x"), Number("y")) == "triton.language.div_rn(x, y)"


def test_what_is_compiled_for_a_gpu_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    before = torch.cuda.is_available()
    monkeypatch.setattr(torch, "compile", lambda function, **given: asked.append(given["options"]))

    def function(x: Any) -> Any:
        return x

    step.compile_forward(function)
    Part(function, "", 0, torch.device("cpu"), "inductor")
    Part(function, "", 0, torch.device("cuda"), "inductor")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    step.compile_forward(function)
    wanted = ask_division()
    for options, gpu in zip(asked, (before, False, True, True), strict=True):
        assert {name: on for name, on in (options or {}).items() if name in wanted} == (wanted if gpu else {})
