"""Attention's kernels compiled for a GPU that need not be there; see `attention_kernels`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qtx_torch.kernels.attention_backward import find_key_slopes, find_query_slopes, weigh_rows
from qtx_torch.kernels.attention_forward import attend_forward
from qtx_torch.kernels.attention_launch import Shape, choose_tile

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
HEADS = ("q", "k", "v", "out", "slope", "dq", "dk", "dv", "context_out", "passed_out", "passed", "context")
OTHERS = {"rows": "*i1", "gate": "*fp32", "d_gate": "*fp32", "address": "*i64"}
FLOATS = ("factor", "unit", "gamma", "zeta", "share", "s_low", "s_high", "p_low", "p_high")
LONG = ("seed", "place", "most", "first")
PLAIN = Shape(**dict.fromkeys(Shape.__dataclass_fields__, 0))
CLIPPED = replace(PLAIN, CLIP=True)
DROPPED = replace(CLIPPED, CAUSAL=True, DROP=True, FOURS=True)
ALL = Shape(**dict.fromkeys(Shape.__dataclass_fields__, True))
VARIANTS = {
    "plain": PLAIN,
    "clipped": CLIPPED,
    "clipped, causal, dropout": DROPPED,
    "clipped by row, zeta, padding, gate": replace(CLIPPED, TOP=True, BY_ROW=True, PADDED=True, GATED=True),
    "softmax1, dropout word by word": replace(PLAIN, SINK=2, DROP=True),
    "quantized": replace(CLIPPED, SCORES=True, PROBS=True),
    "everything": ALL,
}


def type_of(name: str, heads: str) -> str:
    if name in HEADS:
        return heads
    if name in OTHERS:
        return OTHERS[name]
    if name in FLOATS:
        return "fp32"
    if name in LONG:
        return "i64"
    pointers = ("sink", "coder", "delta", "delta_in", "logs_in", "logs_out", "gammas_in", "gammas_out")
    return "*fp32" if name in pointers else "i32"


def build(kernel: Any, constants: dict[str, Any], dtype: torch.dtype, arch: int) -> str:
    """Registers of a thread, bytes that it spills, shared memory, and the kind of its products."""
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {name: "constexpr" if name in constants else type_of(name, TYPES[dtype]) for name in kernel.arg_names}
    aligned = re.compile(r"_(batch|head|line)$")  # as strides of heads are, and all that torch allocates
    hints = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or aligned.search(name)
    }
    made = triton.compile(
        ASTSource(kernel, types, constants, hints), target=GPUTarget("cuda", arch, 32), options=options
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


def kernels(shape: Shape, width: int, dtype: torch.dtype, longest: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each kernel with its constants for sequences of that length."""
    given = asdict(shape) | {"K": width}

    def tile(name: str) -> dict[str, int]:
        return asdict(choose_tile(name, width, dtype, longest, longest))

    drop = ", dropout" * shape.DROP
    yield "forward", attend_forward, given | tile(f"forward{drop}") | {"TRAIN": True}
    yield "rows", weigh_rows, given | tile("rows")
    yield "queries", find_query_slopes, given | tile("queries")
    yield "keys", find_key_slopes, given | tile(f"keys{drop}")


def report(arch: int, few: bool) -> int:
    """Prints a line for each kernel, of long sequences; few: of 16 tokens, for which tiles are small. What does not
    compile raises."""
    widths, dtypes, longest = ((16,), (torch.bfloat16,), 16) if few else ((32, 64, 80, 128), TYPES, 4096)
    for width in widths:
        for dtype in dtypes:
            for name, shape in (VARIANTS if not few else {"everything": ALL}).items():
                for part, kernel, constants in kernels(shape, width, dtype, longest):
                    said = build(kernel, constants, dtype, arch)
                    print(f"K {width:<4}{str(dtype)[6:]:<9} {part:<8} {name:<36} {said}", flush=True)
    return 0
