"""Attention's kernels compiled for a GPU that need not be there; see `attention_kernels`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from parity_tests.long.attention_cases import Case, call, every_case
from parity_tests.subjects.attentions import SOFTMAXES
from qtx_torch.kernels import attention_launch

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int64: "*i64",
}
WIDTHS = 32, 64, 80, 128, 256
LONG = Case("clipped", 4096, 4096, 64, dtype="bfloat16")
ALL = {"causal": True, "padded": True, "rate": 0.1, "stored": True, "gated": True, "scores": True, "probs": True}
LONGS = (  # whose registers are printed
    replace(LONG, softmax="plain"),
    LONG,
    replace(LONG, causal=True, rate=0.1),
    replace(LONG, softmax="clipped_row", padded=True, gated=True),
    replace(LONG, softmax="softmax1", rate=0.1, first=1),
    replace(LONG, scores=True, probs=True),
    replace(LONG, softmax="clipped_row", **ALL),
)
FEW = Case("clipped_row", 37, 37, 32), Case("clipped_row", 16, 16, 16, dtype="bfloat16", **ALL)


@dataclass(frozen=True)
class Source:
    """A kernel as a launch compiles it: arguments' types and constants by name, places of multiples of 16, options."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        known = dict(self.constants + self.options)
        tile = [f"{name} {known[name]}" for name in ("M", "N", "num_warps", "num_stages") if name in known]
        return f"{self.kernel.__name__:<17} {' '.join(tile):<37}"


def find_sources(case: Case) -> Iterator[Source]:
    """What the case launches, forward and backward; nothing is run or allocated."""
    b, h, heads = 2, 2, {"q": case.queries, "k": case.keys, "v": case.keys}
    dtype: torch.dtype = getattr(torch, case.dtype)
    x = {
        name: torch.empty(b, t, h, case.width, dtype=dtype, device="meta").transpose(1, 2).requires_grad_()
        for name, t in heads.items()
    }
    if case.softmax == "sink":
        x["sink"] = torch.empty(h, device="meta", requires_grad=True)
    if case.gated:
        x["gate"] = torch.empty(b, case.queries, h, dtype=dtype, device="meta", requires_grad=True)
    launched: list[Source] = []

    def keep(kernel: Any, programs: int, device: torch.device, *given: Any, **constants: Any) -> None:
        launched.append(specialize(kernel, given, constants))

    with mock.patch.object(attention_launch, "launch", keep):
        y = call(case, x, np.ones((b, case.keys), bool) if case.padded else None)
        torch.autograd.grad(y, list(x.values()), torch.empty_like(y))
    yield from launched


def specialize(kernel: Any, given: tuple[Any, ...], constants: dict[str, Any]) -> Source:
    """As Triton does it when a kernel is launched: None and 1 are constants, and multiples of 16 are known as such."""
    types: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    aligned = []
    for place, (parameter, value) in enumerate(zip(kernel.params, given, strict=False)):
        whole = isinstance(value, int) and not parameter.do_not_specialize
        if isinstance(value, Tensor):
            types[parameter.name] = TYPES[value.dtype]
        elif value is None or (whole and value == 1):
            types[parameter.name], fixed[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (whole and value % 16 == 0):  # torch's memory is
            aligned.append(place)
    for name in kernel.arg_names[len(given) :]:
        types[name], fixed[name] = "constexpr", constants[name]
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    return Source(kernel, tuple(types.items()), tuple(fixed.items()), tuple(aligned), tuple(options.items()))


def build(source: Source, arch: int) -> str:
    """Registers of a thread, bytes that it spills, shared memory, and the kind of its products."""
    hints = {(place,): [["tt.divisibility", 16]] for place in source.aligned}
    made = triton.compile(
        ASTSource(source.kernel, dict(source.types), dict(source.constants), hints),
        target=GPUTarget("cuda", arch, 32),
        options=dict(source.options),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, spilled = (re.search(rf"{key}:(\d+)", said) for key in ("REG", "STACK"))
    assert registers and spilled
    ptx = made.asm["ptx"]
    products = next((word for word in ("tcgen05.mma", "wgmma", "mma.sync") if word in ptx), "fma")
    return f"{registers[1]:>4} registers {spilled[1]:>5} spilled {made.metadata.shared:>7} shared  {products}"


def report(arch: int, few: bool) -> int:
    """Compiles what the proof's cases launch, and what long sequences do, of which it prints a line each; few: what two
    short ones do. 1 where something does not compile."""
    longs = [] if few else [replace(case, width=width) for width in WIDTHS for case in LONGS]
    longs += [] if few else [replace(LONG, softmax=softmax, dtype="float32") for softmax in SOFTMAXES]
    shorts = FEW if few else every_case()
    sources = {source: case for cases in (shorts, longs) for case in cases for source in find_sources(case)}
    failed = 0
    for source, case in sources.items():
        try:
            said = build(source, arch)
        except Exception as error:
            failed, said = failed + 1, f"FAILED: {error}"
        if case in longs or said.startswith("FAILED"):
            print(f"{source.label} {said}  {case.label}", flush=True)
    print(f"{len(sources)} kernels for sm_{arch}, {failed} do not compile")
    return 1 if failed else 0
