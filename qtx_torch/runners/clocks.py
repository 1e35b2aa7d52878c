"""What a pass takes: seconds, memory on a CUDA device, and which ops the time goes to.

Not in the reference: torch has the clock of a CUDA device, and its profiler.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PRODUCTS = ("mm", "matmul", "linear", "attention", "gemm", "einsum")  # in the names of ops that multiply matrices
TOP = 6  # ops that a profile names


def make_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """How to tell the seconds that a call takes: by the clock, on CUDA by its events."""

    def by_clock(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def by_events(call: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return by_events if device.type == "cuda" else by_clock


def measure_peak(device: torch.device, call: Callable[[], object]) -> int:
    """The most bytes that tensors held on a CUDA device while a call ran, the model's own among them."""
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def measure_shares(device: torch.device, call: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Share of a call's op time: of each of the most expensive ops, and of all matrix products."""
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    spent = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in profile.key_averages()
        if event.key.startswith(("aten::", "quantized::", "onednn::", "mkldnn"))
    }
    total = sum(spent.values()) or 1
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:TOP]
    matrices = sum(t for name, t in spent.items() if any(part in name for part in PRODUCTS))
    return {name.removeprefix("aten::"): spent[name] / total for name in largest}, matrices / total
