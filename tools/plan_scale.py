"""What training opt-1.3b takes on many GPUs: `python tools/plan_scale.py`; the tables of docs/scale.md.

Counted: parameters, operations, bytes that collectives move (as `python -m parity_tests.long.distributed` counts them
in small models). Measured here: what one block keeps for its gradient. Assumed, as nothing here measures it: ASSUMED.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from qtx.prepare.calibration import bind
from qtx.recipes.named import training_recipe
from qtx_ref.models.initial import init_params, shapes
from qtx_ref.presets import PRESETS
from qtx_ref.spec import ModelSpec
from qtx_torch.backend import Model
from qtx_torch.numerics import Float

NAME, LENGTH, ROWS, COUNTS = "opt-1.3b", 2048, 512, (8, 16, 32, 64)
GIB = 2**30


@dataclass(frozen=True)
class Assumed:
    """An H100 SXM in nodes of 8, from NVIDIA's data sheets, and what of it a run gets."""

    peak: float = 989e12  # bfloat16 operations a second, dense
    share: float = 0.4  # of them in one GPU's step; FSDP2's authors report 0.52 to 0.58 on 64 A100 (torchtitan)
    inside: float = 450e9  # bytes a second to other GPUs of a node, one way (NVLink)
    outside: float = 50e9  # to other nodes, for each GPU (400 Gb/s)
    used: float = 0.7  # of either
    memory: float = 80e9


ASSUMED = Assumed()


def count_parameters(spec: ModelSpec) -> tuple[int, int]:
    """All parameters, and those of blocks."""
    sizes = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes(spec).items()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("layer."))


def count_operations(spec: ModelSpec) -> float:
    """Multiplications and additions of a token's forward and backward pass: 6 for each weight of a matmul, the tied
    head among them, and 12 D for each pair of tokens, half of which are masked, but computed."""
    blocks = count_parameters(spec)[1]
    return 6.0 * (blocks + spec.vocab * spec.width) + 12.0 * spec.layers * spec.width * LENGTH


def measure_kept(spec: ModelSpec, tokens: int, train_quant: str | None = None) -> tuple[float, float]:
    """Bytes that a block keeps for its gradient: for each token, and for each of its parameters (of weights in another
    dtype, or their codes). Matmuls in bfloat16, no dropout; by autograd's own account."""
    small = replace(spec, vocab=50, length=tokens, dropout=0.0)
    sums = [sum_kept(replace(small, layers=layers), train_quant) for layers in (1, 2)]
    of_tokens, of_weights = np.diff(sums, axis=0)[0]
    return of_tokens / tokens, of_weights / (count_parameters(spec)[1] / spec.layers)


def sum_kept(spec: ModelSpec, train_quant: str | None) -> tuple[int, int]:
    """Bytes that a forward pass of a sequence keeps: activations, and what is in the shape of a weight."""
    model = Model(spec, init_params(spec, 0), dtype="bfloat16")
    if train_quant:
        bind(model, training_recipe(train_quant, spec), {})
    own = {value.untyped_storage().data_ptr() for value in model.weights.values()}
    weights = {tuple(sorted(value.shape)) for value in model.weights.values() if value.ndim > 1}
    storages: dict[int, tuple[int, bool]] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes(), tuple(sorted(x.shape)) in weights
        return x

    tokens = np.zeros((1, spec.length), np.int64)
    inputs = model.accept({"tokens": tokens, "targets": tokens, "mask": np.ones(tokens.shape, bool)})
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model.compute(Float(training=True), inputs)
    del logits
    return tuple(sum(size for size, weight in storages.values() if weight is which) for which in (False, True))


def list_memory(spec: ModelSpec, count: int, kept: float, copies: float, rows: int) -> list[tuple[str, float, float]]:
    """What a GPU holds, in bytes, with DDP and with FSDP2: `rows` at once."""
    whole, blocks = count_parameters(spec)
    gathered = 4.0 * (whole - blocks) + 2 * 2.0 * blocks / spec.layers  # the root, and two blocks in bfloat16
    activations = rows * LENGTH * (kept * spec.layers)
    recomputed = rows * LENGTH * (kept + 4.0 * spec.width * spec.layers)
    logits = rows * LENGTH * spec.vocab * (2 + 4 + 4)  # bfloat16, float32, and its gradient
    return [
        ("parameters, float32", 4.0 * whole, 4.0 * whole / count),
        ("gradients, float32", 4.0 * whole, 4.0 * whole / count),
        ("AdamW's averages, float32", 8.0 * whole, 8.0 * whole / count),
        ("gathered parameters", 0.0, gathered),
        ("copies of weights for the gradient", copies * blocks, copies * blocks),
        (f"activations of {rows} x {LENGTH}", activations, activations),
        ("the same with step.recompute", recomputed, recomputed),
        ("logits and their gradient", logits, logits),
    ]


def list_bytes(spec: ModelSpec, count: int, parts: int) -> list[tuple[str, float]]:
    """Bytes that a GPU sends in a step, in rings: (P - 1) / P of what a gather or a scatter is given, twice that of an
    all-reduce."""
    whole, blocks = count_parameters(spec)
    ring = (count - 1) / count
    both = 2.0 * blocks  # forward and backward
    return [
        ("DDP: all-reduce of float32 gradients, whatever the parts", ring * 2 * 4.0 * whole),
        ("FSDP2: gathers, blocks in bfloat16, each part", parts * ring * (2.0 * both + 4.0 * (whole - blocks))),
        ("FSDP2: the same in float32 (quantized training)", parts * ring * (4.0 * both + 4.0 * (whole - blocks))),
        ("FSDP2: reduce-scatter of float32 gradients, each part", parts * ring * 4.0 * whole),
    ]


def plan(spec: ModelSpec, count: int) -> dict[str, float]:
    """Seconds of a step of ROWS sequences and efficiency, collectives beside the computation but for the first and the
    last block's."""
    tokens = ROWS * LENGTH / count
    compute = tokens * count_operations(spec) / (ASSUMED.peak * ASSUMED.share)
    speed = (ASSUMED.inside if count <= 8 else ASSUMED.outside) * ASSUMED.used
    moved = dict(list_bytes(spec, count, 1))
    gather, _, scatter = list(moved.values())[1:]
    result = {"compute": compute, "tokens": ROWS * LENGTH}
    for name, sent in (("DDP", list(moved.values())[0]), ("FSDP2", gather + scatter)):
        moving, bare = sent / speed, sent / speed / spec.layers
        step = max(compute, moving) + bare
        result |= {f"{name} moving": moving, f"{name} step": step, f"{name} efficiency": compute / step}
    return result


def main() -> None:
    """Prints the tables."""
    torch.set_num_threads(1)
    spec = replace(PRESETS[NAME], length=LENGTH)
    whole, blocks = count_parameters(spec)
    print(
        f"{NAME}: {whole:,} parameters, {blocks:,} of them in blocks; {count_operations(spec) / 1e9:.2f} GFLOP a token"
    )
    kept = 0.0
    for what, recipe in (("w8a8", "w8a8"), ("float", None)):
        (short, copies), (long, _) = (measure_kept(spec, tokens, recipe) for tokens in (64, 128))
        kept, pairs = 2 * short - long, (long - short) / 64  # a + b T
        print(
            f"{what}: a block keeps {kept / 1024:.1f} KiB a token, {copies:.1f} bytes a parameter, and without a fused "
            f"kernel {pairs:.0f} bytes a pair of tokens"
        )
    rows = ROWS // 64
    print(f"\n| {rows} sequences on each of 64 GPUs, GiB | DDP | FSDP2 |\n|---|--:|--:|")
    for name, first, second in list_memory(spec, 64, kept, copies, rows):
        print(f"| {name} | {first / GIB:.2f} | {second / GIB:.2f} |")
    print("\n| bytes a GPU sends in a step, 64 GPUs, one part | GB |\n|---|--:|")
    for name, sent in list_bytes(spec, 64, 1):
        print(f"| {name} | {sent / 1e9:.2f} |")
    print(
        f"\n| GPUs, {ROWS} x {LENGTH} tokens a step | computing s | DDP moving s | DDP efficiency | FSDP2 moving s | "
        "FSDP2 efficiency | Mtokens/s, FSDP2 |\n|--:|--:|--:|--:|--:|--:|--:|"
    )
    for count in COUNTS:
        p = plan(spec, count)
        print(
            f"| {count} | {p['compute']:.3f} | {p['DDP moving']:.3f} | {p['DDP efficiency']:.2f} | "
            f"{p['FSDP2 moving']:.3f} | {p['FSDP2 efficiency']:.2f} | {p['tokens'] / p['FSDP2 step'] / 1e6:.2f} |"
        )


if __name__ == "__main__":
    main()
