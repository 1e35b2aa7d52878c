"""Clipped attention's kernels against FlashAttention-2 by its name in torch, which does not clip, and against the same
written with a tensor of scores: bfloat16, 16384 tokens, 12 heads of 64 and 8 of 128.

Floors, for T x T pairs of B H heads of K: products, of which a plain softmax needs 2 forward and 5 backward and ours
takes 4 and 7 (a pass for the row's sum, one for E, scores and dP twice backward), 2 B H T^2 K operations each; bytes, 9
tensors of B H T K read and 6 written. Both at rates that a matrix product and a copy reach in the same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtx_ref.presets import attention
from qtx_ref.spec import AttentionSpec
from qtx_torch.attention import Mask, attention_mask, masked_probabilities
from qtx_torch.ops import scores

from .harness import Call, Row, Skip, compare, near, peak, time_calls

UNCLIPPED = attention("clipped:gamma=0")
TOKENS, LENGTHS = 16384, (512, 1024, 2048, 4096, 8192)
HEADS = ((12, 64), (8, 128))
PRODUCTS = {False: 4, True: 11}
BOUNDS = {"flash": 2.0, "matrix": 1 / 3}


def clip(length: int) -> AttentionSpec:
    """Clips as much of rows of any length: what is below their mean."""
    return attention(f"clipped:gamma={-1 / length}")


def attend_kernels(q: Tensor, k: Tensor, v: Tensor, causal: bool, spec: AttentionSpec | None = None) -> Tensor:
    from qtx_torch.kernels.attention import attend

    return attend(q, k, v, None, causal, spec or clip(k.shape[2]))


def attend_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def attend_matrix(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    length = q.shape[2]
    mask = Mask(attention_mask(None, length, length, causal, q.device), q.dtype, full=not causal, triangle=causal)
    return masked_probabilities(mask.hide(scores(q, k, q.shape[-1] ** -0.5)), mask, clip(length), None) @ v


WAYS = {
    "kernels": attend_kernels,
    "unclipped": partial(attend_kernels, spec=UNCLIPPED),
    "flash": attend_flash,
    "matrix": attend_matrix,
}


def build(way: str, causal: bool, backward: bool, device: str, shape: tuple[int, int, int, int]) -> Call:
    """A call gives the output and, after `backward`, the gradients of q, k and v."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    b, h, t, k = shape
    *inputs, slope = (
        torch.randn((b, t, h, k), generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)
    )
    for x in inputs:
        x.requires_grad_()

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            y = WAYS[way](*inputs, causal)
        return [y, *torch.autograd.grad(y, inputs, slope)] if backward else [y]

    return call


def check(ours: Call, other: Call, limit: float) -> str:
    """Values and gradients, as shares of the largest."""
    pairs = list(zip(ours(), other(), strict=True))
    largest = [float(y.detach().abs().max()) for _, y in pairs]
    return [near(x / m, y / m, limit, "values, gradients") for (x, y), m in zip(pairs, largest, strict=True)][-1]


def measure_rates(device: str, quick: bool) -> tuple[float, float]:
    """Operations and bytes a millisecond of a matrix product and of a copy."""
    n = 256 if quick else 8192
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32)
    y = torch.empty_like(x)
    times = time_calls({"product": lambda: torch.mm(x, x, out=y), "copy": lambda: y.copy_(x)}, 5, device)
    product, copy = (1000 * min(times[name]) for name in ("product", "copy"))
    return 2 * n**3 / product, 2 * x.nbytes / copy


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Forward, and forward with backward, against both."""
    operations, bandwidth = measure_rates(device, quick)
    limit = 0.03 if device.startswith("cuda") else 1e-4  # of bfloat16's 8 bits, after two products
    sizes = [(1, 2, 48, 32)] if quick else [(TOKENS // t, h, t, k) for h, k in HEADS for t in LENGTHS]
    for shape in sizes:
        b, h, t, k = shape
        for causal, backward in ((False, False), (False, True), (True, True)):
            done = PRODUCTS[backward] * 2 * b * h * t * t * k / (2 if causal else 1)
            moved = (15 if backward else 5) * b * h * t * k * (2 if device.startswith("cuda") else 4)
            notes = f"floors: products {done / operations:.3f} ms, bytes {moved / bandwidth:.3f} ms"
            title = f"T {t}, K {k}{', causal' * causal}, {'forward and backward' if backward else 'forward'}"
            given = (causal, backward, device, shape)
            ours = build("kernels", *given)
            for way, same in (("flash", "unclipped"), ("matrix", "kernels")):  # the same kernels clip nothing at 0
                if way == "matrix" and causal and not quick:
                    continue
                other = build(way, *given)
                checked = partial(check, build(same, *given), other, limit)
                yield compare(
                    f"{title}, kernels", ours, way, other, rounds=2 if quick else 9, check=checked, device=device,
                    mib=peak(build, "kernels", *given, device=device, held=False),
                    against_mib=peak(build, way, *given, device=device, held=False),
                    bound=BOUNDS[way] if backward else None, notes=notes,
                )  # fmt: skip
