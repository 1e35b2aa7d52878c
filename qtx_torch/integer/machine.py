"""How this machine multiplies integers: which ways are exact, by trial with extreme codes, and how long each takes.

Not in the reference: NumPy has one way; a device has several, and only some CPUs multiply bytes without saturating.

    BYTES    `torch._int_mm`: oneDNN's int8 product on a CPU, cuBLAS's on a GPU. With VNNI, exact for all int8.
    HALVES   the same, W = (W >> 1) + (W - (W >> 1)) side by side: without VNNI, `vpmaddubsw` adds two neighbours
             u8 * s8 in int16, which cannot saturate while |W| <= 64, since 255 * (64 + 64) < 2^15. W of 7 bits needs
             no halves.
    TRITON   on a GPU, `kernels.integer_matmul`: zero points and bias, and where nothing comes between, requantization
             in the same pass; any shape, where cuBLAS wants multiples of 8 and more than 16 rows.
    FLOAT32  float32 BLAS in blocks that are exact.
    FLOAT64  the same in float64.

Left out: oneDNN's `qlinear_pointwise` and fbgemm's `linear_prepack`, which took 1.1 times as long as `_int_mm` on a CPU
with VNNI (128 x 768 x 768, one thread; float32 8.4 times) and give floats, which hold sums below 2^24 only; no setting
of fbgemm shows what it does without VNNI. bfloat16, whose products of codes are exact: every CPU that multiplies it has
VNNI, at twice the rate.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

SHAPES = ((1, 768, 768), (64, 384, 384), (128, 768, 768))  # M K N of the trial; the last decides
BUDGET = 0.03  # seconds for one way at one shape
HALF = 64  # the largest magnitude of weights whose pairs do not saturate


class Way(Enum):
    """A way to multiply codes of 8 bits; see the module."""

    BYTES = "int8"
    HALVES = "int8, weights in halves"
    TRITON = "int8, Triton"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


def is_exact(product: Callable[[Tensor, Tensor], Tensor], largest: int, device: str) -> bool:
    """Whether a product of int8 matrices is exact for codes up to `largest` on the right, or all where that is 127:
    extreme ones are multiplied, to see. False too where it fails: a GPU without int8, a compiler that is missing."""
    left = torch.tensor([-128, 127], dtype=torch.int8, device=device)
    right = torch.tensor([-128 if largest == 127 else -largest, largest], dtype=torch.int8, device=device)
    a = left.repeat_interleave(32)[:, None].expand(64, 256).contiguous()
    b = right.repeat(32).expand(256, 64).contiguous()
    want = 256 * left.long().repeat_interleave(32)[:, None] * right.long().repeat(32)
    try:
        return all(torch.equal(product(a, w).long(), want) for w in (b, b.mT.contiguous().mT))
    except Exception:  # of torch's kind or Triton's
        return False


@functools.cache
def exact_bytes(device: str, largest: int) -> bool:
    """Whether `torch._int_mm` is, once tried."""
    return is_exact(torch._int_mm, largest, device)


@functools.cache
def exact_kernel(device: str) -> bool:
    """Whether Triton's kernel is; on a GPU, and where Triton is installed."""
    if device == "cpu" or importlib.util.find_spec("triton") is None:
        return False
    importlib.import_module("qtx_torch.kernels.integer_matmul")
    return is_exact(multiply_by_kernel, 127, device)


def multiply_by_kernel(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K) by (K, N) -> int32, by Triton."""
    bias = torch.zeros(b.shape[1], dtype=torch.int32, device=a.device)
    return torch.ops.qtx.multiply_rows(a, b, bias, 0, 1, torch.int32)


def split_halves(weight: Tensor) -> Tensor:
    """int8 (K, N) -> (K, 2 N), whose halves add up to it, none beyond 64."""
    low = weight >> 1
    return torch.cat([low, weight - low], dim=1)


def recentre_bytes(code: Tensor, middle: int) -> Tensor:
    """Codes of 8 bits or fewer less their centre, int8; 128 less is the top bit flipped, without a conversion: inductor
    (torch 2.13) converts uint8 to int8 one by one."""
    if middle == 128:
        return (code.to(torch.uint8) ^ 128).view(torch.int8)
    return code.to(torch.int8) - middle if middle else code.to(torch.int8)


@functools.cache
def probe(device: str) -> dict[tuple[Way, tuple[int, int, int]], float]:
    """Seconds by way and shape (M, K, N), the least of a few calls; taken once per process, in under a second. Only
    ways that are exact here, for some weights at least."""
    seconds = {}
    for m, k, n in SHAPES:
        x = torch.arange(m * k, device=device).reshape(m, k).to(torch.int8)
        w = (torch.arange(k * n, device=device).reshape(n, k) % 127 - 63).to(torch.int8).mT
        for way in list_ways(device):
            carrier = {Way.FLOAT32: torch.float32, Way.FLOAT64: torch.float64}.get(way)
            if way is Way.BYTES and device != "cpu" and m <= 16:
                continue
            a, b = (x, w) if carrier is None else (x.to(carrier), w.to(carrier))
            b = split_halves(w).mT.contiguous().mT if way is Way.HALVES else b
            product = multiply_by_kernel if way is Way.TRITON else torch._int_mm if carrier is None else torch.matmul
            seconds[way, (m, k, n)] = time_least(functools.partial(product, a, b), device)
    return seconds


def describe(device: str) -> list[str]:
    """What the probe found, a line for each shape: `128 x 768 x 768: int8 0.16 ms, float32 1.38 ms, ...`."""
    lines = []
    for shape in SHAPES:
        times = [f"{way.value} {1000 * s:.3g} ms" for (way, one), s in probe(device).items() if one == shape]
        lines.append(f"{' x '.join(map(str, shape))}: {', '.join(times)}")
    return lines


def list_ways(device: str) -> list[Way]:
    """The ways that are exact on a device, for some weights at least; float32 may be TF32 on CUDA."""
    ways = [Way.BYTES] if exact_bytes(device, HALF) else []
    if ways and not exact_bytes(device, 127):
        ways.append(Way.HALVES)
    ways += [Way.TRITON] if exact_kernel(device) else []
    return [*ways, *([Way.FLOAT32] if device == "cpu" else []), Way.FLOAT64]


def time_least(call: Callable[[], Tensor], device: str) -> float:
    """Seconds of the quickest of 2 to 20 calls, within the budget, after one that warms up."""
    call()
    least, begin = float("inf"), time.perf_counter()
    for turn in range(20):
        if turn > 1 and time.perf_counter() - begin > BUDGET:
            break
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least


@functools.cache
def multiplies_bytes(device: str) -> bool:
    """Whether int8 by any int8 is exact here, and faster than floats."""
    return exact_bytes(device, 127) and choose_way(128, device, plain=True) is Way.BYTES


def choose_way(largest: int, device: str, *, plain: bool) -> Way:
    """The fastest exact way to multiply codes of 8 bits by weights of a magnitude up to `largest`, recentred; `plain`:
    whether float32 products keep 24 bits."""
    ways = [Way.FLOAT64]
    if device == "cpu" and plain:
        ways.append(Way.FLOAT32)
    if exact_kernel(device) and largest <= 128:
        ways.append(Way.TRITON)
    if exact_bytes(device, 127 if largest > HALF else HALF) and largest <= 128:
        ways.append(Way.BYTES)
    elif exact_bytes(device, HALF) and largest <= 128:
        ways.append(Way.HALVES)
    return min(ways, key=lambda way: probe(device)[way, SHAPES[-1]])
