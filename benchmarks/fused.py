"""Attention whose softmax nobody clips: torch's kernels by name, FlexAttention, and ours; and what clipping costs.

FlexAttention changes scores before they are normalised, so that clipped softmax cannot be said in it: plain and causal
attention are what is compared. Floors: 4 B H T^2 K multiplications and additions; bytes are those of Q, K, V and the
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from qtx_ref.presets import attention
from qtx_torch.attention import Mask, attend_fused, attend_tiled, attention_mask

from .harness import Call, Row, Skip, compare, near, peak

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
WAYS = ("qtx vanilla", "qtx clipped, without a clip", "flex, compiled", "math", "efficient", "cudnn")
HEADS, WIDTH = 12, 64


def make_inputs(device: str, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    shape = (1, HEADS, length, WIDTH)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def make_attention(way: str, causal: bool, device: str, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if way in BACKENDS:

        def by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(BACKENDS[way]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        return by_name
    if way == "flex, compiled":
        mask = None
        if causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
        compiled = torch.compile(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)
    allowed = attention_mask(None, length, length, causal, torch.device(device))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    mask = Mask(allowed, dtype, full=not causal, triangle=causal)
    if way == "qtx vanilla":
        return lambda q, k, v: attend_fused(q, k, v, mask)
    spec = attention("clipped:gamma=0" if way.endswith("clip") else "clipped:gamma=-0.03")
    return lambda q, k, v: attend_tiled(q, k, v, mask, spec, None, None)


def build(way: str, causal: bool, backward: bool, device: str, length: int) -> Call:
    inputs = make_inputs(device, length)
    attend = make_attention(way, causal, device, length)

    def call() -> Tensor:
        if not backward:
            with torch.no_grad():
                return attend(*inputs)
        y = attend(*inputs)
        y.backward(torch.ones_like(y))
        for x in inputs:
            x.grad = None
        return y

    return call


def rows(device: str, quick: bool) -> Iterator[Row | Skip]:
    """Each against the fused kernel that is named flash."""
    length = 128 if quick else 1024 if device == "cpu" else 4096
    limit = 0.02 if device.startswith("cuda") else 1e-5  # outputs are means of values below 5; in bfloat16, of 8 bits
    ways = [way for way in WAYS if not (quick and way.endswith("compiled"))]
    for causal in (False, True):
        for backward in (False, True):
            base = build("flash", causal, backward, device, length)
            title = f"T {length}{', causal' * causal}, {'forward and backward' if backward else 'forward'}"
            for way in ways:
                if backward and device == "cpu" and way.startswith("flex"):
                    if not causal:
                        yield Skip(f"{way}, backward", "it has no backward pass on a CPU")
                    continue
                given = (way, causal, backward, device, length)
                try:
                    call = build(*given)
                    call()
                except RuntimeError as error:
                    if not causal and not backward:
                        yield Skip(way, str(error).partition(".")[0])
                    continue
                yield compare(
                    f"{title}, {way}", call, "flash", base, device=device,
                    rounds=2 if quick else 9, check=lambda call=call, base=base: near(call(), base(), limit, "outputs"),
                    mib=peak(build, *given, device=device, held=False, compiled=way.endswith("compiled")),
                    against_mib=peak(build, "flash", causal, backward, device, length, device=device, held=False),
                )  # fmt: skip
